"""The pictures of pre-training, against what the corruption and a decoder that says one number make of an image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.config import validate
from crate_jax.data.pixels import normalise
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods import reconstruction, whitening
from crate_jax.models import autoencoder, corruption as corruptions
from crate_jax.models.patches import patchify, unpatchify
from crate_jax.training import step as train_step

BATCH = 3
SAID = 0.2  # by the decoder, of each pixel of each patch


def tiny(corruption: str, target: str = "pixel"):
    """Images 20 x 12 of 4 x 4 patches: five rows and three columns."""
    c = configs.base()
    c.steps, c.batch_size = 2, BATCH
    c.data.image_size, c.data.mean, c.data.std = (20, 12), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    c.encoder.patch_size, c.encoder.width, c.encoder.depth, c.encoder.heads = 4, 8, 1, 2
    c.decoder.name, c.loss.target = "linear", target
    c.corruption.name, c.corruption.mask_ratio, c.corruption.rop_ratio = corruption, 0.7, 0.3
    validate(c)
    return c


def drawn(c) -> tuple[np.ndarray, list[np.ndarray], jax.Array]:
    """uint8 images, the pictures of them in columns, and the keys of the draws."""
    method = reconstruction.build(c)
    params = jax.jit(lambda: train_step.init_params(c, method)[0])()
    head = params["decoder"]["head"]
    head["kernel"], head["bias"] = jnp.zeros_like(head["kernel"]), jnp.full_like(head["bias"], SAID)
    images = np.random.default_rng(0).integers(90, 170, (BATCH, 20, 12, 3), np.uint8)  # so that nothing is clipped
    keys = jax.random.split(jax.random.key(1), BATCH)
    return images, [np.asarray(x) for x in jax.jit(method.pictures)(params, {"image": images}, keys)], keys


@pytest.mark.parametrize("corruption", [pytest.param("mask", marks=pytest.mark.one_python), "rop"])
def test_the_last_picture_is_what_was_left_and_what_the_decoder_says_about_the_rest(corruption):
    """P x + (I - P) x^, with P as a matrix over the patches of each image."""
    c = tiny(corruption)
    images, (original, corrupted, added, combined), keys = drawn(c)
    np.testing.assert_allclose(original, images / 255, atol=1e-6)
    tokens, pixels = autoencoder.patch_numbers(c)
    corruption = corruptions.sampler(c, tokens, pixels)(keys)
    eye = jnp.broadcast_to(jnp.eye(tokens), (BATCH, tokens, tokens))
    P = np.eye(tokens) - np.asarray(corruption.complement(eye))
    x = np.asarray(patchify(normalise(jnp.asarray(images), c), 4))
    predicted = np.full_like(x, SAID)

    def image(patches: np.ndarray) -> np.ndarray:
        values = np.asarray(unpatchify(jnp.asarray(patches, jnp.float32), (20, 12), 4))
        return np.clip(values * c.data.std + np.asarray(c.data.mean), 0, 1)

    np.testing.assert_allclose(corrupted, image(P @ x), atol=1e-5)
    np.testing.assert_allclose(added, image((np.eye(tokens) - P) @ predicted), atol=1e-5)
    np.testing.assert_allclose(combined, image(P @ x + (np.eye(tokens) - P) @ predicted), atol=1e-5)
    assert np.abs(combined - added).max() > 0.1 < np.abs(combined - original).max()


def test_what_is_said_about_normalised_patches_is_shown_with_each_patchs_mean_and_deviation():
    c = tiny("mask", "patch_normalised")
    images, (_, _, added, _), keys = drawn(c)
    removed = np.asarray(corruptions.sampler(c, *autoencoder.patch_numbers(c))(keys).removed_BN) > 0
    x = np.asarray(patchify(normalise(jnp.asarray(images), c), 4))
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
    shown = (np.asarray(patchify(jnp.asarray(added), 4)).reshape(*x.shape[:2], 16, 3) - c.data.mean) / c.data.std
    expected = np.broadcast_to((mean + SAID * std)[..., None], shown.shape)
    np.testing.assert_allclose(shown[removed], expected[removed], atol=1e-4)
    np.testing.assert_allclose(shown[~removed], 0, atol=1e-6)


@pytest.mark.one_python
def test_a_guide_adds_the_cross_entropy_of_a_linear_classifier_on_the_corrupted_features():
    """Under a mask that drops tokens, with one image of three without a label; without the guide nothing changes."""
    c = tiny("mask")
    c.corruption.mask_fill, c.decoder.name, c.decoder.depth, c.decoder.heads = "drop", "transformer", 1, 2
    c.evaluation.pool = "mean"
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (3, 20, 12, 3), np.uint8),
        "label": np.array([1, -1, 0]),
    }
    keys = jax.random.split(jax.random.key(1), 3)
    plain = reconstruction.build(c)
    params = jax.jit(lambda: train_step.init_params(c, plain)[0])()
    expected, (_, scalars) = jax.jit(plain.loss)(params, {}, batch, keys)
    assert set(scalars) == {"reconstruction"} and plain.inputs == ("image",)
    c.loss.guide = 0.3
    guided = reconstruction.build(c, data.open_split(labelled(c), "train"))
    drawn = jax.jit(lambda: train_step.init_params(c, guided)[0])()
    jax.tree.map(np.testing.assert_array_equal, {k: drawn[k] for k in params}, params)
    weights = {"kernel": np.random.default_rng(2).normal(size=(8, 10)), "bias": np.arange(10) / 7}
    value, (_, scalars) = jax.jit(guided.loss)({**params, "guide": weights}, {}, batch, keys)
    sample = corruptions.sampler(c, *autoencoder.patch_numbers(c))(jax.vmap(jax.random.split)(keys)[:, 0])
    encode = jax.jit(functools.partial(autoencoder.build(c).apply, method="encode"))
    tokens = encode({"params": params}, normalise(batch["image"], c), sample)
    logits = np.asarray(tokens[:, 1:], np.float64).mean(1) @ weights["kernel"] + weights["bias"]
    nats = np.log(np.exp(logits).sum(1)) - logits[range(3), batch["label"]]
    assert float(scalars["guide_loss"]) == pytest.approx((nats[0] + nats[2]) / 3, rel=1e-4)
    assert float(value) == pytest.approx(float(expected) + 0.3 * (nats[0] + nats[2]) / 3, rel=1e-5)
    assert float(scalars["guide_top1"]) == pytest.approx(sum(logits.argmax(1) == batch["label"]) / 3)
    assert set(guided.judged({**params, "guide": weights}, {})) == set(params)  # of no use to who judges the encoder
    c.loss.guide, c.penalty.name, c.penalty.weight = 0.0, "whiten", 0.2
    white = reconstruction.build(c)
    value, (_, scalars) = jax.jit(white.loss)(params, {}, batch, keys)
    term = 25 * whitening.hinge(tokens[:, 1:].mean(1)) + whitening.off_diagonal(tokens[:, 1:].mean(1))
    assert float(value - expected) == pytest.approx(0.2 * float(term), rel=1e-4) and not white.mean_over_images
    c.loss.guide = 0.3
    with pytest.raises(DataError, match="needs labelled training images"):
        reconstruction.build(c)


def labelled(c):
    """The config of a set of ten classes."""
    c = c.copy_and_resolve_references()
    c.data.source = "digits"
    return c


def test_a_patch_of_one_number_cannot_be_normalised():
    """Its unbiased variance is 0 / 0: every loss was NaN."""
    c = configs.base()
    c.update_from_flattened_dict({"steps": 1, "data.image_size": (6, 5), "encoder.patch_size": 1, "data.channels": 1})
    c.data.source, c.data.mean, c.data.std, c.loss.target = "npz:x.npz", (0.4,), (0.3,), "patch_normalised"
    with pytest.raises(ConfigError, match="loss.target='patch_normalised': a patch of one number has no deviation"):
        configs.validate(c)
    c.data.channels, c.data.mean, c.data.std = 2, (0.4, 0.5), (0.3, 0.2)
    configs.validate(c)


def test_a_projection_that_keeps_everything_is_refused():
    """Of 16 dimensions 15.2 are 16: nothing is hidden, and loss and gradient are 0."""
    c = configs.base()
    c.update_from_flattened_dict({"steps": 1, "data.image_size": (16, 16), "encoder.patch_size": 4})
    c.update_from_flattened_dict({"corruption.name": "rop", "corruption.rop_ratio": 0.93})
    configs.validate(c)
    c.corruption.rop_ratio = 0.95
    with pytest.raises(ConfigError, match="rop_ratio=0.95: keeps all of the 16 dimensions"):
        configs.validate(c)
