"""Segmentation: pairs stay aligned, scores equal references, both heads learn, runs continue with the same bits."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

import crate_jax
from crate_jax import config as configs, data
from crate_jax.config import validate
from crate_jax.convert import pretrained
from crate_jax.data.pairs import IGNORED, crop_mask
from crate_jax.errors import CheckpointError, ConfigError, DataError
from crate_jax.evals import segmentation
from crate_jax.jobs import finetune, train
from crate_jax.methods import segment
from crate_jax.models.adopt import adopt_encoder
from crate_jax.models.heads import UPerHead, pooling_matrix
from crate_jax.models.patches import relative_position_index, relative_table_rows
from crate_jax.parallel import sharding
from crate_jax.training import loop, step as train_step
from crate_jax.training.step import init_params, make_recipe
from crate_jax.workdir import pictures

pytestmark = pytest.mark.one_python

CLASSES = 4
COLOURS = np.array([(120, 120, 120), (220, 40, 40), (40, 220, 40), (40, 40, 220)])


def shapes(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two coloured shapes on noise, uint8 (h, w, 3), and which class each pixel is, uint8 (h, w)."""
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    for _ in range(2):
        kind, radius = int(rng.integers(1, CLASSES)), rng.uniform(0.2, 0.35) * min(height, width)
        dy, dx = np.abs(y - rng.uniform(0, height)), np.abs(x - rng.uniform(0, width))
        mask[[np.maximum(dy, dx), np.hypot(dy, dx), dy + dx][kind - 1] < radius] = kind
    noise = rng.normal(0, 25, (height, width, 3))
    return np.clip(COLOURS[mask] + noise, 0, 255).astype(np.uint8), mask


def write(folder: Path, image: np.ndarray, mask: np.ndarray, name: str, kinds=("images", "masks")) -> None:
    for kind, array in zip(kinds, (image, mask), strict=True):
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 19)):
        for i in range(count):
            image, mask = shapes(rng, *rng.integers(36, 56, 2))
            write(root / split, image, mask, f"{i:03d}")
    return root


def small(folder: Path, arg: str = "", **values):
    """configs/segment.py on a small CRATE or ViT; values override keys, as `optimizer__lr=1e-3`."""
    c = importlib.import_module("configs.segment").get_config(arg)
    c.steps, c.batch_size, c.optimizer.lr, c.optimizer.warmup_steps = 4, 16, 3e-3, 0
    c.data.source, c.data.image_size = f"folder:{folder}", (32, 32)
    c.data.mean, c.data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    c.encoder.patch_size, c.encoder.width, c.encoder.depth, c.encoder.heads = 4, 32, 2, 2
    c.save.every, c.log.tensorboard, c.log.pictures, c.evaluation.every = 100, False, 0, 0
    c.evaluation.pool = "mean"  # the job takes the checkpoint's
    for key, value in values.items():
        *section, leaf = key.split("__")
        (c[section[0]] if section else c)[leaf] = value
    validate(c)
    return c


# --- pairs


def test_image_and_mask_stay_aligned(tmp_path):
    """A mask painted into its image is found where the mask is, after crops, resizes and flips."""
    rng = np.random.default_rng(1)
    for i in range(24):
        mask = np.repeat(np.repeat(rng.integers(0, 3, (4, 5), np.uint8), 16, 0), 16, 1)
        write(tmp_path / "train", np.repeat(mask[..., None] * 100, 3, 2), mask, f"{i}")
    c = small(tmp_path, data__crop_scale=(0.2, 1.0), data__interpolation="bilinear", seed=3)
    source = data.open_split(c, "train")
    batches = data.TrainPipeline(c, source).batches()
    agree, mirrored = [], []
    for _ in range(3):
        batch = next(batches)
        assert batch["mask"].dtype == np.int16 and batch["mask"].shape == (16, 32, 32)
        painted = np.rint(batch["image"][..., 0] / 100)
        agree.append(np.mean(painted == batch["mask"]))
        mirrored.append(np.mean(painted == batch["mask"][:, :, ::-1]))
    batches.close()
    assert min(agree) > 0.97  # the rest: blended colours at the edges of the squares
    assert max(mirrored) < 0.8
    for batch in data.eval_batches(c, source, range(5), 5):
        assert np.mean(np.rint(batch["image"][..., 0] / 100) == batch["mask"]) > 0.97


