"""ResNets (He et al., arXiv 1512.03385) as encoders, with the weights and the arithmetic of torchvision's.

Their tokens are the places of the last stage's map; there is no class token. Names of parameters: ``stem/{conv,norm}``
and ``stage{1..4}/block{0..}/{conv1,norm1,conv2,norm2[,conv3,norm3][,shortcut_conv,shortcut_norm]}``, kernels
(kh, kw, in, out), batch norms of :mod:`crate_jax.models.batch_norm`.

Shapes: B batch, H and W pixels, h and w places of a map per side, C channels, D width of the last stage, P patch
pixels, G groups of images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models import cpu_convolution
from crate_jax.models.batch_norm import BatchNorm
from crate_jax.models.beginning import NORMAL
from crate_jax.models.corruption import CLEAN, Corruption, Identity
from crate_jax.models.layers import Dtype
from crate_jax.models.patches import patchify, unpatchify
from crate_jax.parallel import target
from crate_jax.parallel.sharding import keep_split_by_batch

KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # as in torchvision


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the names of ResNets stand for.

    Attributes:
      blocks: number of blocks in each of the four stages.
      bottleneck: whether a block is 1 x 1, 3 x 3, 1 x 1 convolutions with four times the width at its end, and not two
        of 3 x 3.
      inner: factor on the width inside the bottlenecks; 2 in wide ResNets (arXiv 1605.07146) as torchvision has them.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    inner: int = 1

    def widths(self, width: int) -> tuple[int, ...]:
        """Channels after each stage, for a first stage of `width`.

        >>> Architecture((3, 4, 6, 3), bottleneck=True).widths(64)
        (256, 512, 1024, 2048)
        """
        return tuple(width * 2**i * (4 if self.bottleneck else 1) for i in range(4))


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture((2, 2, 2, 2)),
    "resnet34": Architecture((3, 4, 6, 3)),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "wide_resnet50_2": Architecture((3, 4, 6, 3), bottleneck=True, inner=2),
}
STEMS = ("imagenet", "cifar")


def map_sizes(image_size: Sequence[int], stem: str, stem_padding: int) -> tuple[tuple[int, int], ...]:
    """(h, w) of the map after each stage, for images of (height, width) pixels.

    >>> map_sizes((32, 32), "cifar", 2), map_sizes((224, 160), "imagenet", 0)
    (((34, 34), (17, 17), (9, 9), (5, 5)), ((56, 40), (28, 20), (14, 10), (7, 5)))
    """

    def sides(n: int) -> list[int]:
        first = n + 2 * stem_padding - 2 if stem == "cifar" else math.ceil(n / 4)
        return [math.ceil(first / 2**i) for i in range(4)]

    h, w = (sides(n) for n in image_size)
    return tuple(zip(h, w, strict=True))


def draw_groups(keys_B: jax.Array, groups: int) -> jax.Array:
    """Memberships (B, G) of images in random groups of equal size; they do not depend on the layout over devices.

    Raises:
      ValueError: the number of images is not a multiple of `groups`.
    """
    B = keys_B.shape[0]
    if B % groups:
        raise ValueError(f"{B} images cannot be cut into {groups} groups of equal size")
    rank_B = jnp.argsort(jnp.argsort(jax.vmap(jax.random.bits)(keys_B)))
    return jax.nn.one_hot(rank_B // (B // groups), groups)


def conv(features: int, side: int, stride: int, name: str, dtype: Dtype, padding: int | None = None) -> nn.Conv:
    """A convolution without bias, `side` x `side`; the padding is (side - 1) / 2 if none is given."""
    p = (side - 1) // 2 if padding is None else padding
    return nn.Conv(
        features, (side, side), (stride, stride), [(p, p), (p, p)],
        use_bias=False, dtype=dtype, kernel_init=KERNEL_INIT, name=name, conv_general_dilated=cpu_convolution.convolve,
    )  # fmt: skip


WINDOW: Any = (3, 3), (2, 2), ((1, 1), (1, 1))  # of the max-pool: sides, strides, padding
NINE = tuple((i, j) for i in range(3) for j in range(3))


@jax.custom_vjp
def max_pool(x_BHWC: jax.Array) -> jax.Array:
    """The largest of 3 x 3 places, with stride 2 and padding 1: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C).

    The gradient goes to the first of equal places, as in PyTorch. The forward pass keeps for each place which of the
    nine it took, one byte, and the backward pass is one sum of nine shifted arrays. XLA's own for GPUs keeps 20 bytes,
    and adds up by atomic operations, in no fixed order.
    """
    return nn.max_pool(x_BHWC, *WINDOW)


def _max_pool_forward(x_BHWC: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    B, H, W, C = x_BHWC.shape
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    h, w = (H + 1) // 2, (W + 1) // 2
    places = [jax.lax.slice(padded, (0, i, j, 0), (B, i + 2 * h - 1, j + 2 * w - 1, C), (1, 2, 2, 1)) for i, j in NINE]
    y, which = places[0], jnp.zeros((B, h, w, C), jnp.uint8)
    for k, place in enumerate(places[1:], 1):
        larger = (place > y) | jnp.isnan(place)
        y, which = jnp.where(larger, place, y), jnp.where(larger, jnp.uint8(k), which)
    return y, (which, x_BHWC[:0])  # the second says the shape of x


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], g_BhwC: jax.Array) -> tuple[jax.Array]:
    which, like = saved
    (H, W), (h, w) = like.shape[1:3], which.shape[1:3]
    dx = jnp.zeros((len(which), H, W, which.shape[3]))
    for k, (i, j) in enumerate(NINE):
        taken = jnp.where(which == k, g_BhwC.astype(jnp.float32), 0)
        sides = [(0, 0, 0), (i - 1, H - 2 * h + 2 - i, 1), (j - 1, W - 2 * w + 2 - j, 1), (0, 0, 0)]
        dx += jax.lax.pad(taken, jnp.float32(0), sides)
    return (dx.astype(g_BhwC.dtype),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


class Stem(nn.Module):
    """imagenet: 7 x 7 convolution and 3 x 3 max-pool, each with stride 2. cifar: one 3 x 3 convolution, stride 1."""

    width: int
    kind: str
    padding: int
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, groups_BG: jax.Array | None) -> jax.Array:
        """(B, H, W, 3) -> (B, h, w, width)."""
        small = self.kind == "cifar"
        side, stride, padding = (3, 1, self.padding) if small else (7, 2, 3)
        x = conv(self.width, side, stride, "conv", self.dtype, padding)(images_BHWC.astype(self.dtype))
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, self.train, groups_BG))
        if small:
            return x
        return nn.max_pool(x, *WINDOW) if target.is_tpu() else max_pool(x)  # TPUs have an operation for the gradient


class Block(nn.Module):
    """A residual block; the stride lies on the (first) 3 x 3 convolution, as in torchvision.

    Attributes:
      inner: channels between the convolutions.
      width: channels of the result.
      bottleneck: see :class:`Architecture`.
      stride: 1, or 2 for the first block of a stage.
      train: whether batch norms use the statistics of the batch.
      dtype: type of the activations.
    """

    inner: int
    width: int
    bottleneck: bool
    stride: int
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, groups_BG: jax.Array | None) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width), sides rounded up."""

        def layer(x: jax.Array, number: int, features: int, side: int, stride: int, relu: bool) -> jax.Array:
            x = conv(features, side, stride, f"conv{number}", self.dtype)(x)
            return BatchNorm(relu=relu, dtype=self.dtype, name=f"norm{number}")(x, self.train, groups_BG)

        if self.bottleneck:
            y = layer(x_BHWC, 1, self.inner, 1, 1, relu=True)
            y = layer(y, 2, self.inner, 3, self.stride, relu=True)
            y = layer(y, 3, self.width, 1, 1, relu=False)
        else:
            y = layer(x_BHWC, 1, self.inner, 3, self.stride, relu=True)
            y = layer(y, 2, self.width, 3, 1, relu=False)
        if self.stride != 1 or x_BHWC.shape[-1] != self.width:
            x_BHWC = conv(self.width, 1, self.stride, "shortcut_conv", self.dtype)(x_BHWC)
            x_BHWC = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x_BHWC, self.train, groups_BG)
        return nn.relu(x_BHWC + y)


