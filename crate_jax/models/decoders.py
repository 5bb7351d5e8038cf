"""Decoders: modules ``(tokens (B, prefix + M, D), corruption) -> patches (B, N, P)``.

Shapes: B batch, M patch tokens that the encoder sees, N patch tokens, D width, P patch pixels, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.models import prefix_tokens, widths
from crate_jax.models.beginning import BEGINNINGS, NORMAL, Beginning
from crate_jax.models.corruption import Corruption
from crate_jax.models.crate import DICTIONARY_INIT, MSSA, Kernel
from crate_jax.models.layers import (
    BLOCK_EPS,
    Dtype,
    Norm,
    dense,
    layer_norm,
    norm_product,
    remat_rule,
    scan_blocks,
)
from crate_jax.models.patches import grid_shape, sincos_positions
from crate_jax.models.projector import Linear
from crate_jax.models.vit import scan_vit_blocks
from crate_jax.parallel import target
from crate_jax.parallel.sharding import keep_split_by_batch


class CrateDecoderBlock(nn.Module):
    """g = E LN(y); g - MSSA(LN(g)) (arXiv 2404.02446, eq. 2.17); scanned over layers.

    Named points: ``before_mssa`` (Y^{l+1/2}) and ``after_mssa`` (Y^{l+1}).

    Attributes:
      normalised: subtract from LN(g) instead of g, like the paper's Listing 3.
    """

    heads: int
    tied_output: bool
    normalised: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, y_BND: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer, (B, N, D) -> (B, N, D); `nn.scan` demands the second argument and result."""
        y_BND = keep_split_by_batch(y_BND)
        D = y_BND.shape[-1]
        norm = Norm(BLOCK_EPS, name="linear_norm").scale_and_bias(D)
        g = norm_product(y_BND, *norm, Kernel((D, D), DICTIONARY_INIT, name="linear")(), BLOCK_EPS)
        norm = Norm(BLOCK_EPS, name="mssa_norm").scale_and_bias(D)
        g, out = MSSA(self.heads, self.tied_output, self.dtype, negative=True, name="mssa")(g, *norm)
        stream = layer_norm(g, *norm, BLOCK_EPS) if self.normalised else g
        # The first axis has length one on TPUs; see CrateDecoder.
        self.sow("intermediates", "before_mssa", stream.reshape(stream.shape[-3:]))
        y = stream + out
        self.sow("intermediates", "after_mssa", y.reshape(y.shape[-3:]))
        return y, None


class CrateDecoder(nn.Module):
    """L anti-compressing blocks at the encoder's width, a norm, a pixel head (eqs. 2.20-2.21)."""

    depth: int
    heads: int
    grid: tuple[int, int]
    pixels: int
    prefix: int
    positions: bool
    tied_output: bool
    normalised: bool
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens_BMD: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens (B, prefix + M, D) -> patches (B, N, P)."""
        x = restore(self, tokens_BMD, corruption, self.positions, self.grid, self.prefix)
        blocks = scan_blocks(
            CrateDecoderBlock, self.depth, self.remat, self.heads, self.tied_output, self.normalised, self.dtype
        )
        # XLA for TPUs first fills with zeros the arrays that a loop will keep for the backward pass, unless no other
        # loop keeps arrays of the same shape. The encoder's arrays have one axis less.
        x = blocks(x[None], None)[0][0] if target.is_tpu() else blocks(x, None)[0]
        x = Norm(name="norm")(x)
        return dense(self.pixels, "head", self.dtype)(x)[:, self.prefix :]


class TransformerDecoder(nn.Module):
    """MAE's decoder: its own width, mask tokens, positions, ViT blocks, norm, pixel head."""

    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    pixels: int
    prefix: int
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens_BMD: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens (B, prefix + M, D) -> patches (B, N, P)."""
        x = dense(self.width, "embed", self.dtype)(tokens_BMD)
        x = restore(self, x, corruption, True, self.grid, self.prefix)
        x = scan_vit_blocks(
            x, None, None, None, self.depth, self.remat, BEGINNINGS["xavier"], self.heads, 4.0, "qkv", 0.0, self.dtype
        )
        x = Norm(name="norm")(x)
        return dense(self.pixels, "head", self.dtype)(x)[:, self.prefix :]


class LinearDecoder(nn.Module):
    """One linear map from a token to its pixels: the 1 x 1 convolution and pixel shuffle of ROPIM and SimMIM.

    With `begin.torch_head`, which is theirs, it begins as torch's convolution does.
    """

    pixels: int
    prefix: int
    begin: Beginning
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens_BMD: jax.Array, corruption: Corruption) -> jax.Array:
        """Tokens (B, prefix + N, D) -> patches (B, N, P)."""
        if self.begin.torch_head:
            return Linear(self.pixels, dtype=self.dtype, name="head")(tokens_BMD[:, self.prefix :])
        return dense(self.pixels, "head", self.dtype)(tokens_BMD[:, self.prefix :])


def restore(
    module: nn.Module,
    tokens_BMD: jax.Array,
    corruption: Corruption,
    positions: bool,
    grid: tuple[int, int],
    prefix: int,
) -> jax.Array:
    """Puts dropped tokens back as learned mask tokens and adds positions; (B, prefix + M, D) -> (B, prefix + N, D).

    This is a function that takes the decoder, and not a module, so that the mask token lies directly
    under the decoder.
    """
    D = tokens_BMD.shape[-1]
    fill_D = module.param("mask_token", NORMAL, (1, 1, D), jnp.float32)[0, 0] if corruption.fills_decoder else None
    patches_BND = corruption.restore(tokens_BMD[:, prefix:], fill_D)
    x = jnp.concatenate([tokens_BMD[:, :prefix], patches_BND], axis=1)
    return x + jnp.asarray(sincos_positions(grid, D, prefix)).astype(x.dtype) if positions else x


def _crate(config: ConfigDict) -> nn.Module:
    d = config.decoder
    return CrateDecoder(
        **_shared(config),
        depth=d.depth,
        heads=d.heads,
        positions=d.positions,
        tied_output=config.encoder.tied_output,
        normalised=d.residual == "normalised",
    )


def _transformer(config: ConfigDict) -> nn.Module:
    d = config.decoder
    return TransformerDecoder(**_shared(config), width=d.width or widths(config)[-1], depth=d.depth, heads=d.heads)


def _linear(config: ConfigDict) -> nn.Module:
    return LinearDecoder(
        pixels=config.data.channels * config.encoder.patch_size**2,
        prefix=prefix_tokens(config),
        begin=BEGINNINGS[config.encoder.init],
        dtype=jnp.dtype(config.dtype),
    )


def _shared(config: ConfigDict) -> dict:
    return dict(
        grid=grid_shape(config.data.image_size, config.encoder.patch_size),
        pixels=config.data.channels * config.encoder.patch_size**2,
        prefix=prefix_tokens(config),
        remat=remat_rule(config),
        dtype=jnp.dtype(config.dtype),
    )


DECODERS: dict[str, Callable[[ConfigDict], nn.Module]] = {
    "crate": _crate,
    "transformer": _transformer,
    "linear": _linear,
}
