"""Decodes image files to 8-bit RGB, and crops and resizes them in one step.

An input that is not 8-bit RGB is converted:

* grey, palette, CMYK, YCbCr: Pillow's conversion to RGB;
* alpha (RGBA, LA, a palette or an RGB image with a transparent colour): laid over white, as a viewer shows it; the
  colours stored under transparent pixels are arbitrary;
* 16-bit grey: scaled by 1 / 257 (Pillow would clip at 255); 32-bit integers by 1 / 257, or by 2**-23 if they exceed
  65535; floats are read as [0, 1], [0, 255] or [0, 65535], the first range that holds them all;
* EXIF orientation: applied, so that a photo is upright;
* several frames: the first one is taken.

Images of more than Pillow's limit (2 * `PIL.Image.MAX_IMAGE_PIXELS`, 179 million pixels) count as undecodable.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Pillow recognises a format by the content, whatever the file's name, and some formats are dangerous: EPS runs
# Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ORIENTATION_TAG = 0x0112
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as the crop stays this many times as large as the
# output: the antialiasing filter, not the decoder, then decides the result.
DRAFT_MARGIN = 2.0


class DecodeError(Exception):
    """A file that is not an image, is damaged, or is too large to decode."""


def open_image(data: bytes) -> Image.Image:
    """Parses an encoded image's header; the pixels are decoded later, by :func:`decode` or :func:`crops`.

    Raises:
      DecodeError: the bytes are not an image of one of FORMATS, or the header is damaged.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as e:  # the text of this error names the buffer
        raise DecodeError("not an image in a known format") from e
    except Exception as e:  # with a damaged file a parser may raise any error
        raise DecodeError(_reason(e)) from e


def read_file(path: str) -> bytes:
    """Reads a whole file.

    Raises:
      DecodeError: the file cannot be read, or is not a regular file.
    """
    try:
        # Opening a named pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):  # a device may have no end
                raise DecodeError("not a regular file")
            return f.read()
    except OSError as e:
        raise DecodeError(f"cannot be read ({e.strerror})") from e


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) in pixels as displayed, after the EXIF orientation.

    Raises:
      DecodeError: the header is damaged, or the image has no pixels.
    """
    try:
        width, height = image.size
        if min(width, height) < 1:
            raise DecodeError(f"empty image, {width} x {height} pixels")
        return (width, height) if _orientation(image) >= 5 else (height, width)
    except DecodeError:
        raise
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def decode(image: Image.Image) -> np.ndarray:
    """Decodes a whole image to uint8 (H, W, 3), oriented as displayed.

    >>> decode(Image.new("LA", (2, 1), (0, 0))).tolist()  # black, but transparent
    [[[255, 255, 255], [255, 255, 255]]]

    Raises:
      DecodeError: the pixels cannot be decoded.
    """
    try:
        return np.asarray(_to_rgb(_oriented(image)))
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def crop_resize(
    image: Image.Image, box: Sequence[float] | np.ndarray, size: Sequence[int], resample: Image.Resampling
) -> Image.Image:
    """Cuts `box` out of an image and resizes it, antialiased, to `size`; see :func:`crops`."""
    return crops(image, [box], [size], resample)[0]


def crops(
    image: Image.Image,
    boxes: Sequence[Sequence[float] | np.ndarray],
    sizes: Sequence[Sequence[int]],
    resample: Image.Resampling,
    alone: bool = False,
) -> list[Image.Image]:
    """Cuts boxes out of an image and resizes them, antialiased; the image is decoded once.

    Args:
      image: an opened image, whose pixels may not be decoded yet.
      boxes: (top, left, height, width) of each crop in pixels of the displayed image; may be fractional.
      sizes: (height, width) of each result in pixels.
      resample: Pillow's filter.
      alone: whether the filter does not see the pixels around a box.

    Returns:
      RGB images of `sizes`.

    Raises:
      DecodeError: the pixels cannot be decoded.
    """
    numbers = [tuple(float(v) for v in box) for box in boxes]
    try:
        shrink = 1
        if _orientation(image) == 1:
            reductions = [(h / size[0], w / size[1]) for (_, _, h, w), size in zip(numbers, sizes, strict=True)]
            shrink = _draft(image, min(h for h, _ in reductions), min(w for _, w in reductions))
        else:
            image = _oriented(image)
        rgb = _to_rgb(image)
        out = []
        for (top, left, height, width), size in zip(numbers, sizes, strict=True):
            right, bottom = min((left + width) / shrink, rgb.width), min((top + height) / shrink, rgb.height)
            left, top = left / shrink, top / shrink
            source = rgb
            if alone:
                x, y = math.floor(left), math.floor(top)
                source = rgb.crop((x, y, math.ceil(right), math.ceil(bottom)))
                left, top, right, bottom = left - x, top - y, right - x, bottom - y
            out.append(source.resize((size[1], size[0]), resample, box=(left, top, right, bottom)))
        return out
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _draft(image: Image.Image, reduction_height: float, reduction_width: float) -> int:
    """Lets the decoder shrink a JPEG if all crops allow it; returns the divisor of its sides.

    Args:
      image: an opened image; a JPEG is changed.
      reduction_height: the smallest height of a crop / height of its output.
      reduction_width: the smallest width of a crop / width of its output.
    """
    room = min(reduction_height, reduction_width) / DRAFT_MARGIN
    if not isinstance(image, JpegImageFile) or room < 2:
        return 1
    width, height = image.size
    done = image.draft("", (int(width / room), int(height / room)))
    return round(width / image.width) if done else 1


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow rotates these itself, and reports the size after that
        return 1
    if image.format in (None, "JPEG", "BMP", "PPM", "GIF") and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, KeyError, TypeError):  # a damaged EXIF block; the pixels may be fine
        return 1
    return value if value in range(2, 9) else 1


def _oriented(image: Image.Image) -> Image.Image:
    image.load()
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Scales grey values of more than 8 bits to uint8; the module's docstring lists the ranges."""
    values = np.nan_to_num(grey.astype(np.float64))
    highest = values.max(initial=0)
    if grey.dtype.kind == "f" and highest <= 255:
        scale = 255.0 if highest <= 1 else 1.0
    else:
        scale = 1 / 257 if highest <= 65535 else 2.0**-23
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