def test_batches_are_functions_of_seed_step_and_row(folder):
    c = small(folder)
    source = data.open_split(c, "train")
    pipeline = data.TrainPipeline(c, source)
    ahead = [next(b) for b in [pipeline.batches()] for _ in range(4)]
    again = next(pipeline.batches(3))
    second_half = next(data.TrainPipeline(c, source, process_index=1, process_count=2).batches(3))
    for name in ("image", "mask", "index"):
        np.testing.assert_array_equal(ahead[3][name], again[name])
        np.testing.assert_array_equal(ahead[3][name][8:], second_half[name])
    assert (ahead[2]["mask"] != ahead[3]["mask"]).any()


@pytest.mark.slow
def test_worker_processes_give_the_same_pairs(folder):
    c = small(folder)
    source = data.open_split(c, "train")
    here = next(data.TrainPipeline(c, source).batches(2))
    c.data.workers = 2
    pipeline = data.TrainPipeline(c, source)
    there = next(pipeline.batches(2))
    pipeline.close()
    np.testing.assert_array_equal(here["mask"], there["mask"])
    np.testing.assert_array_equal(here["image"], there["image"])


def test_masks_are_resized_as_pillow_takes_the_nearest():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 200, (37, 53), np.uint8)
    for _ in range(50):
        top, left = rng.integers(0, 20, 2)
        height, width = rng.integers(1, 17), rng.integers(1, 33)
        size = tuple(rng.integers(1, 70, 2))
        expected = Image.fromarray(mask).resize(size[::-1], 0, box=(left, top, left + width, top + height))
        # Where a centre falls between two pixels both are nearest, and rounding decides.
        rows, columns = (
            (2 * np.arange(n) + 1) * side % (2 * n) != 0 for n, side in zip(size, (height, width), strict=True)
        )
        ours = crop_mask(mask, (top, left, height, width), size)
        np.testing.assert_array_equal(ours[rows][:, columns], np.asarray(expected)[rows][:, columns])


