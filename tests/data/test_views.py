"""Views of an image: crops on the host, changes on the device, recipes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from crate_jax import config as configs, data
from crate_jax.data import decoding, device_augmentation as device, recipes, sampling
from crate_jax.data.device_augmentation import Draw, Jitter, Options
from crate_jax.data.pixels import normalise
from crate_jax.data.views import augmented_views
from crate_jax.errors import ConfigError
from tests.data.test_pipeline import assert_same, photo, write_set

pytestmark = pytest.mark.one_python

BATCH = 10


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Images of many sizes and kinds, some smaller than a view: streamed."""
    root = write_set(tmp_path_factory.mktemp("mixed"), lambda i: (20 + 3 * i, 40 - 2 * i), count=15)
    photo(1, (9, 7)).convert("L").save(root / "grey.png")
    photo(2, (1, 1)).save(root / "dot.png")
    photo(3, (30, 4)).convert("RGBA").save(root / "flat.png")
    return root


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Images of one size: held in memory."""
    return write_set(tmp_path_factory.mktemp("equal"), lambda i: (24, 20), count=17)


@pytest.fixture(params=["mixed", "equal"])
def root(request):
    return request.getfixturevalue(request.param)


def configured(root, small=3, **options):
    c = configs.base()
    c.batch_size, c.steps, c.method = BATCH, 1, "byol"
    c.data.update({"source": f"folder:{root}", "image_size": (12, 16), "threads": 2} | options)
    data.preset(c, "multicrop_cifar")
    c.views.update(small=small, small_size=(7, 5))
    return c


def take(config, count, start=0, **host):
    pipeline = data.TrainPipeline(config, data.open_split(config, "train"), views=True, **host)
    try:
        return list(itertools.islice(pipeline.batches(start), count))
    finally:
        pipeline.close()


def test_a_batch_holds_two_large_views_and_the_small_ones(root):
    (batch,) = take(configured(root), 1)
    assert batch["views"].shape == (BATCH, 2, 12, 16, 3) and batch["views"].dtype == np.uint8
    assert batch["small_views"].shape == (BATCH, 3, 7, 5, 3) and batch["small_views"].dtype == np.uint8
    assert set(batch) == {"views", "small_views", "index", "undecodable"}
    assert set(take(configured(root, small=0), 1)[0]) == {"views", "index", "undecodable"}


def test_hosts_threads_and_workers_make_the_same_views(root):
    c = configured(root)
    whole = take(c, 3, start=4)
    hosts = [take(c, 3, start=4, process_index=p, process_count=2) for p in range(2)]
    for step, name in itertools.product(range(3), ("views", "small_views", "index")):
        np.testing.assert_array_equal(whole[step][name], np.concatenate([host[step][name] for host in hosts]))
    c.data.threads = 5
    assert_same(take(c, 3, start=4), whole)
    assert_same(take(c, 7)[4:], whole)  # a run that was not stopped


def test_workers_make_the_same_views(mixed):
    c = configured(mixed)
    expected = take(c, 3)
    c.data.workers = 2
    assert_same(take(c, 3), expected)


def test_held_and_streamed_views_are_the_same(equal):
    held, streamed = take(configured(equal), 3), take(configured(equal, memory_mb=0), 3)
    for a, b in zip(held, streamed, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        for name in ("views", "small_views"):  # they may differ in rounding: Pillow may resize columns before rows
            off = np.abs(a[name].astype(int) - b[name])
            assert off.max() <= 2 and off.mean() < 0.2


def test_large_held_views_have_no_tables_and_the_same_bits(tmp_path):
    write_set(tmp_path, lambda i: (150, 140), count=4)
    c = configured(tmp_path, image_size=(112, 112))
    assert_same(take(c, 1), take(configured(tmp_path, image_size=(112, 112), memory_mb=0), 1))


def test_a_view_depends_on_seed_position_and_its_number_only(root):
    (three,), (none,) = take(configured(root), 1), take(configured(root, small=0), 1)
    np.testing.assert_array_equal(three["views"], none["views"])
    later, other = take(configured(root), 2)[1], configured(root)
    other.seed = 1
    first, second = (three["small_views"][:, v].astype(int) for v in (0, 1))
    assert (np.abs(first - second).reshape(BATCH, -1).max(1) > 0).sum() > BATCH - 3
    assert (later["views"] != three["views"]).any() and (take(other, 1)[0]["views"] != three["views"]).any()
    a = recipes.layout(configured(root))["views"][0]
    same = [sampling.uniforms(5, 7, 2, 24, view) for view in (0, 1, 1)]
    assert (same[0] != same[1]).all() and (same[1] == same[2]).all()
    assert (a.flips(same[0]) == (same[0][:, 22] < 0.5)).all()


def test_the_first_view_has_the_numbers_that_a_single_crop_has():
    np.testing.assert_array_equal(sampling.uniforms(3, 5, 4, 24, view=0), sampling.uniforms(3, 5, 4, 24))


def test_each_kind_of_view_has_its_own_crop_and_flip(equal):
    c = configured(equal)
    c.views.update(scale_min=(1.0, 0.3, 0.04), scale_max=(1.0, 0.3, 0.05), flip=(0.0, 1.0, 0.0))
    source = data.open_split(c, "train")
    (batch,) = take(c, 1)
    whole = [Image.fromarray(source.read(int(i))) for i in batch["index"]]
    expected = [np.asarray(x.resize((16, 12), Image.Resampling.BICUBIC)).astype(int) for x in whole]
    assert np.abs(batch["views"][:, 0] - np.stack(expected)).max() <= 1
    layout = recipes.layout(c)
    uniforms = sampling.uniforms(0, 0, BATCH, 24, view=1)
    boxes = layout["views"][1].boxes(uniforms, np.full(BATCH, 20), np.full(BATCH, 24))
    for image, (top, left, h, w), view in zip(whole, boxes, batch["views"][:, 1], strict=True):
        cut = image.crop((left, top, left + w, top + h)).resize((16, 12), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(cut).astype(int)[:, ::-1] - view).max() <= 1
    areas = [a.boxes(uniforms, np.full(BATCH, 200), np.full(BATCH, 240)) for a in layout["small_views"]]
    assert all(0.03 < (h * w / 48000).min() and (h * w / 48000).max() < 0.06 for _, _, h, w in (x.T for x in areas))


def test_crops_of_one_decoded_image_are_those_of_each_alone(tmp_path):
    photo(0, (400, 300)).save(tmp_path / "x.jpg", quality=95)
    boxes, sizes = [(0, 0, 300, 400), (11, 20, 40, 30), (100, 3, 77, 300)], [(20, 30), (9, 8), (13, 21)]
    whole = Image.fromarray(np.asarray(Image.open(tmp_path / "x.jpg")))
    resample = Image.Resampling.BICUBIC
    for alone in (False, True):
        # One small crop: the decoder must not shrink the image, though the others would allow it.
        together = decoding.crops(Image.open(tmp_path / "x.jpg"), boxes, sizes, resample, alone)
        for got, box, size in zip(together, boxes, sizes, strict=True):
            (expected,) = decoding.crops(whole, [box], [size], resample, alone)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    # Two large ones: it shrinks, and their place stays.
    got = decoding.crops(Image.open(tmp_path / "x.jpg"), boxes[:1] + boxes[2:], [(8, 8), (5, 6)], resample, True)
    for image, box, size in zip(got, boxes[:1] + boxes[2:], [(8, 8), (5, 6)], strict=True):
        (expected,) = decoding.crops(whole, [box], [size], resample, True)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() < 16


def drawn_views(c, indices, count=5):
    return [views for views, _ in augmented_views(c, data.open_split(c, "train"), np.array(indices), count, True)]


def test_views_outside_training_follow_the_recipe(equal):
    """View 0, 2, .. is a large view 0, view 1, 3, .. a large view 1; the whole images here, mirrored or changed."""
    c = configured(equal, image_size=(20, 24), crop_ratio=(1.2, 1.2))
    c.views.update(scale_min=(1.0,), scale_max=(1.0,), flip=(0.0, 1.0), jitter=(0.0,), grey=(0.0,), blur=(0.0,))
    c.views.update(solarise=(1.0, 0.0), equalise=(0.0,), small=0)
    (views,), image = drawn_views(c, [3]), data.open_split(c, "train").read(3)
    for view in views[::2]:
        np.testing.assert_array_equal(view, np.where(image >= 128, 255 - image, image))
    np.testing.assert_array_equal(views[1::2], [image[:, ::-1]] * 2)
    c.views.update(solarise=(0.0,), flip=(0.0,), grey=(0.0, 1.0))
    (views,) = drawn_views(c, [3])
    assert (views[1] == views[1][..., :1]).all() and not (views[0] == views[0][..., :1]).all()


def test_views_outside_training_are_a_function_of_image_and_number(equal):
    c = configured(equal, small=0)
    c.views.update(jitter=(1.0,), brightness=(0.8,))
    (a, b), (again,) = drawn_views(c, [2, 5]), drawn_views(c, [5])
    np.testing.assert_array_equal(b, again)
    assert len({view.tobytes() for view in (*a, *b)}) == 10 and a.shape == (5, 12, 16, 3)
    np.testing.assert_array_equal(drawn_views(c, [5], 3)[0][:2], b[:2])
    c.seed = 2**32 - 1  # the largest one
    assert drawn_views(c, [5])[0].tobytes() != b.tobytes()
    c.seed = 0
    c.data.update(image_size=(20, 24), crop_ratio=(1.2, 1.2))
    c.views.update(scale_min=(1.0,), scale_max=(1.0,), flip=(0.0,), jitter=(0.0,), grey=(0.0,), blur=(0.0,))
    c.views.update(solarise=(0.5,))
    images = [data.open_split(c, "train").read(i) for i in (2, 5)]
    drawn = zip(drawn_views(c, [2, 5], 16), images, strict=True)
    plain = [[np.array_equal(view, image) for view in views] for views, image in drawn]
    assert plain[0] != plain[1] and all(0 < sum(row) < 16 for row in plain)


# -- the device


def images(count, size=(9, 11), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def levels(planes):
    return np.stack([np.asarray(x) for x in planes], -1) * 255


def jitter_draw(orders, factors):
    """Each of `orders` lists the operations 0..3 as applied, one list per image."""
    rank = tuple(jnp.asarray(x) for x in np.argsort(np.asarray(orders), 1).T)
    return Draw(jitter=Jitter(rank, *(jnp.full(len(orders), f, jnp.float32) for f in factors)))


def test_jitter_in_every_order_is_its_operations_one_after_the_other():
    def one(x, operation):
        """One operation by its definition, x (H, W, 3) in 0..1; the hue by colorsys."""
        import colorsys

        grey = x @ [0.2989, 0.587, 0.114]
        if operation == 3:
            flat = [colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)]
            return np.array([colorsys.hsv_to_rgb((h + factors[3]) % 1, s, v) for h, s, v in flat]).reshape(x.shape)
        other = [np.zeros_like(x), np.full_like(x, grey.mean()), grey[..., None]][operation]
        return np.clip(factors[operation] * x + (1 - factors[operation]) * other, 0, 1)

    factors = (1.7, 1.9, 2.1, -0.23)  # strong: clipping shows the order
    image, orders = images(1)[0], list(itertools.permutations(range(4)))
    got = levels(jax.jit(device.augmented)(np.stack([image] * 24), jitter_draw(orders, factors)))
    expected = []
    for order in orders:
        x = image / 255
        for operation in order:
            x = one(x, operation)
        expected.append(255 * x)
    assert np.abs(got - np.stack(expected)).max() < 2e-3
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(expected, 2)) > 0.02


def test_what_does_nothing_changes_nothing():
    x = images(3)
    still = jitter_draw([range(4)] * 3, (1.0, 1.0, 1.0, 0.0))
    off = jnp.zeros(3)
    nothing = still._replace(grey=off > 0, sigma=off, solarise=off > 0, equalise=off > 0)
    c = configs.base()
    assert np.abs(levels(jax.jit(device.augmented)(x, still)) - x).max() < 1e-3
    view = jax.jit(lambda x, draw: device.view(x, draw, c))
    assert np.abs(np.asarray(view(x, nothing)) - normalise(x, c)).max() * 0.229 * 255 < 0.26
    np.testing.assert_array_equal(device.view(x, Draw(), c), normalise(x, c))


def test_grey_solarise_and_whole_turns_of_the_hue():
    x = images(2)
    some = jnp.array([True, False])
    grey = levels(device.augmented(x, Draw(grey=some)))
    np.testing.assert_allclose(grey[0], np.repeat(x[0] @ [0.2989, 0.587, 0.114], 3).reshape(x[0].shape), atol=1e-3)
    np.testing.assert_allclose(grey[1], x[1], atol=1e-3)
    inverted = levels(device.augmented(x, Draw(solarise=some)))
    np.testing.assert_allclose(inverted, [np.where(x[0] >= 128, 255 - x[0].astype(int), x[0]), x[1]], atol=1e-3)
    turned = levels(device.turn_hue(device.planes_of(x), device.each(jnp.array([1.0, 1 / 3]))))
    np.testing.assert_allclose(turned[0], x[0], atol=1e-3)
    np.testing.assert_allclose(turned[1], x[1][..., [2, 0, 1]], atol=1e-3)  # red becomes green


@pytest.mark.parametrize("side", [1, 5, 30])
def test_the_blur_keeps_sums_and_its_variance_is_sigma_squared(side):
    sigma = jnp.array([0.0, 0.1, 0.7, 1.3, 2.0])
    weights = np.asarray(jax.jit(lambda x: device.blur_weights(x, side, 2.0))(sigma), np.float64)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert (weights > -1e-6).all()
    offset = np.arange(weights.shape[1]) - weights.shape[1] // 2
    reached = np.arange(side) + offset[:, None]
    assert (weights[:, (reached < 0) | (reached >= side)] == 0).all()
    np.testing.assert_array_equal(weights[0, offset == 0], 1)
    if side == 30:
        np.testing.assert_allclose((weights[:, :, 15] * offset**2).sum(1), np.square(sigma), atol=1e-5)


def test_the_blur_repeats_the_edge_and_spreads_along_both_axes():
    x = np.zeros((1, 3, 12, 9), np.float32)
    x[0, 0, 7, 3], x[0, 1] = 1, 0.6
    red, green, blue = (np.asarray(p)[0] for p in jax.jit(lambda x: device.blur(x, jnp.array([0.8]), 2.0))(x))
    np.testing.assert_allclose(green, 0.6, atol=1e-6)
    assert np.unravel_index(red.argmax(), red.shape) == (7, 3) and blue.max() == 0
    np.testing.assert_allclose(red[6, 3], red[7, 4], atol=1e-6)
    np.testing.assert_allclose(red[5, 3], red[7, 5], atol=1e-6)


def test_a_colour_in_a_word_is_wrong_by_an_eighth_of_a_level_at_most():
    x = np.random.default_rng(0).random((3, 2, 50, 50)).astype(np.float32)
    words = device.packed(tuple(jnp.asarray(x)))
    assert np.abs(np.asarray(device.unpacked(words, 0)) - x).max() <= 1 / 8 / 255 + 1e-6
    np.testing.assert_array_equal(device.unpacked(words, -1), np.moveaxis(device.unpacked(words, 0), 0, -1))
    assert device.unpacked(device.packed((jnp.full((1, 1, 1), 1.3), -jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)))), 0)[
        :, 0, 0, 0
    ].tolist() == [1, 0, 1]


def test_the_mean_of_an_image():
    x = np.random.default_rng(0).random((2, 37, 224)).astype(np.float32)
    np.testing.assert_allclose(device.image_mean(jnp.asarray(x)), x.astype(np.float64).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(device.image_mean(jnp.ones((1, 2, 255))), 1, rtol=1e-6)


def test_draws_have_the_asked_probabilities_and_ranges():
    o = Options(0.7, 1.3, 0.4, 0.2, 0.1, grey=0.3, blur=0.6, solarise=0.2, equalise=0.1, sigma=(0.5, 1.5))
    draw = jax.jit(lambda keys: device.drawn(keys, o))(jax.random.split(jax.random.key(0), 8000))
    jitter = draw.jitter
    on = np.asarray(jitter.brightness) != 1
    for share, asked in (
        (on, 0.7),
        (draw.grey, 0.3),
        (draw.sigma > 0, 0.6),
        (draw.solarise, 0.2),
        (draw.equalise, 0.1),
    ):
        assert np.mean(share) == pytest.approx(asked, abs=0.02)
    for values, low, high in (
        (jitter.brightness[on], 0, 2.3), (jitter.contrast[on], 0.6, 1.4), (jitter.saturation[on], 0.8, 1.2),
        (jitter.hue[on], -0.1, 0.1), (draw.sigma[draw.sigma > 0], 0.5, 1.5),
    ):  # fmt: skip
        near = 0.01 * (high - low)
        assert low <= values.min() < low + near and high - near < values.max() <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=2 * near)
    assert (jitter.hue[~on] == 0).all() and (jitter.contrast[~on] == 1).all()
    orders = np.stack(jitter.rank, 1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 250 and (np.sort(orders, 1) == np.arange(4)).all()
    drawn = [draw.grey, draw.sigma > 0, draw.solarise, draw.equalise, jitter.hue > 0, jitter.saturation > 1]
    assert np.abs(np.corrcoef(np.asarray(drawn, float)[:, on]) - np.eye(6)).max() < 0.05
    strengths = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, *jitter.rank[:3]]
    strengths = np.asarray(strengths, float)[:, on]
    between = np.corrcoef(np.concatenate([strengths, np.asarray(drawn[:4], float)[:, on]])) - np.eye(11)
    between[4:7, 4:7] = 0  # ranks exclude each other
    assert np.abs(between).max() < 0.06


def test_an_operation_of_probability_zero_is_not_in_the_program():
    keys = jax.random.split(jax.random.key(0), 2)
    none = Options(0.0, 0.4, 0.4, 0.4, 0.1, grey=0.0, blur=0.0, solarise=0.0, equalise=0.0, sigma=(0.1, 2.0))
    assert device.drawn(keys, none) == Draw()


def view_config(name, small=0, dtype="float32"):
    c = configs.base()
    c.dtype, c.data.image_size = dtype, (9, 11)
    data.preset(c, name)
    c.views.small = small
    return c


def batch_of(count, small=0):
    batch = {"views": images(2 * count).reshape(count, 2, 9, 11, 3)}
    return batch | ({"small_views": images(count * small, (5, 6), 1).reshape(count, small, 5, 6, 3)} if small else {})


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_views_of_a_batch():
    c, batch = view_config("multicrop_cifar", small=3), batch_of(4, small=3)
    c.views.blur = (0.4, 0.0, 1.0)
    c.views.jitter = (1.0,)  # for the last lines
    run = jax.jit(data.views_of(c))
    out = run(batch, keys(4))
    assert [x.shape for x in out] == [(4, 9, 11, 3)] * 2 + [(4, 5, 6, 3)] * 3
    assert all(x.dtype == jnp.float32 for x in out)
    # An image does not depend on the others, and has the draws of its own key; ten bits may be rounded differently.
    turned = run({name: x[::-1] for name, x in batch.items()}, keys(4)[::-1])
    for a, b, other in zip(out, turned, run(batch, keys(4, seed=1)), strict=True):
        assert np.abs(a - b[::-1]).max() <= 1 / 1023 / 0.224 + 1e-6 and np.abs(a - other).max() > 0.1
    # Every view has draws of its own: one colour, which has no crop and no size, becomes a different one in each.
    flat = run({name: np.broadcast_to(np.uint8([200, 90, 60]), x.shape) for name, x in batch.items()}, keys(4))
    for a, b in itertools.combinations([x[:, 0, 0] for x in flat], 2):
        assert (np.abs(a - b).max(1) > 0.05).all()


def weak_view():
    """A config with most operations, images, and their draws."""
    c = view_config("weak")
    c.views.solarise = (0.5,)
    return c, images(3), jax.jit(lambda keys: device.drawn(keys, Options.of(c, 0)))(keys(3))


@pytest.mark.slow  # op by op
def test_a_view_is_the_same_without_jit():
    c, x, draw = weak_view()
    plain, compiled = device.view(x, draw, c), jax.jit(lambda x, draw: device.view(x, draw, c))(x, draw)
    assert np.abs(plain - compiled).max() <= 1 / 1023 / 0.224 + 1e-6


def test_a_view_is_the_same_in_bfloat16():
    c, x, draw = weak_view()
    compiled = jax.jit(lambda x, draw: device.view(x, draw, c))(x, draw)
    c.dtype = "bfloat16"
    rounded = jax.jit(lambda x, draw: device.view(x, draw, c))(x, draw)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), compiled, atol=0.02)


def test_each_kind_of_view_has_its_own_operations():
    c = view_config("ressl", small=2)
    c.views.update(jitter=(0.0,), blur=(0.0,), grey=(1.0, 0.0, 0.0), solarise=(0.0, 0.0, 1.0))
    batch = batch_of(3, small=2)
    grey, plain, *small = (device.denormalise(x, c) * 255 for x in jax.jit(data.views_of(c))(batch, keys(3)))
    assert np.ptp(np.asarray(grey), -1).max() < 0.3
    np.testing.assert_allclose(plain, batch["views"][:, 1], atol=1e-3)
    for v, x in enumerate(small):
        assert 126 < np.asarray(x).max() < 127.3
        expected = batch["small_views"][:, v].astype(int)
        np.testing.assert_allclose(x, np.where(expected >= 128, 255 - expected, expected), atol=0.14)


def test_pictures_show_an_image_and_its_views(equal):
    c = configured(equal)
    c.data.image_size, c.views.small = (9, 11), 1
    source = data.open_split(c, "train")
    batch = next(data.eval_batches(c, source, [4, 1], 2))
    batch |= data.shown_views(c, source, batch["index"])
    again = data.shown_views(c, source, np.array([1]))
    np.testing.assert_array_equal(batch["small_views"][1:], again["small_views"])
    captions, pictures = data.pictures_of(c)
    columns = jax.jit(pictures)(None, batch, keys(2))
    assert captions == ("image", "view 0", "view 1", "small view 0")
    assert [x.shape for x in columns] == [(2, 9, 11, 3)] * 4
    np.testing.assert_allclose(columns[0] * 255, batch["image"], atol=1e-3)
    assert all(x.min() > -1e-3 and x.max() < 1.001 and np.std(x) > 0.01 for x in columns)


# -- recipes


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_a_recipe_sets_every_key_but_sigma_and_is_valid(name):
    c = configs.base()
    c.steps, c.method, c.encoder.name = 1, "byol", "resnet18"  # patches would have to divide small views
    assert set(recipes.PRESETS[name]) == set(recipes.VIEWS.keys) - {"sigma"}
    data.preset(c, name)
    configs.validate(c)
    assert [recipes.of_kind(c, "jitter", v) for v in range(2)] == ([0.8, 0.0] if name == "ressl" else [0.8, 0.8])


def test_recipes_are_those_of_the_table():
    def of(name, key):
        c = configs.base()
        data.preset(c, name)
        return [recipes.of_kind(c, key, view) for view in range(3 if c.views.small else 2)]

    assert of("asymmetric_cifar", "solarise") == [0, 0.2] and of("asymmetric_cifar", "blur") == [0, 0]
    assert of("asymmetric_imagenet", "blur") == [1, 0.1] and of("symmetric", "hue") == [0.2, 0.2]
    assert of("weak", "saturation") == [0.4, 0.4] and of("asymmetric_cifar", "saturation") == [0.2, 0.2]
    assert of("vicreg_cifar", "scale_min") == [0.2, 0.2] and of("wmse_imagenet100", "blur") == [0.2, 0.2]
    assert of("multicrop_cifar", "scale_max") == [1, 1, 0.5] and of("multicrop_cifar", "brightness") == [0.6, 0.6, 0.8]
    assert of("multicrop_asymmetric", "blur") == [1, 0.1, 0] and of("multicrop_symmetric", "blur") == [0.5, 0.5, 0]


@pytest.mark.parametrize(
    "keys_,line",
    [
        ({"small": 6, "solarise": (0.0, 0.2)}, r"views.solarise=\[0.0, 0.2\]: must hold one value or three"),
        (
            {"scale_min": (0.9,), "scale_max": (0.5,)},
            "views.scale_min=0.9: must not be above config.views.scale_max=0.5",
        ),
        ({"grey": ()}, "must hold one to three values"),
        ({"hue": (0.6,)}, r"each must lie in \[0, 0.5\]"),
        ({"blur": (0.1,) * 4}, "must hold one to three values"),
        ({"small_size": (8,)}, "height, width"),
    ],
)
def test_views_that_cannot_be(keys_, line):
    c = configs.base()
    c.steps, c.method = 1, "byol"
    c.views.update(keys_)
    with pytest.raises(ConfigError, match=line):
        configs.validate(c)


def test_unknown_recipes_and_randaugment_are_refused():
    c = configs.base()
    with pytest.raises(ConfigError, match="'strong': must be one of asymmetric_cifar, "):
        data.preset(c, "strong")
    c.steps, c.method, c.data.randaugment_layers = 1, "byol", 2
    with pytest.raises(ConfigError, match="randaugment_layers=2: must be 0"):
        configs.validate(c)
