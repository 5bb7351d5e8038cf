"""Decodes image files to 8-bit RGB, and crops and resizes them in one step.

An input that is not 8-bit RGB is converted:

* grey, palette, CMYK, YCbCr: Pillow's conversion to RGB;
* alpha (RGBA, LA, a palette with transparent colours): laid over white, as a viewer shows it; the colours stored under
  transparent pixels are arbitrary; a transparent colour of a PNG is looked for at the depth that the file has;
* RGB of 16 bits per channel: the upper 8 bits;
* grey of more than 8 bits: 12 and 16 bits are scaled by 255 / the largest value (Pillow would clip at 255); signed
  numbers likewise, by their largest positive value; integers of 32 bits by 1 / 257 if they do not exceed 65535; floats
  are read as [0, 1], [0, 255] or [0, 65535], the first range that holds them all, NaN as 0. A TIFF whose 0 is white is
  inverted; its MinSampleValue and SMinSampleValue are statistics and change nothing (TIFF 6.0, sections 8 and 19);
* mode I in memory, without a file (Pillow forgets the file of a crop or of a resized copy): values up to 255 are bytes,
  as in Pillow's conversion to L; larger ones are as in a file. Mode I;16 is always of 16 bits;
* EXIF orientation: applied, so that a photo is upright;
* several frames: the first one is taken.

Undecodable are images without a look: negative greys, floats above 65535; layouts that Pillow reads wrongly; and images
of more than `config.data.max_pixels`.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY, PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from crate_jax.errors import escaped

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Pillow recognises a format by the content, whatever the file's name, and some formats are dangerous: EPS runs
# Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow decodes no larger image, and its own warning comes at half of this: `max_pixels` stands in for it.
LARGEST = 2 * 89_478_485
warnings.filterwarnings("ignore", module=r"PIL\.")  # two lines each, which do not say which file
GREY_STEP = {"L;2": 85, "L;4": 17}  # Pillow multiplies grey of 2 and 4 bits by this, to fill 0..255
BITS_TAG, COMPRESSION_TAG, PHOTOMETRIC_TAG, PLANES_TAG, SUBSAMPLING_TAG, FORMAT_TAG = 258, 259, 262, 284, 530, 339
WHITE_IS_ZERO, YCBCR = 0, 6  # values of PHOTOMETRIC_TAG
UNSIGNED, SIGNED = 1, 2  # values of FORMAT_TAG
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts in which Pillow looks for an orientation
# Chunks of a PNG without which we show it the same.
METADATA = (*TEXTS, b"tIME", b"pHYs", b"hIST", b"sPLT", b"cHRM", b"gAMA", b"sRGB", b"bKGD")
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as the crop stays this many times as large as the
# output: the antialiasing filter, not the decoder, then decides the result.
DRAFT_MARGIN = 2.0
GREY, OF_FILES = 1, (1, 2, 3, 4)  # numbers of channels that image files give; see :func:`of_channels`
_RAW_MODE, _DATA, _GREY = "crate_jax raw mode", "crate_jax data", "crate_jax grey"  # entries of Image.info
# An opened image, or the pixels of one that has another number of channels than 3, uint8 (H, W, C).
Picture = Image.Image | np.ndarray


class DecodeError(Exception):
    """A file that is not an image, is damaged, or is too large to decode."""

    def __str__(self) -> str:
        return escaped(super().__str__())


def open_image(data: bytes, max_pixels: int = LARGEST) -> Image.Image:
    """Parses an encoded image's header; the pixels are decoded later, by :func:`decode` or :func:`crops`.

    Args:
      data: the file.
      max_pixels: the largest height x width to decode, at most LARGEST.

    Raises:
      DecodeError: the bytes are not an image of one of FORMATS, the header is damaged, or the image is too large.
    """
    if data.startswith(PNG):
        data = _without_large_metadata(data)
    try:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (SyntaxError, ValueError, OSError):
            if not data.startswith(PNG):
                raise
            data = _without(data, [(start, end) for kind, start, end in _chunks(data) if kind in METADATA])
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if isinstance(image, TiffImageFile):
            _mend_layout(image)
    except UnidentifiedImageError as e:  # the text of this error names the buffer
        raise DecodeError("not an image in a known format") from e
    except Exception as e:  # with a damaged file a parser may raise any error
        raise DecodeError(_reason(e)) from e
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(f"has {width} x {height} pixels, more than config.data.max_pixels={max_pixels}")
    tiles = getattr(image, "tile", None)  # empty once the pixels are decoded
    args = tiles[0].args if tiles else ""
    image.info[_RAW_MODE] = str(args[0] if isinstance(args, tuple) and args else args)
    if isinstance(image, PngImageFile) and "transparency" in image.info and raw_mode(image).startswith("RGB;16"):
        image.info[_DATA] = data
    return image


def raw_mode(image: Image.Image) -> str:
    """Returns Pillow's name for how the file of an opened image stores pixels, such as L;2 for grey of 2 bits."""
    return str(image.info.get(_RAW_MODE, ""))


