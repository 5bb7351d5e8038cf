"""Steps whose loss or gradient is NaN or infinite: left without effect, counted, and written down for a replay.

The device decides alone (:func:`revert_if_nonfinite`), the host counts at log points (:class:`Watch`).
optax.apply_if_finite cannot do it: it sees neither the loss nor what lies outside the optimiser (moving averages, what
a method carries), and takes the update after all once the streak is too long.
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
from crate_jax.workdir import metrics

T = TypeVar("T")

FOLDER = "nonfinite"
JUDGED = {"loss": "loss", "grad_norm": "gradient's norm"}  # scalars that decide; the loss includes the penalty
SKIPPED = "skipped"


def revert_if_nonfinite(scalars: Mapping[str, jax.Array], new: T, old: T) -> tuple[T, jax.Array]:
    """`new` if loss and gradient are finite, else `old`, bit for bit; and 1 if it is the old one.

    The gradient counts as finite if its norm is, which is at hand: one above 1.8e19 is not, in float32.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(scalars[name]) for name in JUDGED]))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), 1 - finite.astype(jnp.int32)


@dataclasses.dataclass
class Watch:
    """Counts steps that are not finite, and writes ``WORKDIR/nonfinite/STEP.json`` for each.

    Attributes:
      config: of the run.
      folder: its workdir.
      source: its training images.
      streak: such steps in a row, up to the last one seen.
      total: in the whole run.
    """

    config: ConfigDict
    folder: Path
    source: Source
    streak: int = 0
    total: int = 0

    def count(self, scalars: Mapping[str, Any]) -> str:
        """Counts the next step, whose scalars are on the host; says what was not finite, empty if all was."""
        wrong = [f"the {JUDGED[name]} is {float(scalars[name])}" for name in JUDGED if not math.isfinite(scalars[name])]
        self.streak = self.streak + 1 if wrong else 0
        self.total += bool(wrong)
        return wrong[0] if wrong else ""

    def write(self, step: int, scalars: Mapping[str, Any], indices: np.ndarray, checkpoint: int | None) -> None:
        """Writes the file about a step; all processes must call it.

        Args:
          step: its number, from 1.
          scalars: on the host.
          indices: int32 (b,), which images are this process's rows of the batch.
          checkpoint: the newest saved step.

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
        """The file about a step."""
        return self.folder / FOLDER / f"{step}.json"
