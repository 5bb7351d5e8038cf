"""Real processes killed, stopped and started twice at random moments, until the run is through: nothing is lost."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from crate_jax.parallel import watch
from crate_jax.workdir import folder as workdirs
from tests.conftest import ROOT
from tests.data.test_pipeline import photo
from tests.hung_disk import HungDisk
from tests.parallel.test_distributed import free_port

pytestmark = pytest.mark.one_python

FLAGS = [
    "--config=configs/quickstart.py:debug,penalty=srip", "--config.optimizer.ema=0.9", "--config.save.every=4",
    "--config.log.every=1", "--config.log.pictures=0", "--config.log.report=False", "--config.batch_size=8",
]  # fmt: skip
UNFINISHED = "*.orbax-checkpoint-tmp*"
SAVE_EVERY = 12  # in the soak: so few that some kills hit a save, so many that some do not
LEAVE_SECONDS = 60  # that the others have once one was killed


class Life:
    """The processes of one start of a run, of so many devices each; `prefixes` start some, `logs` gets their stderr."""

    def __init__(
        self, env: dict, flags: Sequence[str], workdir: Path, processes: int, devices: int = 1,
        prefixes: Mapping[int, Sequence[str]] = MappingProxyType({}), logs: Path | None = None,
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", "crate_jax.main", *flags, f"--workdir={workdir}"]
        if processes > 1:
            command += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
        self.workdir, self.processes, self.errors = workdir, [], []
        self.before = unfinished(workdir)
        self.env = env | {"JAX_NUM_CPU_DEVICES": str(devices)}
        self.commands: list[list[str]] = []
        for i in range(processes):
            self.errors.append((logs or workdir.parent) / f"{workdir.name}.{i}.err")
            number = [f"--process_id={i}"] if processes > 1 else []
            self.commands.append([*prefixes.get(i, ()), *command, *number])
            self.processes.append(self._start(i, self.errors[i]))

    def _start(self, process: int, log: Path) -> subprocess.Popen:
        with open(log, "w") as errors:
            return subprocess.Popen(
                self.commands[process], cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL, env=self.env
            )

    def runs(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.02) -> bool:
        """Whether it came true while all processes ran."""
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.runs():
            if condition():
                return True
            time.sleep(pause)
        return False

    def locked(self) -> bool:
        """Whether process 0 has the workdir, soon after which the processes watch each other."""
        path = self.workdir / workdirs.LOCK_NAME
        return path.exists() and path.read_text().startswith(f"{self.processes[0].pid} ")

    def saving(self) -> bool:
        """Whether there is an unfinished save that an earlier life did not leave."""
        return bool(unfinished(self.workdir) - self.before)

    def stage(self) -> str:
        """Where the processes ended: an unfinished save lies about, or the log has no step yet, or neither."""
        if self.saving():
            return "in a save"
        return "in steps" if " I step " in self.errors[0].read_text() else "in start-up"

    def kill(self, victims: Sequence[int]) -> None:
        """SIGKILL to some; the others must leave by themselves, soon, with the status that asks for a restart."""
        for i in victims:
            self.processes[i].send_signal(signal.SIGKILL)
        start = time.monotonic()
        for i, process in enumerate(self.processes):
            status = process.wait(LEAVE_SECONDS)
            expected = -signal.SIGKILL if i in victims else watch.LOST
            assert status == expected, f"process {i}, victims {victims}: {status}\n{self.errors[i].read_text()[-3000:]}"
        self.left_after = time.monotonic() - start

    def stop(self, victim: int, seconds: float) -> None:
        """SIGSTOP to one; the others must leave by themselves, and so must it, when it goes on later."""
        self.processes[victim].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        for i in [*(i for i in range(len(self.processes)) if i != victim), victim]:
            if i == victim:
                time.sleep(seconds)
                self.processes[i].send_signal(signal.SIGCONT)
            status = self.processes[i].wait(watch.SILENCE + LEAVE_SECONDS)
            assert status == watch.LOST, (
                f"process {i}, stopped {victim}: {status}\n{self.errors[i].read_text()[-3000:]}"
            )
        self.left_after = time.monotonic() - start - seconds

    def pause(self, victims: Sequence[int], seconds: float) -> None:
        """SIGSTOP to some, so short that nobody minds."""
        for signum in (signal.SIGSTOP, signal.SIGCONT):
            for i in victims:
                self.processes[i].send_signal(signum)
            time.sleep(seconds if signum == signal.SIGSTOP else 0)

    def start_again(self, again: Sequence[int]) -> None:
        """The same command a second time, in some processes; they are refused in a line."""
        logs = [self.errors[i].with_suffix(".second") for i in again]
        second = [self._start(i, log) for i, log in zip(again, logs, strict=True)]
        for process, log in zip(second, logs, strict=True):
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                assert not self.runs(), log.read_text()[-3000:]
                process.kill()
            if self.runs():  # else this life has ended meanwhile
                text = log.read_text()
                lines = [line for line in text.splitlines() if line.startswith("error: ")]
                assert process.wait() == 2 and len(lines) == 1 and "Traceback" not in text, text[-3000:]
                assert "it is already there (" in lines[0] or "is in use by process" in lines[0]

    def end(self) -> None:
        for i, process in enumerate(self.processes):
            assert process.wait(900) == 0, self.errors[i].read_text()[-3000:]


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Folders of saves that are not complete, by name and inode."""
    found = set()
    for path in (workdir / "checkpoints").glob(UNFINISHED):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def checkpoints(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdecimal()}