def open_file(path: str) -> IO[bytes]:
    """Opens a regular file.

    Raises:
      DecodeError: the file cannot be opened, or is not a regular file.
    """
    try:
        # Opening a named pipe would wait for a writer.
        f = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115  # the caller closes it
    except OSError as e:
        raise DecodeError(f"cannot be read ({e.strerror})") from e
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):  # a device may have no end
        f.close()
        raise DecodeError("not a regular file")
    return f


def read_file(path: str) -> bytes:
    """Reads a whole file.

    Raises:
      DecodeError: the file cannot be read, or is not a regular file.
    """
    try:
        with open_file(path) as f:
            return f.read()
    except OSError as e:
        raise DecodeError(f"cannot be read ({e.strerror})") from e


def picture(pixels: np.ndarray) -> Picture:
    """Pixels, uint8 (H, W, C), as an opened image."""
    return Image.fromarray(pixels) if pixels.shape[-1] == 3 else pixels


def stored(channels: int) -> tuple[int, ...]:
    """The numbers of channels that an array of images may have: grey images are read as images of 3 channels, too."""
    return (1, 3) if channels == 3 else (channels,)


def layouts(shape: Sequence[int], channels: int) -> tuple[bool, bool]:
    """Whether an array of this shape may be images, and which axis may be the channels'.

    Args:
      shape: the array's.
      channels: how many an image has once it is read.

    Returns:
      whether it may be (n, H, W), which is grey, or (n, H, W, C); and whether it may be (n, C, H, W).

    >>> layouts((9, 5, 7), 3), layouts((9, 3, 5, 7), 3), layouts((9, 3, 5, 1), 3)
    ((True, False), (False, True), (True, True))
    """
    if len(shape) == 4:
        return shape[3] in stored(channels), shape[1] in stored(channels)
    return len(shape) == 3 and 1 in stored(channels), False


def from_array(pixels: np.ndarray, channels: int) -> Picture:
    """Pixels, uint8 (H, W) or (H, W, C) with C of :func:`stored`, as an opened image of so many channels."""
    grey = pixels.ndim == 2
    if channels != 3:
        return np.ascontiguousarray(pixels[..., None] if grey else pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if not grey and pixels.shape[2] == 1 else pixels))