def png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2, 4 or 16 bits per pixel, which Pillow does not write all of."""
    height, width = values.shape
    rows = []
    for row in values:
        packed = np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - bits :]
        rows.append(b"\0" + np.packbits(packed.reshape(-1)).tobytes())

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, "palette"])
def test_mask_files_hold_class_numbers_whatever_their_depth(tmp_path, bits):
    highest = {1: 1, 2: 3, 4: 15, 8: 200, 16: 3000, "palette": 200}[bits]
    values = np.random.default_rng(0).integers(0, highest + 1, (12, 9)).astype(np.uint16)
    values[0, 0] = highest
    write(tmp_path / "train", np.zeros((12, 9, 3), np.uint8), np.zeros((12, 9), np.uint8), "a")
    path = tmp_path / "train/masks/a.png"
    if bits == "palette":
        image = Image.fromarray(values.astype(np.uint8)).convert("P")
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
        image.save(path)
    else:
        path.write_bytes(png(values, bits))
    source = data.open_split(small(tmp_path, segment__ignore_index=-1), "train")
    np.testing.assert_array_equal(source.mask(0), values)
    assert source.classes == highest + 1


def test_ignored_values_and_the_zero_label(tmp_path):
    mask = np.array([[0, 1, 2], [255, 3, 7]], np.uint8)
    write(tmp_path / "train", np.zeros((2, 3, 3), np.uint8), mask, "a")
    plain = data.open_split(small(tmp_path), "train")
    np.testing.assert_array_equal(plain.mask(0), [[0, 1, 2], [IGNORED, 3, 7]])
    shifted = data.open_split(small(tmp_path, segment__reduce_zero_label=True, segment__ignore_index=7), "train")
    np.testing.assert_array_equal(shifted.mask(0), [[IGNORED, 0, 1], [254, 2, IGNORED]])
    assert (plain.classes, shifted.classes) == (8, 255)
    assert plain.fingerprint() != shifted.fingerprint()


@pytest.mark.parametrize(
    ("train_folder", "eval_folder", "kinds"),
    [
        ("{}/training", "{}/validation", ("images", "annotations")),
        ("{}/train", "{}/val", ("images", "masks")),
        ("train/{}", "test/{}", ("images", "labels")),
        ("{}/Training", "{}/valid", ("images", "labels")),
        ("Train/{}", "dev_set/{}", ("images", "masks")),
    ],
)
def test_layouts(tmp_path, train_folder, eval_folder, kinds):
    image, mask = shapes(np.random.default_rng(0), 20, 20)
    for where, count in ((train_folder, 3), (eval_folder, 2)):
        for i in range(count):
            write(tmp_path, image, mask, f"part/{i}", [where.format(kind) for kind in kinds])
    assert len(data.open_split(small(tmp_path), "train")) == 3
    assert len(data.open_split(small(tmp_path), "eval")) == 2
    assert data.open_split(small(tmp_path, data__eval_split=""), "eval") is None


def bad_pair(root: Path, what: str) -> dict:
    """Spoils one pair; returns the keys that a config needs to notice."""
    masks, images = root / "train/masks", root / "train/images"
    if what == "no mask":
        (masks / "1.png").unlink()
    elif what == "no image":
        (images / "1.png").unlink()
    elif what == "other size":
        Image.new("L", (30, 20)).save(masks / "1.png")
    elif what == "colours":
        Image.new("RGB", (20, 20)).save(masks / "1.png")
    elif what == "lossy":
        Image.open(masks / "1.png").save(masks / "1.jpg")
        (masks / "1.png").unlink()
    elif what == "class":
        Image.new("L", (20, 20), 9).save(masks / "1.png")
        return {"segment__classes": CLASSES}
    elif what == "two":
        (root / "train/labels").mkdir()
    elif what == "nothing":
        for path in masks.iterdir():
            Image.new("L", (20, 20), 255).save(path)
    elif what == "split":
        return {"data__train_split": "holdout"}
    elif what == "folder":
        return {"data__source": f"folder:{root}/none"}
    elif what == "source":
        return {"data__source": "digits"}
    return {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", r"train/images/1.png: has no mask; expected .*train/masks/1.png"),
        ("no image", r"train/masks/1.png: has no image; expected .*train/images/1"),
        ("other size", r"train/masks/1.png: is 30 x 20 pixels, its image 1.png 20 x 20"),
        ("colours", r"train/masks/1.png: a mask has one channel .* mode RGB"),
        ("lossy", r"train/masks/1.jpg: a mask must be a PNG"),
        ("class", r"train/masks/1.png: holds the value 9, class 9, but there are 4 classes, 0..3"),
        ("two", r"both .*train/masks and .*train/labels exist"),
        ("nothing", r"no mask holds a class"),
        ("split", r"no pairs of split 'holdout'; expected images/SPLIT and MASKS/SPLIT, or SPLIT/images"),
        ("folder", r"none: no such folder"),
        ("source", r"source='digits': image/mask pairs are read from folder:DIR"),
    ],
)
def test_bad_pairs_are_named_in_one_line(tmp_path, what, message):
    for i in range(3):
        write(tmp_path / "train", *shapes(np.random.default_rng(i), 20, 20), f"{i}")
    values = bad_pair(tmp_path, what)
    with pytest.raises(DataError, match=message) as caught:
        data.open_split(small(tmp_path, **values), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"segment__classes": 2}])
def test_masks_of_0_and_255_hold_one_class(tmp_path, options, caplog):
    """255 is ignore_index: the object would be ignored, and the background alone would score 100 %."""
    mask = np.zeros((5, 8), np.uint8)
    mask[1:4, 2:7] = 255
    for split in ("train", "val"):
        write(tmp_path / split, np.zeros((5, 8, 3), np.uint8), mask, "a")
    message = r"train/masks: the masks hold only class 0, and 37.5% of their pixels have no class .*ignore_index=255\)"
    with pytest.raises(DataError, match=message):
        data.open_split(small(tmp_path, **options), "train")
    assert data.open_split(small(tmp_path, **options), "eval") is not None
    assert "val/masks: the masks hold only class 0" in caplog.text


def test_classes_that_no_mask_holds_are_told(tmp_path, caplog):
    write(tmp_path / "train", np.zeros((1, 3, 3), np.uint8), np.array([[0, 3, 255]], np.uint8), "a")
    data.open_split(small(tmp_path, segment__classes=6), "train")
    assert "train/masks: no mask holds 4 of 6 classes: 1, 2, 4, 5" in caplog.text


def test_a_damaged_mask_is_skipped_with_its_image_and_counted(tmp_path):
    for i in range(8):
        write(tmp_path / "train", *shapes(np.random.default_rng(i), 20, 20), f"{i}")
    path = tmp_path / "train/masks/5.png"
    path.write_bytes(path.read_bytes()[:60])
    batch = next(
        data.TrainPipeline(
            small(tmp_path, data__max_undecodable=0.2), data.open_split(small(tmp_path), "train")
        ).batches()
    )
    assert batch["undecodable"] == 2  # twice in 16 of 8 images
    assert 5 not in batch["index"]
    with pytest.raises(DataError, match="5.png"):
        next(data.TrainPipeline(small(tmp_path), data.open_split(small(tmp_path), "train")).batches())


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_named_pipe_is_skipped_and_not_waited_for(tmp_path, kind):
    for i in range(8):
        write(tmp_path / "train", *shapes(np.random.default_rng(i), 20, 20), f"{i}")
    (path,) = (tmp_path / "train" / kind).glob("5.*")
    path.unlink()
    os.mkfifo(path)
    # In a process of its own, which ends even if it waits.
    code = f"""
