"""Digits in any colour over pieces of photographs: small colour images with labels, without a download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from crate_jax.data.sources import Source, digest, digits

SCENES = {"train": 6000, "eval": 1000}
PARTS = {"train": (0.0, 0.6), "eval": (0.6, 1.0)}  # of a photograph's width: no background is in both splits
SIDE = (0.8, 1.0)  # of the digit, in shorter sides of the scene
TURN = 15.0  # degrees, to both sides
WINDOW = (32, 96)  # side of the piece of a photograph, in its pixels
DETAIL = 2  # pixels of the background along a side, before it is enlarged: little more than its colours
CONTRAST = 80.0  # least difference between the luminance of the digit and the mean one of its background, of 255
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)


class SceneSource(Source):
    """A handwritten digit of a random colour, size, place and angle over a piece of a photograph.

    The class is the digit. It is lighter or darker than its background, so a linear function of the pixels says little
    about it. The digits and the two photographs are scikit-learn's. A digit is in one split only, as in
    :func:`crate_jax.data.sources.digits`, and so is a background. Everything is a function of split, size and index.

    Args:
      split: 'train' or 'eval'.
      size: (height, width) of the images in pixels.

    Raises:
      DataError: scikit-learn is not installed.
    """

    def __init__(self, split: str, size: Sequence[int]):
        self._digits = digits(split)
        from sklearn.datasets import load_sample_images

        low, high = PARTS[split]
        photos = load_sample_images().images
        self._photos = [x[:, round(low * x.shape[1]) : round(high * x.shape[1])] for x in photos]
        classes = self._digits.class_names or []
        self._of_class = [np.flatnonzero(self._digits.labels == k) for k in range(len(classes))]
        self._size = (int(size[0]), int(size[1]))
        self.split, self.class_names = split, classes

    def __len__(self) -> int:
        return SCENES[self.split]

    def read(self, index: int) -> np.ndarray:
        """See Source.read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.Generator(np.random.Philox(key=[sorted(SCENES).index(self.split), index]))
        scene = self._background(rng)
        colour = self._colour(rng, float((scene @ LUMINANCE).mean()))
        digit = self._digit(rng, int(rng.choice(self._of_class[index % len(self._of_class)])))
        side = len(digit)
        top, left = (int(rng.integers(n - side + 1)) for n in self._size)
        part = scene[top : top + side, left : left + side]
        part += digit[..., None] * (colour - part)
        return np.rint(scene).astype(np.uint8)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photo = self._photos[rng.integers(len(self._photos))]
        side = int(rng.integers(WINDOW[0], WINDOW[1] + 1))
        top, left = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
        piece = Image.fromarray(photo[top : top + side, left : left + side])
        piece = piece.resize((DETAIL, DETAIL), Image.Resampling.BOX)
        return np.array(piece.resize(self._size[::-1], Image.Resampling.BICUBIC), np.float32)

    def _colour(self, rng: np.random.Generator, background: float) -> np.ndarray:
        """A colour whose luminance differs from the background's by CONTRAST or more, float32 (3,)."""
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        while abs(float(colour @ LUMINANCE) - background) < CONTRAST:
            colour = rng.uniform(0, 255, 3).astype(np.float32)
        return colour

    def _digit(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """Opacity of a digit at a random size and angle, in 0..1, float32 (side, side)."""
        side = max(1, round(min(self._size) * rng.uniform(*SIDE)))
        grey = Image.fromarray(self._digits.read(index)[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
        grey = grey.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC)
        return np.minimum(np.asarray(grey, np.float32) * np.float32(1.5 / 255), 1)  # enlarged strokes have a soft edge

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return Image.fromarray(self.read(index))

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"scenes/{self.split}[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest("scenes", self.split, self._size, len(self), self._digits.fingerprint())

    @property
    def labels(self) -> np.ndarray:
        """See Source.labels."""
        return (np.arange(len(self)) % len(self._of_class)).astype(np.int32)
