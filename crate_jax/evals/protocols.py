"""Protocols on frozen features, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crate_jax.evals.knn import knn_top1
from crate_jax.evals.probe import probe_top1


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of a labelled data set; float32 [n, D] and integer labels [n] in 0 .. num_classes - 1."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named recipe.

    Attributes:
      name: its key in PROTOCOLS.
      version: raised when its numbers change.
      options: its config keys with their defaults.
      run: (features, options, seed) -> JSON-like results; ``top1`` is the headline.
    """

    name: str
    version: int
    options: Mapping[str, Any]
    run: Callable[[Features, ConfigDict, int], dict[str, Any]]


def _knn(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    return {"top1": knn_top1(f.train_x, f.train_y, f.test_x, f.test_y, f.num_classes, options.k, options.temperature)}


def _logreg(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    return {"top1": probe_top1(f.train_x, f.train_y, f.test_x, f.test_y, f.num_classes, options.c)}


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("knn", 1, {"k": 20, "temperature": 0.07}, _knn),
        Protocol("logreg", 1, {"c": 1.0}, _logreg),
    )
}