from crate_jax.data import folder, pairs
images, masks = [folder.FolderSource(f"{tmp_path}/train/{{kind}}", labelled=False) for kind in ("images", "masks")]
pairs.PairSource(images, masks, 255, False).check(0, 2)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    source = data.open_split(small(tmp_path), "train")
    with pytest.raises(data.decoding.DecodeError, match="not a regular file"):
        source.open(5) if kind == "images" else source.mask(5)


# --- scores


def test_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 6, (3, 9, 11)).astype(np.int16) for _ in range(2))
    truth[truth == 4], predicted[predicted == 4] = 0, 1  # class 4 occurs nowhere
    predicted[predicted == 5] = 2  # class 5 is never predicted
    truth[rng.random(truth.shape) < 0.2] = IGNORED
    counts = np.asarray(jax.jit(segmentation.confusion, static_argnums=2)(truth, predicted, 6))
    kept = truth != IGNORED
    t, p = truth[kept], predicted[kept]
    np.testing.assert_array_equal(counts, confusion_matrix(t, p, labels=range(6)))
    plain = np.zeros((6, 6), int)
    for a, b in zip(truth.ravel(), predicted.ravel(), strict=True):
        if a != IGNORED:
            plain[a, b] += 1
    np.testing.assert_array_equal(counts, plain)
    scores = segmentation.segmentation_scores(counts)
    occurring = [0, 1, 2, 3, 5]
    assert scores["miou"] == pytest.approx(jaccard_score(t, p, labels=occurring, average="macro", zero_division=0))
    expected = jaccard_score(t, p, labels=occurring, average=None, zero_division=0)
    assert [scores["iou"][k] for k in occurring] == pytest.approx(expected)
    assert scores["iou"][4] is None and scores["iou"][5] == 0
    assert scores["mean_accuracy"] == pytest.approx(recall_score(t, p, average="macro", labels=occurring))
    assert scores["pixel_accuracy"] == pytest.approx(np.mean(t == p))
    with pytest.raises(DataError, match="no pixel"):
        segmentation.segmentation_scores(np.zeros((2, 2), int))


