"""The pictures of pre-training, against what the corruption and a decoder that says one number make of an image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.data.pixels import normalise
from crate_jax.methods import reconstruction
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
    params = train_step.init_params(c, method)[0]
    head = params["decoder"]["head"]
    head["kernel"], head["bias"] = jnp.zeros_like(head["kernel"]), jnp.full_like(head["bias"], SAID)
    images = np.random.default_rng(0).integers(90, 170, (BATCH, 20, 12, 3), np.uint8)  # so that nothing is clipped
    keys = jax.random.split(jax.random.key(1), BATCH)
    return images, [np.asarray(x) for x in method.pictures(params, {"image": images}, keys)], keys


@pytest.mark.parametrize("corruption", ["mask", "rop"])
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