def losses(workdir: Path) -> list[float]:
    """Of each step, which must be there once, in order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def orphans(workdir: Path) -> list[str]:
    """Command lines of processes that still have to do with the workdir."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"--workdir={workdir} " in command and path.parent.name != str(os.getpid()):
            found.append(command)
    return found


def kill_at_random(life: Life, rng: random.Random, when: str) -> bool:
    """Kills at a moment of the given kind; False: the run ended before."""
    many = len(life.processes) > 1
    if when == "start-up":
        # Of several, one that is killed before the others have met it is waited for; so they are killed together.
        early = many and rng.random() < 0.5
        if not early and not life.wait_for(life.locked):
            return False
        time.sleep(rng.uniform(0.2, 4.0) if early or not many else rng.uniform(1.0, 4.0))
        victims = range(len(life.processes)) if early else [rng.randrange(len(life.processes))]
    else:
        old = checkpoints(life.workdir)
        if not life.wait_for(lambda: bool(checkpoints(life.workdir) - old)):
            return False
        if when == "save" and not life.wait_for(life.saving, pause=0.001):
            return False
        time.sleep(rng.uniform(0.0, 0.02 if when == "save" else 0.5))
        everyone = range(len(life.processes))
        victims = rng.choice([everyone, *([i] for i in everyone)])
    if not life.runs():
        return False
    life.kill(victims)
    return True


def soak(env: dict, root: Path, steps: int, kills: int, shapes: Sequence[tuple[int, int]], seed: int) -> list[Path]:
    """Starts, kills and starts again, in turn on each shape (processes, devices of each); then lets the run end.

    A run that is through before is followed by another, in the next folder. Returns the folders, prints what happened.
    """
    rng, flags = random.Random(seed), [*FLAGS, f"--config.steps={steps}", f"--config.save.every={SAVE_EVERY}"]
    count = collections.Counter({"kills": 0, "in a save": 0})
    slowest, start, lives, folders = 0.0, time.monotonic(), 0, [root / "run0"]
    while count["kills"] < kills:
        if (folders[-1] / "summary.json").exists():
            folders.append(root / f"run{len(folders)}")
        life, lives = Life(env, flags, folders[-1], *shapes[lives % len(shapes)]), lives + 1
        try:
            if not kill_at_random(life, rng, ["save", "step", "start-up", "save", "step"][count["kills"] % 5]):
                life.end()
                continue
        finally:
            for process in life.processes:
                process.kill()
                process.wait()
        slowest = max(slowest, life.left_after)
        count.update(["kills", life.stage()])
        assert not orphans(folders[-1])
    Life(env, flags, folders[-1], *shapes[0]).end()
    seconds = time.monotonic() - start
    print(dict(count), f"{len(folders)} runs, {seconds:.0f} s; the others left after {slowest:.1f} s at most")
    assert count["in a save"] >= kills // 5
    return folders


def pictures() -> dict[str, bytes]:
    """Images of many sizes, which a run reads from their files in each step."""
    contents = {}
    for i in range(40):
        photo(i, (20 + i, 70 - i)).save(buffer := io.BytesIO(), "PNG")
        contents[f"{i:02d}.png"] = buffer.getvalue()
    return contents


def mounted(folder: Path) -> contextlib.AbstractContextManager[HungDisk | None]:
    """The pictures as a disk that may hang, where the tests may mount one; else as files, and None."""
    folder.mkdir(exist_ok=True)
    try:
        return HungDisk(folder, pictures())
    except OSError:
        for name, content in pictures().items():
            (folder / name).write_bytes(content)
        return contextlib.nullcontext()


