"""The record of a run's starts, ``starts.jsonl``: one line for each, which nothing deletes or changes afterwards.

Each line also holds the run's id, which every checkpoint of the run repeats: so a checkpoint that was copied from
another workdir is noticed.
"""

from __future__ import annotations

import datetime
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crate_jax.errors import UserError
from crate_jax.workdir import metrics, readback
from crate_jax.workdir.checkpoint_files import versions
from crate_jax.workdir.folder import STARTS

FILE = STARTS
RUN = "run"  # the key of the id, in lines and in checkpoints


def new_run() -> str:
    """An id for a run: random, since two runs may have the same config."""
    return secrets.token_hex(8)


def run_of(folder: Path) -> str:
    """The id of the run in the workdir `folder`, to which its checkpoints must belong.

    Returns:
      The newest start's id; a new id if only a version without ids has started it; '' if there is no start, since
      then the checkpoints, if any, say which run it is.
    """
    found = read(folder)
    ids = [start[RUN] for start in found if start.get(RUN) and isinstance(start[RUN], str)]
    return ids[-1] if ids else new_run() if found else ""


def append(folder: Path, run: str, step: int, changed: Sequence[Mapping[str, Any]], devices: str) -> None:
    """Appends the line of a start. Only one process may call it.

    Args:
      folder: the workdir; the caller holds its lock.
      run: the run's id.
      step: the step from which the start continues; 0: it is a new run.
      changed: the changed keys, each with ``key``, ``old`` and ``new``.
      devices: number and kind of the devices.

    Raises:
      UserError: the file cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {RUN: run, "step": step, "time": now, "changed": list(changed), "devices": devices, "versions": versions()}
    metrics.append_line(folder / FILE, start)


def read(folder: Path) -> list[dict[str, Any]]:
    """All starts, the oldest first; without lines that are damaged. [] if an older version made the run.

    Raises:
      UserError: the file cannot be read.
    """
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); move it away") from None
    starts = []
    for line in lines:
        start = readback.parse(line)
        if start is not None and _is_whole(start):
            starts.append(start)
    return starts


def _is_whole(start: Mapping[str, Any]) -> bool:
    """Whether a line has the entries of a start, so that a crash or an editor has not changed them."""
    changed, versions = start.get("changed", []), start.get("versions", {})
    return (
        type(start.get("step")) is int
        and isinstance(versions, dict)
        and isinstance(changed, list)
        and all(isinstance(c, dict) and {"key", "old", "new"} <= c.keys() for c in changed)
        and all(isinstance(c["key"], str) and type(c.get("step")) is int for c in changed)
    )


def lost(earlier: Sequence[Mapping[str, Any]], saved: float, last_sign: float | None) -> float:
    """Seconds that the newest start ran after the run's newest checkpoint.

    The time between two starts does not count. Nor does an older start that saved nothing, whose end nothing records.

    Args:
      earlier: all starts, the oldest first.
      saved: when the checkpoint was written, in seconds since 1970.
      last_sign: when the run last wrote to its records; None: it never did.

    >>> first, second = {"time": "2026-01-01T00:00:00+00:00"}, {"time": "2026-01-01T01:00:00+00:00"}
    >>> lost([first], seconds(first) + 60, seconds(first) + 95)
    35.0
    >>> lost([first, second], seconds(first) + 60, seconds(second) + 7)
    7.0
    """
    began = max((seconds(start) for start in earlier), default=-math.inf)
    return 0.0 if last_sign is None else max(0.0, last_sign - max(saved, began))


def seconds(start: Mapping[str, Any]) -> float:
    """When a start was, in seconds since 1970; infinite if its line does not say it."""
    try:
        return datetime.datetime.fromisoformat(start["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return math.inf


def lineage(starts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The starts whose steps are in the run's present state: what came after the step of a later start is lost.

    >>> [s["step"] for s in lineage([{"step": 0}, {"step": 40}, {"step": 60}, {"step": 40}])]
    [0, 40]
    """
    kept: list[Mapping[str, Any]] = []
    for start in starts:
        kept = [s for s in kept if s["step"] < start["step"]] + [start]
    return kept
