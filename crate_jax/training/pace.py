"""How many steps config.minutes are: measured at a run's first start, and the same at every later one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods.method import Method
from crate_jax.parallel import distributed
from crate_jax.parallel.interrupt import Interrupt
from crate_jax.training.batches import placed_batches
from crate_jax.training.clock import Clock
from crate_jax.training.step import make_init, make_recipe, make_train_step
from crate_jax.validation import MAX_WHOLE
from crate_jax.workdir import bucket, checkpoint_files, metrics, readback

log = logging.getLogger(__name__)

FILE = "pace.json"  # in the workdir: {KEY: whole number, CONFIG: {key of the config, or devices: value}}
KEY = "microseconds_per_step"
CONFIG = "config"  # that of a sweep whose runs had begun does not have it
SHARE, SECONDS = 0.05, 10.0  # a measurement takes this share of the minutes, at most so many seconds
WARM = 2  # steps before the measurement; the first one compiles
ROUND = 4  # steps between two looks at the clock
LONGEST = MAX_WHOLE  # of an int32, in which the processes agree
STEPS = 10**9  # of the trial: longer than any warm-up


def decided(
    config: ConfigDict,
    method: Method,
    source: data.Source,
    mesh: Mesh,
    folder: Path,
    interrupt: Interrupt,
    depends_on: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Returns the config with a number of steps in place of config.minutes.

    The first start measures the time of a step, with its images, and records it in the workdir before the run begins.
    All later starts read the record: so a run that is continued has the steps, and the bits, of one that was never
    stopped, and other minutes give another number of steps by the same record. A record of another config counts once
    there is a checkpoint, so that the run keeps its steps; before that the pace is measured again. All processes must
    call it, and get the same number.

    Args:
      config: a validated config, with minutes.
      method: the method that the run trains.
      source: the training images.
      mesh: the devices.
      folder: the workdir; the caller holds its lock.
      interrupt: passes a signal on in the steps of several processes.
      depends_on: the keys of the config on which the time of a step may depend, and the devices, with their values;
        None: the record counts whatever they are. A sweep's workdir holds one pace for runs of several configs.

    Raises:
      ConfigError: the minutes are too many steps; the record stays, so that the next start need not measure.
    """
    duration = 0
    if distributed.first():
        duration = recorded(folder) if depends_on is None else kept(folder, depends_on)
    duration = distributed.max_over_processes(duration)
    if not duration:
        seconds = measured(config, method, source, mesh, interrupt)
        duration = distributed.max_over_processes(min(max(round(1e6 * seconds), 1), LONGEST))
        if distributed.first():
            metrics.write_json(folder / FILE, {KEY: duration, **({} if depends_on is None else {CONFIG: depends_on})})
    found = config.copy_and_resolve_references()
    found.steps, found.minutes = steps_in(config.minutes, duration), 0.0
    log.info("config.minutes=%g: %d steps of %.3g s (%s)", config.minutes, found.steps, duration / 1e6, folder / FILE)
    return found


def steps_in(minutes: float, duration: int) -> int:
    """Number of steps of `duration` microseconds in so many minutes, at least one.

    Raises:
      ConfigError: they are more than MAX_WHOLE steps.

    >>> steps_in(1.5, 40_000), steps_in(0.001, 40_000_000)
    (2250, 1)
    """
    if 60e6 * minutes / duration > MAX_WHOLE:
        raise ConfigError(
            f"config.minutes={minutes}: more than {MAX_WHOLE} steps of {duration / 1e6:.3g} s; at most "
            f"{MAX_WHOLE * duration / 60e6:.3g} minutes"
        )
    return max(1, round(60e6 * minutes / duration))


def recorded(folder: Path) -> int:
    """The microseconds per step that an earlier start recorded; 0: there is no whole record."""
    found = _read(folder)
    value = found.get(KEY)
    whole = value and readback.is_count(value) and value <= LONGEST and isinstance(found.get(CONFIG, {}), dict)
    return int(value) if value and whole else 0


def _read(folder: Path) -> dict[str, Any]:
    try:
        return readback.parse((folder / FILE).read_text(encoding="utf-8", errors="replace")) or {}
    except OSError:
        return {}


def kept(folder: Path, depends_on: Mapping[str, Any]) -> int:
    """The recorded pace, if it counts for a run in its workdir; 0: it must be measured.

    A record without its config, of a sweep whose runs had begun, counts; so does a key that only one of the two has.

    Args:
      folder: the workdir.
      depends_on: the keys and the devices on which the time of a step may depend, with their values.
    """
    duration, before = recorded(folder), _read(folder).get(CONFIG, {})
    changed = [key for key in depends_on if duration and key in before and before[key] != depends_on[key]]
    if not changed:
        return duration
    listed = "; ".join(f"{key}: {before[key]} -> {depends_on[key]}" for key in changed)
    if checkpoint_files.steps(folder / bucket.CHECKPOINTS):
        log.warning(
            "the run keeps its number of steps, by the time of a step before this changed: %s; set "
            "config.steps for another", listed,
        )  # fmt: skip
        return duration
    log.info("%s: this changed since: %s; the time of a step is measured again", folder / FILE, listed)
    return 0


def trial(config: ConfigDict) -> ConfigDict:
    """The config with STEPS steps in place of config.minutes."""
    found = config.copy_and_resolve_references()
    found.steps, found.minutes = STEPS, 0.0
    return found


def measured(config: ConfigDict, method: Method, source: data.Source, mesh: Mesh, interrupt: Interrupt) -> float:
    """Seconds of a train step of this run, with what it waits for images; the weights are thrown away."""
    limit = min(SECONDS, SHARE * 60 * config.minutes)
    config = trial(config)
    recipe = make_recipe(config, method, len(source))
    state, train_step = make_init(config, method, recipe, mesh)(), make_train_step(config, method, recipe, mesh)
    with placed_batches(config, method, source, mesh, interrupt, Clock()) as batches:
        steps, start = -WARM, 0.0
        while True:
            if steps == 0:
                start = time.monotonic()
            for _ in range(WARM if steps < 0 else ROUND):
                state, scalars = train_step(state, next(batches)[0])
                steps += 1
            jax.block_until_ready(scalars)
            spent = int(1000 * (time.monotonic() - start)) if steps > 0 else 0
            if steps > 0 and distributed.max_over_processes(spent) >= 1000 * limit:
                return (time.monotonic() - start) / steps
