"""Crops, flips and RandAugment: their distribution, and batched resampling against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib
from crate_jax.data import sampling
from crate_jax.data.augmentation import DRAWS, Augmentation
from crate_jax.data.decoding import RESAMPLING
from crate_jax.data.evaluation import central_box
from crate_jax.data.randaugment import OPERATIONS, randaugment
from crate_jax.data.resampling import BatchResizer, _table


def augmentation(**options):
    config = config_lib.base()
    config.data.update(options)
    return Augmentation.from_config(config)


def all_boxes(side):
    return [(start, n) for n in range(1, side + 1) for start in range(side - n + 1)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("in_size,out_size", [((32, 32), (32, 32)), ((9, 14), (16, 12)), ((20, 12), (6, 5))])
def test_batched_resize_is_pillows(interpolation, in_size, out_size):
    rng = np.random.default_rng(0)
    rows, columns = all_boxes(in_size[0]), all_boxes(in_size[1])
    pairs = [(rows[i % len(rows)], columns[j % len(columns)]) for i, j in rng.integers(0, 10**6, (400, 2))]
    boxes = np.array([(top, left, h, w) for (top, h), (left, w) in pairs])
    images = rng.integers(0, 256, (len(boxes), *in_size, 3), np.uint8)
    got = BatchResizer(in_size, out_size, interpolation)(images.transpose(0, 3, 1, 2), boxes)
    expected = [
        Image.fromarray(image).resize(out_size[::-1], RESAMPLING[interpolation], box=(left, top, left + w, top + h))
        for image, (top, left, h, w) in zip(images, boxes, strict=True)
    ]
    difference = np.abs(got.astype(int) - np.stack([np.asarray(image) for image in expected]))
    assert difference.max() <= 2 and (difference > 1).mean() < 1e-3 and (difference > 0).mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side,out", [(1, 8), (2, 7), (8, 32), (32, 32), (40, 9)])
def test_weighted_sums_are_exact_in_float32(interpolation, side, out):
    table = _table(side, out, interpolation)
    assert (table == np.rint(table)).all() and 255 * np.abs(table).sum(axis=-1).max() < 2**24


def test_batched_resize_does_not_depend_on_the_batch():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (70, 3, 32, 32), np.uint8)
    boxes = np.tile([3, 5, 20, 17], (70, 1))
    resize = BatchResizer((32, 32), (32, 32), "bicubic")
    whole = resize(images, boxes)
    np.testing.assert_array_equal(whole, np.concatenate([resize(images[i : i + 1], boxes[:1]) for i in range(70)]))


@pytest.mark.parametrize("height,width", [(32, 32), (480, 640), (1, 1), (1, 900), (700, 2), (3, 5)])
def test_boxes_lie_inside_and_have_the_asked_area_and_ratio(height, width):
    a = augmentation(crop_scale=(0.2, 0.5), crop_ratio=(3 / 4, 2))
    uniforms = sampling.uniforms(0, 0, 4000, DRAWS)
    top, left, h, w = a.boxes(uniforms, np.full(4000, height), np.full(4000, width)).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    if min(height, width) > 100:
        area, ratio = h * w / (height * width), w / h
        assert 0.195 < area.min() < 0.21 and 0.49 < area.max() < 0.505
        assert area.mean() == pytest.approx(0.35, abs=0.01)
        assert ratio.min() == pytest.approx(3 / 4, abs=0.01) and ratio.max() == pytest.approx(2, abs=0.02)
        assert np.log(ratio).mean() == pytest.approx(np.log(3 / 2) / 2, abs=0.02)
        # All places are reached, both edges included.
        assert top.min() == 0 and (top + h).max() == height and left.min() == 0 and (left + w).max() == width


def test_rows_and_columns_of_crops_are_drawn_apart():
    """Each is uniform, and neither says anything about the other."""
    a = augmentation(crop_scale=(0.2, 0.3), crop_ratio=(3 / 4, 4 / 3))
    top, left, h, w = a.boxes(sampling.uniforms(5, 0, 4000, DRAWS), np.full(4000, 480), np.full(4000, 640)).T
    places = np.stack([top / (480 - h), left / (640 - w)])
    np.testing.assert_allclose(
        np.quantile(places, [0.25, 0.5, 0.75], axis=1), [[0.25] * 2, [0.5] * 2, [0.75] * 2], atol=0.03
    )
    assert abs(np.corrcoef(places)[0, 1]) < 0.05


def test_a_sample_is_drawn_from_all_images_once_each():
    """Folders are sorted by class: the first images would be one class."""
    drawn = sampling.sample(4000, 300, 3)
    assert len(np.unique(drawn)) == 300 and np.mean(drawn) == pytest.approx(2000, abs=200) and drawn.max() < 4000
    np.testing.assert_array_equal(drawn, sampling.sample(4000, 300, 3))
    assert (drawn != sampling.sample(4000, 300, 4)).any()
    np.testing.assert_array_equal(np.sort(sampling.sample(7, 0, 3)), np.arange(7))
    np.testing.assert_array_equal(np.sort(sampling.sample(7, 90, 3)), np.arange(7))


def test_a_crop_that_never_fits_is_central():
    a = augmentation(crop_scale=(0.5, 1.0))
    boxes = a.boxes(sampling.uniforms(0, 0, 50, DRAWS), np.full(50, 10), np.full(50, 1000))
    np.testing.assert_array_equal(boxes, np.tile([0, 494, 10, 13], (50, 1)))  # 10 * 4/3 wide


def test_scale_one_takes_the_whole_image():
    a = augmentation(crop_scale=(1.0, 1.0))
    boxes = a.boxes(sampling.uniforms(0, 0, 3, DRAWS), np.array([5, 6, 7]), np.array([8, 9, 10]))
    np.testing.assert_array_equal(boxes, [[0, 0, 5, 8], [0, 0, 6, 9], [0, 0, 7, 10]])


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flip_probability(probability):
    flips = augmentation(flip=probability).flips(sampling.uniforms(0, 0, 5000, DRAWS))
    assert flips.mean() == pytest.approx(probability, abs=0.02 if 0 < probability < 1 else 0)


def test_uniforms_are_addressed_by_position():
    whole = sampling.uniforms(7, 0, 100, DRAWS)
    np.testing.assert_array_equal(whole[37:60], sampling.uniforms(7, 37, 23, DRAWS))
    assert len(np.unique(whole)) == whole.size
    assert (whole != sampling.uniforms(8, 0, 100, DRAWS)).all()


def test_replacements_differ_by_attempt_and_position():
    drawn = [sampling.replacement(0, position, attempt, 10**9) for position in (5, 6) for attempt in range(20)]
    assert len(set(drawn)) == 40 and drawn[:20] == [sampling.replacement(0, 5, attempt, 10**9) for attempt in range(20)]


def test_the_order_is_pinned():
    # A changed order would change every run and break resuming across versions.
    np.testing.assert_array_equal(sampling.indices(0, np.arange(10), 10), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7])
    assert sampling.uniforms(0, 3, 1, DRAWS)[0, :2] == pytest.approx([0.702086000651695, 0.6126538471751471])


def test_every_epoch_has_an_order_of_its_own():
    orders = sampling.indices(0, np.arange(3 * 50), 50).reshape(3, 50)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(50), (3, 1)))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("size,share,expected", [((8, 8), 0.5, (2, 6, 4, 4)), ((8, 8), 1.0, (0, 4, 8, 8))])
def test_central_box(size, share, expected):
    assert central_box(8, 16, size, share) == expected


def test_central_box_of_other_aspects_has_the_outputs_aspect():
    top, left, h, w = central_box(100, 100, (32, 64), 1.0)
    assert (top, left, h, w) == (25, 0, 50, 100)


def picture(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(30, 220, (side, side, 3), np.uint8))


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@pytest.mark.parametrize("magnitude", [0, 14, 30])
@pytest.mark.parametrize("side", [1, 8, 224])
def test_every_operation_works_at_every_strength(number, magnitude, side):
    operation, low, high = OPERATIONS[number]
    image = picture(side)
    out = operation(image, low + magnitude / 30 * (high - low), np.random.default_rng(0))
    assert out.size == image.size and out.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(side)), err_msg="the input was changed")


def test_randaugment_is_a_function_of_its_generator():
    outs = [
        np.asarray(randaugment(picture(), 2, 14, sampling.randaugment_generator(0, position)))
        for position in (0, 0, 1, 2, 3, 4)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert len({out.tobytes() for out in outs[1:]}) == 5


def test_randaugment_draws_every_operation():
    chosen = {int(sampling.randaugment_generator(0, p).integers(len(OPERATIONS), size=1)[0]) for p in range(300)}
    assert chosen == set(range(len(OPERATIONS)))


def test_operations_against_their_definitions():
    rng = np.random.default_rng(0)
    table = {operation.__name__: operation for operation, _, _ in OPERATIONS}
    pixels = np.asarray(picture()).astype(int)
    np.testing.assert_array_equal(np.asarray(table["_invert"](picture(), 0, rng)), 255 - pixels)
    np.testing.assert_array_equal(
        np.asarray(table["_solarize"](picture(), 119.5, rng)), np.where(pixels < 119.5, pixels, 255 - pixels)
    )
    np.testing.assert_array_equal(np.asarray(table["_posterize"](picture(), 1.9, rng)), pixels & 128)
    brighter = np.minimum(pixels + 51, 255)
    np.testing.assert_array_equal(
        np.asarray(table["_solarize_add"](picture(), 51.3, rng)), np.where(brighter < 128, brighter, 255 - brighter)
    )
    moved = np.asarray(table["_translate_x"](picture(), 35, rng))  # 35 / 224 * 64 = 10 pixels, left or right
    left = np.concatenate([pixels[:, 10:], np.zeros_like(pixels[:, :10])], axis=1)
    right = np.concatenate([np.zeros_like(pixels[:, :10]), pixels[:, :-10]], axis=1)
    assert any((moved == expected).all() for expected in (left, right))


@pytest.mark.parametrize("name,axis", [("_translate_x", 1), ("_translate_y", 0)])
def test_moves_go_both_ways_and_are_a_share_of_the_shorter_side(name, axis):
    table = {operation.__name__: operation for operation, _, _ in OPERATIONS}
    pixels = np.random.default_rng(0).integers(30, 220, (56, 96, 3), np.uint8)
    rng = np.random.default_rng(1)
    signs = []
    for _ in range(40):
        moved = np.asarray(table[name](Image.fromarray(pixels), 20, rng))  # 20 / 224 * 56 = 5 pixels
        signs += [sign for sign in (5, -5) if (np.roll(pixels, sign, axis) == moved).all(axis=2).mean() > 0.8]
    assert len(signs) == 40 and 10 <= signs.count(5) <= 30


def test_a_square_that_is_cut_out_is_a_share_of_the_shorter_side():
    table = {operation.__name__: operation for operation, _, _ in OPERATIONS}
    image = Image.new("RGB", (96, 56))
    cut = [np.asarray(table["_cutout"](image, 40, np.random.default_rng(i))).any(axis=2).sum() for i in range(20)]
    assert max(cut) == 11 * 11  # 40 / 224 * 56 = 10, and Pillow's edges are inclusive
