"""What happens to a run whose disk, files or folder fail: it says so in one line, stops, and can go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crate_jax.parallel import watch
from tests.test_soak import FLAGS, Life, check_clean, check_same, checkpoints, losses
from tests.workdir.test_checkpoint import flip, largest


def error_line(life: Life, process: int) -> str:
    """The one line that a process ended with."""
    text = life.errors[process].read_text()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text[-3000:]
    return lines[0]


def own_error(life: Life) -> str:
    """The error of a process that saw it itself; the others name that process."""
    lines = [error_line(life, process) for process in range(len(life.processes))]
    return next(line for line in lines if "failed with status 2" not in line)


def statuses(life: Life, timeout: float = 120) -> list[int]:
    return [process.wait(timeout) for process in life.processes]


@pytest.fixture(scope="module")
def finished(cli_env, tmp_path_factory) -> Path:
    """A run of two processes with the steps 4, 8 and 12; tests copy it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    Life(cli_env, [*FLAGS, "--config.steps=12"], workdir, 2).end()
    assert checkpoints(workdir) == {"4", "8", "12"}
    return workdir


def mounted(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    yield from mounted(tmp_path / "disk", "16m")


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves only so many bytes."""
    filler = disk / "filler"
    with contextlib.suppress(OSError):  # the run writes too: what it took meanwhile is lacking here
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return filler


DAMAGE = {
    "flipped": lambda file: flip(file, file.stat().st_size // 2),
    "deleted": lambda file: file.unlink(),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_two_processes_name_a_damaged_checkpoint_once_and_use_the_one_before(damage, finished, cli_env, tmp_path):
    """And remove what a killed save left; then the run ends as the one that was not damaged."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    DAMAGE[damage](largest(workdir / "checkpoints" / "12"))
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "16.orbax-checkpoint-tmp-1")
    life = Life(cli_env, [*FLAGS, "--config.steps=12"], workdir, 2)
    life.end()
    texts = [file.read_text() for file in life.errors]
    assert [text.count("cannot be used") for text in texts] == [1, 0], texts[1][-2000:]
    assert "checkpoint of step 12" in texts[0] and "continuing from step 8" in texts[0]
    assert (workdir / "checkpoints" / "damaged" / "12").is_dir()
    shutil.rmtree(workdir / "checkpoints" / "damaged")
    check_clean(workdir)
    check_same(workdir, finished)


