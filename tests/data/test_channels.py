"""Images of other numbers of channels than three: each three of them are treated as an RGB image is."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.data import decoding
from crate_jax.data.given import source as given_source
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods import METHODS
from crate_jax.models import autoencoder
from crate_jax.workdir.pictures import reconstruction_grid

pytestmark = pytest.mark.one_python

CHANNELS = 5
THREES = ([0, 1, 2], [4, 3, 1])


def smooth(count, height, width):
    """Smooth images of CHANNELS channels, uint8 (n, H, W, C)."""
    low = np.random.default_rng(0).integers(0, 256, (count, 4, 5, CHANNELS), np.uint8)
    resize = lambda band: Image.fromarray(band).resize((width, height), Image.Resampling.BICUBIC)  # noqa: E731
    return np.stack([np.stack([resize(x[..., c]) for c in range(CHANNELS)], -1) for x in low])


def configured(path, channels=CHANNELS, **options):
    config = config_lib.base()
    config.batch_size, config.steps, config.encoder.patch_size = 9, 2, 4
    config.data.update(
        {"source": f"npz:{path}", "image_size": (16, 12), "channels": channels, "mean": (0.4,) * channels,
         "std": (0.3,) * channels} | options
    )  # fmt: skip
    return config


def saved(folder, images):
    path = folder / f"{len(list(folder.iterdir()))}.npz"  # a thread may still read the one before, which is mapped
    np.savez(path, images=images)
    return path


def first_batch(config):
    """The images of the first batch, and the first four as evaluation has them."""
    source = data.open_split(config, "train")
    pipeline = data.TrainPipeline(config, source)
    try:
        (batch,) = itertools.islice(pipeline.batches(2), 1)
    finally:
        pipeline.close()
    assert batch["image"].shape == data.batch_shapes(config, ["image"])["image"].shape
    return batch["image"], data.eval_images(config, source, range(4))[0]


@pytest.mark.parametrize("alone", [False, True])
def test_crops_are_those_of_rgb_images(alone):
    image = smooth(1, 31, 43)[0]
    boxes, sizes = [(3.4, 5.2, 17.9, 20.3), (0, 0, 31, 43)], [(13, 9), (40, 22)]
    cut = decoding.crops(image, boxes, sizes, Image.Resampling.BICUBIC, alone)
    assert [crop.shape for crop in cut] == [(13, 9, CHANNELS), (40, 22, CHANNELS)]
    for three in THREES:
        rgb = Image.fromarray(np.ascontiguousarray(image[..., three]))
        for ours, theirs in zip(cut, decoding.crops(rgb, boxes, sizes, Image.Resampling.BICUBIC, alone), strict=True):
            np.testing.assert_array_equal(ours[..., three], np.asarray(theirs))


@pytest.mark.parametrize("memory_mb", [0, 100])
@pytest.mark.parametrize("size", [(24, 20), (90, 70)])  # with a table of weights, and without
def test_batches_are_those_of_rgb_images(tmp_path, size, memory_mb):
    images, options = smooth(11, *size), {"memory_mb": memory_mb, "threads": 2}
    if size[0] > 64:
        options["image_size"] = (80, 72)

    def batch(images, channels):
        return first_batch(configured(saved(tmp_path, images), channels, **options))

    ours = batch(images, CHANNELS)
    for three in THREES:
        for mine, theirs in zip(ours, batch(images[..., three], 3), strict=True):
            np.testing.assert_array_equal(mine[..., three], theirs)


def test_layouts_of_the_axes(tmp_path):
    images = smooth(6, 7, 9)
    for array, channels in (
        (images, CHANNELS),
        (images.transpose(0, 3, 1, 2), CHANNELS),
        (images[..., :2], 2),
        (images[..., 0], 1),
        (images[..., :1], 1),
    ):
        source = data.open_split(configured(saved(tmp_path, array), channels), "train")
        np.testing.assert_array_equal([source.read(i) for i in range(6)], images[..., :channels])


@pytest.mark.parametrize("encoder", ["crate", "vit", "resnet18"])
def test_all_kinds_of_encoders_reconstruct_them(encoder):
    config = configured("a.npz", image_size=(16, 16))
    config.encoder.update(name=encoder, width=16, depth=1, heads=2)
    config.decoder.name, config.evaluation.pool = "linear", "mean"
    config.corruption.update(name="mask", mask_fill="token")
    config_lib.validate(config)
    method = METHODS["reconstruction"].build(config, None)

    def step(key):
        params, carried = method.init(key, lambda params: params)
        batch = {"image": jax.numpy.zeros((4, 16, 16, CHANNELS), np.uint8)}
        keys_B = jax.random.split(key, 4)
        return (
            params,
            method.loss(params, carried, batch, keys_B)[0],
            method.pictures(method.judged(params, carried), batch, keys_B),
        )

    params, loss, pictures = jax.eval_shape(step, jax.random.key(0))
    assert autoencoder.patch_numbers(config)[1] == 4 * 4 * CHANNELS
    assert loss.shape == () and {x.shape for x in pictures} == {(4, 16, 16, CHANNELS)}
    assert CHANNELS * 16 in {size for x in jax.tree.leaves(params["decoder"]) for size in x.shape}


@pytest.mark.parametrize("channels,shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_pictures_show_three_channels(channels, shown):
    images = smooth(2, 6, 8)[..., :channels] / 255.0
    rgb = images[..., shown]
    np.testing.assert_array_equal(
        reconstruction_grid({"a": images, "b": rgb}), reconstruction_grid({"a": rgb, "b": rgb})
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"data.mean": (0.5,) * 3}, r"config.data.mean=\[0.5, 0.5, 0.5\]: must be 5 numbers, one per channel"),
        ({"data.std": (0.5,) * 6}, "config.data.std=.*: must be 5 numbers"),
        (
            {"data.source": "hf:a"},
            "channels=5: must be one of 1, 2, 3, 4 with config.data.source='hf:a'; npz: has",
        ),
        ({"data.source": "digits"}, "config.data.channels=5: must be one of 1, 3 with config.data.source='digits'"),
        ({"data.randaugment_layers": 1}, "config.data.randaugment_layers=1: must be 0 with config.data.channels=5"),
        (
            {"method": "byol"},
            "config.data.channels=5: must be 3, since config.method='byol' changes red, green and blue",
        ),
        ({"job": "segment"}, "must be 3, since job segment reads red"),
        ({"job": "align"}, "must be 3, since job align reads red"),
    ],
)
def test_what_needs_three_channels_says_so_in_one_line(change, message):
    config = configured("a.npz")
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message) as e:
        config_lib.validate(config)
    assert "\n" not in str(e.value)


def files(folder, mode, count=6):
    """Images of a mode in two classes, each turned by its EXIF orientation; their bands as displayed."""
    rng, upright = np.random.default_rng(0), []
    bands = len(Image.new(mode, (1, 1)).getbands())
    for i in range(count):
        pixels = rng.integers(0, 256, (5, 7, bands), np.uint8)
        path = folder / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[decoding.ORIENTATION_TAG] = 6
        Image.fromarray(pixels.squeeze(), mode).save(path, exif=exif)
        upright.append(np.rot90(pixels, -1))
    order = np.argsort(np.arange(count) % 2, kind="stable")  # of the paths
    return np.stack(upright)[order]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_files_keep_their_bands(tmp_path, mode):
    images = files(tmp_path, mode)
    channels = images.shape[-1]
    config = configured("", channels, source=f"folder:{tmp_path}")
    config_lib.validate(config)
    source = data.open_split(config, "train")
    np.testing.assert_array_equal([source.read(i) for i in range(6)], images)
    assert source.channels == channels and decoding.oriented_size(source.open(0)) == (7, 5)
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(source.labels_of([4, 1]), [1, 0])
    assert source.class_names == ["a", "b"] and source.name(5) == "b/05.png" and source.split == "train"
    plain = data.open_split(configured("", 3, source=f"folder:{tmp_path}"), "train")
    assert plain.fingerprint() != source.fingerprint() and plain.read(0).shape == (7, 5, 3)
    paths = [str(tmp_path / "train" / plain.name(i)) for i in range(6)]
    for given in (given_source(str(tmp_path), channels), given_source([Image.open(p) for p in paths], channels)):
        np.testing.assert_array_equal([given.read(i) for i in range(6)], images)


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_batches_of_files_are_those_of_arrays(tmp_path, memory_mb):
    """From memory, and read by threads as they are needed."""
    images = files(tmp_path, "LA", 20)

    options = {"memory_mb": memory_mb, "threads": 2, "image_size": (6, 4)}
    of_files, of_arrays = (
        first_batch(configured("", 2, source=source, **options))
        for source in (f"folder:{tmp_path}", f"npz:{saved(tmp_path, images)}")
    )
    for ours, theirs in zip(of_files, of_arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_photo_becomes_grey_and_has_no_fourth_band(tmp_path):
    images = files(tmp_path, "RGB")
    grey = data.open_split(configured("", 1, source=f"folder:{tmp_path}"), "train")
    weighted = images @ np.array([0.299, 0.587, 0.114])
    found = np.stack([grey.read(i) for i in range(6)])
    assert found.shape == (6, 7, 5, 1) and np.abs(found[..., 0] - weighted).max() <= 0.51
    four = data.open_split(configured("", 4, source=f"folder:{tmp_path}"), "train")
    image = Image.fromarray(images[0])
    image.putalpha(255)
    image.save(tmp_path / "a.webp", lossless=True)  # which leaves the opaque alpha out
    opened = decoding.of_channels(decoding.open_image((tmp_path / "a.webp").read_bytes()), 4)
    np.testing.assert_array_equal(opened, np.asarray(image))
    with pytest.raises(decoding.DecodeError, match=r"opens with the bands R, G, B, where config.data.channels=4"):
        four.read(0)


@pytest.mark.parametrize(
    "images,channels,message",
    [
        (smooth(2, 6, 8), 4, "with 4 channels; config.data.channels says how many"),
        (smooth(2, 6, 8), 3, "with 1 or 3 channels; config.data.channels says how many"),
        (smooth(2, 5, 8), 5, "with 5 channels, but it may be either"),
        (smooth(2, 5, 8)[..., 0], 5, "with 5 channels"),
    ],
)
def test_arrays_of_another_number(tmp_path, images, channels, message):
    with pytest.raises(DataError, match=message):
        data.open_split(configured(saved(tmp_path, images), channels), "train")
