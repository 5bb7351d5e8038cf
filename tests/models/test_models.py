"""The contract of every encoder, corruption and decoder, alone and together; parameter counts."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import crate_mae, vit_mae
from crate_jax import config as configs
from crate_jax.config import ConfigError, validate
from crate_jax.methods import reconstruction
from crate_jax.models import ENCODERS, autoencoder, build_encoder, corruption as corruptions, representation
from crate_jax.models.corruption import Masking
from crate_jax.models.crate import ista, norm_ista
from crate_jax.models.decoders import DECODERS
from crate_jax.models.layers import BLOCK_EPS, norm_product
from crate_jax.models.patches import patchify, sincos_positions, unpatchify
from crate_jax.parallel import parameters
from tests.models import drawn

TRANSFORMERS = [name for name, row in ENCODERS.items() if row.patches]  # test_resnet.py tests the others
CORRUPTIONS = {  # every corruption, masking in its three ways
    "mask-token": {"name": "mask", "mask_fill": "token"},
    "mask-zero": {"name": "mask", "mask_fill": "zero"},
    "mask-drop": {"name": "mask", "mask_fill": "drop"},
    "rop": {"name": "rop", "rop_ratio": 0.3},
    "noise": {"name": "noise"},
    "none": {"name": "none"},
}


def small(encoder: str = "crate", corruption: str = "mask-token", decoder: str = "crate", **encoder_values):
    """A tiny model on 12 x 8 images: six 4 x 4 patches, three rows and two columns."""
    c = configs.base()
    c.steps, c.batch_size = 2, 4
    c.data.image_size = (12, 8)
    c.encoder.name, c.encoder.patch_size = encoder, 4
    c.encoder.width, c.encoder.depth, c.encoder.heads = 16, 2, 2
    c.encoder.update(encoder_values)
    c.decoder.name, c.decoder.depth, c.decoder.heads = decoder, 1, 2
    c.decoder.width = 8 if decoder == "transformer" else 0
    c.decoder.positions = corruption == "mask-drop"
    c.corruption.update(CORRUPTIONS[corruption])
    c.corruption.mask_ratio = 0.6  # keeps 2 of 6, removes 4
    validate(c)
    return c


def images(c, n: int = 3):
    return jax.random.normal(jax.random.key(5), (n, *c.data.image_size, 3))


def params_of(c):
    return drawn(lambda: autoencoder.init_params(c, jax.random.key(0)))


def loss_of(c):
    """(params, images) -> loss of one draw of the corruption, as a function to differentiate."""
    model = autoencoder.build(c)
    sample = corruptions.sampler(c, *autoencoder.patch_numbers(c))

    def loss(params, x):
        corruption = sample(jax.random.split(jax.random.key(1), len(x)))
        predicted = model.apply({"params": params}, x, corruption, jax.random.split(jax.random.key(2), len(x)))
        return reconstruction.loss(predicted, reconstruction.target(patchify(x, 4), c), corruption, c)

    return loss


COMBINATIONS = [
    (e, k, d)
    for e, k, d in itertools.product(TRANSFORMERS, CORRUPTIONS, DECODERS)
    if (k, d) != ("mask-drop", "linear")  # nothing could fill the dropped patches; validate() says so
]


def quick(encoder, corruption, decoder) -> bool:
    """True of a third of the combinations: each encoder with each corruption and each decoder, these in turn."""
    places = (TRANSFORMERS.index(encoder), [*CORRUPTIONS].index(corruption), [*DECODERS].index(decoder))
    return (places[0] + places[1] + 1 - places[2]) % 3 == 0


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("encoder", "corruption", "decoder"),
    [pytest.param(*parts, marks=() if quick(*parts) else pytest.mark.slow) for parts in COMBINATIONS],
)
def test_every_combination_trains(encoder, corruption, decoder):
    """A finite loss, and a gradient for every parameter."""
    c = small(encoder, corruption, decoder)
    params = params_of(c)
    loss = loss_of(c)
    x = images(c)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, x)
    chex.assert_tree_all_finite((value, grads))
    chex.assert_trees_all_equal_shapes(grads, params)
    silent = [n for n, g in parameters.names(grads).items() if not np.any(g)]
    assert not silent


@pytest.mark.slow  # a function that jit changes would fail the comparisons with PyTorch too
@pytest.mark.one_python
@pytest.mark.parametrize(
    ("encoder", "corruption", "decoder"), [("crate", "mask-token", "crate"), ("vit", "rop", "linear")]
)
def test_jit_changes_nothing(encoder, corruption, decoder):
    c = small(encoder, corruption, decoder)
    params = autoencoder.init_params(c, jax.random.key(0))
    value, grads = jax.jit(jax.value_and_grad(loss_of(c)))(params, images(c))
    with jax.disable_jit():
        eager_value, eager_grads = jax.value_and_grad(loss_of(c))(params, images(c))
    assert float(value) == pytest.approx(float(eager_value), rel=1e-5)
    chex.assert_trees_all_close(grads, eager_grads, atol=1e-5)


def test_dropping_with_a_linear_decoder_is_refused():
    with pytest.raises(ConfigError, match="decoder.name='linear'"):
        small("vit", "mask-drop", "linear")


@pytest.mark.parametrize("encoder", ["crate", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.one_python
def test_options_of_encoders(encoder):
    """Learned positions, over-complete dictionary, tied output, relative bias, drop path: all train."""
    options = {
        "crate": [
            {"positions": "learned", "embed_norm": True, "dictionary": "overcomplete"},
            {"positions": "none", "tied_output": True},
        ],
        "vit": [
            {"positions": "relative", "qkv_bias": "qv", "layer_scale": 0.1, "drop_path": 0.5, "init": "trunc_normal"},
            {"positions": "learned", "qkv_bias": "none", "embed_norm": True},
        ],
    }
    for values, corruption in zip(options[encoder], ("mask-drop", "rop"), strict=True):
        c = small(encoder, corruption, "transformer", **values)
        value, grads = jax.jit(jax.value_and_grad(loss_of(c)))(params_of(c), images(c))
        chex.assert_tree_all_finite((value, grads))


@pytest.mark.one_python
@pytest.mark.parametrize("encoder", TRANSFORMERS)
def test_bfloat16_activations_keep_float32_parameters(encoder):
    c = small(encoder, "rop", "linear")
    params = params_of(c)
    exact = jax.jit(loss_of(c))(params, images(c))
    c.dtype = "bfloat16"
    chex.assert_trees_all_equal_dtypes(params, params_of(c))
    value = jax.jit(loss_of(c))(params, images(c))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(exact), rel=0.02)
    assert float(value) != float(exact)


@pytest.mark.parametrize("encoder", ["crate", pytest.param("vit", marks=pytest.mark.slow)])
def test_remat_changes_nothing_but_memory(encoder):
    c = small(encoder, decoder="linear")
    params, x = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))(), images(c)
    plain = jax.jit(jax.grad(loss_of(c))).lower(params, x).compile()
    c.remat = True
    again = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))()
    chex.assert_trees_all_equal(params, again)  # same names, same values
    rematted = jax.jit(jax.grad(loss_of(c))).lower(params, x).compile()
    chex.assert_trees_all_close(rematted(params, x), plain(params, x), atol=1e-6)
    # The blocks' forward pass is done again in the backward one. How much that adds depends on what
    # the hand-written backward passes compute again anyway; without remat it is exactly nothing.
    assert rematted.cost_analysis()["flops"] > 1.05 * plain.cost_analysis()["flops"]


def test_remat_keeps_what_it_is_told_to():
    """The more products a recomputed block keeps, the fewer stand in the traced backward pass."""
    c, products = small("vit", decoder="linear"), {}
    params = jax.eval_shape(lambda: autoencoder.init_params(c, jax.random.key(0)))
    for c.remat, c.remat_keep in ((False, "nothing"), (True, "products"), (True, "weights"), (True, "nothing")):
        traced = jax.make_jaxpr(jax.grad(loss_of(c)))(params, images(c))
        products[c.remat, c.remat_keep] = str(traced).count("dot_general")
    counts = list(products.values())
    assert counts[0] == counts[1] < counts[2] < counts[3], products


@pytest.mark.one_python
@pytest.mark.parametrize("encoder", TRANSFORMERS)
@pytest.mark.parametrize("corruption", ["mask-token", "mask-zero", "mask-drop"])
def test_a_removed_patch_does_not_reach_the_encoder(encoder, corruption):
    """Its gradient is exactly zero through every token; a kept patch reaches all of them."""
    c = small(encoder, corruption, "transformer")
    params = params_of(c)
    noise = jnp.asarray([[0.1, 0.9, 0.2, 0.8, 0.7, 0.3]])
    masking = Masking.from_noise(noise, 3, corruption == "mask-drop", learned=corruption != "mask-zero")

    def tokens(x):
        return jnp.sum(build_encoder(c).apply({"params": params["encoder"]}, x, masking) ** 3)

    per_patch = np.abs(np.asarray(patchify(jax.jit(jax.grad(tokens))(images(c, 1)), 4))).max((0, 2))
    np.testing.assert_array_equal(per_patch > 0, [True, False, True, False, False, True])


def test_white_box_points_have_their_names():
    c = small("crate")
    tokens, blocks = jax.jit(representation.points(c))(params_of(c), images(c))
    assert sorted(blocks) == ["after_ista", "after_mssa", "input"]
    assert blocks["after_ista"].shape == (2, 3, 7, 16)  # layers, images, tokens, width
    assert float(blocks["after_ista"].min()) == 0.0  # ReLU: a non-negative code
    assert tokens.shape == (3, 7, 16)


def test_ista_step_lowers_its_objective():
    """Eq. 2.9 is one proximal-gradient step: with a small step size the LASSO objective falls."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 5, 16)))
    kernel = 0.3 * jax.random.normal(jax.random.key(1), (16, 16))

    def objective(z):
        return jnp.sum(0.5 * jnp.sum((x - z @ kernel) ** 2, -1) + 0.1 * jnp.sum(jnp.abs(z), -1))

    assert float(objective(ista(x, kernel, 0.05, 0.1)[0])) < float(objective(x))


