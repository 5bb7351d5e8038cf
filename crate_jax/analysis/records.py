"""The records in a run's folder, read back and checked: metrics, summary, results of evaluations, starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crate_jax.errors import DataError
from crate_jax.evals.metrics import COMPARED, SHARES
from crate_jax.training.clock import PARTS
from crate_jax.workdir import readback, starts

COLUMNS = {name: f"{shown} %" for name, shown in SHARES.items()}  # key in summary.json -> name of the column
OF_A_SUMMARY = {  # what is read in summary.json, and the check of its value
    **dict.fromkeys(("steps", "params", "test_images"), readback.is_count),
    **dict.fromkeys(("loss", "images_per_sec"), readback.is_number),
    **{score + suffix: readback.is_share for score in SHARES for suffix in COMPARED},
    "majority_top1": readback.is_share,
    "goodput": lambda value: (
        value is None
        or (  # summaries of older versions have none
            isinstance(value, dict) and all(type(value.get(part)) is float for part in ("wall_seconds", *PARTS))
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class Logged:
    """The records of a workdir; a file that is missing gives an empty list or dictionary."""

    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    results: list[dict[str, Any]]
    starts: Sequence[Mapping[str, Any]] = ()


def read(workdir: Path | None) -> Logged:
    """Reads the records of a run, which may still be training.

    Args:
      workdir: the run's folder; None gives empty records.

    Raises:
      DataError: summary.json, or a whole line of a .jsonl file, is not what a run writes.
    """
    if workdir is None:
        return Logged([], {}, [])
    metrics = _lines(workdir / "metrics.jsonl", readback.scalars)
    results = _lines(workdir / "results.jsonl", _result)
    return Logged(metrics, _summary(workdir / "summary.json"), results, starts.lineage(starts.read(workdir)))


def _summary(path: Path) -> dict[str, Any]:
    """The object of summary.json; {} if there is no file."""
    if not path.is_file():
        return {}
    summary = readback.parse(path.read_text(encoding="utf-8", errors="replace"))
    wrong = None if summary is None else readback.wrong(summary, OF_A_SUMMARY)
    if summary is None or wrong:
        what = f"{wrong[0]!r} has no possible value" if wrong else "is not a JSON object"
        raise DataError(f"{path}: {what}; run the training command again, which writes it anew")
    return summary


def _result(line: str) -> dict[str, Any] | None:
    record = readback.parse(line)
    return None if record is None or readback.wrong(record, dict.fromkeys(SHARES, readback.is_share)) else record


def _lines(path: Path, parse: Callable[[str], dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line without its end is skipped, since it is still being written."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        record = parse(line + "\n")
        if record is None:
            raise DataError(f"{path}: line {number} is not a record that a run writes; delete this line")
        found.append(record)
    return found
