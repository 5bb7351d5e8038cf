"""What runs write: JSON lines that survive a restart, TensorBoard files, progress, pictures."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import math
import re
import resource
import struct
import sys
import time
import types
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as configs
from crate_jax.errors import ConfigError, UserError
from crate_jax.methods.method import Method
from crate_jax.workdir import metrics, starts
from crate_jax.workdir.pictures import reconstruction_grid


def quiet():
    c = configs.base()
    c.log.tensorboard = False
    return c


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_step_resumed_from_are_dropped(tmp_path):
    with metrics.Writer(tmp_path, quiet(), 0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": "9"}\n{"step": null}\n[9]\n{"step": 9, "loss": "x"}\n')  # no run has written these
        f.write('{"step": 40, "lo')  # the process was killed while writing
    with metrics.Writer(tmp_path, quiet(), 20) as writer:
        writer.write(30, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 0.5)]


@pytest.mark.parametrize(("start", "kept"), [(20, [10, 20]), (0, [])])
def test_pictures_after_the_step_resumed_from_are_dropped(tmp_path, start, kept):
    """A report would show them as the newest, though other weights have drawn them."""
    with metrics.Writer(tmp_path, quiet(), 0) as writer:
        for step in (10, 20, 30, 12_345_678):
            writer.write_image(step, "views.a-b", np.zeros((2, 3, 3), np.uint8))
    for other in ("mine_30.png", "notes.png", "views_0000030.jpg"):
        (tmp_path / "pictures" / other).write_bytes(b"")
    with metrics.Writer(tmp_path, quiet(), start):
        pass
    drawn = {f"views.a-b_{step:07d}.png" for step in kept}
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == drawn | {
        "mine_30.png",
        "notes.png",
        "views_0000030.jpg",
    }


def test_a_folder_in_place_of_the_records_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "starts.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        metrics.Writer(tmp_path, quiet(), 0)
    with pytest.raises(UserError, match=r"starts\.jsonl: cannot be read \(Is a directory\); move it away"):
        starts.read(tmp_path)


def test_what_is_written_can_be_read_back(tmp_path):
    """Whole records of the steps before it continued too, to the bit; not those with a NaN."""
    with metrics.Writer(tmp_path, quiet(), 0) as writer:
        writer.write(2, {"a": 0.1, "b": 1 / 3})
        writer.write(4, {"a": math.nan, "b": 2.0})
        writer.write(6, {"a": 9.0, "b": 9.0})
    with metrics.Writer(tmp_path, quiet(), 5) as writer:
        writer.write(7, {"a": 0.7})
        assert writer.written(("b", "a")) == [{"b": 1 / 3, "a": 0.1}]
        assert writer.written(("a",)) == [{"a": 0.1}, {"a": 0.7}] and writer.written(("c",)) == []


def test_a_new_run_starts_an_empty_file(tmp_path):
    for loss in (1.0, 2.0):
        with metrics.Writer(tmp_path, quiet(), 0) as writer:
            writer.write(1, {"loss": loss})
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]


def test_nan_is_valid_json(tmp_path):
    with metrics.Writer(tmp_path, quiet(), 0) as writer:
        writer.write(1, {"loss": math.nan, "other": math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["step"] == 1


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    with metrics.Writer(tmp_path, configs.base(), 4) as writer:
        writer.write(7, {"loss": 0.5, "a/b": 2.0})
        writer.write_image(7, "grid", np.zeros((5, 7, 3), np.uint8))
    (file,) = (tmp_path / "tensorboard").glob("events*")
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2" and events[2].session_log.status == 1 and events[2].step == 5
    values = {value.tag: value for event in events for value in event.summary.value if event.step == 7}
    assert values["loss"].simple_value == 0.5 and values["a/b"].simple_value == 2.0
    assert (values["pictures/grid"].image.height, values["pictures/grid"].image.width) == (5, 7)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def one_name(folder, config) -> None:
    """A scalar and a picture of the same name, as pre-training by reconstruction writes them."""
    name = inspect.signature(Method).parameters["pictures_name"].default
    assert name == "reconstruction"
    with metrics.Writer(folder, config, 0) as writer:
        for step in (1, 2):
            writer.write(step, {name: 0.5 / step})
            writer.write_image(step, name, pixels() // step)


def get(server: str, path: str, **query):
    path += f"?{urllib.parse.urlencode(query)}" if query else ""
    with urllib.request.urlopen(f"{server}data/plugin/{path}", timeout=20) as answer:
        return answer.read()


def test_tensorboard_shows_scalar_and_picture(tmp_path):
    """Asked as the page asks it, over HTTP: the scalar's points, and the picture's pixels."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    program = pytest.importorskip("tensorboard.program", reason="tensorboard is not installed")
    one_name(tmp_path, configs.base())
    board = program.TensorBoard()
    board.configure(logdir=str(tmp_path), port=0, host="127.0.0.1", load_fast="false")
    server = board.launch()
    deadline = time.monotonic() + 20
    while not (runs := json.loads(get(server, "images/tags"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {run: list(tags) for run, tags in runs.items()} == {"tensorboard": ["pictures/reconstruction"]}
    assert list(json.loads(get(server, "scalars/tags"))["tensorboard"]) == ["reconstruction"]
    shown = json.loads(get(server, "images/images", tag="pictures/reconstruction", run="tensorboard", sample=0))
    assert [image["step"] for image in shown] == [1, 2]
    for image, expected in zip(shown, (pixels(), pixels() // 2), strict=True):
        png = get(server, f"images/individualImage?{image['query']}")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), expected)


def test_weights_and_biases_gets_scalar_and_picture_under_two_names(tmp_path, monkeypatch):
    """And a run that continues keeps the config that it began with."""
    logged, inits = [], []
    run = types.SimpleNamespace(id="7", log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init, wandb.Error, wandb.Image = lambda **k: inits.append(k) or run, RuntimeError, lambda array: array
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    c = quiet()
    c.log.wandb = "project"
    one_name(tmp_path, c)
    assert [set(entry) for entry in logged] == [{"step", "reconstruction"}, {"step", "pictures/reconstruction"}] * 2
    c.seed = 9
    metrics.Writer(tmp_path, c, 2).close()
    assert [(k["id"], k["config"] and k["config"]["seed"]) for k in inits] == [(None, 0), ("7", None)]


@pytest.mark.parametrize("name", ["pictures/reconstruction", "step"])
def test_a_scalar_does_not_take_the_name_of_another_record(tmp_path, name):
    with metrics.Writer(tmp_path, quiet(), 0) as writer, pytest.raises(ValueError, match=f"the name '{name}'"):
        writer.write(1, {"loss": 0.5, name: 0.5})


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "pictures/grid_0000001.png"])
def test_a_file_without_room_is_named(tmp_path, name):
    """A limit on the size of a file stands for the end of the disk; closing says nothing more."""
    if name == "tensorboard":
        pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with metrics.Writer(tmp_path, quiet(), 0) as writer, contextlib.ExitStack() as stack:
        board = metrics.TensorBoard(str(tmp_path / "tensorboard"), 0) if name == "tensorboard" else writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        with pytest.raises(UserError, match=rf"{name} cannot be written: File too large; make room"):
            for step in range(1, 1000):
                board.write_image(step, "grid", pixels) if "png" in name else board.write(step, {"loss": 0.5})
        if name == "tensorboard":
            board.close()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_wanted_but_missing_is_one_line(tmp_path):
    c = quiet()
    c.log.wandb = "project"
    with pytest.raises(ConfigError, match="pip install wandb"):
        metrics.Writer(tmp_path, c, 0)


def test_progress_is_plain_lines_without_a_terminal(caplog):
    with caplog.at_level(logging.INFO), metrics.Progress(100, 0, 10, 30.0) as progress:
        progress.update(50, {"loss": 0.25, "lr": 1e-3}, 20.0)
    assert "step 50/100" in caplog.text and "loss 0.25" in caplog.text
    assert "20 images/s" in caplog.text and "0:00:25" in caplog.text  # 50 steps of 10 at 20 a second


def test_the_bar_says_that_it_compiles_and_counts_epochs(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = []
    with metrics.Progress(100, 0, 10, 28.5) as progress:
        for look in (lambda: None, lambda: progress.reached(0), lambda: progress.reached(57),
                     lambda: progress.update(60, {"loss": 0.25}, 20.0), lambda: progress.reached(100)):  # fmt: skip
            look()
            progress._bar.refresh()
            shown.append("epoch" + sys.stderr.getvalue().rpartition("epoch")[2])
    assert ["compiling" in line for line in shown] == [True, False, False, False, False]
    assert [re.match(r"epoch (\S+)  step (\S+)", line).groups() for line in shown] == [
        ("1/4", "0/100"), ("1/4", "0/100"), ("3/4", "57/100"), ("3/4", "60/100"), ("4/4", "100/100"),
    ]  # fmt: skip
    assert "loss 0.25" not in shown[2] and all("loss 0.25  20 images/s  left 0:00:20" in line for line in shown[3:])


def test_write_json_replaces_whole_files(tmp_path):
    metrics.write_json(tmp_path / "a.json", {"x": np.float32(0.5), "n": np.int64(3)})
    metrics.write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, []),
        (b"", []),
        (b'{"a": 1}\n', [{"a": 1}]),
        (b'{"a": 1}', [{"a": 1}]),  # an editor took its end away
        (b'{"a": 1}\n{"a": 2, "b', [{"a": 1}]),  # a crash cut it short
        (b"\x00\x00\x00", []),
    ],
)
def test_a_line_is_appended_whole_whatever_the_last_line_is(tmp_path, before, kept):
    if before is not None:
        (tmp_path / "a.jsonl").write_bytes(before)
    for record in ({"a": 3}, {"a": 4}):
        metrics.append_line(tmp_path / "a.jsonl", record)
    text = (tmp_path / "a.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [*kept, {"a": 3}, {"a": 4}] and text.endswith("\n")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match=r"b\.jsonl cannot be written: Is a directory; make room"):
        metrics.append_line(tmp_path / "b.jsonl", {"a": 3})


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a.json").mkdir()  # a rename onto a folder fails, as a write to a full disk does
    with pytest.raises(UserError, match=r"a\.json cannot be written: Is a directory; make room"):
        metrics.write_json(tmp_path / "a.json", {"x": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_pictures_are_written_as_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "grid_0000002.png.4711.crate_jax.tmp").touch()  # of a process that was killed
    with metrics.Writer(tmp_path, quiet(), 0) as writer:
        path = writer.write_image(3, "grid", pixels)
        with pytest.raises(ValueError, match="grid/x"):
            writer.write_image(3, "grid/x", pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["grid_0000003.png"]


def test_the_grid_keeps_the_order_of_its_columns():
    """Columns from left to right as given, rows from top to bottom, pixels enlarged by a whole factor."""
    values = (0.2, 0.9, 0.5)
    columns = {f"column {v}": np.full((2, 8, 8, 3), v, np.float32) for v in values}
    grid = reconstruction_grid(columns)
    width = grid.shape[1] // 3
    for i, v in enumerate(values):
        assert grid[-20, i * width + width // 2, 0] == round(v * 255)
    assert grid.shape[0] > 2 * 96 and width >= 96
    assert grid[: grid.shape[0] - 2 * 100].std() > 5  # the captions


def test_a_grid_of_unequal_columns_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        reconstruction_grid({"a": np.zeros((2, 8, 8, 3)), "b": np.zeros((2, 8, 4, 3))})


def test_text_with_bytes_of_a_name_that_are_no_text_is_written(tmp_path):
    metrics.write_text(tmp_path / "x", "caf\u00e9 \udcff")
    assert (tmp_path / "x").read_bytes() == b"caf\xc3\xa9 \\udcff"
