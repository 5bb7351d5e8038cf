"""The lock of a workdir and the check of free space, with real processes and real file systems."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crate_jax.config import base
from crate_jax.convert import __main__ as command, files, pretrained, weights
from crate_jax.data.folder import open_folder
from crate_jax.data.sources import Request
from crate_jax.errors import CheckpointError, UserError
from crate_jax.jobs import report
from crate_jax.workdir import checkpoint, folder as workdir, whole
from tests.conftest import ROOT

HOLDER = """
    import sys, time
    from crate_jax.workdir import folder
    with folder.lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock of `folder`."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_creates_the_folder_and_names_the_holder(tmp_path: Path) -> None:
    with workdir.lock(tmp_path / "a" / "b") as folder:
        assert folder == tmp_path / "a" / "b"
        assert (folder / workdir.LOCK_NAME).read_text().startswith(f"{os.getpid()} on ")


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*choose another --workdir") as error:
            with workdir.lock(tmp_path):
                pass
        assert "\n" not in str(error.value)
        assert (tmp_path / workdir.LOCK_NAME).read_text().startswith(str(process.pid))  # still the holder's line
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with workdir.lock(tmp_path):
            pass


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    kept = ["config.json", "notes.2024.tmp", "x.7.crate_jax.tmp"]  # a user's file, and a user's folder
    for name in (f"config.json.4711.{whole.ENDING}", *kept[:2]):
        (tmp_path / name).write_text("{")
    (tmp_path / kept[2]).mkdir()
    with workdir.lock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [workdir.LOCK_NAME, *kept]


@pytest.mark.parametrize("key", ["model_type", "architectures", "architecture"])
def test_a_folder_of_weights_keeps_its_config(tmp_path: Path, key: str) -> None:
    """A job that writes another one is refused; a report is not, as it writes none."""
    (tmp_path / "config.json").write_text(json.dumps({key: "vit"}))
    for refuse in (workdir.require_no_model, workdir.require_no_run):
        with pytest.raises(UserError, match=f"that of a model .{key}: 'vit'.*a job would replace it; choose another"):
            refuse(tmp_path, "a job")
    with workdir.lock(tmp_path):
        pass


def test_a_folder_of_a_training_run_is_not_one_of_another_job(tmp_path: Path) -> None:
    workdir.require_no_run(tmp_path, "an evaluation")
    for name in workdir.KEPT[2:]:
        (tmp_path / name).touch()
    workdir.require_no_run(tmp_path, "an evaluation")
    (tmp_path / workdir.STARTS).touch()
    with pytest.raises(UserError, match="holds a training run, whose config.json an evaluation would replace"):
        workdir.require_no_run(tmp_path, "an evaluation")


def test_released_at_the_end_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), workdir.lock(tmp_path):
        _ = 1 / 0
    start = time.monotonic()
    with workdir.lock(tmp_path):
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("below", ["", "below/it"])
def test_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file.*: is, or lies under, a file"), workdir.lock(tmp_path / "file" / below):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "hdfs://host/run", "gs:/bucket/run", "s3://"])
def test_not_a_folder_name(name: str) -> None:
    with pytest.raises(UserError, match=r"must be .* local or mounted file system, gs://BUCKET/"), workdir.lock(name):
        pass


def test_a_path_that_is_not_utf_8_is_refused_before_the_run(tmp_path):
    with (
        pytest.raises(UserError, match=r"w\\udcff: must be a path in UTF-8; choose an"),
        workdir.lock(tmp_path / "w\udcff"),
    ):
        pass
    assert not any(tmp_path.iterdir())


SCHEMES = (
    "hdfs://host/x",
    "file:///x",
    "http://host/x.pth",
    "abfss://c@host/x",
    "dbfs:/x",
)
TAKES_A_PATH = {
    "checkpoint": lambda path: pretrained.load(path, "config.checkpoint"),
    "parameters": checkpoint.read_params,
    "weights": weights.load,
    "a file of weights": files.read,
    "what is inspected": lambda path: command.inspect(command.parser().parse_args(["inspect", path])),
    "a new file of weights": lambda path: files.write(path, {"a": np.ones(3, np.float32)}, {}),
    "checkpoints of a report": report.split,
    "runs of a report": report.expand,
    "a workdir": lambda path: workdir.lock(path).__enter__(),
    "images": lambda path: open_folder(path, Request.from_config(base(), "train")),
}


@pytest.mark.parametrize("path", SCHEMES)
def test_no_path_begins_with_a_scheme(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for all, and no local folder of the name of a scheme is made or read."""
    monkeypatch.chdir(tmp_path)
    for take in TAKES_A_PATH.values():
        with pytest.raises(UserError, match=f"{path}.*: must be a (path|folder) on a local or mounted file system"):
            take(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://bucket/x"])
def test_no_single_file_is_written_to_a_bucket(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{path}: must be a path on a local or mounted file system, without"):
        TAKES_A_PATH["a new file of weights"](path)
    assert not list(tmp_path.iterdir())


def test_one_function_knows_home_folders_and_schemes() -> None:
    """Whatever else turned a user's text into a path would not refuse a scheme; an exported file runs without us."""
    others = {str(path.relative_to(ROOT)) for path in (ROOT / "crate_jax").rglob("*.py")}
    using = {name for name in others if ".expanduser(" in (ROOT / name).read_text()}
    assert using == {"crate_jax/workdir/folder.py", "crate_jax/convert/torch_model/modeling_crate.py"}


@pytest.mark.parametrize("exists", [False, True])
def test_folder_that_cannot_be_written(tmp_path: Path, exists: bool) -> None:
    parent = tmp_path / "locked"
    target = parent if exists else parent / "run"
    parent.mkdir()
    with contextlib.ExitStack() as undo:
        if os.geteuid() == 0:  # root passes any permission bits, but not a read-only mount
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", parent], capture_output=True).returncode:
                pytest.skip("root without the right to mount: nothing here is unwritable")
            undo.callback(subprocess.run, ["umount", parent], check=True)
        else:
            parent.chmod(0o500)
            undo.callback(parent.chmod, 0o700)
        with pytest.raises(UserError, match=r"locked.*cannot be (created|written to) \((Read-only|Permission)"):
            with workdir.lock(target):
                pass


def test_free_space(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/checkpoints is gone \(No such file"):
        workdir.check_free_space(tmp_path / "gone" / "checkpoints", 1000)
    workdir.check_free_space(tmp_path, 1000)
    with pytest.raises(
        CheckpointError, match=r"no space left .*1,000,000,000,000\.0 MB needed, [\d,.]+ MB free; make room"
    ):
        workdir.check_free_space(tmp_path, 10**18)
