"""Encoder and decoder as one module, built from a config."""

from __future__ import annotations

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from crate_jax.models import blank_image, build_encoder, grids
from crate_jax.models.corruption import Corruption, sampler
from crate_jax.models.decoders import DECODERS
from crate_jax.models.patches import grid_shape, resize


class Autoencoder(nn.Module):
    """Images -> corrupted tokens -> patches; parameters under ``encoder`` and ``decoder``.

    Attributes:
      encoder: a row of ENCODERS.
      decoder: a row of DECODERS.
      resized: None, or two grids (h, w) of an encoder whose tokens do not lie on the patches: its map of the first grid
        is resized bilinearly to the second, the grid of the patches, before the decoder.
    """

    encoder: nn.Module
    decoder: nn.Module
    resized: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __call__(self, images_BHWC: jax.Array, corruption: Corruption, keys_B: jax.Array | None = None) -> jax.Array:
        """Clean, normalised images (B, H, W, 3) -> predicted patches (B, N, P); drop path only with `keys_B`."""
        return self.both(images_BHWC, corruption, keys_B)[1]

    def both(
        self, images_BHWC: jax.Array, corruption: Corruption, keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes and decodes corrupted images; the tokens in between serve losses on features.

        Args:
          images_BHWC: clean, normalised images (B, H, W, 3).
          corruption: what the encoder does not see.
          keys_B: random keys (B,) of drop path; None: without drop path.

        Returns:
          the tokens after the encoder's final norm (B, prefix + M, D), and the predicted patches (B, N, P).
        """
        tokens_BMD = self.encoder(images_BHWC, corruption, keys_B)
        return tokens_BMD, self.decode(tokens_BMD, corruption)

    def encode(self, images_BHWC: jax.Array, corruption: Corruption) -> jax.Array:
        """Images (B, H, W, 3) -> tokens after the encoder's final norm (B, prefix + M, D)."""
        return self.encoder(images_BHWC, corruption)

    def decode(self, tokens_BMD: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens (B, prefix + M, D) -> predicted patches (B, N, P)."""
        if self.resized is not None:
            here, there = self.resized
            map_BHWD = tokens_BMD.reshape(tokens_BMD.shape[0], *here, -1)
            tokens_BMD = resize(map_BHWD, there).reshape(tokens_BMD.shape[0], there[0] * there[1], -1)
        return self.decoder(tokens_BMD, corruption)


def build(config: ConfigDict) -> Autoencoder:
    """The model that a validated config describes."""
    here, there = grids(config)[-1], grid_shape(config.data.image_size, config.encoder.patch_size)
    return Autoencoder(
        build_encoder(config), DECODERS[config.decoder.name](config), (here, there) if here != there else None
    )


def patch_numbers(config: ConfigDict) -> tuple[int, int]:
    """(N, P): the number of patches per image, and of numbers per patch."""
    h, w = grid_shape(config.data.image_size, config.encoder.patch_size)
    return h * w, config.data.channels * config.encoder.patch_size**2


def init_params(config: ConfigDict, key: jax.Array) -> dict:
    """Initial parameters {"encoder": ..., "decoder": ...}, float32; they depend on the key alone.

    Call it under jit or eval_shape.
    """
    tokens, pixels = patch_numbers(config)
    corruption = sampler(config, tokens, pixels)(jax.random.split(jax.random.key(0), 1))
    return build(config).init(key, blank_image(config), corruption)["params"]
