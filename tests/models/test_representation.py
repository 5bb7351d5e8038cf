"""Images of several sizes through one encoder, its tokens layer by layer, and tokens before those of the patches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.errors import CheckpointError, ConfigError
from crate_jax.models import ENCODERS, build_encoder, representation
from crate_jax.models.adopt import adopt_encoder, grid_of, init_encoder
from crate_jax.models.corruption import CLEAN, Masking
from crate_jax.models.decoders import DECODERS
from crate_jax.models.patches import patchify, resize_table, sincos_positions

pytestmark = pytest.mark.one_python

WIDE = (20, 28)  # 5 x 7 patches of 4 px
TRANSFORMERS = [name for name, row in ENCODERS.items() if row.patches]


def small(encoder: str = "crate", size: tuple[int, int] = (16, 16), **encoder_values):
    """A tiny encoder, for 4 x 4 patches of 4 px unless told otherwise."""
    c = configs.base()
    c.steps, c.data.image_size = 1, size
    c.encoder.update(dict(name=encoder, patch_size=4, width=16, depth=2, heads=2) | encoder_values)
    c.decoder.depth, c.decoder.heads = 1, 2
    validate(c)
    return c


def images(size: tuple[int, int] = WIDE, n: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (n, *size, 3))


def shapes(c):
    return jax.eval_shape(lambda key: representation.init_params(c, key), jax.random.key(0))


def random(c):
    """Parameters with something in every table."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes(c))


def encode(c, params, x, corruption=CLEAN) -> jax.Array:
    return jax.jit(build_encoder(c).apply)({"params": params["encoder"]}, x, corruption)


@pytest.mark.parametrize("encoder", TRANSFORMERS)
def test_the_sincos_table_is_that_of_the_images_grid(encoder):
    """Black images of two sizes through one encoder: only the positions tell their patches apart."""
    c = small(encoder)
    params = random(c)
    for size, grid in ((WIDE, (5, 7)), (WIDE[::-1], (7, 5)), ((16, 16), (4, 4))):
        tokens_ND = jax.jit(representation.points(c))(params, 0 * images(size))[1]["input"][0, 1, 1:]
        expected = sincos_positions(grid, 16)[1:] + params["encoder"]["embedding"]["patch_embed"]["bias"]
        np.testing.assert_allclose(tokens_ND, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "positions", "dropped"),
    [
        ("crate", "sincos", False),
        ("crate", "learned", True),
        ("vit", "relative", True),
        ("vit", "relative_per_block", False),
        pytest.param("crate", "sincos", True, marks=pytest.mark.slow),
        pytest.param("crate", "learned", False, marks=pytest.mark.slow),
        pytest.param("vit", "relative", False, marks=pytest.mark.slow),
        pytest.param("vit", "relative_per_block", True, marks=pytest.mark.slow),
    ],
)
def test_another_size_is_encoded_as_by_the_encoder_of_that_size(encoder, positions, dropped):
    """With its tables resized as fine-tuning at another size resizes them; also where patches are dropped."""
    here, there = small(encoder, positions=positions), small(encoder, WIDE, positions=positions)
    params, x = random(here), images()
    noise_BN = jax.random.uniform(jax.random.key(1), (len(x), 35))
    corruption = Masking.from_noise(noise_BN, 20, True) if dropped else CLEAN
    adopted = adopt_encoder(shapes(there), params, "test", grid_of(here), ours=grid_of(there), resize=True)
    tokens, expected = encode(here, params, x, corruption), encode(there, adopted, x, corruption)
    assert tokens.shape == (3, 1 + (20 if dropped else 35), 16)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_a_table_of_another_shape_of_grid_is_not_taken_for_ours(positions):
    """2 x 8 patches are as many as 4 x 4; the table is resized from the grid that it had, or refused."""
    c, wide = small("vit", positions=positions), small("vit", (8, 32), positions=positions)
    params = random(wide)
    adopted = adopt_encoder(shapes(c), params, "test", grid_of(wide), ours=grid_of(c), resize=True)
    if positions == "relative":
        there, here = params["encoder"]["relative_bias"], adopted["encoder"]["relative_bias"]
        np.testing.assert_allclose(here[:49], resize_table(there[:45], (3, 15), (7, 7)), atol=1e-6)
        np.testing.assert_array_equal(here[49:], there[45:])
        return
    there, here = (tree["encoder"]["embedding"]["positions"] for tree in (params, adopted))
    np.testing.assert_allclose(here[1:], resize_table(there[1:], (2, 8), (4, 4)), atol=1e-6)
    np.testing.assert_array_equal(here[0], there[0])
    for adopt in (adopt_encoder, init_encoder):  # the shapes alone do not tell
        with pytest.raises(CheckpointError, match="positions: checkpoint of 2 x 8 patches, config of 4 x 4"):
            adopt(shapes(c), params, "test", (2, 8), ours=(4, 4))


