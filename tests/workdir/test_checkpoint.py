"""Checkpoints: what is saved comes back, and whatever happens to the files, nothing else does."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absl.logging
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from orbax.checkpoint._src.serialization import tensorstore_utils

from crate_jax.config import base
from crate_jax.errors import CheckpointError
from crate_jax.models import adopt
from crate_jax.parallel import distributed
from crate_jax.workdir import checkpoint, checkpoint_files
from crate_jax.workdir.checksum import checksums
from tests.conftest import ROOT

CONFIG = base()


def make(step: int, width: int = 64) -> tuple[Any, Any]:
    """The state that belongs to a step: every kind of leaf that a train state may have."""
    key = jax.random.key(step)
    params = {
        "encoder": {
            "blocks": {"kernel": jax.random.normal(key, (3, width, width))},
            "norm": {"scale": jnp.ones(width)},
        },
        "decoder": {"bias": jnp.full(5, step, jnp.float32)},
    }
    rest = {
        "opt_state": optax.adamw(1e-3).init(params),
        "ema": jax.tree.map(lambda x: (2 * x).astype(jnp.bfloat16), params),
        "objective": {"flags": jnp.array([True, False]), "keys": jax.random.split(key, 2), "queue": jnp.zeros((0, 3))},
        "step": jnp.int32(step),
        "nothing": None,
    }
    return params, rest


def shapes(width: int = 64) -> tuple[Any, Any]:
    return jax.eval_shape(lambda: make(0, width))


def assert_is(restored: checkpoint.Restored | None, step: int) -> None:
    """Checks that `restored` holds bit for bit what `make(step)` made, and its structure and types."""
    assert restored is not None and restored.step == step == restored.meta["step"]
    plain = jax.tree.map(_key_data, (restored.params, restored.rest))
    chex.assert_trees_all_equal(plain, jax.tree.map(_key_data, make(step)))
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, jax.tree.map(_key_data, make(step)))


def _key_data(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with the steps 10, 20 and 30, not to be changed."""
    folder = tmp_path_factory.mktemp("pristine")
    saver = checkpoint.Checkpoints(folder, keep=3)
    for step in (10, 20, 30):
        saver.save(step, *make(step), {"config": CONFIG, "data": "fingerprint"})
    saver.close()
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Iterator[checkpoint.Checkpoints]:
    """A run that starts again on a copy of that workdir."""
    shutil.copytree(pristine, tmp_path / "run")
    saver = checkpoint.Checkpoints(tmp_path / "run", keep=3)
    yield saver
    saver.close()


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(bytes(data))


# --- save and restore ------------------------------------------------------------------------------


def test_round_trip(run: checkpoint.Checkpoints) -> None:
    restored = run.restore(*shapes(), CONFIG)
    assert_is(restored, 30)
    assert restored is not None
    assert restored.meta["data"] == "fingerprint" and restored.meta["config"] == json.loads(CONFIG.to_json())
    assert restored.meta["versions"]["jax"] == jax.__version__


def test_orbax_v1_reads_it(pristine: Path) -> None:
    """Its next API, which is to be the only one some day, restores what this one saves, placed as asked."""
    folder, (params, _) = pristine / "checkpoints" / "30", make(30)
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    kernel = params["encoder"]["blocks"]["kernel"]
    abstract["encoder"]["blocks"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=split)
    read = v1.load(folder, abstract, checkpointable_name="params")
    assert read["encoder"]["blocks"]["kernel"].sharding == split
    chex.assert_trees_all_equal(jax.device_get(read), jax.device_get(params))
    assert v1.load_checkpointables(folder, {"meta": None})["meta"]["body"]["step"] == 30


def test_empty_workdir(tmp_path: Path) -> None:
    saver = checkpoint.Checkpoints(tmp_path, keep=1)
    assert saver.latest() is None and saver.restore(*shapes(), CONFIG) is None
    saver.close()


