"""Images as sequences of patches, and the fixed tables of their positions.

Shapes: B batch, H and W pixels, h and w patches per side, N = h * w tokens, p patch side,
C channels, P = p * p * C numbers per patch, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def grid_shape(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """(h, w), the number of patches per column and per row, of an image of (height, width) pixels.

    >>> grid_shape((224, 112), 16)
    (14, 7)
    """
    return image_size[0] // patch_size, image_size[1] // patch_size


def patchify(images_BHWC: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images (B, H, W, C) into raster-ordered patches (B, N, P), P as (row, column, channel).

    >>> image_BHWC = jnp.arange(8).reshape(1, 2, 4, 1)
    >>> patchify(image_BHWC, 2).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]

    Raises:
      ValueError: a side of the images is not a multiple of `patch_size`.
    """
    B, H, W, C = images_BHWC.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"images of {H} x {W} pixels cannot be cut into patches of {patch_size} x {patch_size}")
    h, w = grid_shape((H, W), patch_size)
    x = images_BHWC.reshape(B, h, patch_size, w, patch_size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, patch_size * patch_size * C)


def unpatchify(patches_BNP: jax.Array, image_size: tuple[int, int], patch_size: int) -> jax.Array:
    """Inverse of :func:`patchify`: (B, N, P) -> (B, H, W, C)."""
    B = patches_BNP.shape[0]
    h, w = grid_shape(image_size, patch_size)
    x = patches_BNP.reshape(B, h, w, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * patch_size, w * patch_size, -1)


@functools.cache
def sincos_positions(grid: tuple[int, int], width: int, prefix: int = 1) -> np.ndarray:
    """Fixed 2-D sine-cosine table (prefix + N, D), float32; the first `prefix` rows (the class token) are zero.

    The first half of the width encodes the column, the second half the row; in each, D/4 sines
    come before D/4 cosines of frequencies 10000^(-i / (D/4)), as in MAE (He et al. 2022) and
    CRATE-MAE.

    Raises:
      ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width that is a multiple of 4, got {width}")
    frequencies = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(halves, axis=1)
    return np.concatenate([np.zeros((prefix, width)), table]).astype(np.float32)


@functools.cache
def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
    """The row of the relative-bias table for each pair of tokens, (1 + N, 1 + N) int32.

    As in BEiT and ROPIM, the (2h-1)(2w-1) displacements come first; then come the rows of
    class-to-patch, patch-to-class and class-to-class.
    """
    h, w = grid
    rows, columns = (c.reshape(-1) for c in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    dy = rows[:, None] - rows[None, :] + h - 1
    dx = columns[:, None] - columns[None, :] + w - 1
    displacements = (2 * h - 1) * (2 * w - 1)
    index = np.empty((h * w + 1, h * w + 1), np.int32)
    index[1:, 1:] = dy * (2 * w - 1) + dx
    index[0, :] = displacements
    index[:, 0] = displacements + 1
    index[0, 0] = displacements + 2
    return index


def relative_table_rows(grid: tuple[int, int]) -> int:
    """The number of rows of the table that :func:`relative_position_index` points into.

    >>> relative_table_rows((14, 14))
    732
    """
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def resize(x_BHWD: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes bilinearly between pixel centres (torch's align_corners=False), (B, H, W, D) -> (B, *size, D)."""
    shape = (x_BHWD.shape[0], *size, x_BHWD.shape[-1])
    return jax.image.resize(x_BHWD, shape, "bilinear", antialias=False)


def resize_table(table_ND: jax.Array, grid: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Resizes a table with one row per place of a grid to another grid, (h w, D) -> (h' w', D).

    The interpolation is bicubic and antialiased (Keys, a = -1/2), as timm's. The scripts of MAE, BEiT and DINO take
    torch's other bicubic kernel (a = -3/4) without antialiasing.
    """
    resized = jax.image.resize(table_ND.reshape(*grid, -1), (*new, table_ND.shape[-1]), "cubic")
    return resized.reshape(new[0] * new[1], -1)


def resize_relative_table(table_RH: jax.Array, grid: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Resizes a table of relative biases to another grid, (R, H) -> (R', H); R: :func:`relative_table_rows`.

    The class token's three rows stay. BEiT's own script resizes at spacings that grow geometrically; here
    they are equal.
    """
    sides, new_sides = ((2 * h - 1, 2 * w - 1) for h, w in (grid, new))
    return jnp.concatenate([resize_table(table_RH[:-3], sides, new_sides), table_RH[-3:]])


def standardise(patches_BNP: jax.Array) -> jax.Array:
    """Gives each patch zero mean and unit variance, (B, N, P) -> (B, N, P), as MAE's norm_pix_loss."""
    mean_BN1, variance_BN1 = statistics(patches_BNP)
    return (patches_BNP - mean_BN1) * jax.lax.rsqrt(variance_BN1)


def statistics(patches_BNP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean of each patch, and its unbiased variance plus 1e-6, each (B, N, 1)."""
    mean_BN1 = jnp.mean(patches_BNP, axis=-1, keepdims=True)
    return mean_BN1, jnp.var(patches_BNP, axis=-1, keepdims=True, ddof=1) + 1e-6