def _saves_products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")  # the second on CPUs


# What a recomputed block keeps; see REMAT in layers.py. All products of a ResNet are with weights.
REMAT: dict[str, Any] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "weights": _saves_products,
    "products": _saves_products,
}


class Stage(nn.Module):
    """`depth` residual blocks of one width, of which the first has the stage's stride."""

    depth: int
    inner: int
    width: int
    bottleneck: bool
    stride: int
    train: bool
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, groups_BG: jax.Array | None) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width), sides rounded up."""
        cls = nn.remat(Block, policy=REMAT[self.remat]) if self.remat else Block
        for i in range(self.depth):
            block = cls(
                self.inner, self.width, self.bottleneck, self.stride if i == 0 else 1, self.train, self.dtype,
                name=f"block{i}",
            )  # fmt: skip
            x_BHWC = block(split_by_batch(x_BHWC), groups_BG)
        return x_BHWC


def split_by_batch(x_BHWC: jax.Array) -> jax.Array:
    """:func:`keep_split_by_batch` for maps."""
    return keep_split_by_batch(x_BHWC.reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1])).reshape(x_BHWC.shape)


def corrupt_image(
    images_BHWC: jax.Array, corruption: Corruption, patch_size: int, fill_P: jax.Array | None
) -> jax.Array:
    """The images that corrupted patches form, (B, H, W, 3) -> (B, H, W, 3); `fill_P` replaces removed patches."""
    if isinstance(corruption, Identity):
        return images_BHWC
    x_BNP = corruption.corrupt_pixels(patchify(images_BHWC, patch_size))
    H, W = images_BHWC.shape[1:3]
    return unpatchify(corruption.corrupt_tokens(x_BNP, fill_P), (H, W), patch_size)


class ResNetEncoder(nn.Module):
    """Stem and four stages; the tokens are the places of the last map, in raster order.

    A corruption acts on the patches of the normalised pixels, and the network sees the image that they form: masked
    patches are replaced by 0 or, with ``mask_fill=token``, by a learned patch of pixels.

    Attributes:
      architecture: blocks per stage and their kind.
      width: channels of the first stage; 64 in torchvision.
      stem: one of STEMS.
      stem_padding: padding of the convolution of the stem "cifar"; 2 in solo-learn, 1 elsewhere.
      patch_size: side in pixels of the patches that a corruption acts on.
      norm_groups: G; in training a batch is cut at random into so many groups of equal size, of which each has its own
        statistics, so that an image's features tell less about the others of its batch (MoCo, arXiv 1911.05722).
      remat: a row of REMAT: blocks are recomputed in the backward pass; empty: they are not.
      dtype: type of the activations.
    """

    architecture: Architecture
    width: int
    stem: str
    stem_padding: int
    patch_size: int
    norm_groups: int
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> jax.Array:
        """Normalised images (B, H, W, 3) -> tokens (B, h * w, D).

        With `keys_B` batch norms use the batch's statistics and move the running ones (:func:`batch_norm.train`).
        Named points: ``input``, the tokens that the first stage gets, a tuple of one (B, h * w, C);
        ``after_stage``, the tokens after each stage, a tuple of four.
        """
        train = keys_B is not None
        groups_BG = draw_groups(keys_B, self.norm_groups) if keys_B is not None and self.norm_groups > 1 else None
        fill_P = None
        if corruption.fills_encoder:
            numbers = images_BHWC.shape[-1] * self.patch_size**2
            fill_P = self.param("mask_token", NORMAL, (1, 1, numbers), jnp.float32)[0, 0]
        x = corrupt_image(images_BHWC, corruption, self.patch_size, fill_P)
        x = Stem(self.width, self.stem, self.stem_padding, train, self.dtype, name="stem")(x, groups_BG)
        self.sow("intermediates", "input", x.reshape(x.shape[0], -1, x.shape[-1]))
        widths = self.architecture.widths(self.width)
        tokens = x
        for i, (depth, width) in enumerate(zip(self.architecture.blocks, widths, strict=True)):
            inner = self.width * 2**i * self.architecture.inner
            x = Stage(
                depth, inner, width, self.architecture.bottleneck, 2 if i else 1, train, self.remat, self.dtype,
                name=f"stage{i + 1}",
            )(x, groups_BG)  # fmt: skip
            tokens = x.reshape(x.shape[0], -1, width)
            self.sow("intermediates", "after_stage", tokens)
        return tokens