@pytest.mark.parametrize("name", ["run[1]", "lr[1e-3]", "a*b", "a?", "a\\b"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"its path must not have one of the characters \* \? \[ \\, since"):
        checkpoint.Checkpoints(tmp_path / name / "w", keep=2)


def test_other_characters_of_a_folder_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "a] {b}, (c='d') $e #f %g &h; ~i|j ä\n"
    run = checkpoint.Checkpoints(folder, keep=2)
    run.save(3, {"w": jnp.arange(5.0)}, {"n": jnp.int32(7)}, {"config": {}})
    run.close()
    assert checkpoint.read_params(folder)[0]["w"].tolist() == [0, 1, 2, 3, 4]


def test_keeps_the_newest(run: checkpoint.Checkpoints) -> None:
    for step in (40, 50):
        run.save(step, *make(step), {"config": CONFIG})
    run.wait()
    assert checkpoint_files.steps(run.folder) == [50, 40, 30] and run.latest() == 50


def test_saving_a_step_again_changes_nothing(run: checkpoint.Checkpoints) -> None:
    run.save(30, *make(31), {"config": CONFIG})
    assert_is(run.restore(*shapes(), CONFIG), 30)


def test_saving_behind_the_newest_is_an_error(run: checkpoint.Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="step 25: .* holds a later one, of step 30"):
        run.save(25, *make(25), {"config": CONFIG})


def test_buffers_may_be_donated_right_after_save(tmp_path: Path) -> None:
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros((1024, 1024)), "v": jnp.zeros(3)}
    saver = checkpoint.Checkpoints(tmp_path, keep=4)
    for step in range(4):
        saver.save(step, params, {"step": jnp.int32(step)}, {"config": CONFIG})
        for _ in range(10):
            params = update(params)
    saver.close()
    for step in range(4):
        read, _ = checkpoint.read_params(tmp_path, step)
        np.testing.assert_array_equal(read["w"], 10 * step)


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    def placed(devices: int) -> Any:
        mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        return NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    params = {"w": jax.device_put(jnp.arange(6 * 16.0).reshape(6, 16), placed(8))}
    rest = {"step": jnp.int32(7)}
    saver = checkpoint.Checkpoints(tmp_path, keep=1)
    saver.save(7, params, rest, {"config": CONFIG})
    for devices in (2, 1):
        target = {"w": jax.ShapeDtypeStruct((6, 16), jnp.float32, sharding=placed(devices))}
        restored = saver.restore(target, rest, CONFIG)
        assert restored is not None and restored.params["w"].sharding == placed(devices)
        np.testing.assert_array_equal(restored.params["w"], params["w"])
    saver.close()


# --- damage ----------------------------------------------------------------------------------------


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte in the largest file": (lambda d: flip(largest(d), largest(d).stat().st_size // 2), "params|rest"),
    "truncated data": (lambda d: os.truncate(largest(d), largest(d).stat().st_size // 2), "params|rest"),
    "emptied data": (lambda d: os.truncate(largest(d), 0), "params|rest"),
    "deleted data": (lambda d: largest(d).unlink(), "params|rest"),
    "deleted manifest": (lambda d: (d / "params" / "manifest.ocdbt").unlink(), "params cannot be read"),
    "truncated _METADATA": (lambda d: os.truncate(d / "rest" / "_METADATA", 100), "rest cannot be read"),
    "deleted params": (lambda d: shutil.rmtree(d / "params"), "params is missing"),
    "deleted rest": (lambda d: shutil.rmtree(d / "rest"), "rest is missing"),
    "deleted meta": (lambda d: shutil.rmtree(d / "meta"), "meta/metadata: No such file"),
    "truncated meta": (lambda d: os.truncate(d / "meta" / "metadata", 200), "meta/metadata is not valid JSON"),
    "emptied meta": (lambda d: os.truncate(d / "meta" / "metadata", 0), "meta/metadata is not valid JSON"),
    "another config in meta": (
        lambda d: (d / "meta" / "metadata").write_text(
            (d / "meta" / "metadata").read_text().replace('"seed": 0', '"seed": 1')
        ),
        "meta/metadata is not what was saved",
    ),
    "empty folder": (lambda d: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in d.iterdir()], "meta/metadata"),
    "everything but meta deleted": (
        lambda d: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in d.iterdir() if p.name != "meta"],
        "params is missing",
    ),
    "a copy of another step": (
        lambda d: (shutil.rmtree(d), shutil.copytree(d.parent / "10", d)),
        "it is the checkpoint of step 10, under another name",
    ),
    "a pipe for meta": (
        lambda d: ((d / "meta" / "metadata").unlink(), os.mkfifo(d / "meta" / "metadata")),
        "meta/metadata: not a regular file",
    ),
    "meta deeper than Python goes": (
        lambda d: (d / "meta" / "metadata").write_text("[" * 100_000),
        "meta/metadata is not valid JSON",
    ),
}


