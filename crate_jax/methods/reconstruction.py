"""The pre-training objective: image -> corruption -> encoder -> decoder -> loss, plus a penalty.

One of the objectives that the training loop can be given (see :mod:`crate_jax.methods.method`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import denormalise, normalise
from crate_jax.methods.method import Batch, Carried, Method, Params, Scalars, Start
from crate_jax.models import autoencoder, corruption as corruptions, representation
from crate_jax.models.adopt import init_encoder
from crate_jax.models.corruption import Corruption, Identity
from crate_jax.models.patches import patchify, standardise, unpatchify

NORMS = {"l2": jnp.square, "l1": jnp.abs}


def build(config: ConfigDict, source: data.Source | None = None) -> Method:
    """The pre-training objective of a validated config; needs nothing of the images."""
    apply: Callable[..., jax.Array] = autoencoder.build(config).apply  # type: ignore[assignment]  # never mutable
    sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))

    def patches(images_uint8: jax.Array) -> jax.Array:
        return patchify(normalise(images_uint8, config), config.encoder.patch_size)

    def init(key: jax.Array, start: Start) -> tuple[Params, Carried]:
        return start(autoencoder.init_params(config, key)), {}

    def loss_of_batch(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        x_BNP = patches(batch["image"])
        draw_keys_B, path_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
        corruption = sample(draw_keys_B)
        predicted_BNP = apply({"params": params}, x_BNP, corruption, path_keys_B)
        value = loss(predicted_BNP, target(x_BNP, config), corruption, config)
        return value, (carried, {"reconstruction": value})

    represent = representation.build(config)

    def features(params: Params, images_uint8: jax.Array) -> jax.Array:
        return represent(params, patches(images_uint8))

    def pictures(params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, ...]:
        return reconstruct(config, apply, sample(keys_B), params, patches(batch["image"]))

    return Method(
        inputs=("image",),
        init=init,
        adopt=init_encoder,
        loss=loss_of_batch,
        features=features,
        columns=COLUMNS,
        pictures=pictures,
    )


def target(patches_BNP: jax.Array, config: ConfigDict) -> jax.Array:
    """What is reconstructed, float32: normalised pixels, or pixels standardised per patch."""
    patches_BNP = patches_BNP.astype(jnp.float32)
    return standardise(patches_BNP) if config.loss.target == "patch_normalised" else patches_BNP


def loss(predicted_BNP: jax.Array, target_BNP: jax.Array, corruption: Corruption, config: ConfigDict) -> jax.Array:
    """Mean over images, patches and pixels of |(I - P)(x^ - x)|^n, scalar float32.

    The mean runs over the removed patches for masking (He et al. 2022; CRATE-MAE B.1) and over all
    patches for projection (ROPIM section 3.2), where every patch loses something. `loss.region="all"`
    takes the whole error instead (CRATE-MAE eq. 2.22).
    """
    if config.loss.region == "all":
        corruption = Identity()
    error_BNP = corruption.complement(predicted_BNP.astype(jnp.float32) - target_BNP)
    # Per image first: the mean of a batch then rounds alike however the batch is split over devices.
    per_image_B = jnp.mean(NORMS[config.loss.norm](error_BNP), axis=(1, 2))
    return jnp.mean(per_image_B) / corruption.complement_share()


COLUMNS = ("original", "corrupted P x", "reconstruction x^", "P x + (I - P) x^")


def reconstruct(
    config: ConfigDict, apply: Callable, corruption: corruptions.Corruption, params: Params, x_BNP: jax.Array
) -> tuple[jax.Array, ...]:
    """The reconstruction grid's columns, COLUMNS, images (B, H, W, 3) in 0..1.

    The last column puts what the corruption left (P x) and what the decoder says about the rest,
    (I - P) x^, together: for a perfect decoder it is the image.
    """
    predicted_BNP = apply({"params": params}, x_BNP, corruption).astype(jnp.float32)
    if config.loss.target == "patch_normalised":  # back to pixels with each patch's own statistics
        mean, std = x_BNP.mean(-1, keepdims=True), jnp.sqrt(x_BNP.var(-1, keepdims=True, ddof=1) + 1e-6)
        predicted_BNP = predicted_BNP * std + mean
    combined_BNP = x_BNP - corruption.complement(x_BNP - predicted_BNP)

    def image(v_BNP: jax.Array) -> jax.Array:
        pixels = unpatchify(v_BNP, config.data.image_size, config.encoder.patch_size)
        return jnp.clip(denormalise(pixels, config), 0.0, 1.0)

    return tuple(image(v) for v in (x_BNP, corruption.view(x_BNP), predicted_BNP, combined_BNP))
