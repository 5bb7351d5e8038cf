"""The pre-training objective: image -> corruption -> encoder -> decoder -> loss, plus a penalty.

`Objective` is all that the training loop knows of a method: initial values, the loss of a
micro-batch, a penalty on the weights, features for evaluation and pictures. Other objectives
(fine-tuning, joint embeddings) fill in the same fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax import autoencoder, corruption as corruptions, orthogonality, reconstruction
from crate_jax.corruption import Identity
from crate_jax.patches import patchify, unpatchify

Params = dict
Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is optimised, as pure functions.

    Attributes:
      init: key -> (params, state); state is whatever the objective carries from step to step.
      loss: (params, images uint8 (b, H, W, 3), keys (b,)) -> (scalar, scalars to log). One key per
        image, so that micro-batches draw what the whole batch would.
      penalty: (params, state, key) -> (weighted scalar, (new state, scalars to log)); once per step.
      penalised: names of the parameters that the penalty acts on.
      features: (params, images uint8) -> (b, D) float32, of the uncorrupted images.
      columns: captions of what `pictures` returns, from left to right.
      pictures: (params, images uint8, keys) -> one (b, H, W, 3) array in 0..1 per column.
    """

    init: Callable[[jax.Array], tuple[Params, dict]]
    loss: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Scalars]]
    penalty: Callable[[Params, dict, jax.Array], tuple[jax.Array, tuple[dict, Scalars]]]
    penalised: tuple[str, ...]
    features: Callable[[Params, jax.Array], jax.Array]
    columns: tuple[str, ...]
    pictures: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, ...]]


def normalise(images_uint8: jax.Array, config: ConfigDict) -> jax.Array:
    """Bytes -> pixels of zero mean and unit variance per channel, float32, on the device."""
    mean, std = np.float32(config.data.mean), np.float32(config.data.std)
    return (images_uint8.astype(jnp.float32) / 255.0 - mean) / std


def denormalise(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverse of :func:`normalise`, to pixels in 0..1 (not clipped)."""
    return images * np.float32(config.data.std) + np.float32(config.data.mean)


def build(config: ConfigDict) -> Objective:
    """The pre-training objective of a validated config."""
    apply: Callable[..., jax.Array] = autoencoder.build(config).apply  # type: ignore[assignment]  # never mutable
    sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))
    shapes = jax.eval_shape(lambda key: autoencoder.init_params(config, key), jax.random.key(0))
    penalty = orthogonality.build(config, shapes)

    def patches(images_uint8: jax.Array) -> jax.Array:
        return patchify(normalise(images_uint8, config), config.encoder.patch_size)

    def init(key: jax.Array) -> tuple[Params, dict]:
        params_key, penalty_key = jax.random.split(key)
        return autoencoder.init_params(config, params_key), penalty.init(penalty_key)

    def loss(params: Params, images_uint8: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, Scalars]:
        x_BNP = patches(images_uint8)
        draw_keys_B, path_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
        corruption = sample(draw_keys_B)
        predicted_BNP = apply({"params": params}, x_BNP, corruption, path_keys_B)
        value = reconstruction.loss(predicted_BNP, reconstruction.target(x_BNP, config), corruption, config)
        return value, {"reconstruction": value}

    def weighted_penalty(params: Params, state: dict, key: jax.Array) -> tuple[jax.Array, tuple[dict, Scalars]]:
        value, state = penalty.apply(params, state, key)
        return config.penalty.weight * value, (state, {"penalty": value} if penalty.names else {})

    def features(params: Params, images_uint8: jax.Array) -> jax.Array:
        tokens = apply({"params": params}, patches(images_uint8), Identity(), method="encode")
        pooled = tokens[:, 0] if config.evaluation.pool == "cls" else jnp.mean(tokens[:, 1:], axis=1)
        return pooled.astype(jnp.float32)

    def pictures(params: Params, images_uint8: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, ...]:
        return reconstruct(config, apply, sample(keys_B), params, patches(images_uint8))

    return Objective(init, loss, weighted_penalty, penalty.names, features, COLUMNS, pictures)


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