@pytest.mark.one_python
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_named_and_the_one_before_used(
    run: checkpoint.Checkpoints, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = DAMAGE[damage]
    change(run.folder / "30")
    with caplog.at_level(logging.WARNING):
        assert_is(run.restore(*shapes(), CONFIG), 20)
    lines = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(f"checkpoint of step 30 ({run.folder / '30'})")
    assert (
        caplog.records[-1].getMessage().endswith("goes on from step 20, and the steps from there to 30 are done again")
    )
    assert any(part in lines[0] for part in message.split("|"))
    assert "\n" not in lines[0] and "tensorstore_spec" not in lines[0]
    # The run gets to step 30 again, and its checkpoint is the new one; the damaged one is still there.
    assert run.latest() == 20 and (run.folder / checkpoint.DAMAGED / "30").is_dir()
    run.save(30, *make(30), {"config": CONFIG})
    assert_is(run.restore(*shapes(), CONFIG), 30)


def test_damaged_twice(run: checkpoint.Checkpoints) -> None:
    for _ in range(2):
        flip(largest(run.folder / "30" / "params"), -1)
        largest(run.folder / "30").unlink()
        assert_is(run.restore(*shapes(), CONFIG), 20)
        run.save(30, *make(30), {"config": CONFIG})
        run.wait()
    assert sorted(p.name for p in (run.folder / checkpoint.DAMAGED).iterdir()) == ["30", "30.1"]


def test_what_cannot_be_moved_far_is_renamed(run: checkpoint.Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder without the permission to write, which Linux does not move into another folder."""
    for name in ("30.damaged", "30.damaged.1"):
        (run.folder / checkpoint.DAMAGED).touch()
        largest(run.folder / "30").unlink()
        assert_is(run.restore(*shapes(), CONFIG), 20)
        assert (run.folder / name).is_dir()
        run.save(30, *make(30), {"config": CONFIG})
        run.wait()
    largest(run.folder / "30").unlink()

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"30: cannot be used, nor moved away \(Permission denied\); move it"):
        run.restore(*shapes(), CONFIG)


def test_what_is_no_step_is_not_in_the_way(pristine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names that int() takes for the number of a step, or Orbax does, or that no process could tell another."""
    folder = shutil.copytree(pristine, tmp_path / "run") / checkpoint.FOLDER
    shutil.copytree(folder / "30", folder / "007")
    for name in ("٤٠", "1٤", str(2**31), "9" * 30):
        (folder / name).mkdir()
    (folder / "40").touch()
    (folder / "50").symlink_to("nowhere")
    strays = {"007", "٤٠", "1٤", str(2**31), "9" * 30, "40", "50"}
    again = checkpoint.Checkpoints(tmp_path / "run", keep=3)
    assert {r.getMessage().split(",")[0] for r in caplog.records} == {f"moved {folder / name}" for name in strays}
    assert {path.name for path in (folder / checkpoint.DAMAGED).iterdir()} == strays
    assert_is(again.restore(*shapes(), CONFIG), 30)
    for step in (40, 50):
        again.save(step, *make(step), {"config": CONFIG})
    assert_is(again.restore(*shapes(), CONFIG), 50)
    again.close()


def test_what_cannot_be_deleted_stops_nothing(
    run: checkpoint.Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an old checkpoint whose permissions have changed; what cannot be written still is an error."""
    delete = shutil.rmtree

    def refuse(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).name == "10":
            raise PermissionError(13, "Permission denied", str(path))
        delete(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (40, 50):
        run.save(step, *make(step), {"config": CONFIG})
        run.wait()
    assert {50, 40, 10} <= set(checkpoint_files.steps(run.folder))
    assert "checkpoint of step 40 is saved; an older one cannot be deleted: PermissionError" in caplog.text
    assert_is(run.restore(*shapes(), CONFIG), 50)


def _saved_by(folder: Path, run: str) -> None:
    """Gives the checkpoint in `folder` the id of a run; '': a version without ids saved it."""
    meta = folder / "meta" / "metadata"
    body = json.loads(meta.read_text())["body"]
    body.pop("run")
    body |= {"run": run} if run else {}
    meta.write_text(json.dumps({"sha256": checkpoint_files._digest(body), "body": body}))


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("begun", "saved", "other"),
    [
        ([], "", ""),
        ([], "feed", ""),  # the checkpoints alone were copied: they say which run it is
        (["", "beef"], "", ""),
        (["", "beef"], "beef", ""),
        (["", "beef"], "feed", "feed"),
        ([""], "", ""),  # all is as a version without ids left it
        ([""], "feed", "feed"),
    ],
)
def test_a_checkpoint_of_another_run_is_told_from_the_runs_own(
    begun: list[str], saved: str, other: str, pristine: Path, tmp_path: Path
) -> None:
    """`begun`: the ids in the record of starts; `saved`: that in the checkpoint."""
    folder = shutil.copytree(pristine, tmp_path / "run")
    _saved_by(folder / checkpoint.FOLDER / "30", saved)
    lines = [json.dumps({"step": 0} | ({"run": run} if run else {})) for run in begun]
    (folder / "starts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run = checkpoint.Checkpoints(folder, keep=3)
    restored = run.restore(*shapes(), CONFIG)
    assert restored is not None and restored.other_run == other
    assert run.run == (begun[-1] if begun and begun[-1] else saved if not begun and saved else run.run)
    assert len(run.run) == 16 or run.run in ("beef", "feed")
    run.save(40, *make(40), {"config": CONFIG})
    run.close()
    assert checkpoint_files.read_meta(run.folder / "40")["run"] == run.run


def test_a_save_leaves_nothing_in_memory(run: checkpoint.Checkpoints) -> None:
    """Of what Python collects. TensorStore never frees what it answers, so it must not be asked at each save."""
    state = make(100)

    def after(steps: range) -> int:
        for step in steps:
            run.save(step, *state, {"config": CONFIG})
        run.wait()
        gc.collect()
        return len(gc.get_objects())

    before = after(range(100, 112))  # until what libraries keep of their last calls is full
    assert after(range(112, 118)) - before < 10


@pytest.mark.one_python
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_damage_to_any_file_is_harmless_or_noticed(run: checkpoint.Checkpoints, every: bool) -> None:
    """Restored is always exactly what was saved, at step 30 if the damage does not matter, else at step 20."""
    rng = random.Random(0)
    folder, fallen_back = run.folder / "30", 0
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    changes: list[Callable[[Path], Any]] = [
        lambda f: flip(f, rng.randrange(f.stat().st_size), rng.randrange(8)),
        lambda f: os.truncate(f, rng.randrange(f.stat().st_size)),
        lambda f: f.write_bytes(f.read_bytes() + b"\0"),
        lambda f: f.unlink(),
    ]
    for file in files:
        content = file.read_bytes()
        for change in changes if every else rng.sample(changes, 1):
            change(file)
            restored = run.restore(*shapes(), CONFIG)
            assert restored is not None
            assert_is(restored, 20 if restored.step == 20 else 30)
            if restored.step == 20:
                fallen_back += 1
                (run.folder / checkpoint.DAMAGED / "30").rename(folder)
            file.write_bytes(content)
    # Which files there are, and so what is drawn for each, differs from run to run; about four in ten matter.
    assert fallen_back > len(files) // 8


@pytest.mark.one_python
@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_array_data_counts(run: checkpoint.Checkpoints, bit: int) -> None:
    file = largest(run.folder / "30" / "params" / "ocdbt.process_0" / "d")
    flip(file, random.Random(bit).randrange(file.stat().st_size), bit)
    assert_is(run.restore(*shapes(), CONFIG), 20)


@pytest.mark.parametrize(("own", "other", "me"), [("", 1, 0), ("mine", 2, 0), ("mine", 2, 1), ("", 1, 2), ("", 0, 2)])
def test_what_one_process_cannot_use_is_damaged_for_all(
    own: str, other: int, me: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 and the first process that noticed log it. `other`: another process that has a problem too."""
    monkeypatch.setattr(distributed, "process", lambda: me)
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    monkeypatch.setattr(distributed, "max_over_processes", lambda value: max(value, -other))
    with pytest.raises(checkpoint_files.DamagedError) as error:
        checkpoint_files.agree(own)
    assert str(error.value) == (own or f"process {other} cannot read it, see its log")
    assert error.value.logged_here == (me == 0 or me == min(other, me if own else 3))
    monkeypatch.setattr(distributed, "max_over_processes", lambda value: max(value, -3))
    checkpoint_files.agree("")


def test_half_deleted_oldest_does_no_harm(run: checkpoint.Checkpoints) -> None:
    shutil.rmtree(run.folder / "10" / "params")
    (run.folder / "10" / "_CHECKPOINT_METADATA").unlink()
    again = checkpoint.Checkpoints(run.folder.parent, keep=3)
    assert_is(again.restore(*shapes(), CONFIG), 30)
    again.save(40, *make(40), {"config": CONFIG})
    again.close()
    assert checkpoint_files.steps(run.folder) == [40, 30, 20]


def test_none_usable_is_an_error_and_moves_nothing(run: checkpoint.Checkpoints) -> None:
    for step in (10, 20, 30):
        (run.folder / str(step) / "meta" / "metadata").write_text("{")
    with pytest.raises(
        CheckpointError, match="no usable checkpoint .step 30: .*; step 20: .*; step 10: .* not valid JSON"
    ):
        run.restore(*shapes(), CONFIG)
    assert checkpoint_files.steps(run.folder) == [30, 20, 10]


@pytest.mark.one_python
def test_no_word_of_orbax_reaches_the_terminal(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "run")
    for item in checkpoint_files.ITEMS:
        flip(tmp_path / "run" / "checkpoints" / "30" / item / "manifest.ocdbt", 30)
        for file in (tmp_path / "run" / "checkpoints" / "20" / item / "ocdbt.process_0" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
    code = (
        "import logging, sys; from crate_jax.workdir import checkpoint as c; imported = list(logging.root.handlers); "
    )
    code += "print(c.read_params(sys.argv[1])[1]['step'], imported, logging.root.handlers)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    # Without a handler of the root logger: a user's own logging.basicConfig, after us, must not be in vain.
    assert done.stdout == "10 [] []\n" and done.returncode == 0
    assert "Traceback" not in done.stderr
    assert all("cannot be used" in line for line in done.stderr.splitlines() if line), done.stderr


def orbax_is_quiet() -> tuple[Any, ...]:
    """What `quiet_orbax` changes in the process."""
    filters = [list(logging.getLogger(name).filters) for name in ("absl", "asyncio")]
    return sys.unraisablehook, tensorstore_utils.get_tensorstore_raw_bytes, *filters


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that reach a user's own `sys.unraisablehook`; nothing of Orbax has failed yet."""
    told: list[str] = []
    monkeypatch.setattr(checkpoint_files, "_QUIET", checkpoint_files._Quiet())
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(str(args.exc_value)))
    return told


def unraisable(text: str) -> None:
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text), object=None))  # type: ignore[arg-type]


