"""The one training loop: steps, logging, observers, saving, resuming.

The loop takes any method (:mod:`crate_jax.methods.method`). The batch and all randomness are functions of the step's
number, so a run that was stopped continues with the same bits as a run that was not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.reading import Stalled
from crate_jax.errors import ConfigError, NonFiniteError, some
from crate_jax.evals import collapse
from crate_jax.methods.method import Method, Params, Scalars
from crate_jax.models.layers import attention_noted
from crate_jax.parallel import distributed, parameters, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.training import clock as clocks, groups, nonfinite, optimizer, trace
from crate_jax.training.batches import Placed, placed_batches
from crate_jax.training.observer import Observation, Observer, Picture
from crate_jax.training.step import (
    SIGNAL,
    TrainState,
    all_finite,
    completed,
    drawn_params,
    make_draw,
    make_init,
    make_recipe,
    make_train_step,
    state_shapes,
    state_shardings,
)
from crate_jax.training.window import Window
from crate_jax.workdir import checkpoint, metrics, starts

log = logging.getLogger(__name__)

# The host may dispatch so many steps before the device has done them: enough to hide the time of every launch. Without
# this bound, runs on several CPU devices sometimes stopped for ever on a busy machine: one device waited in an
# all-reduce, the other for a place among the programs that XLA allows in flight. With the bound no run did.
IN_FLIGHT = 8
BUSY_POLL = 0.005  # seconds between two looks at whether the device has done its steps, while images are awaited


class Pretrained(Protocol):
    """An encoder to start from.

    Attributes:
      name: the encoder's name, for people.
      params: its parameters, with the key ``encoder``.
      sha256: the digest of `params`.
      grid: (h, w), the patches of its images.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def params(self) -> Params: ...  # noqa: D102

    @property
    def sha256(self) -> str: ...  # noqa: D102

    @property
    def grid(self) -> tuple[int, int]: ...  # noqa: D102


OnResume = Callable[[int, Mapping[str, Any], bool, tuple[str, str] | None], Sequence[Mapping[str, Any]]]