@pytest.mark.one_python
@pytest.mark.parametrize("name", ["product", "ista"])
def test_what_normalises_again_in_the_backward_pass_is_the_plain_composition(name):
    """Values and gradients against automatic differentiation through the textbook norm."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, g = (1 + 2 * jax.random.normal(key, (2, 5, 16)) for key in keys[:2])
    scale, bias, kernel = (jax.random.normal(k, s) for k, s in zip(keys[2:], [(16,), (16,), (16, 16)], strict=True))

    def plain(x, scale, bias, kernel):
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        y = (x - mean) / jnp.sqrt(variance + BLOCK_EPS) * scale + bias
        return y @ kernel if name == "product" else jax.nn.relu(y + 0.1 * (y - y @ kernel) @ kernel.T - 0.1 * 0.5)

    def ours(*args):
        return norm_product(*args, BLOCK_EPS) if name == "product" else norm_ista(*args, 0.1, 0.5)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, *args):
        y, pull = jax.vjp(function, *args)
        return y, pull(g)

    with jax.default_matmul_precision("highest"):
        (y, grads), (expected, expected_grads) = (both(f, x, scale, bias, kernel) for f in (ours, plain))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_patchify_is_undone_and_ordered_by_row_column_channel():
    images = jax.random.normal(jax.random.key(0), (2, 12, 8, 3))
    cut = patchify(images, 4)
    np.testing.assert_array_equal(unpatchify(cut, (12, 8), 4), images)
    np.testing.assert_array_equal(cut[1, 3].reshape(4, 4, 3), images[1, 4:8, 4:8])


def test_sincos_table_separates_rows_and_columns():
    table = sincos_positions((3, 2), 16)
    assert table.shape == (7, 16)
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[1, :8], table[3, :8])  # same column: same first half
    np.testing.assert_array_equal(table[1, 8:], table[2, 8:])  # same row: same second half
    assert len(np.unique(table[1:].round(5), axis=0)) == 6


def counted(c) -> int:
    return parameters.count(jax.eval_shape(lambda: autoencoder.init_params(c, jax.random.key(0))))


@pytest.mark.parametrize(
    ("variant", "width", "published"),
    [("B", 768, 44_638_464), ("S", 576, 25_405_824), ("Ti", 384, 11_555_328)],
)
def test_crate_mae_parameters_match_the_published_count(variant, width, published):
    """The published total also counts two frozen position tables and an unused `decoder_embed`."""
    tables, unused = 2 * 197 * width, width * width + width
    assert counted(crate_mae.get_config(f"variant={variant}")) == published - tables - unused


def test_vit_mae_parameters_match_the_published_count():
    """He et al.'s MAE-B has 111.9M with its two frozen position tables (768 and 512 wide)."""
    total = counted(vit_mae.get_config("variant=B"))
    assert total == 111_655_680
    assert round((total + 197 * (768 + 512)) / 1e6, 1) == 111.9