def test_orbax_is_quiet_only_while_we_read_and_save(pristine: Path, tmp_path: Path, hook, monkeypatch) -> None:
    """Seen: one `crate_jax.load` hid what the user's own Orbax says until the process ended."""
    before, read = orbax_is_quiet(), checkpoint_files.read_meta
    seen: list[bool] = []

    def meta(folder: Path) -> dict[str, Any]:
        seen.append(all(a != b for a, b in zip(before, orbax_is_quiet(), strict=True)))
        return read(folder)

    monkeypatch.setattr(checkpoint_files, "read_meta", meta)
    checkpoint.read_params(pristine)
    assert seen == [True] and orbax_is_quiet() == before
    run = checkpoint.Checkpoints(tmp_path, keep=1)
    during = orbax_is_quiet()
    run.save(1, *make(1), {"config": CONFIG})
    checkpoint.read_params(pristine)
    assert orbax_is_quiet() == during and all(a != b for a, b in zip(before, during, strict=True))
    run.close()
    assert orbax_is_quiet() == before
    with pytest.raises(CheckpointError):
        checkpoint.Checkpoints(tmp_path / "checkpoints" / "1" / "meta" / "metadata", keep=1)
    assert orbax_is_quiet() == before


def test_orbax_is_quiet_until_the_last_of_several_threads_is_done(hook) -> None:
    before, barrier = orbax_is_quiet(), threading.Barrier(8)

    def work(number: int) -> bool:
        barrier.wait()
        same = []
        for i in range(20):
            with checkpoint_files.quiet_orbax(), checkpoint_files.quiet_orbax():
                time.sleep(1e-4 * (i * number % 7))
                same.append(all(a != b for a, b in zip(before, orbax_is_quiet(), strict=True)))
        return all(same)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert orbax_is_quiet() == before


