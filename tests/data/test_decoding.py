"""Every kind of image file becomes the RGB picture that a viewer would show."""

from __future__ import annotations

import io
import runpy
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from crate_jax.data import decoding, given

RNG = np.random.default_rng(0)
BICUBIC = decoding.RESAMPLING["bicubic"]


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    return decoding.decode(decoding.open_image(data))


def photo(height=40, width=60, seed=0):
    low = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def test_rgb_is_unchanged():
    np.testing.assert_array_equal(decoded(encode(photo(), "PNG")), np.asarray(photo()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_without_alpha_keep_their_look(mode):
    image = photo().convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    np.testing.assert_allclose(decoded(encode(image, kind)).astype(int), np.asarray(image.convert("RGB")), atol=1)


def test_cmyk_jpeg():
    got = decoded(encode(photo().convert("CMYK"), "JPEG", quality=98)).astype(int)
    assert np.abs(got - np.asarray(photo())).mean() < 4


@pytest.mark.parametrize("kind,mode", [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_alpha_lies_over_white(kind, mode):
    image = Image.new(mode, (4, 2), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((0, 0), (200, 10, 30, 255) if mode == "RGBA" else (200, 255))
    image.putpixel((1, 0), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    got = decoded(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(got[0, 0], [200, 10, 30] if mode == "RGBA" else [200] * 3)
    np.testing.assert_allclose(got[0, 1].astype(int), 127, atol=1)
    np.testing.assert_array_equal(got[1], 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_transparent_palette_entry_becomes_white(kind):
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    got = decoded(encode(image, kind, transparency=0))
    np.testing.assert_array_equal(got[0], [[255] * 3, [0, 0, 255], [0, 0, 255]])


def test_transparent_colour_of_rgb_becomes_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    np.testing.assert_array_equal(decoded(encode(image, "PNG", transparency=(1, 2, 3)))[0], [[255] * 3, [4, 5, 6]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    got = decoded(encode(Image.fromarray(grey), kind))
    np.testing.assert_array_equal(got[0], np.repeat([[0], [1], [128], [255]], 3, axis=1))


@pytest.mark.parametrize(
    "values,expected",
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 65535.0, np.nan]], np.float32), [0, 255, 0]),
    ],
)
def test_wide_greys_are_scaled(values, expected):
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(values), "TIFF"))[0, :, 0], expected)


@pytest.mark.parametrize(
    "values,expected",
    [
        (np.array([[0, 7, 200, 255]], np.int32), [0, 7, 200, 255]),
        (np.array([[0, 7, 200, 257]], np.int32), [0, 0, 1, 1]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 200]], np.uint16), [0, 1]),
    ],
)
def test_integers_in_memory_are_bytes_if_they_fit(values, expected):
    """Seen: labels and masks as int32 became black."""
    image = Image.fromarray(values)
    assert image.mode == ("I" if values.dtype == np.int32 else "I;16")
    np.testing.assert_array_equal(decoding.decode(image)[0, :, 0], expected)
    np.testing.assert_array_equal(decoding.decode(given.source([image], 3).open(0))[0, :, 0], expected)
    if values.max() == 255:
        np.testing.assert_array_equal(decoding.decode(image)[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF of 32 bits", "PGM"])
def test_a_dark_file_of_more_than_8_bits_stays_dark(kind):
    """Read from the file, or opened by the caller."""
    if kind == "PGM":
        file = b"P5 2 1 65535 " + np.array([0, 200], ">u2").tobytes()
    else:
        values = np.array([[0, 200]], np.uint16 if kind == "PNG" else np.int32)
        file = encode(Image.fromarray(values), kind[:4].strip())
    for image in (decoding.open_image(file), given.source([Image.open(io.BytesIO(file))], 3).open(0)):
        np.testing.assert_array_equal(decoding.decode(image)[0, :, 0], [0, 1])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def png(samples, bits, key=None, before=b"", after=b"", interlaced=False):
    """A PNG of grey (H, W) or RGB (H, W, 3) samples of 1 to 16 bits; `key` is its transparent colour."""
    samples = np.asarray(samples)
    packed = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        for row in samples[top::down, left::right]:
            digits = row.reshape(-1, 1) >> np.arange(bits)[::-1] & 1
            packed += b"\0" + np.packbits(digits.astype(np.uint8)).tobytes() if row.size else b""
    colour = 2 if samples.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", *samples.shape[1::-1], bits, colour, 0, 0, interlaced)
    trns = b"" if key is None else chunk(b"tRNS", np.asarray(key, ">u2").tobytes())
    pixels = chunk(b"IDAT", zlib.compress(packed))
    return decoding.PNG + chunk(b"IHDR", header) + before + trns + pixels + after + chunk(b"IEND", b"")


def test_transparent_colour_of_16_bit_grey_leaves_the_other_pixels():
    ramp = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4)
    expected = np.arange(0, 256, 17).reshape(4, 4)
    got = decoded(encode(Image.fromarray(ramp), "PNG", transparency=40000))
    np.testing.assert_array_equal(got[..., 0], expected)
    got = decoded(encode(Image.fromarray(ramp), "PNG", transparency=4369 * 6))
    np.testing.assert_array_equal(got[..., 1], np.where(expected == 6 * 17, 255, expected))


@pytest.mark.parametrize("bits,upper", [(1, 0), (2, 0), (4, 0), (8, 0), (8, 0x700), (16, 0)])
def test_transparent_grey_is_compared_at_the_depth_of_the_file(bits, upper):
    top = 2**bits - 1
    samples = np.unique(np.linspace(0, top, 7).astype(int))[None]  # 0, ..., top
    for key in (0, samples[0, -2], top // 2 if bits == 16 else top):
        expected = np.where(samples == key, 255, np.rint(samples * 255 / top))
        got = decoded(png(samples, bits, key + upper))
        np.testing.assert_array_equal(got[..., 2], expected, err_msg=f"key {key}")


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_rgb_is_compared_at_the_depth_of_the_file(bits):
    top = 2**bits - 1
    near = np.array([[[3, 2, 1], [3, 2, 0], [top - 200, 9, top]]])  # 16 bits: the first two have equal upper bytes
    upper = near >> (bits - 8)
    for key in (0, 2):
        expected = upper.copy()
        expected[0, key] = 255
        np.testing.assert_array_equal(decoded(png(near, bits, near[0, key])), expected)


@pytest.mark.parametrize("bits,channels", [(1, ()), (2, ()), (4, ()), (8, ()), (16, ()), (8, (3,)), (16, (3,))])
def test_transparent_colours_of_interlaced_images(bits, channels):
    samples = np.random.default_rng(1).integers(0, 2**bits, (5, 7, *channels))
    key = samples[3, 2]
    pixels = samples >> 8 if channels and bits == 16 else np.rint(samples * 255 / (2**bits - 1)).astype(int)
    pixels = pixels if channels else np.repeat(pixels[..., None], 3, axis=-1)
    at_key = np.all((samples == key).reshape(5, 7, -1), axis=-1)
    got = decoded(png(samples, bits, key, interlaced=True))
    np.testing.assert_array_equal(got, np.where(at_key[..., None], 255, pixels))


def test_transparent_colour_of_a_turned_image():
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = 6
    grey = np.array([[0, 25700, 40000]], np.uint16)
    got = decoded(encode(Image.fromarray(grey), "PNG", transparency=25700, exif=exif))
    np.testing.assert_array_equal(got[..., 0], [[0], [255], [156]])


def tiff(values, bits, photometric=1, order="<", packed=None, format=1, deflate=False, separate=False, more=()):
    """A TIFF, whose pixels are `packed` where NumPy has no such type; `format` 1: unsigned, 2: signed, 3: float."""
    height, width, *channels = values.shape
    channels = channels[0] if channels else 1
    planes = np.moveaxis(values, -1, 0) if separate else values[None]
    data = [packed or plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    data = [zlib.compress(x) if deflate else x for x in data]
    starts = 8 + np.cumsum([0] + [len(x) + len(x) % 2 for x in data])
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflate else 1], 262: [photometric]}
    tags |= {273: list(starts[:-1]), 277: [channels], 278: [height], 279: [len(x) for x in data]}
    tags |= {284: [2 if separate else 1], 339: [format] * channels, **dict(more)}
    entries, tail = b"", b""
    after = int(starts[-1]) + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        field = struct.pack(order + "I" * len(numbers), *map(int, numbers))
        if len(numbers) > 1:
            field, tail = struct.pack(order + "I", after + len(tail)), tail + field
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", int(starts[-1]))
    body = b"".join(x + b"\0" * (len(x) % 2) for x in data)
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4) + tail


