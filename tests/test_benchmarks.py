"""The benchmarks run as their docstrings say and print what they promise."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import alignment_predicts, montages, sources
from benchmarks.stand_in import training_set
from benchmarks.step import matmul_flops, random_batch
from crate_jax import config
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python


def run(cli_env, *args: str) -> list[dict]:
    result = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=cli_env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_step_prints_speed_and_share_of_the_peak(cli_env):
    (out,) = run(
        cli_env, "benchmarks.step", "--config=configs/quickstart.py:debug", "--batch=8", "--steps=3"
    )  # fmt: skip
    assert out["images_per_sec"] == pytest.approx(8e3 / out["step_ms"], rel=0.01)
    assert 0 < out["fraction_of_peak"] < 1
    assert out["batch"] == 8 and out["steps"] == 3


def test_flops_count_loops_and_gradients():
    """A scan of 3 products of (4 x 5) by (5 x 5): 3 * 2 * 4 * 5 * 5, three times that with gradients."""
    x, w = jnp.ones((4, 5)), jnp.ones((3, 5, 5))

    def run(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    forward = 3 * 2 * 4 * 5 * 5
    assert matmul_flops(jax.make_jaxpr(run)(x, w).jaxpr) == forward
    assert matmul_flops(jax.make_jaxpr(jax.grad(run, (0, 1)))(x, w).jaxpr) == 3 * forward


def test_flops_count_convolutions_and_their_gradients():
    """5 x 7 maps of 3 to 4 channels by 3 x 3 kernels, and with stride 2; each gradient has as many products."""

    def run(x, w, stride):
        y = jax.lax.conv_general_dilated(x, w, (stride,) * 2, [(0, 0)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.square(y))

    x, w = jnp.ones((2, 7, 9, 3)), jnp.ones((3, 3, 3, 4))
    for stride, places in ((1, 5 * 7), (2, 3 * 4)):
        forward = 2 * 2 * places * 4 * 9 * 3
        assert matmul_flops(jax.make_jaxpr(run, 2)(x, w, stride).jaxpr) == forward
        weights = jax.make_jaxpr(jax.grad(run, 1), 2)(x, w, stride)
        assert matmul_flops(weights.jaxpr) == 2 * forward
        # The gradient of x is counted with the padding that it needs around its 5 x 7 or 3 x 4 (dilated 5 x 7) places.
        both = matmul_flops(jax.make_jaxpr(jax.grad(run, (0, 1)), 2)(x, w, stride).jaxpr)
        assert both == 2 * forward + 2 * 2 * 7 * 9 * 3 * 9 * 4 // stride**2


def test_a_stand_in_has_the_size_of_the_set_that_the_config_names():
    c = config.base()
    for source, images, classes in (
        ("tfds:cifar100", 50_000, 100), ("folder:imagenet100", 126_689, 100), ("folder:elsewhere", 1_281_167, 1000),
        ("digits", 1437, 10),
    ):  # fmt: skip
        c.data.source = source
        stand_in = training_set(c)
        assert (len(stand_in), len(stand_in.class_names)) == (images, classes)
        assert (len(stand_in.labels), stand_in.labels.max() + 1) == (images, classes)


def test_a_random_batch_has_labels_of_the_set_and_an_index_per_image():
    c = config.base()
    c.method, c.batch_size, c.data.image_size, c.views.small = "swav", 97, (5, 7), 3
    batch = random_batch(c, ("views", "small_views", "label", "index"), classes=4)
    assert batch["views"].shape == (97, 2, 5, 7, 3) and batch["views"].max() > 250
    assert batch["small_views"].shape == (97, 3, 96, 96, 3)
    assert set(batch["label"]) == {0, 1, 2, 3} and list(batch["index"]) == list(range(97))


def fake_run(folder, ratio: float, seed: int, probe: float, **encoder) -> None:
    """What alignment_predicts reads of a finished run on 8 x 8 images."""
    c = config.base()
    c.data.image_size, c.encoder.patch_size, c.encoder.width, c.seed = (8, 8), 2, 12, seed
    c.corruption.name, c.corruption.mask_ratio = "mask", ratio
    c.encoder.update(encoder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(c.to_dict()))
    (folder / "summary.json").write_text(json.dumps({"probe_top1": probe, "knn_top1": 0.5}))


@pytest.mark.slow
def test_alignment_predicts_ranks_gains_against_accuracies(tmp_path, capsys):
    """Accuracies that fall as the gain does: a rank correlation of 1, of the means over seeds."""
    rng = np.random.default_rng(0)
    for i in range(60):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3)).cumsum(0) // 8 + 40 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    ratios = (0.1, 0.3, 0.5, 0.7, 0.9)
    for ratio in ratios:
        for seed in (0, 1):
            fake_run(tmp_path / "sweep" / f"{ratio},{seed}", ratio, seed, 0.5 + seed)
    arguments = ["--folder", str(tmp_path / "images"), str(tmp_path / "sweep")]
    alignment_predicts.main(arguments)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| mask")]
    gains = [float(row[3]) for row in rows]
    assert [float(row[2]) for row in rows] == list(ratios) and [float(row[4]) for row in rows] == [100.0] * 5
    assert len(set(gains)) == 5
    for ratio, gain in zip(ratios, gains, strict=True):
        fake_run(tmp_path / "again" / str(ratio), ratio, 0, 0.5 + gain / 1000)
    alignment_predicts.main([*arguments[:2], str(tmp_path / "again")])
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("2 px, k = 12, probe_top1: +1.00 [") and last[0].endswith(", 5 corruptions")
    assert "knn_top1: +nan" in last[1]  # all the same: no ranks
    fake_run(tmp_path / "sweep" / "other", 0.5, 0, 0.5, depth=3)
    with pytest.raises(SystemExit, match="differs from .* in more than its corruption: encoder.depth: 12 -> 3"):
        alignment_predicts.main(arguments)
    with pytest.raises(SystemExit, match="holds no summary.json of a finished run"):
        alignment_predicts.main([*arguments[:2], str(tmp_path / "images")])


def test_sources_compares_kinds_with_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # the benchmark sets it
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 7)).save(tmp_path / name / "0.png")
    args = ["--batch_size", "2", "--size", "8", "--seconds", "0.01", "--rounds", "2"]
    sources.main(["--folder", str(tmp_path), "--kinds", "webdataset,npz", *args])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["folder", "npz", "webdataset"]
    assert rows[0]["to_folder"] == 1 and all(row["images"] == 2 and row["cpu_us_per_image"] > 0 for row in rows)


@pytest.mark.slow
def test_data_prints_a_line_per_setting(cli_env):
    out = run(cli_env, "benchmarks.data", "--settings", "memory", "--seconds", "0.3", "--repeats", "2")
    assert out and all(line["images_per_sec"] > 0 for line in out)


def test_montages_are_pairs_whose_masks_have_the_classes_of_the_parts(tmp_path):
    """Each image of a class has one shade of its own, so that a picture says what its mask must be."""
    for split in ("train", "test"):
        for label, name in enumerate(("apple", "bee", "cat")):
            if split == "test" and name == "bee":
                continue
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (21, 30), (90 * label,) * 3).save(tmp_path / split / name / f"{i}.png")
    for split in ("train", "test"):
        montages.make(tmp_path, tmp_path / "out", split, 16, 40)
    lines = set()
    for path in sorted((tmp_path / "out").glob("*/images/*")):
        picture, mask = np.asarray(Image.open(path)), np.asarray(Image.open(path.parent.parent / "masks" / path.name))
        assert picture.shape == (16, 16, 3) and mask.shape == (16, 16)
        np.testing.assert_array_equal(picture[..., 0], 90 * mask)
        across = [(axis, int(np.argmax(np.diff(mask, axis=axis).any(1 - axis))) + 1) for axis in (0, 1)]
        lines |= {(axis, at) for axis, at in across if np.diff(mask, axis=axis).any()}
    assert {axis for axis, _ in lines} == {0, 1} and {at for _, at in lines} == {6, 7, 8, 9, 10}
    assert len(list((tmp_path / "out").glob("t*/masks/*.png"))) == 80