def disturb(life: Life, rng: random.Random, how: str, last: int, disk: HungDisk | None) -> str:
    """Something that happens to a life before step `last`; how it is called, empty if nothing happened."""
    everyone = range(len(life.processes))
    old = checkpoints(life.workdir)
    if max(map(int, old), default=0) > last:
        return ""
    if how == "kill":
        return how if kill_at_random(life, rng, rng.choice(["save", "step", "start-up"])) else ""
    if not life.wait_for(life.locked if rng.random() < 0.3 else lambda: bool(checkpoints(life.workdir) - old)):
        return ""
    time.sleep(rng.uniform(0.0, 0.5))
    victims = rng.choice([everyone, *([i] for i in everyone)])
    if how == "hung disk" and disk is not None:
        disk.hang()
        for process, errors in zip(life.processes, life.errors, strict=True):
            assert process.wait(STALL_SECONDS + 2 * LEAVE_SECONDS) == watch.LOST, errors.read_text()[-3000:]
    elif how == "second start":
        life.start_again(victims)
    elif how == "stop" and len(everyone) > 1:
        life.stop(rng.choice(everyone), rng.uniform(0.0, 3.0))
    elif how == "stand still":  # as SLURM suspends a job
        life.pause(everyone, watch.SILENCE + 5)
    else:
        how = "pause"
        life.pause(victims, rng.uniform(0.1, 5.0))
    return how


HOW = ["second start", "pause", "stop", "hung disk", "second start", "kill", "pause", "kill", "stand still"]
STALL_SECONDS = 45  # more than the processes stand still


def disturbed(env: dict, root: Path, processes: int, seconds: float, steps: int) -> list[Path]:
    """Starts runs and disturbs them for so many seconds, then lets the last one end; returns their folders.

    Afterwards runs one that nobody disturbs, in the folder `whole`.
    """
    rng, flags = random.Random(processes), [*FLAGS, f"--config.steps={steps}", f"--config.save.every={SAVE_EVERY}"]
    flags += [f"--config.data.source=folder:{root / 'disk'}", f"--config.data.stall_seconds={STALL_SECONDS}"]
    count: collections.Counter[str] = collections.Counter()
    folders, end = [root / "run0"], time.monotonic() + seconds
    while time.monotonic() < end:
        if (folders[-1] / "summary.json").exists():
            folders.append(root / f"run{len(folders)}")
        with mounted(root / "disk") as disk:
            life, how = Life(env, flags, folders[-1], processes), "started"
            try:
                while how and life.runs() and time.monotonic() < end:
                    how = disturb(life, rng, HOW[sum(count.values()) % len(HOW)], steps - 80, disk)
                    count.update([how] if how else [])
                if life.runs() or not how:
                    life.end()
            finally:
                for process in life.processes:
                    process.kill()
                    process.wait()
        assert not orphans(folders[-1])
    with mounted(root / "disk"):
        for folder in (folders[-1], root / "whole"):
            Life(env, flags, folder, processes).end()
    print(f"{processes} processes: {dict(count)}, {len(folders)} runs")
    assert count.total()
    return folders


def check_clean(workdir: Path) -> None:
    assert not orphans(workdir)
    assert not list((workdir / "checkpoints").glob(UNFINISHED)) and not list(workdir.glob("*.tmp"))
    assert not (workdir / "checkpoints" / "damaged").exists()
    with workdirs.lock(workdir):  # nobody holds it
        pass


def check_same(workdir: Path, reference: Path) -> None:
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (workdir, reference))
    for name in ("steps", "loss", "params_sha256", "knn_top1", "probe_top1"):
        assert ours[name] == theirs[name], name
    assert losses(workdir) == losses(reference) and len(losses(workdir)) == ours["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_a_run_ends_with_the_same_bits(processes, cli_env, tmp_path):
    kills, steps = 24, 600
    folders = soak(cli_env, tmp_path, steps, kills, [(processes, 1)], seed=kills + processes)
    Life(cli_env, [*FLAGS, f"--config.steps={steps}"], tmp_path / "whole", processes).end()
    for folder in folders:
        check_clean(folder)
        check_same(folder, tmp_path / "whole")
        goodput = json.loads((folder / "summary.json").read_text())["goodput"]
        assert 0 < goodput["restarts"] < 1 and 0 < goodput["steps"] < 1


@pytest.mark.slow
def test_killed_and_continued_on_other_devices_the_losses_are_the_same(cli_env, tmp_path):
    shapes = [(1, 1), (2, 1), (1, 4), (2, 2), (1, 2)]
    folders = soak(cli_env, tmp_path, 200, 10, shapes, seed=5)
    Life(cli_env, [*FLAGS, "--config.steps=200"], tmp_path / "whole", 1).end()
    for folder in folders:
        check_clean(folder)
        np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_whatever_happens_to_its_processes_a_run_ends_with_the_same_bits(processes, cli_env, tmp_path, request):
    """For a third of --soak seconds each, what HOW names."""
    folders = disturbed(cli_env, tmp_path, processes, request.config.getoption("--soak") / 3, 300)
    for folder in folders:
        check_clean(folder)
        check_same(folder, tmp_path / "whole")