GREYS = [  # bits, format, samples, as 8 bits
    (8, 1, np.array([[0, 1, 100, 255]], np.uint8), [0, 1, 100, 255]),
    (8, 2, np.array([[0, 1, 100, 127]], np.int8), [0, 2, 201, 255]),
    (8, 2, np.array([[0, 1, 100, -56]], np.int8), None),
    (16, 1, np.array([[0, 1000, 40000, 65535]], np.uint16), [0, 4, 156, 255]),
    (16, 2, np.array([[0, 1000, 30000, 32767]], np.int16), [0, 8, 233, 255]),
    (16, 2, np.array([[0, 1000, 30000, -300]], np.int16), None),
    (16, 3, np.array([[0, 0.25, 0.5, 1]], np.float16), [0, 64, 128, 255]),
    (32, 1, np.array([[0, 1000, 40000, 65535]], np.uint32), [0, 4, 156, 255]),
    (32, 1, np.array([[0, 2**31, 3 * 2**30, 2**32 - 1]], np.uint32), [0, 128, 192, 255]),
    (32, 2, np.array([[0, 2**29, 2**30, 2**31 - 1]], np.int32), [0, 64, 128, 255]),
    (32, 2, np.array([[0, 1000, 65535, -1000]], np.int32), None),
    (32, 3, np.array([[0, 0.25, 0.5, 1]], np.float32), [0, 64, 128, 255]),
    (32, 3, np.array([[0, 1000, 40000, 65535]], np.float32), [0, 4, 156, 255]),
    (32, 3, np.array([[0, 0.25, 0.5, -0.1]], np.float32), None),
    (32, 3, np.array([[0, 0.25, 0.5, 1e6]], np.float32), None),
    (32, 3, np.array([[0, 0.25, 0.5, np.inf]], np.float32), None),
    (64, 3, np.array([[0, 0.25, 0.5, 1]], np.float64), [0, 64, 128, 255]),
]
UNREAD = {(8, 2, 0), (16, 2, 0), (16, 3, 0), (16, 3, 1), (32, 1, 0), (32, 2, 0), (64, 3, 0), (64, 3, 1)}  # by Pillow
UNREAD_BIG_ENDIAN = UNREAD | {(16, 1, 0), (32, 1, 1)}


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
def test_grey_tiffs_are_right_or_undecodable(photometric, order, deflate):
    for bits, kind, values, expected in GREYS:
        data = tiff(values, bits, photometric, order, format=kind, deflate=deflate)
        if expected is None or (bits, kind, photometric) in (UNREAD if order == "<" else UNREAD_BIG_ENDIAN):
            with pytest.raises(decoding.DecodeError, match="grey value|known format"):
                decoded(data)
        else:
            expected = np.array(expected) if photometric else 255 - np.array(expected)
            np.testing.assert_array_equal(decoded(data)[0, :, 0], expected, err_msg=f"{bits} bits, format {kind}")


