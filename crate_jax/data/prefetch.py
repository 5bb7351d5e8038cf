"""Moves batches to the device while the step before is still running."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from crate_jax.data import reading

Host = TypeVar("Host")
Device = TypeVar("Device")


class DevicePrefetch(Generic[Host, Device]):
    """An iterator over batches on the device; made by :func:`device_prefetch`."""

    def __init__(self, iterator: Iterator[Host], put: Callable[[Host], Device], size: int, stall_seconds: float):
        self._iterator = iterator
        self._put = put
        self._stall_seconds = stall_seconds
        self._patience = min(stall_seconds, reading.SIGNAL_SECONDS)  # seconds that the thread has to end
        self._room = threading.Semaphore(size)
        self._ready: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._next: tuple[str, Any] | None = None  # taken from the queue by `within`
        self._ended: tuple[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="device_prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> DevicePrefetch[Host, Device]:
        return self

    def __next__(self) -> Device:
        if self._ended is None:
            kind, value = self._take()
            if kind == "batch":
                self._room.release()
                return value
            self._ended = kind, value
        kind, value = self._ended
        if kind == "error":
            raise value
        raise StopIteration

    def within(self, seconds: float) -> bool:
        """Waits at most `seconds`; returns whether `next` will return or raise at once."""
        if self._next is None and self._ended is None:
            try:
                self._next = self._ready.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def _take(self) -> tuple[str, Any]:
        wait = reading.Wait("the next batch", self._stall_seconds)
        try:
            while not self.within(reading.POLL):
                wait.check()
        except (reading.Stalled, KeyboardInterrupt) as e:  # a second Ctrl-C acts at once
            self._ended, self._patience = ("error", e), 0.0
            raise
        item, self._next = self._next, None
        assert item is not None
        return item

    def __enter__(self) -> DevicePrefetch[Host, Device]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread, after the batch that it is making; the thread closes the iterator that it reads.

        A thread that makes no batch any more is left behind.
        """
        self._stop.set()
        self._room.release()
        reading.kill_stopped_workers()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            reading.leave_behind()
        self._ended = "end", None

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stop.is_set():
                    return
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    self._ready.put(("end", None))
                    return
                self._ready.put(("batch", self._put(batch)))
        except BaseException as e:  # `__next__` raises it in the consumer's thread
            self._ready.put(("error", e))
        finally:
            if hasattr(self._iterator, "close"):
                self._iterator.close()


def device_prefetch(
    iterator: Iterator[Host], put: Callable[[Host], Device], size: int, stall_seconds: float = math.inf
) -> DevicePrefetch[Host, Device]:
    """Applies `put` to the items of an iterator in a thread, up to `size` items ahead.

    Args:
      iterator: the host's batches; from now on only the thread may use it.
      put: the function that starts the transfer of a batch to the device.
      size: number of batches that are kept ready besides the one in use, at least 1.
      stall_seconds: the deadline of a batch, after which the iterator raises :class:`crate_jax.data.reading.Stalled`.

    Returns:
      An iterator over the results of `put`. It raises an error of `iterator` or of `put` in place of the batch that
      failed. `close()` stops the thread and closes `iterator`.

    Raises:
      ValueError: `size` is below 1.

    >>> with device_prefetch(iter([1, 2, 3]), put=lambda x: 10 * x, size=2) as batches:
    ...     list(batches)
    [10, 20, 30]
    """
    if size < 1:
        raise ValueError(f"size={size}: must be at least 1")
    return DevicePrefetch(iterator, put, size, stall_seconds)
