"""Every kind of image file becomes the RGB picture that a viewer would show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from crate_jax.data import decoding

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


def test_missing_file_is_a_decode_error(tmp_path):
    with pytest.raises(decoding.DecodeError, match="No such file"):
        decoding.read_file(str(tmp_path / "gone.png"))
