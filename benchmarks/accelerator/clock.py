"""Times of work on a device: warm-up excluded, several windows, the median."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

WINDOWS = 7
IN_FLIGHT = 32  # results that are kept until they are there: enough to hide the launches, and not too much memory


def timed(
    call: Callable[[], Any],
    seconds: float = 0.05,
    windows: int = WINDOWS,
    block: Callable[[Any], Any] = jax.block_until_ready,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times a call.

    The first two calls are not counted: they compile, and allocate. Then there are `windows` windows, each of as many
    calls as take `seconds`, without waiting between them; a window ends when the result of its last call is there.

    Args:
      call: starts the work and returns its result.
      seconds: the least length of a window.
      windows: their number.
      block: waits for the result.
      now: the clock.

    Returns:
      "ms" of one call: the median of the windows, "ms_range" of them, and "calls" in each window.
    """

    def window(calls: int) -> float:
        results: collections.deque[Any] = collections.deque()
        start = now()
        for _ in range(calls):
            if len(results) == IN_FLIGHT:
                block(results.popleft())
            results.append(call())
        block(results.pop())
        return now() - start

    window(1), window(1)
    calls = 1
    while (took := window(calls)) < seconds / 2:  # a window of few calls is mostly the wait for the last
        calls *= 2
    calls = max(1, math.ceil(calls * seconds / took))
    each = [window(calls) / calls * 1e3 for _ in range(windows)]
    return {"ms": statistics.median(each), "ms_range": [min(each), max(each)], "calls": calls}