def oriented_size(image: Picture) -> tuple[int, int]:
    """Returns (height, width) in pixels as displayed, after the EXIF orientation.

    Raises:
      DecodeError: the header is damaged, or the image has no pixels.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    try:
        width, height = image.size
        if min(width, height) < 1:
            raise DecodeError(f"empty image, {width} x {height} pixels")
        return (width, height) if _orientation(image) >= 5 else (height, width)
    except DecodeError:
        raise
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def decode(image: Picture) -> np.ndarray:
    """Decodes a whole image to uint8 (H, W, 3), oriented as displayed; pixels (H, W, C) stay as they are.

    >>> decode(Image.new("LA", (2, 1), (0, 0))).tolist()  # black, but transparent
    [[[255, 255, 255], [255, 255, 255]]]

    Raises:
      DecodeError: the pixels cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return image
    try:
        return _grey(_upright(image)) if _GREY in image.info else np.asarray(_upright(image))
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def of_channels(image: Picture, channels: int) -> Picture:
    """An image with so many channels: opened for three, else decoded to uint8 (H, W, channels), oriented as displayed.

    A JPEG stays opened for one channel, too, so that its decoder can shrink it; :func:`decode` and :func:`crops` make
    it grey.

    One channel is the grey of the image as displayed (ITU-R 601-2). Two or four are the bands that Pillow finds in the
    file, of 16 bits the upper 8; nothing is laid over white, as the last band may be no alpha.

    >>> of_channels(Image.new("RGB", (1, 1), (255, 0, 100)), 1).tolist()  # 0.299, 0.587 and 0.114 of the three
    [[[88]]]
    >>> of_channels(Image.new("RGBA", (1, 1), (200, 100, 50, 0)), 4).tolist()
    [[[200, 100, 50, 0]]]

    Raises:
      DecodeError: the pixels cannot be decoded, or the file stores another number of bands.
    """
    if isinstance(image, np.ndarray) or channels == 3:
        return image
    if channels == 4 and image.format == "WEBP" and image.mode == "RGB":  # which leaves an opaque alpha out
        image = image.convert("RGBA")
    if channels == GREY and isinstance(image, JpegImageFile):
        image.info[_GREY] = True
        return image
    if channels == GREY:
        return _grey(Image.fromarray(decode(image)))
    try:
        image.load()
        orientation = _orientation(image)
        pixels = np.asarray(image if orientation == 1 else image.transpose(UPRIGHT[orientation]))
    except Exception as e:
        raise DecodeError(_reason(e)) from e
    bands = image.getbands()
    if len(bands) != channels or image.mode == "PA":
        raise DecodeError(f"opens with the bands {', '.join(bands)}, where config.data.channels={channels}")
    return pixels


def crop_resize(
    image: Picture, box: Sequence[float] | np.ndarray, size: Sequence[int], resample: Image.Resampling
) -> Picture:
    """Cuts `box` out of an image and resizes it, antialiased, to `size`; see :func:`crops`."""
    return crops(image, [box], [size], resample)[0]


def crops(
    image: Picture,
    boxes: Sequence[Sequence[float] | np.ndarray],
    sizes: Sequence[Sequence[int]],
    resample: Image.Resampling,
    alone: bool = False,
) -> list[Picture]:
    """Cuts boxes out of an image and resizes them, antialiased; the image is decoded once.

    Args:
      image: an opened image, whose pixels may not be decoded yet, or pixels (H, W, C), whose channels are resized one
        by one, as Pillow does it.
      boxes: (top, left, height, width) of each crop in pixels of the displayed image; may be fractional.
      sizes: (height, width) of each result in pixels.
      resample: Pillow's filter.
      alone: whether the filter does not see the pixels around a box.

    Returns:
      RGB images of `sizes`, or pixels (h, w, C).

    Raises:
      DecodeError: the pixels cannot be decoded.
    """
    numbers = [tuple(float(v) for v in box) for box in boxes]
    if isinstance(image, np.ndarray):
        bands = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
        cut = [_cut(band, numbers, sizes, 1, resample, alone) for band in bands]
        return [np.stack(channels, axis=-1) for channels in zip(*cut, strict=True)]
    try:
        width, height = image.size
        reductions = [(h / size[0], w / size[1]) for (_, _, h, w), size in zip(numbers, sizes, strict=True)]
        shrink = _draft(image, min(h for h, _ in reductions), min(w for _, w in reductions))
        if shrink > 1:
            # The decoder fills up the last column and row; of a turned image they may be displayed at the left or top.
            right, bottom, turn = shrink * image.width - width, shrink * image.height - height, _orientation(image)
            left = right if turn in (2, 3) else bottom if turn in (6, 7) else 0
            top = bottom if turn in (3, 4) else right if turn in (7, 8) else 0
            numbers = [(y + top, x + left, h, w) for y, x, h, w in numbers]
        if _GREY in image.info:
            return list(map(_grey, _cut(_upright(image).convert("L"), numbers, sizes, shrink, resample, alone)))
        return list(_cut(_upright(image), numbers, sizes, shrink, resample, alone))
    except Exception as e:
        raise DecodeError(_reason(e)) from e


