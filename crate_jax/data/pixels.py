"""Bytes of an image to what an encoder reads, and back; on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def normalise(images_uint8: jax.Array, config: ConfigDict) -> jax.Array:
    """Bytes -> pixels of zero mean and unit variance per channel, float32, on the device."""
    mean, std = np.float32(config.data.mean), np.float32(config.data.std)
    return (images_uint8.astype(jnp.float32) / 255.0 - mean) / std


def denormalise(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverse of :func:`normalise`, to pixels in 0..1 (not clipped)."""
    return images * np.float32(config.data.std) + np.float32(config.data.mean)
