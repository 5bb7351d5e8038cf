"""How weights begin: bounds and deviations of each parameter by the rules of the authors' code."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.models import autoencoder
from crate_jax.models.post_norm import PostNorm

pytestmark = pytest.mark.one_python

D, L = 48, 3


def drawn(encoder: str, decoder: str, **encoder_values) -> dict[str, np.ndarray]:
    """Every initial parameter by its path; those of blocks have the layer as first axis."""
    c = configs.base()
    c.steps, c.data.image_size = 1, (16, 16)
    c.encoder.update(dict(name=encoder, patch_size=4, width=D, depth=L, heads=4) | encoder_values)
    c.decoder.update(dict(name=decoder, depth=2, heads=4))
    validate(c)
    params = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(3)))()
    flat, _ = jax.tree.flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in flat}


def uniform_bound(x: np.ndarray) -> float:
    """The bound of a uniform distribution around zero from which these numbers come, to some per cent."""
    assert x.std() == pytest.approx(abs(x).max() / 3**0.5, rel=0.06), "not uniform"
    return abs(x).max()


def test_trunc_normal_begins_as_ropim_does():
    """Cut at one deviation of 0.02; the branches of block l divided by sqrt(2 l); the head as torch's convolution."""
    found = drawn("vit", "linear", init="trunc_normal", positions="learned")
    cut = 0.02 * (1 - 2 * 0.24197 / 0.68269) ** 0.5  # the deviation of a normal number between -1 and 1, times 0.02
    for name, x in found.items():
        if name.startswith("encoder") and name.endswith(("kernel", "token", "positions")):
            blocks = x if "/blocks/" in name else x[None]
            for number, block in enumerate(blocks, start=1):
                last = name.endswith(("output/kernel", "mlp_out/kernel"))
                factor = (2 * number) ** -0.5 if last else 1.0
                assert abs(block).max() <= 0.02 * factor, name
                if block.size > 500:
                    assert block.std() == pytest.approx(cut * factor, rel=0.05), name
        elif name.startswith("encoder"):
            assert (x == (1.0 if name.endswith("scale") else 0.0)).all(), name
    assert {"encoder/blocks/attention/output/kernel", "encoder/blocks/mlp_out/kernel"} <= set(found)
    assert uniform_bound(found["decoder/head/kernel"]) == pytest.approx(D**-0.5, rel=0.01)
    assert 0.8 * D**-0.5 < abs(found["decoder/head/bias"]).max() < D**-0.5


@pytest.mark.parametrize("encoder", ["vit", "crate"])
def test_xavier_begins_as_mae_and_crate_mae_do(encoder):
    found = drawn(encoder, "transformer" if encoder == "vit" else "crate")
    fans = {"qkv": D + 3 * D, "output": D + D, "subspaces": D + D, "mlp_in": D + 4 * D, "mlp_out": D + 4 * D}
    fans |= {"patch_embed": D + 48, "head": D + 48, "embed": D + D}
    for name, x in found.items():
        part, kind = name.split("/")[-2:]
        if kind == "kernel":
            # Dictionaries, and E in the decoder: torch's kaiming_uniform_.
            bound = 1 / D if part in ("dictionary", "linear") else 1 / fans[part]
            assert uniform_bound(x) == pytest.approx((6 * bound) ** 0.5, rel=0.01), name
        elif kind.endswith("token"):
            assert x.std() == pytest.approx(0.02, rel=0.5), name
        else:
            assert (x == (1.0 if kind == "scale" else 0.0)).all(), name


def test_mocov3_begins_with_queries_keys_and_values_as_matrices_of_their_own():
    """facebookresearch/moco-v3, vits.py: sqrt(6 / (D + D)) for each of the three; the class token near 0."""
    found = drawn("vit", "linear", init="mocov3")
    usual = drawn("vit", "linear")
    assert set(found) == set(usual)
    qkv = found["encoder/blocks/attention/qkv/kernel"]
    assert uniform_bound(qkv) == pytest.approx((6 / (2 * D)) ** 0.5, rel=0.01)
    parts = qkv.reshape(L, D, 3, D)
    assert all(
        abs(np.corrcoef(parts[:, :, a].ravel(), parts[:, :, b].ravel())[0, 1]) < 0.05 for a, b in ((0, 1), (1, 2))
    )
    assert 0 < found["encoder/embedding/cls_token"].std() < 2e-6
    for name in ("embedding/patch_embed", "blocks/attention/output", "blocks/mlp_in", "blocks/mlp_out"):
        np.testing.assert_array_equal(found[f"encoder/{name}/kernel"], usual[f"encoder/{name}/kernel"])


def test_timm_begins_as_timms_vit():
    """timm, vision_transformer.py: normal numbers of deviation 0.02, no cut; the patch projection as torch's."""
    found = drawn("vit", "linear", init="timm", positions="learned")
    for name in ("blocks/attention/qkv/kernel", "blocks/attention/output/kernel", "blocks/mlp_out/kernel"):
        for block in found[f"encoder/{name}"]:
            assert block.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(block).max() > 0.05, name
    assert found["encoder/embedding/positions"].std() == pytest.approx(0.02, rel=0.1)
    assert 0 < found["encoder/embedding/cls_token"].std() < 2e-6
    patches = found["encoder/embedding/patch_embed/kernel"]
    assert uniform_bound(patches) == pytest.approx(48**-0.5, rel=0.01)
    assert 0.8 * 48**-0.5 < abs(found["encoder/embedding/patch_embed/bias"]).max() < 48**-0.5
    assert not found["encoder/blocks/attention/qkv/bias"].any()


def test_an_over_complete_dictionary_begins_as_where_crate_alpha_was_trained():
    """Flax's kaiming_uniform of a (D, 4 D) matrix: D numbers count, and not 4 D."""
    found = drawn("crate", "linear", dictionary="overcomplete", expansion=4)
    for name in ("dictionary", "back"):
        x = found[f"encoder/blocks/{name}/kernel"]
        assert x.shape == (L, 4 * D, D) and uniform_bound(x) == pytest.approx((6 / D) ** 0.5, rel=0.01)


def test_the_transformer_of_all4one_begins_as_torchs_encoder_layer():
    params = PostNorm(depth=1, heads=2, hidden=24, dropout=0.0).init(jax.random.key(0), np.zeros((2, 5, D)), False)
    found = jax.tree.map(np.asarray, params["params"])
    for name, width in (("out0", D), ("hidden0", D), ("back0", 24)):
        assert uniform_bound(found[name]["kernel"]) == pytest.approx(width**-0.5, rel=0.02), name
    assert uniform_bound(found["qkv0"]["kernel"]) == pytest.approx((6 / (4 * D)) ** 0.5, rel=0.02)
    assert not found["qkv0"]["bias"].any() and not found["out0"]["bias"].any()
    assert abs(found["hidden0"]["bias"]).max() > 0.5 * D**-0.5 and abs(found["back0"]["bias"]).max() > 0.5 * 24**-0.5
