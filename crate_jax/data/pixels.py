"""Converts bytes of images to the normalised pixels that an encoder reads, and back; on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def normalise(images_uint8: jax.Array, config: ConfigDict) -> jax.Array:
    """Scales bytes to [0, 1], subtracts config.data.mean and divides by config.data.std, per channel.

    Args:
      images_uint8: images, uint8 (..., C).
      config: the whole config; reads config.data.mean and config.data.std.

    Returns:
      Normalised pixels, float32 (..., C).

    >>> config = ConfigDict({"data": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.5)}})
    >>> normalise(jnp.array([[255, 0, 255]], jnp.uint8), config).tolist()
    [[2.0, -2.0, 1.0]]
    """
    mean, std = np.float32(config.data.mean), np.float32(config.data.std)
    return (images_uint8.astype(jnp.float32) / 255.0 - mean) / std


def denormalise(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverts :func:`normalise`, up to pixels (..., C) in 0..1, which are not clipped.

    >>> config = ConfigDict({"data": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.5)}})
    >>> denormalise(jnp.array([[2.0, -2.0, 1.0]]), config).tolist()
    [[1.0, 0.0, 1.0]]
    """
    return images * np.float32(config.data.std) + np.float32(config.data.mean)