@pytest.mark.parametrize("max_counted", [1, 2**31 - 1])
def test_evaluation_counts_every_pixel_once(folder, monkeypatch, max_counted):
    """On eight devices, with a last batch that is filled up, and with the device emptied after each batch."""
    monkeypatch.setattr(segmentation, "MAX_COUNTED", max_counted)
    c = small(folder, evaluation__batch_size=8)
    source, test = data.open_split(c, "train"), data.open_split(c, "eval")

    def nearest_colour(params, images):
        distance = jnp.linalg.norm(images[..., None, :].astype(jnp.float32) - COLOURS, axis=-1)
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    evaluation = segmentation.SegmentationEvaluation(c, nearest_colour, source, sharding.make_mesh(8, 1))
    batch = next(data.eval_batches(c, test, range(19), 19))
    predicted = np.asarray(nearest_colour(None, batch["image"]))
    scores = evaluation.scores({})
    assert scores["miou"] == pytest.approx(jaccard_score(batch["mask"].ravel(), predicted.ravel(), average="macro"))
    assert 0.6 < scores["miou"] < 1


def test_evaluation_needs_a_split_with_known_classes(tmp_path, folder):
    rng = np.random.default_rng(0)
    write(tmp_path / "train", *shapes(rng, 20, 20), "a")
    c = small(tmp_path)
    train_split = data.open_split(c, "train")
    with pytest.raises(DataError, match="has no evaluation split"):
        segmentation.SegmentationEvaluation(c, None, train_split, sharding.make_mesh(8, 1))
    write(tmp_path / "val", np.zeros((9, 9, 3), np.uint8), np.full((9, 9), 7, np.uint8), "b")
    with pytest.raises(DataError, match=r"val/masks/b.png: holds the value 7"):
        segmentation.SegmentationEvaluation(c, None, train_split, sharding.make_mesh(8, 1))


# --- heads


def test_pooling_covers_a_side_as_torch_does():
    """AdaptiveAvgPool of 7 places into 3: 0..2, 2..4, 4..6; of 2 into 6: 0 0 0 1 1 1."""
    np.testing.assert_allclose(
        pooling_matrix(7, 3) * 3, [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 4 + [1] * 3]
    )
    np.testing.assert_allclose(pooling_matrix(2, 6), np.repeat(np.eye(2), 3, axis=0))
    for side in range(1, 20):
        for bins in (1, 2, 3, 6):
            np.testing.assert_allclose(pooling_matrix(side, bins).sum(1), 1, rtol=1e-6)


def test_upernet_treats_each_image_alone_and_takes_odd_grids():
    head = UPerHead(CLASSES, 8, True, jnp.float32)
    maps = tuple(np.random.default_rng(i).normal(size=(2, 3, 5, 16)).astype(np.float32) for i in range(4))
    params = jax.jit(head.init)(jax.random.key(9), maps)
    apply = jax.jit(lambda *maps: head.apply(params, maps))
    scores, auxiliary = jax.device_get(apply(*maps))
    assert (scores.shape, auxiliary.shape) == ((2, 12, 20, CLASSES), (2, 3, 5, CLASSES))
    for i in range(4):  # every block is read, and only for its own image
        changed = [x.copy() for x in maps]
        changed[i][0, 1, 1] += 5.0
        difference = np.abs(jax.device_get(apply(*changed))[0] - scores)
        assert difference[0].max() > 1e-4
        assert difference[1].max() == 0


def test_blocks_of_the_papers(folder):
    for depth, expected in ((12, (4, 6, 8, 12)), (24, (8, 12, 16, 24)), (2, (1, 1, 1, 2))):
        assert segment.blocks(small(folder, "head=upernet", encoder__depth=depth)) == expected
    assert segment.blocks(small(folder, encoder__depth=12)) == (12,)
    assert segment.blocks(small(folder, segment__blocks=(1, 2))) == (1, 2)


