"""What looks at a run while it trains: an evaluation, a picture, a measure of the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from crate_jax.methods.method import Params


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that an observer draws.

    Attributes:
      name: the name of the picture's file.
      pixels: RGB, uint8 (H, W, 3).
    """

    name: str
    pixels: np.ndarray


Observation = Mapping[str, Any] | Picture | None


@dataclasses.dataclass(frozen=True)
class Observer:
    """Looks at the judged parameters every n steps: an evaluation, a picture, a measure of the layers.

    Attributes:
      name: the observer's name, for people; the key of its final results in :attr:`Loop.results`.
      every: steps between two calls of `look`; 0: the loop never calls it.
      mark: what tells that the records of a step hold this observer's look: the name of one of its numbers, or what
        comes before the slash in their names, or "pictures/" and the name of its picture.
      look: the function from judged parameters to numbers to log, a picture to write, or None.
      at_end: a function like `look` that the loop calls after the last step instead of `look`; its results also go to
        the summary. None: the loop treats the last step like any other.
    """

    name: str
    every: int
    mark: str
    look: Callable[[Params], Observation]
    at_end: Callable[[Params], Observation] | None = None
