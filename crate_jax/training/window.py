"""The steps that one line of the log describes: those since the last multiple of config.log.every."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Window:
    """Sums of the scalars of the steps since the last multiple of config.log.every.

    Checkpoints hold them, so that a line of the log and the summary's loss do not depend on where a run was stopped.
    The sums are float64 and grow step by step, so that it does not matter either how often the host fetches scalars.

    Args:
      saved: :meth:`saved` at the checkpoint from which the run continues; {}: the window is empty.

    >>> window = Window({})
    >>> window.add({"loss": 3.0, "penalty": 1.0})
    >>> again = Window(window.saved())
    >>> again.add({"loss": 4.0})
    >>> again.means()
    {'loss': 3.5, 'penalty': 1.0}
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        # Each name has its own count: a start may change which scalars a step has.
        self._sums = {name: (total, count) for name, (total, count) in saved.get("sums", {}).items()}
        self.skipped: int = saved.get("skipped", 0)  # steps that were not finite
        self.undecodable: int = saved.get("undecodable", 0)  # images, of all processes

    def add(self, scalars: Mapping[str, Any]) -> None:
        """Adds a step's scalars, which are on the host."""
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value), count + 1)

    def means(self) -> dict[str, float]:
        """The means over the steps that were added; {} if there are none."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    def saved(self) -> dict[str, Any]:
        """The window as a JSON-like mapping."""
        sums = {name: list(pair) for name, pair in self._sums.items()}
        return {"sums": sums, "skipped": self.skipped, "undecodable": self.undecodable}