@pytest.mark.parametrize(
    ("arg", "values", "message"),
    [
        ("", {"segment__blocks": (0, 2)}, r"config.segment.blocks=\(0, 2\): the encoder has the blocks 1..2"),
        ("head=upernet", {"segment__blocks": (1, 2)}, r"blocks=\(1, 2\): must be four blocks for head=upernet"),
        ("", {"data__randaugment_layers": 2}, r"config.data.randaugment_layers=2: must be 0 for segmentation"),
        ("", {"finetune__mixup": 0.8}, r"config.finetune.mixup=0.8: must be 0 for segmentation"),
        ("", {"segment__head": "fcn"}, r"config.segment.head='fcn': must be one of linear, upernet"),
    ],
)
def test_bad_options_are_named(folder, arg, values, message):
    with pytest.raises(ConfigError, match=message):
        c = small(folder, arg, **values)
        segment.build(c, data.open_split(c, "train"))


@pytest.mark.parametrize("pretraining", ["crate_mae", "vit_mae", "rop_vitb"])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_the_recipes_build_for_the_papers_encoders(folder, pretraining, head):
    """ADE20K's size by shapes alone: 512 px, 150 classes, an encoder of 12 blocks that was trained on 224 px."""
    c = importlib.import_module("configs.segment").get_config(f"head={head}")
    c.data.source, c.data.image_size, c.segment.classes = f"folder:{folder}", (512, 512), 150
    of = importlib.import_module(f"configs.{pretraining}").get_config("")
    c = finetune.resolve(c, pretrained.Pretrained("", of.to_dict(), {}, ""))
    validate(c)
    method = segment.build(c, data.open_split(c, "train"))
    make_recipe(c, method, 100 * c.batch_size)
    shapes = jax.eval_shape(lambda: init_params(c, method)[0])
    if pretraining == "rop_vitb":
        bias = shapes["encoder"]["blocks" if head == "upernet" else "relative_bias"]
        shape = bias["relative_bias"].shape if head == "upernet" else bias.shape
        assert shape == ((12,) if head == "upernet" else ()) + (63 * 63 + 3, 12)
    batch = {
        "image": jax.ShapeDtypeStruct((2, 512, 512, 3), np.uint8),
        "mask": jax.ShapeDtypeStruct((2, 512, 512), np.int16),
    }
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    value, (_, scalars) = jax.eval_shape(method.loss, shapes, {}, batch, keys)
    assert value.shape == () and ("auxiliary" in scalars) == (head == "upernet")
    assert jax.eval_shape(method.features, shapes, batch["image"]).shape == (2, 512, 512)


def test_ignored_pixels_have_no_part_in_the_loss():
    scores = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    mask = np.random.default_rng(0).integers(0, 3, (2, 4, 4)).astype(np.int16)
    mask[0, :2], mask[1, 0, 0] = IGNORED, IGNORED
    loss, grad = jax.value_and_grad(segment.cross_entropy)(scores, mask)
    log_p = np.asarray(jax.nn.log_softmax(scores))
    kept = np.argwhere(mask != IGNORED)
    assert float(loss) == pytest.approx(-sum(log_p[*i, mask[*i]] for i in kept) / mask.size, rel=1e-5)
    assert (np.asarray(grad)[mask == IGNORED] == 0).all()
    assert (np.abs(np.asarray(grad)[mask != IGNORED]).sum(-1) > 0).all()


