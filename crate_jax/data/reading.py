"""Waits for images that may never come: a disk that does not answer, worker processes that are stopped or killed.

Who waits says after a while what hangs, and gives up after `config.data.stall_seconds`, or soon after a signal. No
thread can be freed from a read that hangs. It is left behind; the process must then end by :func:`leave_if_hung`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from crate_jax.data.sources import Source
from crate_jax.errors import escaped
from crate_jax.parallel.interrupt import Interrupt

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at the clock and at signals
SIGNAL_SECONDS = 10.0  # so long a run waits for images after a signal: slow ones may still come

_reads: dict[int, tuple[Source, int, float]] = {}  # by thread: what it reads, and since when
_left_behind = False  # whether a thread of this process hangs in a read


class Stalled(Exception):
    """Images do not come; the same command continues the job.

    Attributes:
      signum: the signal that ended the wait; None: the deadline passed, or a worker process is gone.
    """

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(escaped(message))
        self.signum = signum


@contextlib.contextmanager
def reading(source: Source, index: int) -> Iterator[None]:
    """Notes that the present thread reads an image, so that :func:`slowest` can name it."""
    thread = threading.get_ident()
    _reads[thread] = source, index, time.monotonic()
    try:
        yield
    finally:
        del _reads[thread]


def slowest(seconds: float) -> str:
    """The image of this process whose reading has lasted longest; empty if none has lasted `seconds`."""
    reads = sorted(_reads.copy().values(), key=lambda read: read[2])
    if not reads or time.monotonic() - reads[0][2] < seconds:
        return ""
    source, index, since = reads[0]
    return f"{source.name(index)} has been read for {time.monotonic() - since:.0f} s"


class Wait:
    """One wait for images, whose owner calls :meth:`check` every POLL seconds.

    Args:
      what: what it waits for, such as "the images of step 41".
      seconds: the deadline, `config.data.stall_seconds`.
    """

    def __init__(self, what: str, seconds: float) -> None:
        self._what, self._seconds = what, seconds
        self._start = time.monotonic()
        self._next_line = first_line(seconds)

    def check(self) -> None:
        """Logs from time to time what hangs, with the stacks of all threads.

        Raises:
          Stalled: the deadline has passed, or a signal has come and SIGNAL_SECONDS have passed.
        """
        waited = time.monotonic() - self._start
        if waited >= self._next_line:
            self._next_line *= 2
            log.warning("%s; gives up after config.data.stall_seconds=%g", self._hung(waited), self._seconds)
            with contextlib.suppress(OSError, ValueError):  # stderr is closed, or not a file
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        signum = Interrupt.came()
        if signum and waited >= min(SIGNAL_SECONDS, self._seconds):
            raise Stalled(self._hung(waited), signum)
        if waited >= self._seconds:
            raise Stalled(self._hung(waited))

    def _hung(self, waited: float) -> str:
        culprits = [*stopped_workers(), slowest(waited / 2)]
        others = "its worker processes say what hangs, if they know" if multiprocessing.active_children() else ""
        known = "; ".join(filter(None, culprits)) or others or "what hangs is unknown"
        return escaped(f"waited {waited:.0f} s for {self._what}; {known}")


def first_line(seconds: float) -> float:
    """Seconds of waiting until the log says so for the first time, for a deadline of `seconds`."""
    return min(30.0, seconds / 20)


def stopped_workers() -> list[str]:
    """The worker processes of this process that a signal (SIGSTOP) has stopped, in words; on Linux only."""
    return [f"worker process {child.pid} is stopped" for child in _stopped()]


def kill_workers() -> None:
    """Kills the worker processes, which end with this process only if they run."""
    for child in multiprocessing.active_children():
        child.kill()


def kill_stopped_workers() -> None:
    """Kills the worker processes that are stopped: they could not end by themselves, and would be waited for."""
    for child in _stopped():
        child.kill()


def _stopped() -> list[Any]:
    return [child for child in multiprocessing.active_children() if _state(child.pid) in ("T", "t")]


def _state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Readers:
    """Threads that read images; a context, which leaves threads behind that hang.

    Args:
      threads: the number of threads.
      seconds: the deadline of each result, `config.data.stall_seconds`.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._seconds = seconds
        self._asked: set[concurrent.futures.Future[Any]] = set()  # whose result nobody has had yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hung = kind is not None and issubclass(kind, Stalled | KeyboardInterrupt)  # a second Ctrl-C acts at once
        self._pool.shutdown(wait=False, cancel_futures=True)
        try:
            if not hung:  # what is being read may hang, whatever ended the block
                begun = [future for future in self._asked if not future.cancelled()]
                hung = bool(concurrent.futures.wait(begun, min(SIGNAL_SECONDS, self._seconds)).not_done)
        except KeyboardInterrupt:
            hung = True
            raise
        finally:
            if hung:
                leave_behind()
            self._pool.shutdown(wait=not hung)

    def map(self, function: Callable[[T], R], items: Iterable[T], what: str) -> Iterator[R]:
        """Yields the results of `function` for all items, in their order.

        Args:
          function: reads an item.
          items: the items; all are given to the threads at once.
          what: what the items are, for messages.

        Raises:
          Stalled: a result did not come in time.
        """
        futures = [self._pool.submit(function, item) for item in items]
        self._asked.update(futures)
        for future in futures:
            wait = Wait(what, self._seconds)
            while not concurrent.futures.wait([future], POLL).done:
                wait.check()
            self._asked.discard(future)
            yield future.result()


def leave_behind() -> None:
    """Notes that a thread of this process hangs, so that the process must end by :func:`leave_if_hung`."""
    global _left_behind
    _left_behind = True


def leave_if_hung(status: int) -> None:
    """Ends this process with `status` if one of its threads hangs, for which Python would wait for ever; else returns.

    Its worker processes end too.
    """
    if not _left_behind:
        return
    kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def watch_worker(worker: int, workers: int, seconds: float) -> None:
    """Starts the watch of this worker process: it ends with its parent, and says which file it cannot read.

    A run that is killed, or that calls os._exit, cannot end its workers.

    Args:
      worker: the worker's number.
      workers: the number of workers.
      seconds: the deadline of a batch, `config.data.stall_seconds`.
    """

    def watch() -> None:
        parent, said = multiprocessing.parent_process(), ""
        if parent is None:
            return
        while parent.is_alive():
            parent.join(max(POLL, first_line(seconds) / 2))
            read = slowest(first_line(seconds))
            if read and read.partition(" has been ")[0] != said:
                said = read.partition(" has been ")[0]
                with contextlib.suppress(OSError, ValueError):  # nobody reads it; the watch must go on
                    print(escaped(f"worker process {os.getpid()} ({worker + 1} of {workers}): {read}"), file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, name="watch_worker", daemon=True).start()
