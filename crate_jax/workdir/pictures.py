"""Pictures of image grids, such as inputs, corrupted inputs and reconstructions."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crate_jax.workdir.whole import whole

CELL = 96  # smallest side of a cell, in pixels; smaller images are enlarged
GAP = 4  # pixels between cells and around the grid
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)


def reconstruction_grid(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arranges images in one row per image and one column, with a caption, per entry.

    Small images are enlarged by a whole factor without smoothing, so that each of their pixels stays visible.

    Args:
      columns: for each caption, images with values in [0, 1], float (n, H, W, C), of one n, H and W in all columns.
        Values outside are clipped; NaN becomes black. Of more than three channels the first three are shown, of two
        the first one, as grey.

    Returns:
      The picture, uint8 (Hg, Wg, 3).

    Raises:
      ValueError: there is no column or no image, or the columns have different or wrong shapes.
    """
    columns = {caption: rgb(np.asarray(images)) for caption, images in columns.items()}
    shapes = {caption: np.shape(images) for caption, images in columns.items()}
    shape = next(iter(shapes.values()), ())
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or len(set(shapes.values())) != 1:
        raise ValueError(f"reconstruction_grid: columns must all have one shape (n, H, W, 3), got {shapes}")
    n, height, width, _ = shape
    scale = -(-CELL // min(height, width, CELL))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=min(max(width // 8, 12), 20))
    captions = [_wrap(caption, font, width) for caption in columns]
    header = max(_text_height(text, font) for text in captions) + GAP
    picture = Image.new("RGB", (GAP + len(columns) * (width + GAP), GAP + header + n * (height + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for j, (text, images) in enumerate(zip(captions, columns.values(), strict=True)):
        x = GAP + j * (width + GAP)
        draw.multiline_text((x + width / 2, header), text, INK, font, anchor="md", align="center")
        for i, image in enumerate(to_uint8(images)):
            cell = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
            picture.paste(Image.fromarray(cell), (x, GAP + header + i * (height + GAP)))
    return np.asarray(picture)


def rgb(images: np.ndarray) -> np.ndarray:
    """The channels of images (n, H, W, C) that are shown as red, green and blue."""
    if images.ndim != 4 or images.shape[-1] in (0, 3):
        return images
    return images[..., :3] if images.shape[-1] > 3 else images[..., [0, 0, 0]]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Rounds numbers in [0, 1], of any shape, to uint8 in 0..255; values outside are clipped, and NaN becomes 0.

    >>> to_uint8(np.array([-1.0, 0.5, 2.0, np.nan])).tolist()
    [0, 128, 255, 0]
    """
    return (np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)


def save_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Writes a picture as a PNG file, whole, and creates the file's folder if it does not exist.

    Args:
      path: the file.
      array: the picture, uint8 (H, W, 3).

    Raises:
      OSError: the file cannot be written.
      TypeError: the array is not uint8 (H, W, 3).
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise TypeError(f"save_png: a picture must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with whole(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Breaks text into lines of at most `width` pixels, if possible between words."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def _text_height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font, anchor="ma")
    return int(np.ceil(box[3]))
