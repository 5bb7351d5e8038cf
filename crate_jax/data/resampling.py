"""Antialiased crop and resize of batches of small images of one size, as two matrix products.

The filters, their supports and the rounding between the two passes are those of Pillow's `Image.resize(box=...)`: the
results differ by at most one grey level, in a few pixels of noisy images by two. The weights are integers, scaled so
that float32 holds every partial sum exactly: the result depends neither on the order in which a BLAS library adds, nor
on its threads, nor on the processor.
"""

from __future__ import annotations

import numpy as np

# 255 * sum|w| * 2**15 < 2**24 as long as sum|w| < 2, which holds for these filters.
WEIGHT_BITS = 15
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


class BatchResizer:
    """Cuts boxes of whole pixels out of images of one size and resizes them to another size.

    It holds a table of the weights of all possible boxes; `table_bytes` computes its size.

    Args:
      in_size: (height, width) of the images in pixels.
      out_size: (height, width) of the results in pixels.
      interpolation: 'bicubic' or 'bilinear'.
      alone: whether the filter does not see the pixels around a box.
    """

    def __init__(self, in_size: tuple[int, int], out_size: tuple[int, int], interpolation: str, alone: bool = False):
        self._rows = _table(in_size[0], out_size[0], interpolation, alone)
        same = (in_size[0], out_size[0]) == (in_size[1], out_size[1])
        self._columns = self._rows if same else _table(in_size[1], out_size[1], interpolation, alone)
        self._in_size = in_size

    @staticmethod
    def table_bytes(in_size: tuple[int, int], out_size: tuple[int, int]) -> int:
        """Returns the memory that the tables of weights take, in bytes."""
        return sum(4 * n * (n + 1) // 2 * n * m for n, m in zip(in_size, out_size, strict=True))

    def __call__(self, images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Resizes one box of each image.

        Args:
          images: planar images, uint8 (B, C, H, W).
          boxes: top, left, height and width of each box in pixels, int64 (B, 4).

        Returns:
          The resized boxes, uint8 (B, h, w, C).
        """
        batch, channels, height, width = images.shape
        across = self._columns[_box_number(boxes[:, 1], boxes[:, 3], width)]
        down = self._rows[_box_number(boxes[:, 0], boxes[:, 2], height)]
        x = images.reshape(batch, channels * height, width).astype(np.float32)
        x = np.matmul(x, across.transpose(0, 2, 1))
        _round_to_levels(x)
        x = np.matmul(down[:, None], x.reshape(batch, channels, height, -1))
        _round_to_levels(x)
        return x.astype(np.uint8).transpose(0, 2, 3, 1)


def _round_to_levels(x: np.ndarray) -> None:
    """Rounds weighted sums to whole grey levels 0..255, in place; halves are rounded up, as in Pillow."""
    x *= np.float32(2.0**-WEIGHT_BITS)
    x += np.float32(0.5)
    np.floor(x, out=x)
    np.clip(x, 0, 255, out=x)


def _box_number(start: np.ndarray, length: np.ndarray, side: int) -> np.ndarray:
    """Returns the row of the table for each box; rows are sorted by length, 1 .. side, then by start."""
    shorter = length - 1
    return shorter * side - shorter * (shorter - 1) // 2 + start


def _table(side: int, out: int, interpolation: str, alone: bool = False) -> np.ndarray:
    """Returns the weights of all boxes along one axis, float32 (side * (side + 1) / 2, out, side)."""
    lengths = np.concatenate([np.full(side - n + 1, n) for n in range(1, side + 1)])
    starts = np.concatenate([np.arange(side - n + 1) for n in range(1, side + 1)])
    scale = lengths / out
    stretch = np.maximum(scale, 1.0)[:, None]
    support = SUPPORT[interpolation] * stretch
    center = starts[:, None] + (np.arange(out) + 0.5) * scale[:, None]
    # Pillow's bounds: the pixels whose centres the filter reaches, also those outside the box but inside the image.
    first, end = (starts[:, None], (starts + lengths)[:, None]) if alone else (0, side)
    low = np.maximum((center - support + 0.5).astype(int), first)
    high = np.minimum((center + support + 0.5).astype(int), end)
    pixel = np.arange(side)
    distance = np.abs((pixel + 0.5 - center[..., None]) / stretch[..., None])
    weights = _FILTERS[interpolation](distance)
    weights *= (pixel >= low[..., None]) & (pixel < high[..., None])
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.rint(weights * 2**WEIGHT_BITS).astype(np.float32)


def _bilinear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - distance, 0.0)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Computes Keys' cubic filter with a = -0.5 (Keys 1981, "Cubic convolution interpolation")."""
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}
