"""Heads that turn an encoder's token maps into class scores per pixel: linear, and UPerNet.

Shapes: B batch, h and w patches per side, H and W pixels (or steps of a finer map), D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.models import ENCODERS, widths
from crate_jax.models.layers import Dtype, Norm, dense
from crate_jax.models.patches import resize

BINS = (1, 2, 3, 6)  # sides of the pooled maps in the pyramid pooling module
AUXILIARY_CHANNELS = 256
CLASSIFIER_INIT = nn.initializers.normal(0.01)


def pooling_matrix(side: int, bins: int) -> np.ndarray:
    """The matrix (bins, side) that averages over `bins` stretches of a side, like torch's AdaptiveAvgPool.

    Stretch i holds the positions floor(i side / bins) ... ceil((i + 1) side / bins) - 1.

    >>> pooling_matrix(3, 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    i, x = np.arange(bins)[:, None], np.arange(side)[None]
    inside = (x >= i * side // bins) & (x < -(-(i + 1) * side // bins))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


class LinearHead(nn.Module):
    """One linear map from a place's tokens, concatenated over the blocks, to its class scores."""

    classes: int

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Maps (B, h, w, D) -> one (B, h, w, C), float32; maps of other sides are resized to the first."""
        size = maps[0].shape[1:3]
        same = (x if x.shape[1:3] == size else resize(x, size) for x in maps)
        x = jnp.concatenate(list(same), axis=-1).astype(jnp.float32)
        return (dense(self.classes, "linear", jnp.float32, init=CLASSIFIER_INIT)(x),)


class ConvNorm(nn.Module):
    """Convolution without bias, layer norm over the channels, ReLU."""

    channels: int
    side: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        """(B, H, W, D) -> (B, H, W, channels)."""
        side = (self.side, self.side)
        x = nn.Conv(self.channels, side, use_bias=False, dtype=self.dtype, name="conv")(x_BHWD)
        return nn.relu(Norm(name="norm")(x))


class Pyramid(nn.Module):
    """Brings four maps to 4, 2, 1 and 1/2 times their resolution: BEiT's adapter (arXiv 2106.08254).

    The first map goes through two transposed convolutions with norm and GELU between them, the second through
    one, the last through a max-pool. Patches of 16 px give strides of 4, 8, 16 and 32 px, as in a
    convolutional backbone.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Maps (B, h, w, D) -> (B, 4h, 4w, D), (B, 2h, 2w, D), (B, h, w, D), (B, h/2, w/2, D), halves rounded up."""

        def double(x_BHWD: jax.Array, name: str) -> jax.Array:
            B, H, W, D = x_BHWD.shape  # 2 x 2 kernel, stride 2: windows do not overlap, so a product is enough
            x = dense(4 * D, name, self.dtype)(x_BHWD).reshape(B, H, W, 2, 2, D)
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, D)

        finest, fine, same, coarse = maps
        finest = nn.gelu(Norm(name="norm_4")(double(finest, "double_4a")), approximate=False)
        coarse = nn.max_pool(coarse, (2, 2), (2, 2), padding="SAME")  # keeps the last row of an odd side
        return double(finest, "double_4b"), double(fine, "double_2"), same, coarse


class UPerHead(nn.Module):
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221) on :class:`Pyramid`, as BEiT and MAE use it, or on ResNet stages.

    Pyramid pooling on the coarsest map, lateral 1 x 1 convolutions and a top-down sum on the other maps; then all
    are resized to the finest map, fused and classified. Every norm is a layer norm over the channels of one place;
    the published heads have batch norms over all devices. An image's loss thus depends on that image alone, and
    not on the batch, its micro-batches or the number of devices. The dropout of 0.1 before the published heads'
    classifiers is left out.

    Attributes:
      classes: C.
      channels: the head's width.
      auxiliary: also classify the third map by one convolution, for a second loss in training.
      dtype: the dtype of everything but the class scores.
      pyramid: whether the maps have one resolution, of which :class:`Pyramid` makes four.
    """

    classes: int
    channels: int
    auxiliary: bool
    dtype: Dtype
    pyramid: bool = True

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Maps (B, h, w, D) -> the finest (B, 4h, 4w, C) and, if `auxiliary`, the third (B, h, w, C), float32."""
        levels = list(Pyramid(self.dtype, name="pyramid")(maps) if self.pyramid else maps)
        top = self.pool(levels.pop())
        sums = [top]
        for i in reversed(range(len(levels))):
            lateral = self.conv(1, f"lateral_{i}")(levels[i])
            sums.append(lateral + resize(sums[-1], lateral.shape[1:3]))
        smooth = [self.conv(3, f"smooth_{i}")(x) for i, x in enumerate(reversed(sums[1:]))]
        size = smooth[0].shape[1:3]
        fused = self.conv(3, "fuse")(jnp.concatenate([resize(x, size) for x in (*smooth, top)], axis=-1))
        scores = [self.classify(fused, "linear")]
        if self.auxiliary:
            x = ConvNorm(AUXILIARY_CHANNELS, 3, self.dtype, name="auxiliary_conv")(levels[2])
            scores.append(self.classify(x, "auxiliary_linear"))
        return tuple(scores)

    def conv(self, side: int, name: str) -> ConvNorm:
        """A convolution of `side` x `side` to the head's width."""
        return ConvNorm(self.channels, side, self.dtype, name=name)

    def classify(self, x_BHWD: jax.Array, name: str) -> jax.Array:
        """Class scores of each place, (B, H, W, channels) -> (B, H, W, C) float32."""
        return dense(self.classes, name, jnp.float32, init=CLASSIFIER_INIT)(x_BHWD.astype(jnp.float32))

    def pool(self, x_BHWD: jax.Array) -> jax.Array:
        """Pyramid pooling (Zhao et al. 2017, arXiv 1612.01105): the map and averages over its parts, fused."""
        H, W = x_BHWD.shape[1:3]
        parts = [x_BHWD]
        for bins in BINS:
            rows, columns = (pooling_matrix(side, bins).astype(x_BHWD.dtype) for side in (H, W))
            pooled = jnp.einsum("bhwd,ih,jw->bijd", x_BHWD, rows, columns)
            parts.append(resize(self.conv(1, f"pool_{bins}")(pooled), (H, W)))
        return self.conv(3, "pool_fuse")(jnp.concatenate(parts, axis=-1))


def _linear(config: ConfigDict, classes: int) -> nn.Module:
    return LinearHead(classes)


def _upernet(config: ConfigDict, classes: int) -> nn.Module:
    options = config.segment
    channels, pyramid = options.channels or widths(config)[-1], ENCODERS[config.encoder.name].patches
    return UPerHead(classes, channels, options.auxiliary > 0, jnp.dtype(config.dtype), pyramid)


# Name -> (whole config, classes) -> module: maps of the encoder's blocks -> class scores, the main scores first.
HEADS: Mapping[str, Callable[[ConfigDict, int], Any]] = {"linear": _linear, "upernet": _upernet}