def test_a_relative_bias_is_looked_up_on_the_images_grid():
    """A large bias for one column to the right: each patch then looks at its right neighbour alone."""
    c = small("vit", WIDE, positions="relative", depth=1)
    params, h, w = random(c), 5, 7
    table = np.zeros(params["encoder"]["relative_bias"].shape, np.float32)
    table[(h - 1) * (2 * w - 1) + w - 2] = 60.0  # query less key: 0 rows, -1 column
    params["encoder"]["relative_bias"] = jnp.asarray(table)

    def token(x: jax.Array) -> jax.Array:
        return jnp.sum(build_encoder(c).apply({"params": params["encoder"]}, x)[0, 1 + 2 * w + 5] ** 3)

    moved = np.abs(np.asarray(patchify(jax.jit(jax.grad(token))(images(n=1)), 4))).max((0, 2)).reshape(h, w)
    assert {tuple(place) for place in np.argwhere(moved > 1e-6 * moved.max())} == {(2, 5), (2, 6)}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_resized_table_keeps_its_rows_and_columns(axis):
    """What rises along one side of a 4 x 6 grid rises along that side of a 5 x 7 one, and nowhere else."""
    ramp = np.broadcast_to(np.moveaxis(np.arange((4, 6)[axis], dtype=np.float32)[:, None], 0, axis), (4, 6))
    resized = np.asarray(resize_table(jnp.asarray(ramp.reshape(24, 1)), (4, 6), (5, 7))).reshape(5, 7)
    assert (np.diff(resized, axis=axis) > 0.5).all()
    np.testing.assert_allclose(np.diff(resized, axis=1 - axis), 0, atol=1e-5)


def test_tables_are_resized_as_timm_does():
    """Expected: torch's F.interpolate(mode="bicubic", antialias=True), which differs from torch's default kernel."""
    table = jnp.array([[0.9, -1.3, 0.2, 2.1], [1.7, 0.4, -0.6, 0.3], [-0.8, 1.1, 0.5, -2.2]])
    expected = [
        [0.1825, -0.7333, 1.8442],
        [0.7568, -0.5640, 1.1925],
        [1.4359, -0.1774, 0.0204],
        [0.3636, 0.5854, -1.0862],
        [-0.4268, 1.0479, -1.6869],
    ]
    np.testing.assert_allclose(resize_table(table.reshape(12, 1), (3, 4), (5, 3)).reshape(5, 3), expected, atol=1e-4)


def test_images_that_do_not_divide_into_patches_are_named():
    with pytest.raises(ValueError, match="images of 20 x 27 pixels cannot be cut into patches of 4 x 4"):
        patchify(jnp.zeros((1, 20, 27, 3)), 4)


@pytest.mark.parametrize("encoder", TRANSFORMERS)
def test_the_last_layer_is_the_output_without_its_norm(encoder):
    c = small(encoder, final_norm=False)
    params, x = random(c), images()
    output, layers = jax.jit(representation.layers(c))(params, x)
    np.testing.assert_allclose(output, encode(c, params, x), atol=1e-6)
    np.testing.assert_array_equal(layers[-1], output)
    shallow = c.copy_and_resolve_references()
    shallow.encoder.depth = 1
    first = {"encoder": params["encoder"] | {"blocks": jax.tree.map(lambda a: a[:1], params["encoder"]["blocks"])}}
    np.testing.assert_allclose(layers[0], jax.jit(representation.layers(shallow))(first, x)[0], atol=1e-6)
    assert layers.shape == (2, 3, 36, 16)


