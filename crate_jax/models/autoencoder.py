"""Encoder and decoder as one module, built from a config."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.models import ENCODERS
from crate_jax.models.corruption import Corruption, sampler
from crate_jax.models.decoders import DECODERS
from crate_jax.models.patches import grid_shape


class Autoencoder(nn.Module):
    """Corrupted patches -> tokens -> patches; parameters under ``encoder`` and ``decoder``."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(self, patches_BNP: jax.Array, corruption: Corruption, keys_B: jax.Array | None = None) -> jax.Array:
        """(B, N, P) clean patches -> (B, N, P) predicted patches; drop path only with `keys_B`."""
        return self.decoder(self.encoder(patches_BNP, corruption, keys_B), corruption)

    def encode(self, patches_BNP: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens after the encoder's final norm, (B, 1 + M, D), class token first."""
        return self.encoder(patches_BNP, corruption)

    def decode(self, tokens_BMD: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens -> (B, N, P) predicted patches."""
        return self.decoder(tokens_BMD, corruption)


def build(config: ConfigDict) -> Autoencoder:
    """The model that a validated config describes."""
    return Autoencoder(ENCODERS[config.encoder.name](config), DECODERS[config.decoder.name](config))


def patch_numbers(config: ConfigDict) -> tuple[int, int]:
    """(N, P): patches per image and numbers per patch."""
    h, w = grid_shape(config.data.image_size, config.encoder.patch_size)
    return h * w, 3 * config.encoder.patch_size**2


def init_params(config: ConfigDict, key: jax.Array) -> dict:
    """Initial parameters, float32; a function of the key alone. Use under jit or eval_shape."""
    tokens, pixels = patch_numbers(config)
    corruption = sampler(config, tokens, pixels)(jax.random.split(jax.random.key(0), 1))
    return build(config).init(key, jnp.zeros((1, tokens, pixels), jnp.float32), corruption)["params"]
