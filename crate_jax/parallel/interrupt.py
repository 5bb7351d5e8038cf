"""Keeps the signals that ask a job to end, so that a loop can ask between two steps whether one came."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar, Self

# Ctrl-C, `kill`, a closed terminal or ssh, a warning of a scheduler (SLURM's --signal=USR1@60, Grid Engine's USR2), and
# Ctrl-\\.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


class Interrupted(Exception):
    """A signal ended the job at a point from which it can continue.

    Attributes:
      signum: the signal's number.
      where: how far the job came, such as "at step 40, state saved".
      exit_code: the status that a shell reports for a process that the signal ended, 128 + signum.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}")
        self.signum, self.where, self.exit_code = signum, where, 128 + signum


class Interrupt:
    """A context that keeps the first of SIGNALS in `signal`; a second signal acts at once.

    A signal that is ignored stays ignored, as `nohup` sets SIGHUP.

    Contexts may be nested (a run inside a sweep). The inner one shows the signal of the outer one, so that both see
    a signal whenever it came.
    """

    _outermost: ClassVar[Interrupt | None] = None

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The number of the signal that came; None: no signal came."""
        return (Interrupt._outermost or self)._signal

    @classmethod
    def came(cls) -> int | None:
        """The number of the signal that the outermost open context keeps; None: no signal, or no context."""
        return None if cls._outermost is None else cls._outermost._signal

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    @classmethod
    def renew(cls) -> None:
        """Sets the outermost open context's handlers again, for libraries that set their own when they are loaded."""
        if cls._outermost is not None:
            for signum in cls._outermost._previous:
                signal.signal(signum, cls._outermost._receive)

    def __enter__(self) -> Self:
        on_main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
        if on_main and Interrupt._outermost is None:
            Interrupt._outermost = self
            for signum in SIGNALS:
                if signal.getsignal(signum) == signal.SIG_IGN:
                    continue
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if Interrupt._outermost is self:
            Interrupt._outermost = None
