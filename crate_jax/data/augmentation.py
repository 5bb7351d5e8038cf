"""Random crop boxes and flips of training images, as functions of given uniform numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax.data.decoding import RESAMPLING

# Columns of the uniform numbers of one position: the areas and the ratios of ten attempts, the place, the flip.
_AREA, _RATIO, _PLACE, _FLIP = slice(0, 10), slice(10, 20), slice(20, 22), 22
DRAWS = 24  # uniform numbers per position, a multiple of 4


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The augmentation that `config.data` asks for; small and picklable, for worker processes.

    Attributes:
      size: (height, width) of the training images in pixels.
      scale: range of the share of the image's area that a crop covers; (1, 1): the whole image is resized to `size`,
        whatever its aspect.
      ratio: range of width / height of a crop, drawn log-uniformly.
      flip: probability of a horizontal flip.
      interpolation: 'bicubic' or 'bilinear', both antialiased.
      layers: RandAugment operations per image.
      magnitude: strength of these operations, 0..30.
      alone: whether a crop is cut out before it is resized, as torchvision does, so that the filter does not see the
        pixels around it; otherwise it sees them, as in Pillow's `resize(box=...)`.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: str
    layers: int
    magnitude: float
    alone: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict) -> Augmentation:
        """Reads `config.data`."""
        d = config.data
        return cls(
            size=(int(d.image_size[0]), int(d.image_size[1])),
            scale=(float(d.crop_scale[0]), float(d.crop_scale[1])),
            ratio=(float(d.crop_ratio[0]), float(d.crop_ratio[1])),
            flip=float(d.flip),
            interpolation=d.interpolation,
            layers=int(d.randaugment_layers),
            magnitude=float(d.randaugment_magnitude),
        )

    @property
    def resample(self) -> Image.Resampling:
        """Pillow's constant for the interpolation."""
        return RESAMPLING[self.interpolation]

    def boxes(self, uniforms: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Returns the crop boxes of a batch: random resized crops, as Inception and torchvision draw them.

        The first of ten draws of an area and a ratio that fits into the image is taken; if none fits, the largest
        central crop of an allowed ratio.

        Args:
          uniforms: uniform numbers in [0, 1), float64 (B, DRAWS).
          heights: the images' heights (B,) in pixels.
          widths: the images' widths (B,) in pixels.

        Returns:
          Top, left, height and width of each box in whole pixels, int64 (B, 4).
        """
        heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
        if self.scale == (1.0, 1.0):
            zeros = np.zeros_like(heights)
            return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int64)
        low, high = self.scale
        area = (heights * widths)[:, None] * (low + (high - low) * uniforms[:, _AREA])
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = np.exp(low + (high - low) * uniforms[:, _RATIO])
        crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (crop_w >= 1) & (crop_h >= 1) & (crop_w <= widths[:, None]) & (crop_h <= heights[:, None])
        rows, first = np.arange(len(fits)), fits.argmax(axis=1)
        found = fits[rows, first]
        central_h = np.clip(np.rint(widths / self.ratio[0]), 1, heights)
        central_w = np.clip(np.rint(heights * self.ratio[1]), 1, widths)
        h = np.where(found, crop_h[rows, first], central_h)
        w = np.where(found, crop_w[rows, first], central_w)
        place = np.where(found[:, None], uniforms[:, _PLACE], 0.5)
        top, left = np.floor(place[:, 0] * (heights - h + 1)), np.floor(place[:, 1] * (widths - w + 1))
        return np.stack([top, left, h, w], axis=1).astype(np.int64)

    def flips(self, uniforms: np.ndarray) -> np.ndarray:
        """Returns which images are mirrored, bool (B,), from uniform numbers (B, DRAWS)."""
        return uniforms[:, _FLIP] < self.flip


# For each entry of a training batch the crops that it holds of an image, such as {"image": (crop,)}. The entry has an
# axis of crops, (b, crops, H, W, C), unless it is "image".
Layout = Mapping[str, tuple[Augmentation, ...]]


def numbered(layout: Layout) -> Iterator[tuple[str, int, Augmentation]]:
    """Yields the entry of the batch, the place in it and the augmentation of view 0, 1, ... of an image."""
    for name, crops in layout.items():
        for place, augmentation in enumerate(crops):
            yield name, place, augmentation


def empty(layout: Layout, count: int, channels: int) -> dict[str, np.ndarray]:
    """Zeros for the crops of `count` images: for each entry uint8 (count, crops, H, W, channels)."""
    return {name: np.zeros((count, len(crops), *crops[0].size, channels), np.uint8) for name, crops in layout.items()}


def packed(crops: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries of a batch, of arrays as :func:`empty` makes them."""
    return {name: x[:, 0] if name == "image" else x for name, x in crops.items()}
