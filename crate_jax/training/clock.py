"""Where the wall time of a run goes, over all its starts (its goodput), and how fast it trains now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

STEPS, INPUT, COMPILATION, SAVING = "steps", "input", "compilation", "saving"
EVALUATION, RESTARTS, OTHER = "evaluation", "restarts", "other"
PARTS = {  # part of the wall time -> what it is
    STEPS: "the device computes steps",
    INPUT: "it waits for images",
    COMPILATION: "the step is compiled",
    SAVING: "steps wait for checkpoints",
    EVALUATION: "evaluations, pictures and measures during training and at its end",
    RESTARTS: "steps that a kill lost, and the set-up of each start but the first",
    OTHER: "the set-up of the first start, and the rest",
}


class Clock:
    """Divides the wall time into PARTS: at each moment one part runs, so that their seconds sum to the whole."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = OTHER, time.perf_counter()

    def turn(self, part: str) -> str:
        """From now on `part` runs; returns the part that ran."""
        now, before = time.perf_counter(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """A block in which `part` runs."""
        before = self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def resume(self, earlier: Mapping[str, float], lost: float) -> None:
        """Adds what earlier starts of the run took. What this start has taken is a restart, until the next `turn`.

        Args:
          earlier: :meth:`seconds` at the checkpoint from which the run continues.
          lost: seconds that the run still ran after that checkpoint.
        """
        ours = self.seconds()
        self._seconds = {part: earlier.get(part, 0.0) for part in PARTS}
        self._seconds[RESTARTS] += sum(ours.values()) + lost
        self._part = RESTARTS

    def seconds(self) -> dict[str, float]:
        """The seconds of each part so far."""
        self.turn(self._part)
        return dict(self._seconds)

    def goodput(self) -> dict[str, float]:
        """The wall time in seconds as ``wall_seconds``, and each part's share of it; the shares sum to 1."""
        seconds = self.seconds()
        whole = sum(seconds.values())
        return {"wall_seconds": whole, **{part: x / whole for part, x in seconds.items()}}


class Speed:
    """Measures images per second in intervals between two `add`, without the time of observers and of saving."""

    def __init__(self) -> None:
        self._told = 0  # intervals that `recent` has told
        self._seconds: list[float] = []
        self._images: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Starts a new interval now."""
        self._start = time.perf_counter()

    def add(self, images: int) -> None:
        """Ends the interval, in which the run trained on `images`."""
        self._seconds.append(max(time.perf_counter() - self._start, 1e-9))
        self._images.append(images)
        self.restart()

    def recent(self) -> float:
        """Images per second over the intervals since the last call; 0 if there are none."""
        images, seconds = sum(self._images[self._told :]), sum(self._seconds[self._told :])
        self._told = len(self._images)
        return images / seconds if images else 0.0

    def average(self) -> float | None:
        """Images per second over all intervals except the first, which compiles; None if nothing was trained."""
        first = 1 if len(self._seconds) > 1 else 0
        images, seconds = sum(self._images[first:]), sum(self._seconds[first:])
        return images / seconds if images else None
