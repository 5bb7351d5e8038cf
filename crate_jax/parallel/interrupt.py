"""SIGINT and SIGTERM as something a loop can ask about between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar, Self


class Interrupted(Exception):
    """A signal ended the job where it can be continued.

    Attributes:
      signum: the signal.
      where: what was reached, such as "at step 40, state saved".
      exit_code: what a shell reports for a process that the signal ended.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}")
        self.signum, self.where, self.exit_code = signum, where, 128 + signum


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is kept in `signal`; a second one acts at once.

    One that is entered inside another (a run inside a sweep) shows the outer one's signal, so that a signal is seen by
    both, whenever it came.
    """

    _outermost: ClassVar[Interrupt | None] = None

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The signal that came, if one did."""
        return (Interrupt._outermost or self)._signal

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        on_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
        if on_main and Interrupt._outermost is None:
            Interrupt._outermost = self
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if Interrupt._outermost is self:
            Interrupt._outermost = None
