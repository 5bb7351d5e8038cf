"""The parts of a report: an analysis takes subjects and returns a section."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure as Plot
from ml_collections import ConfigDict

from crate_jax.data import Source
from crate_jax.errors import DataError


class Absent(DataError):
    """A section is not possible, for a reason that all processes see before one of them computes."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that a report describes.

    Attributes:
      name: a short name, unique in the report.
      config: the run's valid config, with the data on which the report measures the run.
      params: the parameters ``encoder`` and, if it is known, ``decoder``, as NumPy arrays.
      workdir: the folder with the run's metrics.jsonl and pictures; None for a file of weights.
      train: the training images, with labels or without; None if they cannot be read.
      test: the evaluation split; None if there is no such split.
      mesh: the devices that compute the measures.
    """

    name: str
    config: ConfigDict
    params: dict[str, Any]
    workdir: Path | None
    train: Source | None
    test: Source | None
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot or a picture.

    Attributes:
      caption: what the figure shows, with units, and how to read it.
      content: a Matplotlib figure (made with the object interface, without pyplot), or a picture uint8 (H, W, 3).
    """

    caption: str
    content: Plot | np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with an interval; the page shows half the interval's length after ±.

    Attributes:
      value: the number.
      low: the interval's lower end.
      high: its upper end.
      best: whether the page marks the number as the best one of its column.
    """

    value: float
    low: float
    high: float
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Best:
    """A number without an interval that the page marks as the best one of its column; report.json has the number."""

    value: float


Cell = str | float | int | Estimate | Best | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts and numbers under column names. Numbers have their full precision; the page rounds them."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
      title: the question in a few words.
      text: one paragraph: what was measured, on which data, after which paper, and how to read the result.
      figures: plots and pictures.
      tables: tables, which the reader can sort; the first `leading` of them stand before the figures.
      numbers: the results for report.json.
      leading: see `tables`.
      folded: whether the page shows the title alone until the reader opens the section.
    """

    title: str
    text: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    leading: int = 0
    folded: bool = False


def short_names(subjects: Sequence[Subject]) -> dict[str, str]:
    """Names of runs for legends: without what all names share, and with the penalty if the runs differ in it.

    Parts of a name are what commas and slashes separate, as in the folders of a sweep: penalty=so,seed=0.
    """
    parts = [re.split("[,/]", s.name) for s in subjects]
    same_length = len({len(p) for p in parts}) == 1
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)] if same_length else []
    penalties = {s.config.penalty.name for s in subjects}
    out = {}
    for s, own in zip(subjects, parts, strict=True):
        short = ",".join(x for x, kept in zip(own, differ, strict=True) if kept) if any(differ) else s.name
        penalty = s.config.penalty.name
        out[s.name] = short if len(penalties) == 1 or penalty in short.lower() else f"{short} ({penalty})"
    return out