# --- training


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder):
    """`checkpoint(encoder)` -> workdir of a pre-training run of one step, at half the image size of the task."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            c = configs.base()
            c.steps, c.batch_size, c.data.source, c.data.image_size = 1, 8, f"folder:{folder}/train/images", (16, 16)
            c.encoder.name, c.encoder.patch_size = name, 4
            c.encoder.width, c.encoder.depth, c.encoder.heads = 32, 2, 2
            if name == "vit":
                c.encoder.positions, c.encoder.qkv_bias = "relative", "qv"
            c.corruption.name, c.decoder.name = "none", "linear"
            c.log.pictures, c.log.tensorboard = 0, False
            made[name] = str(tmp_path_factory.mktemp(name))
            train.run(c, made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def learned(folder, checkpoint, tmp_path_factory, one_device):
    """A run of a linear head on a frozen encoder: its config, its workdir and its record."""
    path = tmp_path_factory.mktemp("learned")
    c = small(folder, "freeze", steps=60, checkpoint=checkpoint("crate"), optimizer__lr=3e-2, log__pictures=2)
    return c, path, finetune.run(c.copy_and_resolve_references(), str(path))


def test_a_linear_head_learns_shapes_and_a_frozen_encoder_stays_as_it_is(learned, folder):
    c, tmp_path, record = learned
    c, path = c.copy_and_resolve_references(), c.checkpoint
    assert record["miou"] > 0.5 and record["pixel_accuracy"] > 0.8  # all background: 0.18 and 0.72
    assert record["classes"] == CLASSES == len(record["iou"])
    assert json.loads((tmp_path / "results.jsonl").read_text()) == json.loads(json.dumps(record))
    before, after = (pretrained.load(str(p), "").params["encoder"] for p in (path, tmp_path))
    before.pop("mask_token", None)
    chex.assert_trees_all_equal(before, after)
    with Image.open(record["pictures"]) as picture:
        shown = {tuple(rgb) for rgb in np.asarray(picture).reshape(-1, 3)}
    assert {tuple(rgb) for rgb in pictures.to_uint8(segment.class_colours(1))} <= shown
    masks = next(data.eval_batches(c, data.open_split(c, "eval"), range(19), 19))["mask"]
    predicted = crate_jax.load(tmp_path).predict(folder / "val" / "images")
    assert predicted.dtype == np.int32 and predicted.shape == masks.shape
    assert np.mean(predicted == masks) == pytest.approx(record["pixel_accuracy"], abs=1e-6)
    c.protocol.name = "finetune_mae"
    with pytest.raises(ConfigError, match="segment_linear, segment_upernet"):
        finetune.run(c, str(tmp_path))


def break_off_and_continue(c, folder: Path, at: int, monkeypatch) -> dict:
    """The record of a run that broke off after step `at`, then was started again."""
    after = loop.Loop._after

    def break_off(self, step, *args):
        after(self, step, *args)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_after", break_off)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(c, str(folder / "broken"))
    return finetune.run(c, str(folder / "broken"))


@pytest.mark.slow
def test_a_run_that_broke_off_continues_with_the_same_bits(learned, tmp_path, monkeypatch):
    c, _, whole = learned
    c = c.copy_and_resolve_references()
    c.save.every, c.log.pictures = 25, 0
    continued = break_off_and_continue(c, tmp_path, 40, monkeypatch)
    assert continued["params_sha256"] == whole["params_sha256"] != pretrained.load(c.checkpoint, "").sha256
    assert continued["iou"] == whole["iou"]


@pytest.mark.slow
def test_upernet_learns_shapes(folder):
    c = small(folder, "head=upernet", steps=60, batch_size=8, optimizer__lr=1e-2, segment__channels=16)
    mesh = sharding.make_mesh(8, 1, jax.devices()[:1])
    source = data.open_split(c, "train")
    method = segment.build(c, source)
    recipe = train_step.make_recipe(c, method, c.batch_size)
    step = train_step.make_train_step(c, method, recipe, mesh)
    state = jax.jit(lambda: train_step.init_state(c, method, recipe))()
    for batch, _ in zip(data.TrainPipeline(c, source).batches(), range(60), strict=False):
        state, scalars = step(state, sharding.put_batch({k: batch[k] for k in method.inputs}, mesh))
    assert set(scalars) >= {"cross_entropy", "auxiliary"}
    assert float(scalars["loss"]) == pytest.approx(float(scalars["cross_entropy"] + 0.4 * scalars["auxiliary"]))
    scores = segmentation.SegmentationEvaluation(c, method.features, source, mesh).scores(state.params)
    assert scores["miou"] > 0.4  # all background: 0.18


@pytest.mark.slow
def test_upernet_on_a_tuned_vit_learns_and_continues_with_the_same_bits(folder, checkpoint, tmp_path, monkeypatch):
    """The whole job on eight devices; relative biases of a 4 x 4 grid are resized to 8 x 8."""
    c = small(folder, "head=upernet", steps=80, batch_size=8, checkpoint=checkpoint("vit"), segment__channels=16)
    c.save.every = 30
    whole = finetune.run(c, str(tmp_path / "whole"))
    continued = break_off_and_continue(c, tmp_path, 50, monkeypatch)
    assert whole["miou"] > 0.6
    assert continued["params_sha256"] == whole["params_sha256"]
    assert continued["iou"] == whole["iou"]


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing(folder):
    """Masks with ignored pixels in half of the images; one device, and four micro-batches on two."""
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8),
        "mask": np.random.default_rng(1).integers(0, CLASSES, (16, 32, 32)).astype(np.int16),
    }
    batch["mask"][::2, :20] = IGNORED

    def step(devices: int, accumulate: int):
        c = small(folder, accumulate=accumulate, optimizer__lr=1e-4)
        mesh = sharding.make_mesh(16, accumulate, jax.devices()[:devices])
        method = segment.build(c, data.open_split(c, "train"))
        recipe = train_step.make_recipe(c, method, c.batch_size)
        state, scalars = train_step.make_train_step(c, method, recipe, mesh)(
            jax.jit(lambda: train_step.init_state(c, method, recipe))(), sharding.put_batch(batch, mesh)
        )
        return jax.device_get((state.params, scalars))

    chex.assert_trees_all_close(step(1, 1), step(2, 4), atol=2e-5)


# --- positions of another image size


def test_relative_biases_keep_what_they_say_on_a_larger_grid():
    """A bias that grows linearly with the displacement still does, per patch; the class token's rows are copied."""
    old, new = (4, 4), (8, 8)

    def slope(grid: tuple[int, int], per_row: float) -> np.ndarray:
        rows = np.arange(1 - grid[0], grid[0])[:, None] * per_row + np.zeros(2 * grid[1] - 1)
        return np.concatenate([rows.reshape(-1), [7, 8, 9]]).astype(np.float32)[:, None]

    encoder = {
        "relative_bias": slope(old, 1.0),
        "blocks": {},
        "embedding": {"positions": np.zeros((17, 2), np.float32)},
    }
    target = {
        "encoder": {
            "blocks": {"relative_bias": np.zeros((3, relative_table_rows(new), 1), np.float32)},
            "embedding": {"positions": np.zeros((65, 2), np.float32)},
        }
    }
    taken = adopt_encoder(target, {"encoder": encoder}, "run", old, ours=new, resize=True)["encoder"]
    assert taken["embedding"]["positions"].shape == (65, 2)
    for table in taken["blocks"]["relative_bias"]:
        np.testing.assert_array_equal(table[-3:, 0], [7, 8, 9])
        pairs = table[relative_position_index(new)][1:, 1:, 0]  # query, key
        assert pairs[0, 0] == pytest.approx(0, abs=1e-5)  # the middle of the table stays the middle
        middle = table[:-3, 0].reshape(15, 15)[4:11]
        np.testing.assert_allclose(np.diff(middle, axis=0), 7 / 15, rtol=1e-4)
    encoder["embedding"] = {"positions": np.zeros((16, 2), np.float32)}
    with pytest.raises(CheckpointError, match="its table of positions has 16 rows, and 4 x 4 patches have 17"):
        adopt_encoder(target, {"encoder": encoder}, "run", old, ours=new, resize=True)