def test_no_message_of_absl_gives_the_root_logger_a_handler(hook, monkeypatch) -> None:
    """Where there is none, absl adds one; where a user has one, it is the only one."""
    monkeypatch.setattr(logging.root, "handlers", [])
    with checkpoint_files.quiet_orbax(), checkpoint_files.quiet_orbax():
        absl.logging.debug("a message")
        assert logging.root.handlers == [logging.lastResort]  # as if there were none
    assert logging.root.handlers == []
    mine = logging.NullHandler()
    logging.root.addHandler(mine)
    with checkpoint_files.quiet_orbax():
        absl.logging.debug("a message")
        assert logging.root.handlers == [mine]
    assert logging.root.handlers == [mine]


def test_other_peoples_hooks_get_what_is_not_of_orbax(hook) -> None:
    with checkpoint_files.quiet_orbax():
        unraisable("theirs")
        unraisable("Event loop is closed")
        ours = sys.unraisablehook
        sys.unraisablehook = lambda args: ours(args)  # as pytest's and Sentry's do
    unraisable("Event loop is closed")
    with checkpoint_files.quiet_orbax():  # ours is also below theirs
        unraisable("theirs again")
    assert hook == ["theirs", "Event loop is closed", "theirs again"]


def test_after_a_failure_the_tracebacks_of_orbax_stay_hidden(pristine: Path, tmp_path: Path, hook) -> None:
    """They come when Python collects what Orbax has left, which may be long after our call."""
    before = orbax_is_quiet()
    shutil.copytree(pristine, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30" / "params")
    assert checkpoint.read_params(tmp_path / "run")[1]["step"] == 20
    assert orbax_is_quiet()[1:3] == before[1:3], "what Orbax logs is shown"
    for text in ("Event loop is closed", "theirs"):
        unraisable(text)
    assert hook == ["theirs"]
    logging.getLogger("asyncio").removeFilter(checkpoint_files._QUIET.filter)


# --- a changed config --------------------------------------------------------------------------------


def test_changed_width_is_named(run: checkpoint.Checkpoints) -> None:
    config = base()
    config.encoder.width, config.encoder.heads, config.log.every = 32, 2, 7
    with pytest.raises(CheckpointError) as error:
        run.restore(*shapes(32), config)
    text = str(error.value)
    assert "encoder.heads: 12 -> 2; encoder.width: 768 -> 32" in text and "log.every" not in text
    assert "encoder/blocks/kernel: checkpoint (3, 64, 64), config (3, 32, 32)" in text
    assert "more" in text and "\n" not in text and len(text) < 1500
    assert checkpoint_files.steps(run.folder) == [30, 20, 10]


def test_added_removed_and_retyped_arrays_are_named(run: checkpoint.Checkpoints) -> None:
    params, rest = shapes()
    params["decoder"] = {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}
    rest["step"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        run.restore(params, rest, CONFIG)
    for part in ("decoder/kernel: not in the checkpoint", "decoder/bias: only in the checkpoint",
                 "step: checkpoint () int32, config ()", "Changed keys: none"):  # fmt: skip
        assert part in str(error.value)


def test_changed_config_that_fits_is_said_once(run: checkpoint.Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    config = base()
    config.optimizer.lr, config.evaluation.every, config.save.keep = 1.0, 5, 9
    with caplog.at_level(logging.WARNING):
        assert_is(run.restore(*shapes(), config), 30)
    assert [r.getMessage() for r in caplog.records] == [
        "resuming step 30 with a changed config: optimizer.lr: 0.00015 -> 1.0"
    ]


# --- parameters alone ----------------------------------------------------------------------------------


def test_read_params(pristine: Path) -> None:
    for folder in (pristine, pristine / "checkpoints"):
        params, meta = checkpoint.read_params(folder)
        assert meta["step"] == 30 and all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
        chex.assert_trees_all_equal(params, make(30)[0])
    assert checkpoint.params_sha256(params) == checkpoint.params_sha256(make(30)[0])
    chex.assert_trees_all_equal(checkpoint.read_params(pristine, step=10)[0], make(10)[0])


def test_read_params_falls_back_but_not_from_a_named_step(run: checkpoint.Checkpoints) -> None:
    workdir = run.folder.parent
    largest(run.folder / "30" / "params").unlink()
    assert checkpoint.read_params(workdir)[1]["step"] == 20
    with pytest.raises(CheckpointError, match="no usable checkpoint .step 30: params cannot be read"):
        checkpoint.read_params(workdir, step=30)
    with pytest.raises(CheckpointError, match="no checkpoint of step 25; it holds 30, 20, 10"):
        checkpoint.read_params(workdir, step=25)
    assert checkpoint_files.steps(run.folder) == [30, 20, 10]


def test_a_path_may_name_the_step(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (pristine / "checkpoints" / "10", f"{pristine}/checkpoints/10/"):
        params, meta = checkpoint.read_params(path)
        assert meta["step"] == 10 and checkpoint.of_step(path) == (str(pristine), 10)
        chex.assert_trees_all_equal(params, make(10)[0])
    monkeypatch.chdir(pristine / "checkpoints")
    assert checkpoint.of_step("20") == (str(pristine), 20)
    monkeypatch.chdir(pristine.parent)
    assert checkpoint.of_step(f"{pristine.name}/checkpoints/20") == (pristine.name, 20)
    with pytest.raises(CheckpointError, match=f"^{pristine}/checkpoints: holds no checkpoint of step 25; it holds 30"):
        checkpoint.read_params(pristine / "checkpoints" / "25")
    with pytest.raises(CheckpointError, match=f"^{pristine}/none: no such folder"):
        checkpoint.read_params(pristine / "none" / "checkpoints" / "25")


def test_what_has_the_name_of_a_step_and_is_none_stays_what_it_is(pristine: Path, tmp_path: Path) -> None:
    """A workdir may be the seventh of a folder of that name."""
    shutil.copytree(pristine, tmp_path / "checkpoints" / "7")
    assert checkpoint.of_step(tmp_path / "checkpoints" / "7") is None
    assert checkpoint.read_params(tmp_path / "checkpoints" / "7")[1]["step"] == 30
    (tmp_path / "checkpoints" / "8").write_bytes(b"weights")
    for name in ("8", "007", "damaged"):
        assert checkpoint.of_step(tmp_path / "checkpoints" / name) is None
    assert checkpoint.of_step(pristine) is checkpoint.of_step(pristine / "checkpoints") is None
    assert checkpoint.of_step("s3://checkpoints/7") is None  # the bucket's name


def test_read_params_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.read_params(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.read_params(tmp_path)


def test_init_encoder() -> None:
    ours, theirs = make(1)[0], jax.device_get(make(2)[0])
    got = adopt.init_encoder(ours, theirs, "config.init_from=X", (2, 3), ours=(2, 3))
    chex.assert_trees_all_equal(got, {"encoder": make(2)[0]["encoder"], "decoder": ours["decoder"]})
    chex.assert_trees_all_equal(ours, make(1)[0])
    chex.assert_trees_all_equal_structs(got, ours)
    assert isinstance(got["encoder"]["norm"]["scale"], jax.Array)


@pytest.mark.parametrize("side", [0, 1])
def test_init_encoder_allows_a_mask_token_on_one_side(side: int) -> None:
    trees = (make(1)[0], make(2)[0])
    trees[side]["encoder"]["mask_token"] = jnp.full((1, 1, 8), side)
    got = adopt.init_encoder(*trees, "X", (2, 3), ours=(2, 3))
    assert ("mask_token" in got["encoder"]) == (side == 0)
    chex.assert_trees_all_equal(got["encoder"]["blocks"], make(2)[0]["encoder"]["blocks"])


def test_init_encoder_lists_everything_that_does_not_fit() -> None:
    ours, theirs = make(1)[0], make(2, width=4)[0]
    theirs["encoder"]["extra"] = jnp.ones(1)
    del theirs["encoder"]["norm"]
    with pytest.raises(CheckpointError) as error:
        adopt.init_encoder(ours, theirs, "config.init_from=X", (2, 3), ours=(2, 3))
    for part in ("config.init_from=X: ", "encoder/extra: not in this configuration", "encoder/norm/scale: not in the",
                 "encoder/blocks/kernel: checkpoint (3, 4, 4), config (3, 64, 64)"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="no 'encoder'"):
        adopt.init_encoder(ours, {"decoder": {}}, "X", (2, 3), ours=(2, 3))


def test_params_sha256_sees_names_dtypes_shapes_and_bytes() -> None:
    trees = [
        {"a": np.zeros(4, np.float32)}, {"b": np.zeros(4, np.float32)}, {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)}, {"a": np.array([0, 0, 0, -0.0], np.float32)},
    ]  # fmt: skip
    assert len({checkpoint.params_sha256(tree) for tree in trees}) == len(trees)
    assert checkpoint.params_sha256(trees[0]) == checkpoint.params_sha256({"a": jnp.zeros(4)})


# --- the checksum ----------------------------------------------------------------------------------------


def one(x: Any) -> str:
    return checksums({"x": x})["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint16", "bool"])
def test_checksum_sees_every_bit_of_every_type(dtype: str) -> None:
    x = np.asarray(np.random.default_rng(0).integers(0, 2, 5), jnp.dtype(dtype))
    seen = {one(x)}
    raw = x.view(f"uint{8 * x.itemsize}")
    bits = 1 if dtype == "bool" else 8 * x.itemsize
    for i in range(x.size):
        for bit in range(bits):
            y = raw.copy()
            y[i] ^= np.array(1 << bit, raw.dtype)
            seen.add(one(y.view(x.dtype)))
    assert len(seen) == 1 + x.size * bits


def test_checksum_sees_moved_blocks() -> None:
    # Coarse values: their low bits are all zero, which is where weaker position weights fail.
    x = np.random.default_rng(0).integers(1, 100, (2**16, 2)).astype(np.float32)
    variants = [x, x[::-1], np.roll(x, 1, axis=0), np.roll(x, 1, axis=1), np.roll(x, 2**15, axis=0)]
    swapped = x.copy()
    swapped[[0, 2**15]] = swapped[[2**15, 0]]
    assert len({one(v) for v in [*variants, swapped]}) == len(variants) + 1


def test_checksum_of_odd_shapes_and_keys() -> None:
    assert one(jnp.zeros((0, 3))) == "0" * 16
    assert one(jnp.float32(1)) != one(jnp.float32(2)) != one(jnp.zeros(()))
    assert one(jax.random.key(1)) != one(jax.random.key(2))
    assert one(jax.random.split(jax.random.key(1), 3)) != one(jax.random.split(jax.random.key(2), 3))


def test_checksum_does_not_depend_on_the_sharding() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 16, 24))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = [(), ("a",), ("b", None, "a"), (None, ("a", "b")), (None, None, "b")]
    assert (
        {one(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s)))) for s in specs}
        == {one(x)}
        == {one(np.asarray(x))}
    )


