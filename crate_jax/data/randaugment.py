"""RandAugment (Cubuk et al., 2020), with the operations and ranges of CRATE's `data/randomaug.py`.

Each of `layers` operations is drawn with replacement from the list below and applied with strength
low + magnitude / 30 * (high - low):

    AutoContrast, Equalize, Invert     (no strength)
    Rotate         0 .. 30 degrees, either sign       Sharpness    0.1 .. 1.9 (1: unchanged)
    Posterize      0 .. 4 bits kept, at least 1       ShearX/Y     0 .. 0.3, either sign
    Solarize       0 .. 256, threshold                Cutout       0 .. 40 px, side of a square
    SolarizeAdd    0 .. 110 added, then solarised     TranslateX/Y 0 .. 100 px, either sign
    Color, Contrast, Brightness  0.1 .. 1.9 (1: unchanged)

The ranges in pixels are for images of 224 px; they are scaled with the shorter side, as otherwise a translation would
move a 32 px image out of the frame. Areas that an operation uncovers are black; Cutout fills with ImageNet's mean
colour. As in the released file, Posterize and Solarize become weaker as the magnitude grows, and the four enhancements
change almost nothing at magnitude 15. (The released fine-tuning script imports that file but calls torchvision's
RandAugment(2, 14): 14 operations, without Invert, SolarizeAdd and Cutout. The code of the pre-training is not public.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30
REFERENCE_SIDE = 224
CUTOUT_COLOUR = (125, 123, 114)
SOLARIZE_ADD_THRESHOLD = 128

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def randaugment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """Applies `layers` random operations of one magnitude.

    Args:
      image: an RGB image.
      layers: number of operations, n in the paper.
      magnitude: strength of the operations, 0..30, m in the paper.
      rng: the generator that chooses operations, signs and places.

    Returns:
      An RGB image of the same size.
    """
    for choice in rng.integers(len(OPERATIONS), size=layers):
        operation, low, high = OPERATIONS[choice]
        image = operation(image, low + magnitude / MAX_MAGNITUDE * (high - low), rng)
    return image


def _random_sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _pixels(image: Image.Image, value: float) -> float:
    return value * min(image.size) / REFERENCE_SIDE


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


def _autocontrast(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_random_sign(value, rng))


def _posterize(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(image, max(1, int(value)))


def _solarize(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(value))


def _solarize_add(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    brighter = image.point(lambda v: min(255, v + int(value)))
    return ImageOps.solarize(brighter, SOLARIZE_ADD_THRESHOLD)


def _color(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Color(image).enhance(value)


def _contrast(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(value)


def _brightness(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(value)


def _sharpness(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(value)


def _shear_x(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, _random_sign(value, rng), 0, 0, 1, 0)


def _shear_y(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, _random_sign(value, rng), 1, 0)


def _cutout(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    side = _pixels(image, value)
    left = max(0, int(rng.random() * image.width - side / 2))
    top = max(0, int(rng.random() * image.height - side / 2))
    right, bottom = min(image.width, left + side), min(image.height, top + side)
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), CUTOUT_COLOUR)
    return image


def _translate_x(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, _random_sign(_pixels(image, value), rng), 0, 1, 0)


def _translate_y(image: Image.Image, value: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _random_sign(_pixels(image, value), rng))


OPERATIONS: tuple[tuple[Operation, float, float], ...] = (
    (_autocontrast, 0, 1),
    (_equalize, 0, 1),
    (_invert, 0, 1),
    (_rotate, 0, 30),
    (_posterize, 0, 4),
    (_solarize, 0, 256),
    (_solarize_add, 0, 110),
    (_color, 0.1, 1.9),
    (_contrast, 0.1, 1.9),
    (_brightness, 0.1, 1.9),
    (_sharpness, 0.1, 1.9),
    (_shear_x, 0, 0.3),
    (_shear_y, 0, 0.3),
    (_cutout, 0, 40),
    (_translate_x, 0, 100),
    (_translate_y, 0, 100),
)