class Loop:
    """One process's run, with all that is open while it trains.

    Args:
      config: a validated config.
      method: the method to train.
      source: the training images.
      mesh: the devices.
      folder: the workdir; the caller holds its lock.
      interrupt: says whether a signal came.
      stack: closes, at the end, the files that the loop opens.
      start: reads the encoder that a fresh run starts from; None: random parameters.
      on_resume: the loop calls it when it continues from a checkpoint, with the step, the checkpoint's config,
        whether the training images have changed, and the ids of the checkpoint's run and of this one if they differ,
        else None. It returns the changes that this and all later checkpoints record,
        each as a JSON-like mapping, and raises if the run must not continue.
      clock: runs since the job began; None: since now.

    Attributes:
      total: optimiser steps of the run.
      start_step: the step that the run continues from; 0: it is new.
      changed: what this and earlier starts have changed that checkpoints record, the oldest first.
      state: the present state.
      record: what a checkpoint and the summary hold: loss, speed, skipped steps, the window of the log.
      origin: name and digest of the encoder that the run started from; {} if there is none.
      results: the observers' results after the last step, by the observers' names.

    Raises:
      UserError: the config, the data or the workdir cannot be used; one line says why.
    """

    def __init__(
        self,
        config: ConfigDict,
        method: Method,
        source: data.Source,
        mesh: Mesh,
        folder: Path,
        interrupt: Interrupt,
        stack: contextlib.ExitStack,
        start: Callable[[], Pretrained] | None = None,
        on_resume: OnResume | None = None,
        clock: clocks.Clock | None = None,
    ) -> None:
        self.config, self.method, self.source, self.mesh, self.folder = config, method, source, mesh, folder
        self._interrupt = interrupt
        self.clock = clock or clocks.Clock()
        self._falls = {name: collapse.Fall(collapse.SPREAD_SHARE) for name in method.healthy}
        self._recipe = make_recipe(config, method, len(source))
        self._draw = make_draw(config, method, self._recipe, mesh)
        self.total = self._recipe.total
        self._checkpoints = checkpoint.Checkpoints(folder, config.save.keep)
        stack.callback(self._checkpoints.close)
        self.origin: dict[str, str] = {}
        self.changed: list[Mapping[str, Any]] = []
        self.results: dict[str, dict[str, Any]] = {}
        self._images = source.fingerprint()  # now: it may read files, for which no save must wait
        self.state, self.start_step, self.record = self._begin(start, on_resume)
        if self.start_step > self.total:
            raise ConfigError(
                f"config.steps or config.epochs: ask for {self.total} steps, but {folder} is already at step "
                f"{self.start_step}; ask for more, or choose another --workdir"
            )
        self._trace = trace.Trace(config.log.profile, self.total, folder / "tensorboard")
        stack.callback(self._trace.close)
        self._stack = stack
        self._speed = clocks.Speed()
        self._window = Window(self.record.get("window", {}))  # a new run has none
        # Per step since the last `_fetch`: scalars on the device, number of undecodable images, indices of the images
        # in this process's rows.
        self._pending: list[tuple[Scalars, int, np.ndarray]] = []
        counted = self.record.get(nonfinite.SKIPPED, {})
        self.nonfinite = nonfinite.Watch(config, folder, source, **counted)
        self._lr = math.nan  # of the last step that `_fetch` has brought
        self._done = self._saved = self.start_step  # steps that `state` holds, and that a checkpoint holds
        self._signal: int | None = None  # a signal that came to any process; all processes know it
        self._train_step = make_train_step(config, method, self._recipe, mesh)
        self._judged_names = self.state.judged_names(method)  # raises now, not at the first save, if `judged` computes
        self._log_layout()

    def _begin(
        self,
        start: Callable[[], Pretrained] | None,
        on_resume: OnResume | None,
    ) -> tuple[TrainState, int, dict[str, Any]]:
        """Returns the newest checkpoint's state, step and record; without a checkpoint a fresh state, 0 and {}."""
        parts = self.config, self.method, self._recipe, self.mesh
        abstract = state_shapes(*parts)
        last_sign = metrics.last_written(self.folder)
        restored = self._checkpoints.restore(abstract.params, abstract.rest(), self.config.to_dict())
        if restored is not None:
            log.info("continuing from step %d of %s", restored.step, self._checkpoints.folder)
            self._resume_clock(restored.meta.get("clock"), last_sign)
            self.origin = restored.meta.get("origin", {})
            # One host may see other files; but all must take the same way from here.
            other_images = bool(distributed.max_over_processes(int(restored.meta["data"] != self._images)))
            self.changed = restored.meta.get("changed", [])  # a version that did not record them has none
            if on_resume is not None:
                runs = (restored.other_run, self.run_id) if restored.other_run else None
                changed = on_resume(restored.step, restored.meta["config"], other_images, runs)
                self.changed = [*self.changed, *changed]
            if other_images:
                log.warning("the training images are not those of the checkpoint; their order differs from here on")
            return TrainState(params=restored.params, **restored.rest), restored.step, restored.meta["record"]
        if earlier := starts.read(self.folder):
            self._resume_clock({"seconds": {}, "time": starts.seconds(earlier[0])}, last_sign)
        init = make_init(*parts, self._draw)
        if start is None:
            return init(), 0, {}
        encoder = start()
        self.origin = {"checkpoint": encoder.name, "checkpoint_sha256": encoder.sha256}
        shapes = jax.eval_shape(functools.partial(drawn_params, self.config, self.method))
        # Before anything is compiled: an encoder may not fit.
        what = f"config.init_from={self.config.init_from}"
        adopted = self.method.adopt(shapes, encoder.params, what, encoder.grid)
        log.info("encoder taken from %s", encoder.name)
        return init(completed(self.config, self.method, adopted, self.mesh)), 0, {}

    def open_records(self) -> Callable[[Sequence[str]], list[dict[str, float]]]:
        """Opens the run's records, which `run` needs; a run that is only read back leaves them as they are.

        Returns:
          :meth:`crate_jax.workdir.metrics.Writer.written` of the run's records.
        """
        self._writer = self._stack.enter_context(metrics.Writer(self.folder, self.config, self.start_step))
        for name in self.method.healthy:
            for scalars in self._writer.written((name,)):
                self._fallen(name, scalars[name])  # what the log has said before the run was stopped is not said again
        return self._writer.written

    @property
    def run_id(self) -> str:
        """The id that the run's checkpoints and starts hold."""
        return self._checkpoints.run

    def _resume_clock(self, saved: Mapping[str, Any] | None, last_sign: float | None) -> None:
        """Adds what earlier starts took. What the newest did after the checkpoint, to its last sign of life, is lost.

        The checkpoint of a version without a clock has none; then the clock knows only this start.
        """
        saved = saved or {"seconds": {}, "time": math.inf}
        self.clock.resume(saved["seconds"], starts.lost(starts.read(self.folder), saved["time"], last_sign))

    def _log_layout(self) -> None:
        """Logs the memory on each device between two steps (without activations), and parameters' rules if asked."""
        shapes = self.state.params
        of = groups.groups(self.config, shapes, self._recipe.per_epoch, self.method.held)
        for group in dict.fromkeys(group for group in of.values() if str(group)):
            mine = [name for name in of if of[name] == group]
            never = self._recipe.total <= group.still < groups.FOREVER
            whole = ", which is the whole run" if never else ""
            log.log(logging.WARNING if never else logging.INFO, "%s: %s%s", some(mine, ", "), group, whole)
        if self.config.log.parameters:
            decayed, penalised = optimizer.decayed(self.config, shapes), self._recipe.penalty.names
            layouts = sharding.layouts(shapes, self.mesh)
            notes = {name: ", ".join(filter(None, (str(group), layouts.get(name)))) for name, group in of.items()}
            parameters.log_rules(shapes, decayed, penalised, notes)
        place = state_shardings(self.state, self.mesh)
        batch = data.batch_shapes(self.config, self.method.inputs)
        averages = (self.state.ema, self.state.ema_carried), (place.ema, place.ema_carried)
        parts = {
            "parameters": (shapes, place.params),
            "gradients": (shapes, sharding.update_shardings(shapes, self.mesh)),
            "carried": (self.state.carried, place.carried),
            "optimizer": (self.state.opt_state, place.opt_state),
            "moving average": averages,
            "batch": (batch, jax.tree.map(lambda _: sharding.split(self.mesh), batch)),
        }
        each = {name: sharding.bytes_per_device(*part) / 1e6 for name, part in parts.items()}
        log.info(
            "mesh of %d (data) x %d (model) devices; MB on each: %s",
            *self.mesh.devices.shape,
            ", ".join(f"{name} {size:.1f}" for name, size in each.items()),
        )

    def untrained(self) -> Params:
        """The judged parameters of a run that has not begun, laid out as this run's parameters are."""
        return self.method.judged(*self._draw())

    def run(self, observers: Sequence[Observer]) -> None:
        """Trains up to the last step, then calls each observer's `at_end`.

        Raises:
          Interrupted: one of `interrupt.SIGNALS` came; the state is saved.
          Stalled: images do not come, which the message explains; of a single process the state is saved.
          NonFiniteError: a loss, a gradient or a weight is NaN or infinite.
        """
        log.info(
            "training %d -> %d of batch %d on %d x %s; %s parameters, %s of them the encoder's",
            self.start_step, self.total, self.config.batch_size, self.mesh.size,
            self.mesh.devices.flat[0].device_kind, f"{parameters.count(self.state.params):,}",
            f"{parameters.count(self.state.params['encoder']):,}",
        )  # fmt: skip
        try:
            per_epoch = self._recipe.per_epoch
            with metrics.Progress(self.total, self.start_step, self.config.batch_size, per_epoch) as progress:
                self._look_again(observers)
                self._steps(progress, observers)
            for observer in observers:
                if observer.at_end is not None:
                    with self.clock.spent(clocks.EVALUATION):
                        self.results[observer.name] = self._write(self.total, observer.at_end(self._judged()))
        except Stalled as e:
            raise self._stalled(e, progress) from None
        self._wait_for_saves()

    def _look_again(self, observers: Sequence[Observer]) -> None:
        """Lets observers look that were due at the step that the run continues from, and did not come to it.

        A step is saved before the observers look, so a signal or a kill can end the run in between.
        """
        for observer in self._due(self.start_step, observers) if self.start_step else ():
            if not self._writer.holds(self.start_step, observer.mark):
                log.info("step %d: %s was due when the run was stopped", self.start_step, observer.name)
                self._look(self.start_step, observer)

    def _due(self, step: int, observers: Sequence[Observer]) -> list[Observer]:
        """The observers whose `look` is due at a step."""
        last = step == self.total
        return [o for o in observers if o.every and step % o.every == 0 and not (last and o.at_end)]

    def _look(self, step: int, observer: Observer) -> None:
        with self.clock.spent(clocks.EVALUATION):
            self._write(step, observer.look(self._judged()))

    def _steps(self, progress: metrics.Progress, observers: Sequence[Observer]) -> None:
        parts = self.config, self.method, self.source, self.mesh, self._interrupt, self.clock
        with placed_batches(*parts, self.start_step) as batches:
            self._speed.restart()
            for step in range(self.start_step + 1, self.total + 1):
                self._trace.begin(step, self.state)
                batch, undecodable, indices = self._next(batches)
                self.clock.turn(clocks.COMPILATION if step == self.start_step + 1 else clocks.STEPS)
                with self._trace.step(step), attention_noted() as noted:
                    self.state, scalars = self._train_step(self.state, batch)
                if noted:  # it was traced
                    log.info("attention is computed by %s", ", ".join(noted))
                self._trace.end(step, self.state)
                if step == self.start_step + 1:
                    progress.reached(self.start_step)  # it is compiled
                self.clock.turn(clocks.STEPS)
                self._done = step
                self._pending.append((scalars, undecodable, indices))
                if len(self._pending) > IN_FLIGHT:
                    self._note_signal([jax.block_until_ready(self._pending[-1 - IN_FLIGHT][0])])
                    progress.reached(step - IN_FLIGHT)
                self._after(step, progress, observers)
            self.clock.turn(clocks.OTHER)

    def _next(self, batches: data.DevicePrefetch[dict[str, np.ndarray], Placed]) -> Placed:
        """The next batch. The wait for it counts as such only from when the device has done all steps before."""
        while self._pending and not batches.within(0):
            if next(iter(self._pending[-1][0].values())).is_ready():  # type: ignore[attr-defined]
                break
            batches.within(BUSY_POLL)
        with self.clock.spent(clocks.INPUT):
            return next(batches)

    def _wait_for_saves(self) -> None:
        with self.clock.spent(clocks.SAVING):
            self._checkpoints.wait()

    def _stalled(self, e: Stalled, progress: metrics.Progress) -> Exception:
        """Saves the present step without waiting for images; returns what ends the run.

        Of several processes none saves: the others wait inside the next step for this one, and cannot leave it.
        """
        if distributed.processes() > 1:
            return e
        if self._done > self._saved:
            self._fetch(self._done, progress)
            self._save(self._done)
            self._wait_for_saves()
        where = f"at step {self._done}, state saved" if self._done else "before the first step"
        return Interrupted(e.signum, f"{where} ({e})") if e.signum else Stalled(f"{e}; stopped {where}")

    def _judged(self) -> Params:
        return self.state.judged(self.method)

    def _note_signal(self, scalars: Sequence[Scalars]) -> None:
        """Notes a signal that came to any process: the step passes it on, so all processes note it at the same step."""
        if distributed.processes() == 1:
            self._signal = self._interrupt.signal
        else:
            self._signal = self._signal or max(int(s[SIGNAL]) for s in scalars) or None

    def _after(self, step: int, progress: metrics.Progress, observers: Sequence[Observer]) -> None:
        """Logs, saves and calls observers after a step; between these points it only compares a few numbers."""
        last = step == self.total
        if last or step % self.config.log.every == 0:
            self._fetch(step, progress)
            self._log(step, progress)
        if distributed.processes() == 1:
            self._note_signal(())
        save = last or step % self.config.save.every == 0 or self._signal is not None
        looking = self._due(step, observers)
        if not (save or looking):
            return
        self._fetch(step, progress)
        if save:
            self._save(step)
        if self._signal is not None and save and not last:
            self._wait_for_saves()
            raise Interrupted(self._signal, f"at step {step}, state saved")
        for observer in looking:
            self._look(step, observer)
        self._speed.restart()

    def _write(self, step: int, observation: Observation) -> dict[str, Any]:
        """Writes an observer's numbers or picture; returns the numbers, or the picture's path as ``path``."""
        if isinstance(observation, Picture):
            return {"path": self._writer.write_image(step, observation.name, observation.pixels)}
        found = dict(observation or {})
        numbers = {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, Real) and not isinstance(value, bool)
        }
        if numbers:  # a curve over the steps needs numbers, not lists or None
            self._writer.write(step, numbers)
        return found

    def _fetch(self, step: int, progress: metrics.Progress) -> None:
        """Waits for the steps since the last call, checks them and adds them to the window of the log.

        Raises:
          NonFiniteError: a loss or a gradient is NaN or infinite, as in the config.nonfinite.skip steps before it.
        """
        if not self._pending:
            return
        scalars = jax.device_get([s for s, _, _ in self._pending])
        counts = [count for _, count, _ in self._pending]
        indices = [rows for _, _, rows in self._pending]
        self._pending = []
        progress.reached(step)
        self._note_signal(scalars)
        for values in scalars:
            values.pop(SIGNAL, None)
        self._speed.add(len(scalars) * self.config.batch_size)
        # Each process reads its own rows, and only process 0 writes. This waits for the others, as no step does.
        self._window.undecodable += distributed.sum_over_processes(sum(counts))
        first = step - len(scalars) + 1
        for i, values in enumerate(scalars):
            if self._counts(first + i, values, indices[i]):
                self._window.add(values)
            else:
                self._window.skipped += 1
        self._lr = float(scalars[-1]["lr"])
        self.record = {
            "loss": self._window.means().get("loss", self.record.get("loss", math.nan)),
            "images_per_sec": self._speed.average(),
            nonfinite.SKIPPED: {"streak": self.nonfinite.streak, "total": self.nonfinite.total},
            "window": self._window.saved(),
        }

    def _log(self, step: int, progress: metrics.Progress) -> None:
        """Logs the means over the steps since the last multiple of config.log.every, which `_fetch` has brought."""
        means = self._window.means() | {"lr": self._lr}
        if self.config.nonfinite.skip:
            means[nonfinite.SKIPPED] = self._window.skipped
            means["skipped_total"] = self.nonfinite.total
        self._watch_spread(means)
        speed, undecodable = self._speed.recent(), self._window.undecodable
        progress.update(step, means, speed)
        self._writer.write(step, means | {"images_per_sec": speed, "undecodable": undecodable})
        if step % self.config.log.every == 0:  # else it is the last step: a run that goes on from there adds to it
            self._window = Window({})
            self.record["window"] = self._window.saved()

    def _watch_spread(self, means: Mapping[str, float]) -> None:
        for name, healthy in self.method.healthy.items():
            if name in means and self._fallen(name, means[name]):
                collapse.warn(f"{name} is {means[name]:.3g}, {healthy:.3g} would be an even spread")

    def _fallen(self, name: str, value: float) -> bool:
        return self._falls[name].begins(value / self.method.healthy[name])

    def _counts(self, step: int, scalars: Mapping[str, np.ndarray], indices: np.ndarray) -> bool:
        """Whether a step was finite; writes a file about a step that was not.

        Raises:
          NonFiniteError: this step and the config.nonfinite.skip steps before it were not finite.
        """
        watch, allowed = self.nonfinite, self.config.nonfinite.skip
        problem = watch.count(scalars)
        if not problem:
            return True
        watch.write(step, scalars, indices, self._checkpoints.latest())
        if watch.streak > allowed:
            if allowed:
                problem += f", as in the {watch.streak - 1} steps before (config.nonfinite.skip={allowed}),"
            raise self._non_finite(f"{problem} at step {step}; its images are named in {watch.path(step)}")
        if distributed.first():
            log.warning("step %d skipped: %s; its images are named in %s", step, problem, watch.path(step))
        return False

    def _non_finite(self, problem: str) -> NonFiniteError:
        self._checkpoints.wait()
        latest = self._checkpoints.latest()
        saved = f"the last finite checkpoint is step {latest} in {self._checkpoints.folder}"
        return NonFiniteError(
            f"{problem}; {saved if latest else 'no checkpoint was saved yet'}; try a lower config.optimizer.lr, a "
            "longer warm-up or config.optimizer.clip_norm"
        )

    def _save(self, step: int) -> None:
        with self.clock.spent(clocks.SAVING):
            self._save_now(step)
        self._saved = step

    def _save_now(self, step: int) -> None:
        # A step computes its loss before its update, so a finite loss does not mean finite weights.
        if not all_finite((self.state.params, self.state.rest())):
            raise self._non_finite(f"the weights or the rest of the state are not finite after step {step}")
        meta = {
            "config": self.config.to_dict(),
            "data": self._images,
            "record": self.record,
            "origin": self.origin,
            "changed": self.changed,
            "judged": self._judged_names,
            "clock": {"seconds": self.clock.seconds(), "time": time.time()},
            # In the order of a classifier's scores.
            "classes": list(self.source.class_names or ()) if self.config.job == "finetune" else [],
        }
        self._checkpoints.save(step, self.state.params, self.state.rest(), meta)
