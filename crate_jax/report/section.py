"""The parts of a report: an analysis takes subjects and returns a section."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure as Plot
from ml_collections import ConfigDict

from crate_jax.data import Source


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that is looked at.

    Attributes:
      name: short and unique in the report.
      config: valid; the run's own, with the data that it is looked at on.
      params: ``encoder`` and, where it is known, ``decoder``; NumPy arrays.
      workdir: where its metrics.jsonl and pictures lie; None for a file of weights.
      train: labelled or not; None if the data cannot be read.
      test: the evaluation split; None if there is none.
      mesh: the devices to compute on.
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
      caption: what is seen, with units, and how to read it.
      content: a Matplotlib figure (made with its object API, never pyplot's state), or uint8 (H, W, 3).
    """

    caption: str
    content: Plot | np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts and numbers under column names; numbers keep their full precision, the page rounds them."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
      title: the question in a few words.
      text: one paragraph: what was measured, on what, after which paper, and how to read it.
      figures: to look at.
      tables: to sort.
      numbers: the same as JSON, for programs.
    """

    title: str
    text: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
