"""The profiler's trace of a few steps (`config.log.profile`), for XProf and TensorBoard."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from crate_jax.errors import ConfigError
from crate_jax.parallel import distributed

log = logging.getLogger(__name__)


class Trace:
    """Traces the steps from the first to the last, both included, in process 0.

    The trace goes to FOLDER/plugins/profile/TIME, where TensorBoard's plug-in looks for it.

    Args:
      steps: numbers of the first and the last step; empty: none are traced.
      total: the number of the run's last step.
      folder: where TensorBoard's files are.

    Raises:
      ConfigError: the run has no such steps.
    """

    def __init__(self, steps: Sequence[int], total: int, folder: Path) -> None:
        if steps and steps[0] > total:
            raise ConfigError(f"config.log.profile={steps[0]},{steps[1]}: the run has only {total} steps")
        self._first, self._last = (steps[0], min(steps[1], total)) if steps and distributed.first() else (0, 0)
        self._folder = folder
        self._begun = 0  # the first step of the trace under way; 0: there is none

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace before `step` if it is one of the steps, when the device has done what comes before."""
        if self._first <= step <= self._last and not self._begun:  # a run that continues may begin after the first
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._begun = step

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """The context of a step, by which the profiler tells steps apart."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._begun else contextlib.nullcontext()

    def end(self, step: int, state: Any) -> None:
        """Ends the trace after the last step, when the device has done it."""
        if self._begun and step == self._last:
            jax.block_until_ready(state)
            begun = self._begun
            self.close()
            where = max((self._folder / "plugins" / "profile").iterdir())  # their names are times
            log.info("profile of steps %d to %d: %s; `xprof %s` shows it", begun, step, where, self._folder)

    def close(self) -> None:
        """Ends a trace that is under way, as after a failure."""
        if self._begun:
            self._begun = 0
            jax.profiler.stop_trace()