def test_checksum_gathers_nothing() -> None:
    from crate_jax.workdir.checksum import _sums

    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.zeros((16, 64, 8)), NamedSharding(mesh, PartitionSpec(None, "a")))
    assert "all-gather" not in _sums.lower([x, x]).compile().as_text()


# --- a full disk -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def big(step: int) -> tuple[Any, Any]:
    return {"w": np.random.default_rng(step).standard_normal(10**6).astype(np.float32)}, {"step": jnp.int32(step)}


def test_full_disk_is_seen_before_saving(small_disk: Path) -> None:
    saver = checkpoint.Checkpoints(small_disk, keep=2)
    for step in (1, 2):
        saver.save(step, *big(step), {"config": CONFIG})
    with pytest.raises(CheckpointError, match=r"no space left for a checkpoint in .*MB needed, .* MB free"):
        saver.save(3, *big(3), {"config": CONFIG})
    saver.close()
    np.testing.assert_array_equal(checkpoint.read_params(small_disk)[0]["w"], big(2)[0]["w"])


def test_disk_that_fills_up_while_saving(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the room between the check and the write."""
    saver = checkpoint.Checkpoints(small_disk, keep=1)
    saver.save(1, *big(1), {"config": CONFIG})
    saver.wait()
    filler = small_disk / "filler"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_free_space", lambda *_: filler.write_bytes(bytes(6 * 2**20)))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*newest checkpoint there: 1") as error:
            saver.save(2, *big(2), {"config": CONFIG})
            saver.wait()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert "No space left" in str(error.value)
    np.testing.assert_array_equal(checkpoint.read_params(small_disk)[0]["w"], big(1)[0]["w"])
    assert not list(saver.folder.glob("*tmp*"))  # its room was given back
    filler.unlink()
    saver.save(2, *big(2), {"config": CONFIG})
    saver.close()
    np.testing.assert_array_equal(checkpoint.read_params(small_disk)[0]["w"], big(2)[0]["w"])


# --- SIGKILL -----------------------------------------------------------------------------------------------

SAVES = """
    import sys
    import numpy as np
    from crate_jax.workdir import checkpoint
    from crate_jax.config import base
    def params(step):
        return {f"w{i}": np.random.default_rng([step, i]).standard_normal(10**6, np.float32) for i in range(5)}
    saver = checkpoint.Checkpoints(sys.argv[1], keep=1)
    step = saver.latest() or 0
    print("started", flush=True)
    while True:
        step += 1
        saver.save(step, params(step), {"step": np.int32(step)}, {"config": base()})
        saver.wait()
        print(step, flush=True)
"""


@pytest.mark.one_python
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_any_moment_loses_nothing(tmp_path: Path, kills: int) -> None:
    """Whatever was complete is still there, bit for bit, although every save deletes the one before (keep=1)."""
    rng = random.Random(kills)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for _ in range(kills):
        command = [sys.executable, "-c", textwrap.dedent(SAVES), str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            acknowledged = process.stdout.read().split()
        params, meta = checkpoint.read_params(tmp_path)
        assert meta["step"] >= int(acknowledged[-1] if acknowledged else 1)
        for i, x in enumerate(params.values()):
            expected = np.random.default_rng([meta["step"], i]).standard_normal(10**6, np.float32)
            np.testing.assert_array_equal(x, expected)
