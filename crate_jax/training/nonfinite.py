"""Steps whose loss or gradient is NaN or infinite: they are undone, counted, and recorded in files for a replay.

The device undoes a step by itself (:func:`revert_if_nonfinite`); the host counts such steps at log points
(:class:`Watch`). optax.apply_if_finite is not enough: it knows neither the loss nor the state outside the optimiser
(moving averages, what a method carries), and after too many such steps in a row it applies the update.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.data import Source
from crate_jax.parallel import distributed
from crate_jax.validation import FREE, Key, Section, at_least
from crate_jax.workdir import metrics

T = TypeVar("T")

FOLDER = "nonfinite"
DECISIVE = {
    "loss": "loss",
    "grad_norm": "gradient's norm",
}  # scalars that must be finite; the loss includes the penalty
SKIPPED = "skipped"

NONFINITE = Section(
    "nonfinite",
    "What happens if a step's loss or gradient is NaN or infinite.",
    of_the_run=True,
    resume=FREE,
    keys=dict(
        skip=Key(0, at_least(0), "so many such steps in a row are undone before the run stops; 0: it stops at once")
    ),
)


def revert_if_nonfinite(scalars: Mapping[str, jax.Array], new: T, old: T) -> tuple[T, jax.Array]:
    """Returns `new` if loss and gradient are finite, else `old`, bit for bit.

    The gradient counts as finite if its norm is finite. In float32 the norm is infinite above 1.8e19.

    Args:
      scalars: the step's scalars, with ``loss`` and ``grad_norm``.
      new: the tree of arrays after the step.
      old: the same tree before the step.

    Returns:
      the tree, and an int32 scalar: 1 if it is `old`, else 0.

    >>> state, skipped = revert_if_nonfinite({"loss": jnp.nan, "grad_norm": 1.0}, new=2.0, old=1.0)
    >>> float(state), int(skipped)
    (1.0, 1)
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(scalars[name]) for name in DECISIVE]))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), 1 - finite.astype(jnp.int32)


@dataclasses.dataclass
class Watch:
    """Counts steps that are not finite, and writes ``WORKDIR/nonfinite/STEP.json`` for each.

    Attributes:
      config: the run's config.
      folder: the run's workdir.
      source: the run's training images.
      streak: the number of such steps in a row, up to the last counted step.
      total: the number of such steps in the whole run.
    """

    config: ConfigDict
    folder: Path
    source: Source
    streak: int = 0
    total: int = 0

    def count(self, scalars: Mapping[str, Any]) -> str:
        """Counts the next step, whose scalars are on the host; returns what was not finite, or an empty text."""
        wrong = [
            f"the {DECISIVE[name]} is {float(scalars[name])}" for name in DECISIVE if not math.isfinite(scalars[name])
        ]
        self.streak = self.streak + 1 if wrong else 0
        self.total += bool(wrong)
        return wrong[0] if wrong else ""

    def write(self, step: int, scalars: Mapping[str, Any], indices: np.ndarray, checkpoint: int | None) -> None:
        """Writes the file about a step. All processes must call it.

        Args:
          step: the step's number, from 1.
          scalars: the step's scalars, on the host.
          indices: int32 (b,), the images in this process's rows of the batch.
          checkpoint: the newest saved step; None: nothing was saved.

        Raises:
          UserError: the file cannot be written.
        """
        everyone = distributed.gather_rows(indices)
        if not distributed.first():
            return
        path = self.path(step)
        with metrics.writing(path):
            path.parent.mkdir(exist_ok=True)
        record = {
            "step": step,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "first_position": (step - 1) * self.config.batch_size,
            "data": self.config.data.source,
            "newest_checkpoint": checkpoint,
            "scalars": {name: str(float(value)) for name, value in sorted(scalars.items())},  # JSON has no NaN
            "indices": everyone,
            "images": [self.source.name(int(i)) for i in everyone],
        }
        metrics.write_json(path, record)

    def path(self, step: int) -> Path:
        """The path of the file about a step."""
        return self.folder / FOLDER / f"{step}.json"
