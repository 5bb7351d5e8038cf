"""Runs the parts, each in processes of its own that are killed in time, and keeps what they measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.accelerator.parts import ALL, MACHINE, PARTS, Row, Settings
from crate_jax.errors import UserError
from crate_jax.workdir.metrics import write_json

START = 45.0  # seconds that a process may need until its first case begins, imports and the device's start
RESERVE = 3.0  # seconds kept at the end
SAME = ("device", "devices", "platform")  # what numbers of one folder must have in common


class Record:
    """The rows of one part, in DIR/PART.json.

    Rows from a command with other settings, on which the numbers depend, are dropped.

    Args:
      name: the part.
      settings: of this command.
      machine: the row of the part MACHINE; {} for itself.
    """

    def __init__(self, name: str, settings: Settings, machine: Row):
        self.name = name
        self.path = Path(settings.out) / f"{name}.json"
        self._head: Row = {"part": name, "settings": key_of(name, settings), "machine": machine}
        old = read(self.path)
        self.rows: dict[str, Row] = old["rows"] if old.get("settings") == self._head["settings"] else {}
        for row in self.rows.values():
            row.setdefault("by", software(old.get("machine", {})))
        self.new: set[str] = set()  # cases of this command

    def wanted(self, names: Sequence[str], again: bool) -> list[str]:
        """The cases that have no row yet; with `again` those that failed, or lacked something, before this command."""
        if again:
            return [n for n in names if n not in self.new and n in self.rows and not measured(self.rows[n])]
        return [n for n in names if n not in self.rows]

    def add(self, case: str, row: Row, names: Sequence[str]) -> None:
        """Writes a row; `names` are all cases of the part, in order."""
        self.new.add(case)
        self.rows[case] = {**row, "by": software(self._head["machine"])} if self._head["machine"] else row
        self.rows = {name: self.rows[name] for name in names if name in self.rows}
        finished = all(name in self.rows and measured(self.rows[name]) for name in names)
        write_json(self.path, {**self._head, "finished": finished, "rows": self.rows})


def software(machine: Row) -> Row:
    """The versions and the cards' drivers of a machine, on which numbers depend: a folder may hold those of several."""
    return {**machine.get("versions", {}), "cards": machine.get("nvidia_smi", "")}


def measured(row: Row) -> bool:
    """Whether a row holds numbers: the case did not fail, and what it needs was there."""
    return "failed" not in row and "absent" not in row


def key_of(name: str, settings: Settings) -> Row:
    """What the numbers of a part depend on."""
    own = {"data": settings.data} if name in ("cifar10", "questions") else {}
    return {"debug": settings.debug, "batch": settings.batch, **own}


def read(path: Path) -> Row:
    """A part's JSON; {} if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def command(part: str, settings: Settings, names: Sequence[str]) -> list[str]:
    """The command of a process that runs cases of a part."""
    arguments = [part, json.dumps(dataclasses.asdict(settings)), *names]
    return [sys.executable, "-m", "benchmarks.accelerator.child", *arguments]


def environment(settings: Settings) -> dict[str, str]:
    """The environment of a process; what it compiles is kept in DIR/compiled, for the next command."""
    folder = os.path.join(os.path.abspath(settings.out), "compiled")
    kept = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "torch"),
        "PYTHONUNBUFFERED": "1",
        **({"XLA_FLAGS": "--xla_backend_optimization_level=0"} if settings.debug else {}),  # quick to compile
    }
    return {**kept, **os.environ}


def complain(text: str) -> None:
    """One line on stderr."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def process(arguments: list[str], settings: Settings, log: IO[str]) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Starts a process; gives it, and a queue of the lines that it prints, None at their end; kills it with its own."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def forward(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    child = subprocess.Popen(arguments, env=environment(settings), text=True, start_new_session=True, **pipes)
    threading.Thread(target=forward, args=(child.stdout,), daemon=True).start()
    try:
        yield child, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
        child.wait()
        assert child.stdin is not None
        child.stdin.close()


def attempt(
    name: str, names: Sequence[str], settings: Settings, limit: float, until: float, add: Callable[[str, Row], None]
) -> None:
    """Runs cases of a part in one process, until one fails or is killed, or the time is over.

    Args:
      name: the part's name.
      names: its cases to run; at least one of them gets a row, unless the time is over.
      settings: for the process.
      limit: the seconds of each case; the first has the start of the process in addition.
      until: the end of the time, as `time.monotonic()` counts.
      add: called with each row, which holds the seconds that the case took.
    """
    log_path = Path(settings.out) / f"{name}.log"
    running, begun = names[0], time.monotonic()
    end = min(until, begun + START + limit)
    settings = dataclasses.replace(settings, until=time.time() + end - begun)

    def done(row: Row) -> None:
        add(running, {**row, "seconds": round(time.monotonic() - begun, 1)})

    with (
        open(log_path, "a", encoding="utf-8", errors="replace") as log,
        process(command(name, settings, names), settings, log) as (child, lines),
    ):
        while True:
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                if running and end < until:
                    done({"failed": f"killed after {end - begun:.3g} s"})
                return
            if line is None:
                break
            try:
                event = json.loads(line)
            except ValueError:  # a library printed it while it was imported
                continue
            if "row" in event:
                done(event["row"])
                running = ""
            elif event["case"] != names[0]:
                running, begun = event["case"], time.monotonic()
                end = min(until, begun + limit)
        if running:
            done({"failed": ended(child.wait(), log_path)})


def ended(status: int, log_path: Path) -> str:
    """How a process ended that should have gone on, with the last line of its log."""
    last = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1:]
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"its process ended with {how}: {''.join(last)[:300]}"