@pytest.mark.slow
def test_two_processes_agree_on_what_is_the_runs_own(finished, cli_env, tmp_path):
    """A copy of step 8 stands for step 12; then the checkpoints are those of another run."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "12")
    life = Life(cli_env, [*FLAGS, "--config.steps=12"], workdir, 2)
    life.end()
    text = life.errors[0].read_text()
    assert text.count("it is the checkpoint of step 8, under another name") == 1 and "continuing from step 8" in text
    check_same(workdir, finished)
    starts = workdir / "starts.jsonl"
    starts.write_text(re.sub('"run": "[0-9a-f]{16}"', '"run": "feed"', starts.read_text()))
    life = Life(cli_env, [*FLAGS, "--config.steps=16"], workdir, 2)
    assert statuses(life) == [2, 2]
    for process in (0, 1):
        assert "holds a checkpoint of step 12 of another run" in error_line(life, process)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["params/manifest.ocdbt", "data", "meta/metadata"])
def test_damage_that_one_process_alone_sees_is_damage_for_all(file, finished, cli_env, tmp_path):
    """As of a bad cable or a stale cache: process 1 has another file mounted over the real one."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    newest = workdir / "checkpoints" / "12"
    real = largest(newest / "params") if file == "data" else newest / file
    flip(Path(shutil.copy(real, tmp_path / "other")), real.stat().st_size // 2)
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount of one process's own needs root")
    hide = ["unshare", "-m", "sh", "-c", f'mount --bind {tmp_path / "other"} {real} && exec "$@"', "sh"]
    life = Life(cli_env, [*FLAGS, "--config.steps=12"], workdir, 2, prefixes={1: hide})
    life.end()
    texts = [path.read_text() for path in life.errors]
    assert [text.count("cannot be used") for text in texts] == [1, 1], texts[1][-2000:]
    assert "process 1 cannot read it, see its log" in texts[0] and "continuing from step 8" in texts[0]
    check_same(workdir, finished)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_without_room_for_a_checkpoint_stops_all_and_the_run_goes_on_later(processes, cli_env, disk, tmp_path):
    flags = [*FLAGS, "--config.steps=2000"]
    life = Life(cli_env, flags, disk / "run", processes, logs=tmp_path)
    assert life.wait_for(lambda: len(checkpoints(disk / "run")) > 1)
    filler = fill(disk, leave=500_000)
    ended = statuses(life)
    assert ended == [2] * processes, life.errors[0].read_text()[-3000:]
    line = own_error(life)  # seen before saving or, rarely, while TensorStore writes
    assert "o space left" in line and "checkpoint" in line and str(disk / "run") in line
    newest = max(int(name) for name in checkpoints(disk / "run"))
    filler.unlink()
    life = Life(cli_env, [*FLAGS, f"--config.steps={newest + 8}"], disk / "run", processes, logs=tmp_path)
    life.end()
    assert f"continuing from step {newest} of" in life.errors[0].read_text()
    assert len(losses(disk / "run")) == newest + 8
    check_clean(disk / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_without_room_for_the_log_names_the_file(processes, cli_env, disk, tmp_path):
    """No checkpoint is due before: metrics.jsonl or TensorBoard's file is what meets the end of the disk."""
    life = Life(
        cli_env, [*FLAGS, "--config.steps=100000", "--config.save.every=100000"], disk / "run", processes, logs=tmp_path
    )
    assert life.wait_for(lambda: " I step " in life.errors[0].read_text())
    fill(disk, leave=0)
    ended = statuses(life)
    assert ended == [2] * processes
    line = error_line(life, 0)
    assert "cannot be written: No space left on device; make room" in line and str(disk / "run") in line


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_workdir_that_vanishes_stops_the_run_in_one_line(processes, cli_env, tmp_path):
    life = Life(cli_env, [*FLAGS, "--config.steps=100000"], tmp_path / "run", processes)
    assert life.wait_for(lambda: len(checkpoints(tmp_path / "run")) > 1)
    while (tmp_path / "run").exists():  # a save in between may leave a file behind
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    ended = statuses(life)
    assert ended == [2] * processes, life.errors[0].read_text()[-3000:]
    assert str(tmp_path / "run") in own_error(life)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("when", ["compiling", "compiling, twice", "evaluating"])
def test_a_signal_outside_the_steps(when, processes, cli_env, tmp_path):
    """Before the first step it saves that step; a second one acts at once; in the last evaluation the run ends."""
    said = {"evaluating": " I step 8/8 "}.get(when, " I training 0 -> 8 ")
    flags = [*FLAGS, "--config.steps=8"]
    life = Life(cli_env, flags, tmp_path / "run", processes)
    assert life.wait_for(lambda: said in life.errors[0].read_text())
    for _ in range(2 if "twice" in when else 1):
        life.processes[-1].send_signal(signal.SIGTERM)
        time.sleep(0.2)
    ended = statuses(life)
    if when == "evaluating":
        assert ended == [0] * processes
    elif when == "compiling":
        assert ended == [128 + signal.SIGTERM] * processes, life.errors[0].read_text()[-3000:]
        assert "state saved; the same command continues it" in life.errors[0].read_text()
        assert checkpoints(tmp_path / "run")
    else:
        assert ended == [*[watch.LOST] * (processes - 1), -signal.SIGTERM]
    if when != "evaluating":
        Life(cli_env, flags, tmp_path / "run", processes).end()
    assert len(losses(tmp_path / "run")) == 8
    check_clean(tmp_path / "run")


@pytest.mark.slow
def test_a_second_job_of_two_processes_is_refused_in_both(cli_env, tmp_path):
    flags = [*FLAGS, "--config.steps=100000"]
    holder = Life(cli_env, flags, tmp_path / "run", 2)
    assert holder.wait_for(lambda: " I step " in holder.errors[0].read_text())
    (tmp_path / "second").mkdir()
    second = Life(cli_env, flags, tmp_path / "run", 2, logs=tmp_path / "second")
    assert statuses(second) == [2, 2]
    for process in range(2):
        assert f"is in use by process {holder.processes[0].pid} on " in error_line(second, process)
    assert holder.runs()
    holder.kill([0])


@pytest.mark.slow
def test_two_processes_name_the_images_of_the_whole_batch(cli_env, tmp_path):
    """A rate that blows the weights up: both stop with one line, and the file holds both processes' rows in order."""
    flags = [*FLAGS, "--config.steps=50", "--config.optimizer.lr=1e30", "--config.nonfinite.skip=2"]
    written = []
    for processes in (1, 2):
        life = Life(cli_env, flags, tmp_path / f"run{processes}", processes)
        assert statuses(life) == [2] * processes, life.errors[0].read_text()[-3000:]
        line = error_line(life, processes - 1)
        assert "as in the 2 steps before (config.nonfinite.skip=2)" in line
        path = Path(line.split("named in ")[1].split(";")[0])
        written.append(json.loads(path.read_text()))
        assert len(list(path.parent.iterdir())) == 3
    one, two = written
    assert one["indices"] == two["indices"] and one["images"] == two["images"] and len(set(one["images"])) == 8