def test_maps_lie_where_the_patches_lie():
    c = small("vit")
    params, x = random(c), images()
    output, layers = jax.jit(representation.layers(c))(params, x)
    first, last = jax.jit(representation.block_maps(c, (1, 2)))(params, x)
    assert first.shape == last.shape == (3, 5, 7, 16)
    np.testing.assert_allclose(first[:, 3, 1], layers[0][:, 1 + 3 * 7 + 1], atol=1e-6)
    np.testing.assert_allclose(last[:, 1, 6], output[:, 1 + 1 * 7 + 6], atol=1e-6)


def with_prefix(monkeypatch, prefix: int) -> None:
    monkeypatch.setitem(ENCODERS, "vit", dataclasses.replace(ENCODERS["vit"], prefix=prefix))


@pytest.mark.parametrize("prefix", [1, 3])
def test_pooling_knows_which_tokens_are_patches(prefix, monkeypatch):
    with_prefix(monkeypatch, prefix)
    c, tokens = small("vit"), np.random.default_rng(0).normal(size=(2, prefix + 35, 16)).astype(np.float32)
    expected = {"cls": tokens[:, 0], "mean": tokens[:, -35:].mean(1)}
    expected["cls_mean"] = np.concatenate([expected["cls"], expected["mean"]], axis=1)
    for c.evaluation.pool, features in expected.items():
        np.testing.assert_allclose(representation.pool(c)(jnp.asarray(tokens)), features, atol=1e-6)


def test_without_a_class_token_there_is_only_the_mean(monkeypatch):
    with_prefix(monkeypatch, 0)
    c, tokens = small("vit"), jnp.asarray(np.random.default_rng(0).normal(size=(2, 35, 16)))
    c.evaluation.pool = "mean"
    np.testing.assert_allclose(representation.pool(c)(tokens), tokens.mean(1), atol=1e-6)
    for c.evaluation.pool in ("cls", "cls_mean"):
        with pytest.raises(ConfigError, match="config.evaluation.pool='cls.*has no class token; set it to mean") as e:
            representation.build(c)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("prefix", [0, pytest.param(1, marks=pytest.mark.slow), 3])  # 1: all other tests
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_predict_patches_alone(decoder, prefix, monkeypatch):
    """Kept patches of a 5 x 7 grid in, all patches out, whatever stands before them."""
    with_prefix(monkeypatch, prefix)
    c = small("vit", WIDE)
    c.decoder.name, c.decoder.positions = decoder, True
    c.corruption.mask_fill = "token" if decoder == "linear" else "drop"
    noise_BN = jax.random.uniform(jax.random.key(1), (3, 35))
    corruption = CLEAN if decoder == "linear" else Masking.from_noise(noise_BN, 20, True)
    count = prefix + (35 if decoder == "linear" else 20)
    tokens = jax.random.normal(jax.random.key(2), (3, count, 16))
    module = DECODERS[decoder](c)
    params = jax.jit(module.init)(jax.random.key(0), tokens, corruption)
    apply = jax.jit(module.apply)
    patches_BNP = apply(params, tokens, corruption)
    assert patches_BNP.shape == (3, 35, 48)
    # A removed patch is predicted alike whatever it held, a kept one by its own token: the last one moves its own most.
    moved = np.abs(apply(params, tokens.at[:, -1].add(5.0), corruption) - patches_BNP).mean(-1)
    last = corruption.order_BN[:, 19] if decoder != "linear" else np.full(3, 34)
    np.testing.assert_array_equal(moved.argmax(1), last)


def test_positions_leave_what_stands_before_the_patches_alone():
    table = sincos_positions((5, 7), 16)[1:]
    for prefix in (0, 1, 3):
        rows = sincos_positions((5, 7), 16, prefix)
        np.testing.assert_array_equal(rows[:prefix], 0)
        np.testing.assert_array_equal(rows[prefix:], table)