def _cut(
    image: Image.Image,
    boxes: Sequence[tuple[float, ...]],
    sizes: Sequence[Sequence[int]],
    shrink: int,
    resample: Image.Resampling,
    alone: bool,
) -> list[Image.Image]:
    """See :func:`crops`; the decoder has divided the sides of `image` by `shrink`."""
    out = []
    for (top, left, height, width), size in zip(boxes, sizes, strict=True):
        right, bottom = min((left + width) / shrink, image.width), min((top + height) / shrink, image.height)
        left, top = left / shrink, top / shrink
        source = image
        if alone:
            x, y = math.floor(left), math.floor(top)
            source = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
            left, top, right, bottom = left - x, top - y, right - x, bottom - y
        out.append(source.resize((size[1], size[0]), resample, box=(left, top, right, bottom)))
    return out


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
    # Pillow would decode all pixels in search of what stands behind them.
    file = image.fp if isinstance(image, PngImageFile) and image.tile else None
    if file is not None and "exif" not in image.info and not _may_turn(file):
        return 1
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, KeyError, TypeError):  # a damaged EXIF block; the pixels may be fine
        return 1
    return value if value in range(2, 9) else 1


def _may_turn(file: IO[bytes]) -> bool:
    """Returns whether a PNG has a chunk that may hold an orientation; reads the head of each chunk only."""
    place = file.tell()
    try:
        file.seek(len(PNG))
        while len(head := file.read(8 + max(map(len, TURNING)))) >= 8:
            length, kind = struct.unpack_from(">I4s", head)
            if kind == b"eXIf" or kind in TEXTS and head[8:].startswith(TURNING):
                return True
            file.seek(length + 12 - len(head), os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image to RGB as it is displayed."""
    image.load()
    orientation = _orientation(image)  # that of a PNG may be known only now
    rgb = _to_rgb(image)
    return rgb if orientation == 1 else rgb.transpose(UPRIGHT[orientation])


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))[..., None]


def _to_rgb(image: Image.Image) -> Image.Image:
    key_HW = _key(image)
    if key_HW is not None:
        rgb = np.array(_without_alpha(image))
        rgb[key_HW] = 255
        return Image.fromarray(rgb)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return _without_alpha(image)


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;") or _tag(image, FORMAT_TAG, UNSIGNED) == SIGNED:
        image = Image.fromarray(_to_8_bits(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def _key(image: Image.Image) -> np.ndarray | None:
    """Returns where a PNG has its transparent colour, bool (H, W); None if there is no such colour.

    Pillow compares the colour, which has the depth of the file, with pixels that it has brought to 8 bits.
    """
    key = image.info.get("transparency")
    if key is None or not isinstance(image, PngImageFile) or image.mode not in ("1", "L", "I;16", "I", "RGB"):
        return None
    raw, values = raw_mode(image), np.asarray(image)
    if image.mode == "RGB":
        values = values.astype(np.int64)
        if _DATA in image.info:  # Pillow has kept the upper bytes; read as little-endian, it keeps the lower ones
            lower = PngImageFile(io.BytesIO(image.info[_DATA]))
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
            values = 256 * values + np.asarray(lower)
            return np.all(values == key, axis=-1)
        return np.all(values == np.bitwise_and(key, 255), axis=-1)  # only the lower bits of a key count
    if image.mode == "1":
        return values == bool(key)
    if image.mode == "L":
        step = GREY_STEP.get(raw, 1)
        return values == (key & 255 // step) * step
    return values == key


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Scales grey values of more than 8 bits to uint8; the module's docstring lists the ranges."""
    values = np.asarray(image)
    bits, signed = 8 * values.dtype.itemsize, values.dtype.kind == "i"
    if image.format == "PPM":
        bits, signed = 16, False  # Pillow has stretched any maximum to 65535
    elif isinstance(image, TiffImageFile):
        bits, signed = _tag(image, BITS_TAG, 1), _tag(image, FORMAT_TAG, UNSIGNED) == SIGNED
        if values.dtype.kind != "f" and values.dtype.itemsize * 8 == bits:  # Pillow has one sign per size
            values = values.view(values.dtype.str.replace("u", "i") if signed else values.dtype.str.replace("i", "u"))
    is_float = values.dtype.kind == "f"
    values = np.where(np.isnan(values), 0, values) if is_float else values.astype(np.float64)
    highest, lowest = values.max(initial=0), values.min(initial=0)
    if is_float:
        top = next((top for top in (1, 255, 65535) if highest <= top), math.inf)
        if top == math.inf:
            raise DecodeError(f"holds the grey value {highest:g}; floats must lie in [0, 1], [0, 255] or [0, 65535]")
        scale = 255.0 / top
    elif bits == 32:
        in_bytes = image.mode == "I" and image.format is None and highest <= 255
        scale = 1.0 if in_bytes else 1 / 257 if highest <= 65535 else 2.0 ** (-23 if signed else -24)
    else:
        scale = 255.0 / (2 ** (bits - signed) - 1)
    if lowest * scale < -0.5:
        raise DecodeError(f"holds the negative grey value {lowest:g}, which has no brightness")
    scaled = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    return 255 - scaled if _tag(image, PHOTOMETRIC_TAG, 1) == WHITE_IS_ZERO else scaled


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Returns a number, or the first of several, of a TIFF's tags; `default` for other images."""
    if not isinstance(image, TiffImageFile):
        return default
    value = image.tag_v2.get(tag, WHITE_IS_ZERO if tag == PHOTOMETRIC_TAG else default)
    return int(np.ravel(value)[0])


def _mend_layout(image: TiffImageFile) -> None:
    """Corrects, before the pixels are decoded, how Pillow reads a TIFF.

    Raises:
      DecodeError: it would be read wrongly.
    """
    compressed = _tag(image, COMPRESSION_TAG, 1) != 1
    bits, photometric = _tag(image, BITS_TAG, 1), _tag(image, PHOTOMETRIC_TAG, WHITE_IS_ZERO)
    if not compressed and _tag(image, PLANES_TAG, 1) == 2 and (bits != 8 or photometric == WHITE_IS_ZERO):
        # Pillow takes a letter of its mode for each plane, and forgets the rest of the mode.
        raise DecodeError(f"a TIFF with separate planes of {bits} bits, uncompressed")
    if not compressed and photometric == YCBCR and tuple(image.tag_v2.get(SUBSAMPLING_TAG, (2, 2))) != (1, 1):
        raise DecodeError("a TIFF with subsampled colours, uncompressed")
    if compressed and sys.byteorder == "little":  # libtiff has brought signed numbers and floats to this order
        native = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
        args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
        image.tile = [
            tile._replace(args=(native.get(str(a[0]), a[0]), *a[1:])) for tile, a in zip(image.tile, args, strict=True)
        ]


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields type, start and end of each chunk of a PNG."""
    start = len(PNG)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + 12 + length
        start += 12 + length


def _without(data: bytes, chunks: Iterable[tuple[int, int]]) -> bytes:
    """Returns bytes without the parts (start, end), which are in order."""
    edges = [0, *(edge for chunk in chunks for edge in chunk), len(data)]
    if len(edges) == 2:
        return data
    return b"".join(data[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


def _without_large_metadata(data: bytes) -> bytes:
    """Returns a PNG without the texts and profiles for which Pillow would refuse the whole image."""
    dropped, memory = [], 0.0
    for kind, start, end in _chunks(data):
        if kind in TEXTS:
            size = _text_size(kind, data[start + 8 : end - 4])
            if memory + size > MAX_TEXT_MEMORY:
                dropped.append((start, end))
            elif kind != b"iCCP":
                memory += size
    return _without(data, dropped)


def _text_size(kind: bytes, body: bytes) -> float:
    """Returns the bytes that a text or profile of a PNG takes; infinite if Pillow refuses to unpack it."""
    rest = body.partition(b"\0")[2]
    if kind == b"tEXt":
        return len(rest)
    method, text = rest[:1], rest[1:]
    if kind == b"iTXt":  # whether it is packed, the method, a language and a translated key
        packed, method, text = rest[:1], rest[1:2], rest[2:].split(b"\0", 2)[-1]
        if packed == b"\0":
            return len(text)
    if method not in (b"\0", b""):
        return math.inf
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(text, MAX_TEXT_CHUNK))
    except zlib.error:
        return 0  # Pillow leaves it out, too
    return math.inf if unpacker.unconsumed_tail else size