@pytest.mark.parametrize("bits,packed", [(1, b"\x1b"), (2, b"\x1b"), (4, b"\x1b"), (12, b"\0\x0f\xff\x80\x0f\xff")])
@pytest.mark.parametrize("photometric", [0, 1])
def test_packed_grey_tiffs_are_right_or_undecodable(bits, packed, photometric):
    digits = np.unpackbits(np.frombuffer(packed, np.uint8)).reshape(-1, bits)
    values = digits @ 2 ** np.arange(bits)[::-1]
    data = tiff(np.zeros((1, len(values))), bits, photometric, packed=packed)
    expected = np.rint(values * 255 / (2**bits - 1))
    if bits == 12 and not photometric:
        with pytest.raises(decoding.DecodeError, match="known format"):
            decoded(data)
    else:
        np.testing.assert_array_equal(decoded(data)[0, :, 0], expected if photometric else 255 - expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiffs_of_separate_planes_are_right_or_undecodable(bits, deflate, order):
    values = RNG.integers(0, 2**bits, (2, 5, 3)).astype(f"u{bits // 8}")
    data = tiff(values, bits, photometric=2, order=order, deflate=deflate, separate=True)
    if bits == 16 and not deflate:
        with pytest.raises(decoding.DecodeError, match="separate planes of 16 bits"):
            decoded(data)
    else:
        np.testing.assert_array_equal(decoded(data), values >> (bits - 8))


def test_tiffs_whose_layout_pillow_forgets_are_undecodable():
    grey = np.array([[[0], [100], [255]]], np.uint8)
    with pytest.raises(decoding.DecodeError, match="separate planes"):
        decoded(tiff(grey, 8, photometric=0, separate=True))
    colours = np.zeros((2, 2, 3), np.uint8)
    assert decoded(tiff(colours, 8, photometric=6, more=[(530, [1, 1])])).shape == (2, 2, 3)
    with pytest.raises(decoding.DecodeError, match="subsampled"):
        decoded(tiff(colours, 8, photometric=6))


@pytest.mark.parametrize(
    "data,expected",
    [
        (b"P5 3 1 1023\n" + np.array([0, 500, 1023], ">u2").tobytes(), [0, 125, 255]),
        (b"P5 3 1 65535\n" + np.array([0, 1000, 65535], ">u2").tobytes(), [0, 4, 255]),
        (b"P2 3 1 1023\n0 500 1023", [0, 125, 255]),
        (b"P5 3 1 7\n\x00\x03\x07", [0, 109, 255]),
        (b"P4 3 1\n\x40", [255, 0, 255]),
        (b"P6 1 1 1023\n" + np.array([500, 0, 1023], ">u2").tobytes(), [125]),
    ],
)
def test_pnms_of_any_maximum(data, expected):
    np.testing.assert_array_equal(decoded(data)[0, :, 0], expected)


LONG = bytes(2**21)
METADATA = {
    "profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
    "text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "international text": chunk(b"iTXt", b"Comment\0\1\0en\0c\0" + zlib.compress(LONG)),
    "method": chunk(b"zTXt", b"Comment\0\7" + zlib.compress(b"x")),
    "short gamma": chunk(b"gAMA", b"x"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_pillow_refuses_do_not_hide_the_pixels(kind):
    pixels = [[0, 100, 255]]
    placed = [{"before": METADATA[kind]}] + ([] if kind == "short gamma" else [{"after": METADATA[kind]}])
    for where in placed:
        with pytest.raises((ValueError, SyntaxError, OSError)):
            Image.open(io.BytesIO(png(pixels, 8, **where))).load()
        np.testing.assert_array_equal(decoded(png(pixels, 8, **where))[..., 0], pixels)


def test_texts_that_take_too_much_memory_together_do_not_hide_the_pixels(monkeypatch):
    for module in (decoding, PngImagePlugin):
        monkeypatch.setattr(module, "MAX_TEXT_MEMORY", 250)
    data = png([[0, 100, 255]], 8, after=b"".join(chunk(b"tEXt", b"Comment\0" + bytes(99)) for _ in range(3)))
    with pytest.raises(ValueError, match="Too much memory"):
        Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(decoded(data)[..., 0], [[0, 100, 255]])


def test_the_size_of_a_png_comes_from_its_header():
    """Its pixels, which Pillow decodes in search of an orientation behind them, may be damaged."""
    comment = chunk(b"tEXt", b"Software\0XML:com.adobe.xmp")
    data = png(np.arange(77).reshape(7, 11).tolist(), 8, before=comment, after=comment)
    image = decoding.open_image(data[: data.index(b"IDAT") + 12])
    assert decoding.oriented_size(image) == (7, 11)
    image = decoding.open_image(data)
    assert decoding.oriented_size(image) == (7, 11) and image.tile, "the pixels were decoded"
    np.testing.assert_array_equal(decoding.decode(image)[..., 0].ravel(), np.arange(77))


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", ["exif", "text", "xmp"])
def test_what_turns_a_png_may_stand_behind_its_pixels(kind, where):
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = 6
    block = exif.tobytes()
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    text = b"\nexif\n%8d\n" % len(block) + block.hex().encode()
    chunks = {
        "exif": chunk(b"eXIf", block.removeprefix(b"Exif\0\0")),
        "text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }
    image = decoding.open_image(png([[0, 100, 255]], 8, **{where: chunks[kind]}))
    assert decoding.oriented_size(image) == (3, 1) and decoding.decode(image)[:, 0, 0].tolist() == [0, 100, 255]


def test_texts_that_turn_an_image_are_kept():
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)) + METADATA["profile"]
    assert decoded(png([[0, 100, 255]], 8, before=text)).shape == (3, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    # Four quadrants of different grey tell all eight orientations apart.
    upright = np.kron(np.array([[20, 90], [160, 230]]), np.ones((16, 24))).astype(np.uint8)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose.* that stores the picture so
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = orientation
    image = decoding.open_image(encode(stored.convert("RGB"), kind, exif=exif))
    assert decoding.oriented_size(image) == upright.shape
    got = np.asarray(decoding.crop_resize(image, (0, 0, *upright.shape), upright.shape, BICUBIC))[..., 0]
    assert np.abs(got.astype(int) - upright).mean() < 6


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_sizes(size):
    image = decoding.open_image(encode(photo(*size), "PNG"))
    got = np.asarray(decoding.crop_resize(image, (0, 0, *size), (16, 24), BICUBIC))
    assert got.shape == (16, 24, 3) and got.dtype == np.uint8


def test_crop_is_pillows():
    image = photo(90, 120)
    got = decoding.crop_resize(decoding.open_image(encode(image, "PNG")), (7, 11, 50, 61), (32, 48), BICUBIC)
    expected = image.resize((48, 32), BICUBIC, box=(11, 7, 72, 57))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_reduced_decoding_of_large_jpegs_changes_little(kind):
    # Odd sizes: the reduced picture's last row and column hold only part of a block.
    data = encode(photo(903, 1205), kind, quality=92)
    whole = decoding.open_image(data)
    whole.load()  # too late to reduce
    reduced = decoding.open_image(data)
    box = (101, 203, 777, 951)
    a, b = (np.asarray(decoding.crop_resize(i, box, (64, 64), BICUBIC)).astype(int) for i in (whole, reduced))
    assert reduced.size == (302, 226), "the decoder reduces by 4"
    assert np.abs(a - b).max() <= 2 and np.abs(a - b).mean() < 0.5


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_jpegs_are_reduced_and_stay_where_they_are(orientation):
    """A step of grey 20 away from each edge; the decoder fills up the last column and row of what is stored."""
    upright = np.full((603, 409), 40, np.uint8)
    upright[20:-20, 20:-20] = 210
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as above
    stored = Image.fromarray(upright).transpose(Image.Transpose(undo[orientation])).convert("RGB")
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = orientation
    data = encode(stored, "JPEG", quality=95, exif=exif)
    whole, reduced = decoding.open_image(data), decoding.open_image(data)
    whole.load()  # too late to reduce
    a, b = (
        np.asarray(decoding.crop_resize(i, (3, 5, 597, 399), (66, 44), BICUBIC)).astype(int) for i in (whole, reduced)
    )
    assert sorted(reduced.size) == [103, 151], "the decoder reduces by 4"
    assert np.abs(a - b).max() <= 4 and np.abs(a - b).mean() < 0.5


def test_grey_jpegs_are_reduced_and_have_one_channel():
    data = encode(photo(903, 1205), "JPEG", quality=92)
    array = decoding.of_channels(decoding.open_image(encode(Image.open(io.BytesIO(data)), "PNG")), 1)
    image = decoding.of_channels(decoding.open_image(data), 1)
    np.testing.assert_array_equal(decoding.decode(decoding.of_channels(decoding.open_image(data), 1)), array)
    box, sizes = (101, 203, 777, 951), [(64, 48), (33, 64)]
    for a, b in zip(*(decoding.crops(i, [box, box], sizes, BICUBIC) for i in (array, image)), strict=True):
        assert b.shape == a.shape == (*a.shape[:2], 1) and np.abs(a.astype(int) - b).max() <= 2
    assert image.size == (302, 226), "the decoder reduces by 4"


def truncated_jpeg():
    data = encode(photo(200, 200), "JPEG")
    return data[: len(data) // 2]


def damaged_png():
    data = bytearray(encode(photo(200, 200), "PNG"))
    data[100:200] = bytes(100)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", truncated_jpeg(), truncated_jpeg()[:20], damaged_png(), encode(photo(), "GIF")[:40]],
    ids=["empty", "text", "half a jpeg", "start of a jpeg", "damaged png", "start of a gif"],
)
def test_bad_files_are_decode_errors(data):
    with pytest.raises(decoding.DecodeError, match="."):
        image = decoding.open_image(data)
        decoding.crop_resize(image, (0, 0, *decoding.oriented_size(image)), (8, 8), BICUBIC)


def test_decompression_bomb_is_a_decode_error():
    bomb = encode(Image.new("1", (15000, 15000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(decoding.DecodeError, match="decompression bomb"):
        decoding.open_image(bomb)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_more_pixels_than_allowed_are_a_decode_error(kind, recwarn):
    data = encode(photo(7, 11), kind)
    assert decoding.open_image(data, max_pixels=77).size == (11, 7)
    with pytest.raises(decoding.DecodeError, match="has 11 x 7 pixels, more than config.data.max_pixels=76"):
        decoding.open_image(data, max_pixels=76)
    assert not recwarn.list


def test_large_images_are_no_warning_of_pillow():
    size = decoding.LARGEST // 1000  # above Pillow's bound for its warning
    data = png(np.zeros((1, 1), int), 1)
    header = struct.pack(">IIBBBBB", 1000, size, 1, 0, 0, 0, 0)
    data = data[:8] + chunk(b"IHDR", header) + data[33:]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert runpy.run_path(decoding.__file__)["open_image"](data).size == (1000, size)
    assert not said


def test_missing_file_is_a_decode_error(tmp_path):
    with pytest.raises(decoding.DecodeError, match="No such file"):
        decoding.read_file(str(tmp_path / "gone.png"))