def run_part(name: str, settings: Settings, record: Record, until: float, again: bool = False) -> list[str]:
    """Runs the cases of a part that are wanted; returns those for which there was no time."""
    part = ALL[name]
    try:
        names = list(part.cases(name, settings))
    except Exception as e:
        if name not in record.new:
            complain(f"{name}: failed: {type(e).__name__}: {e}")
            record.add(name, {"failed": f"{type(e).__name__}: {e}"}, [name])
        return []

    def add(case: str, row: Row) -> None:
        record.add(case, row, names)
        if "failed" in row:
            complain(f"{name}/{case}: failed: {row['failed']}; see {Path(settings.out) / name}.log")

    record.rows = {case: record.rows[case] for case in names if case in record.rows}  # another version had others
    wanted = record.wanted(names, again)
    while wanted:
        left = until - time.monotonic()
        if left < (1.0 if settings.debug else part.least):
            complain(f"{name}: no time left for {', '.join(wanted)}; the same command goes on with it")
            return wanted
        alone = part.alone and not (settings.debug and part.limit)
        limit = part.limit or left / len(wanted) - START
        attempt(name, wanted[:1] if alone else wanted, settings, limit, until, add)
        wanted = [case for case in wanted if case not in record.new]
    return []


def run(settings: Settings, minutes: float, only: Sequence[str], show: Callable[[dict[str, Row]], None]) -> bool:
    """Runs all parts in order of value within the time.

    First all cases that have no row yet, then those that failed in an earlier command, then the parts that take the
    rest of the time.

    Args:
      settings: of the command.
      minutes: the time.
      only: the parts to run.
      show: called with the rows of all parts, by name, as they are in the folder, after each part.

    Returns:
      whether nothing failed, was wrong or is left.

    Raises:
      UserError: there is no accelerator, or the folder holds numbers of another one.
    """
    until = time.monotonic() + 60 * minutes - RESERVE
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    machine = find_machine(settings, until)
    settings = dataclasses.replace(settings, platform=machine["platform"])
    records = {name: Record(name, settings, machine) for name in PARTS}
    fixed, rest = ([n for n in only if bool(PARTS[n].limit) == kind] for kind in (True, False))
    left: dict[str, list[str]] = {}
    turns = [(part, again) for parts in (fixed, rest) for again in (False, True) for part in parts]
    for name, again in turns:
        left[name] = left.get(name, []) + run_part(name, settings, records[name], until, again)
        show({MACHINE: {MACHINE: machine}, **{n: r.rows for n, r in records.items()}})
    rows = [row for name in only for row in records[name].rows.values()]
    return not any(left.values()) and not any("failed" in row or row.get("ok") is False for row in rows)


def find_machine(settings: Settings, until: float) -> Row:
    """The row of the part MACHINE.

    Raises:
      UserError: JAX finds no device, or the folder holds numbers of another one.
    """
    path = Path(settings.out) / f"{MACHINE}.json"
    before = read(path).get("rows", {}).get(MACHINE, {})
    found: dict[str, Row] = {}
    attempt(MACHINE, [MACHINE], settings, ALL[MACHINE].limit, until, found.__setitem__)
    row = found.get(MACHINE, {"failed": "no answer in time"})
    if "failed" in row:
        raise UserError(f"no device to measure: {row['failed']}; see {path.with_suffix('.log')}")
    if any(before.get(key, row[key]) != row[key] for key in SAME):
        raise UserError(
            f"--out={settings.out}: holds numbers of {before['devices']} x {before['device']}, but this machine has "
            f"{row['devices']} x {row['device']}; give another folder"
        )
    Record(MACHINE, settings, {}).add(MACHINE, row, [MACHINE])
    return row
