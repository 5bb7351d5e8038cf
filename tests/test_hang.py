"""Real processes whose images stop coming: stopped and killed data workers, a disk that does not answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crate_jax.parallel import watch
from tests.conftest import ROOT
from tests.hung_disk import HungDisk
from tests.parallel.test_distributed import free_port
from tests.test_soak import FLAGS, Life, check_clean, check_same, orphans, pictures

pytestmark = [pytest.mark.one_python, pytest.mark.slow]

KEYS = ["--config.steps=90", "--config.save.every=1000", "--config.data.threads=1"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("images")
    for name, content in pictures().items():
        (root / name).write_bytes(content)
    return [*FLAGS, *KEYS, f"--config.data.source=folder:{root}"]


@pytest.fixture(scope="module")
def whole(flags, cli_env, tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    Life(cli_env, flags, workdir, 1).end()
    return workdir


def workers(life: Life, process: int) -> list[int]:
    """The data workers of a process, by their ids, once it trains."""
    assert life.wait_for(lambda: " I step 5/" in life.errors[0].read_text()), life.errors[0].read_text()[-3000:]
    pid = life.processes[process].pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = []
    for task in children.parent.parent.glob("*/children"):  # a thread starts them
        found += [int(child) for child in task.read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def statuses(life: Life) -> list[int]:
    return [process.wait(120) for process in life.processes]


def last_line(life: Life, process: int) -> str:
    """The error, or what a signal stopped; there is one such line and no traceback."""
    text = life.errors[process].read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(("error: ", "stopped by ")))
    assert "Traceback" not in text
    return line


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_stops_or_dies_is_named_and_the_run_continues(sent, flags, whole, cli_env, tmp_path):
    more = [*flags, "--config.data.workers=2", "--config.data.stall_seconds=30"]
    life = Life(cli_env, more, tmp_path / "run", 1)
    victim = workers(life, 0)[1]
    os.kill(victim, sent)
    assert statuses(life) == [watch.LOST]
    line = last_line(life, 0)
    text = life.errors[0].read_text()
    if sent == signal.SIGSTOP:
        assert f"worker process {victim} is stopped" in line and "Current thread" in text  # the stacks
    else:
        assert "ended by SIGKILL, perhaps because memory was short" in line
    assert ", state saved; the same command continues it" in line and not orphans(tmp_path / "run")
    assert not Path(f"/proc/{victim}").exists()
    Life(cli_env, [*flags, "--config.data.workers=0"], tmp_path / "run", 1).end()
    check_clean(tmp_path / "run")
    check_same(tmp_path / "run", whole)


def test_a_signal_ends_a_run_whose_worker_is_stopped(flags, cli_env, tmp_path):
    life = Life(cli_env, [*flags, "--config.data.workers=1"], tmp_path / "run", 1)
    os.kill(workers(life, 0)[0], signal.SIGSTOP)
    time.sleep(1)
    life.processes[0].send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert statuses(life) == [128 + signal.SIGTERM] and time.monotonic() - start < 25
    assert ", state saved" in last_line(life, 0) and not orphans(tmp_path / "run")


def test_two_processes_of_which_one_hangs_end_alike(flags, cli_env, tmp_path):
    """Neither saves: a step needs both. The one that hangs says why, the other names it."""
    life = Life(cli_env, [*flags, "--config.data.workers=1", "--config.data.stall_seconds=30"], tmp_path / "run", 2)
    victim = workers(life, 1)[0]
    os.kill(victim, signal.SIGSTOP)
    assert statuses(life) == [watch.LOST] * 2
    assert f"worker process {victim} is stopped" in last_line(life, 1)
    assert "process 1 of 2" in last_line(life, 0)
    assert not Path(f"/proc/{victim}").exists() and not orphans(tmp_path / "run")


@pytest.fixture
def disk(tmp_path) -> Iterator[HungDisk]:
    (tmp_path / "disk").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(HungDisk(tmp_path / "disk", pictures()))
        except OSError as e:
            pytest.skip(f"a disk that hangs needs root and FUSE: {e}")
        yield disk


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_does_not_answer_is_named_by_its_file(workers, disk, flags, whole, cli_env, tmp_path):
    more = [*FLAGS, *KEYS, f"--config.data.source=folder:{tmp_path / 'disk'}", f"--config.data.workers={workers}"]
    life = Life(cli_env, [*more, "--config.data.stall_seconds=30"], tmp_path / "run", 1)
    assert life.wait_for(lambda: " I step 5/" in life.errors[0].read_text())
    disk.hang()
    assert statuses(life) == [watch.LOST]
    assert ", state saved" in last_line(life, 0)
    said = life.errors[0].read_text() if workers else last_line(life, 0)  # a worker says it before
    assert ".png has been read for" in said and not orphans(tmp_path / "run")


def test_local_sh_starts_a_run_again_that_lost_a_process(flags, whole, cli_env, tmp_path):
    """With one process less: the losses are the same to rounding, each step is there once."""
    command = [
        str(ROOT / "launch" / "local.sh"), *flags, "--config.save.every=20", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    settings = {"N": "2", "RESTARTS": "2", "MIN": "1", "GRACE": "60", "PORT": str(free_port())}
    with open(tmp_path / "err", "w") as errors:
        launcher = subprocess.Popen(
            command, cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL,
            env=cli_env | settings | {"JAX_NUM_CPU_DEVICES": "1", "PYTHON": sys.executable},
        )  # fmt: skip
    deadline = time.monotonic() + 300
    while " I step 25/" not in (tmp_path / "err").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    victims = subprocess.run(
        ["pgrep", "-f", f"^[^ ]*python.*--workdir={tmp_path / 'run'} .*--process_id=1"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(victims[0]), signal.SIGKILL)
    assert launcher.wait(300) == 0, (tmp_path / "err").read_text()[-3000:]
    text = (tmp_path / "err").read_text()
    assert "local.sh: process " in text and "restart 1 of 2, with 1 processes" in text
    assert "continuing from step 20" in text
    check_clean(tmp_path / "run")
