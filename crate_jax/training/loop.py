"""The training loop, the only one: steps, logging, evaluation, saving, resuming.

It takes an objective (see :mod:`crate_jax.methods.method`) and knows nothing of methods. The batch and
all randomness are functions of the step, so a run that was stopped anywhere continues with the
bits it would have had.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.config import changed_keys
from crate_jax.convert import pretrained
from crate_jax.data.sampling import sample
from crate_jax.errors import ConfigError, NonFiniteError
from crate_jax.evals.classification import ClassifierEvaluation
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.evals.segmentation import SegmentationEvaluation
from crate_jax.methods import classify, reconstruction, segment
from crate_jax.methods.method import Batch, Objective, Params, Scalars
from crate_jax.parallel import distributed, parameters, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.training import nonfinite, optimizer
from crate_jax.training.step import SIGNAL, TrainState, all_finite, init_state, make_train_step, state_shardings
from crate_jax.validation import validate
from crate_jax.workdir import checkpoint, metrics, pictures
from crate_jax.workdir.folder import lock

log = logging.getLogger(__name__)

OBJECTIVES: dict[str, Callable[[ConfigDict, data.Source], Objective]] = {
    "pretrain": reconstruction.build,
    "finetune": classify.build,
    "segment": segment.build,
}
EVALUATIONS: dict[str, type[FrozenEvaluation] | type[ClassifierEvaluation] | type[SegmentationEvaluation]] = {
    "pretrain": FrozenEvaluation,
    "finetune": ClassifierEvaluation,
    "segment": SegmentationEvaluation,
}


# Steps that dispatch may run ahead of the device: enough to hide every launch. Without a bound, runs on several CPU
# devices were seen to stop for ever on a busy machine: one device waiting in an all-reduce, the other for its turn
# among the programs that XLA lets be in flight. With it none did.
IN_FLIGHT = 8


def total_steps(config: ConfigDict, images: int) -> tuple[int, float]:
    """(optimiser steps of the run, steps per epoch) for a training set of `images`."""
    per_epoch = images / config.batch_size
    return config.steps or max(1, round(config.epochs * per_epoch)), per_epoch


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Those of an evaluation's results that can be drawn over the steps: no lists and no None."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def telemetry_of(
    telemetry: Callable[..., Scalars], images: np.ndarray, seed: int, mesh: Mesh
) -> Callable[[Params], Scalars]:
    """An objective's telemetry as a function of the parameters, always of the same images and draws.

    Args:
      telemetry: see :class:`Objective`.
      images: uint8 (b, H, W, 3), the same in every process; split over the devices where b can be.
      seed: of the draws.
      mesh: the devices.
    """
    whole = sharding.replicated(mesh)
    rows = whole if len(images) % mesh.size else sharding.split(mesh)
    batch = {"image": jax.make_array_from_callback(images.shape, rows, lambda index: images[index])}
    keys = jax.jit(lambda: jax.random.split(jax.random.key(seed), len(images)), out_shardings=rows)()
    measure = jax.jit(sharding.on_mesh(mesh, telemetry), out_shardings=whole)
    return lambda params: measure(params, batch, keys)


class Speed:
    """Images per second between log points, without the time that evaluations and saving take."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._images: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Starts an interval."""
        self._start = time.perf_counter()

    def add(self, images: int) -> float:
        """Ends an interval in which `images` were trained on; returns its speed."""
        self._seconds.append(max(time.perf_counter() - self._start, 1e-9))
        self._images.append(images)
        self.restart()
        return images / self._seconds[-1]

    def average(self) -> float | None:
        """Over all intervals but the first, which compiles; None if nothing was trained."""
        first = 1 if len(self._seconds) > 1 else 0
        images, seconds = sum(self._images[first:]), sum(self._seconds[first:])
        return images / seconds if images else None


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or goes on training, in `workdir`; returns what it wrote to summary.json.

    Raises:
      UserError: anything a user can mend, in one line.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    validate(config)
    sharding.use_cpu_cores(config.batch_size, config.accumulate, config.mesh.model)
    # From here on: an exception out of a signal during set-up can get lost in a library's callback.
    with Interrupt() as interrupt, lock(workdir) as folder, contextlib.ExitStack() as stack:
        ready = Run(config, folder, stack, interrupt)
        signum = distributed.largest(interrupt.signal or 0)
        if signum:
            raise Interrupted(signum, "before the first step")
        summary = ready.run()
        distributed.barrier("run finished")  # what process 0 wrote is there for all
        return summary


class Run:
    """One process's run: what is open while the loop goes."""

    def __init__(self, config: ConfigDict, folder: Path, stack: contextlib.ExitStack, interrupt: Interrupt) -> None:
        self.config, self.folder, self.interrupt = config, folder, interrupt
        self.mesh = sharding.make_mesh(
            config.batch_size, config.accumulate, data=config.mesh.data, model=config.mesh.model
        )
        source = data.open_split(config, "train")
        if source is None:
            raise ConfigError(f"config.data.source={config.data.source!r}: has no training images")
        self.source = source
        self.total, per_epoch = total_steps(config, len(source))
        self.objective = OBJECTIVES[config.job](config, source)
        shapes = jax.eval_shape(lambda: self.objective.init(jax.random.key(0))[0])
        self.tx, self.schedule = optimizer.build(config, shapes, self.total, per_epoch)
        self.checkpoints = checkpoint.Checkpoints(folder, config.save.keep)
        stack.callback(self.checkpoints.close)
        self.evaluation = EVALUATIONS[config.job](config, self.objective.features, source, self.mesh)
        self.origin: dict[str, str] = {}  # name and digest of the encoder that the run started from
        self.state, self.start, self.record = self._start(shapes)
        if self.start > self.total:
            raise ConfigError(
                f"config.steps or config.epochs: ask for {self.total} steps, but {folder} is already at step "
                f"{self.start}; ask for more, or choose another --workdir"
            )
        self.writer = stack.enter_context(metrics.Writer(folder, config, self.start))
        self.speed = Speed()
        # Since the last log point: scalars on the device, undecodable images, indices of this process's rows.
        self.pending: list[tuple[Scalars, int, np.ndarray]] = []
        counted = self.record.get(nonfinite.SKIPPED, {})
        self.nonfinite = nonfinite.Watch(config, folder, source, **counted)
        self.signal: int | None = None  # that came to any process, as all of them know it
        self.train_step = make_train_step(config, self.objective, self.tx, self.schedule, self.mesh)
        self.draw_pictures = None
        if self.objective.pictures:
            whole = sharding.replicated(self.mesh)
            self.draw_pictures = jax.jit(sharding.on_mesh(self.mesh, self.objective.pictures), out_shardings=whole)
        self.telemetry = None
        if config.whitebox.every and self.objective.telemetry is not None:
            shown = self._shown(config.whitebox.images)["image"]
            self.telemetry = telemetry_of(self.objective.telemetry, shown, config.seed, self.mesh)
        decayed = optimizer.decayed(config, shapes)
        parameters.log_rules(shapes, decayed, self.objective.penalised, sharding.layouts(shapes, self.mesh))
        self._log_memory(shapes)

    def _log_memory(self, shapes: Params) -> None:
        """Logs what lies on each device between two steps; activations come on top of it while one runs."""
        place = state_shardings(self.state, self.mesh)
        images = (self.config.batch_size, *self.config.data.image_size, 3)
        parts = {
            "parameters": (shapes, place.params),
            "gradients": (shapes, sharding.split_update(shapes, self.mesh)),
            "optimizer": (self.state.opt_state, place.opt_state),
            "moving average": (self.state.ema, place.ema),
            "images": (jax.ShapeDtypeStruct(images, jnp.uint8), sharding.split(self.mesh)),
        }
        each = {name: sharding.bytes_per_device(*part) / 1e6 for name, part in parts.items()}
        log.info(
            "mesh of %d (data) x %d (model) devices; MB on each: %s",
            *self.mesh.devices.shape,
            ", ".join(f"{name} {size:.1f}" for name, size in each.items()),
        )

    def _start(self, shapes: Params) -> tuple[TrainState, int, dict[str, Any]]:
        """The newest checkpoint's state, or a fresh one; its step; what the checkpoint recorded."""

        def fresh(params: Params | None = None) -> TrainState:
            return init_state(self.config, self.objective, self.tx, params)

        place = state_shardings(jax.eval_shape(fresh), self.mesh)
        init = jax.jit(fresh, out_shardings=place)
        abstract = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), jax.eval_shape(init), place
        )
        restored = self.checkpoints.restore(abstract.params, abstract.rest(), self.config.to_dict())
        if restored is not None:
            log.info("continuing from step %d of %s", restored.step, self.checkpoints.folder)
            self.origin = restored.meta.get("origin", {})
            other_images = restored.meta["data"] != self.source.fingerprint()
            if self.config.job != "pretrain":
                self._require_same_task(restored.meta["config"], other_images)
            if other_images:
                log.warning("the training images are not those of the checkpoint; their order differs from here on")
            return TrainState(params=restored.params, **restored.rest), restored.step, restored.meta["record"]
        state = init()
        if self.config.init_from:
            encoder = pretrained.load(self.config.init_from, "config.init_from")
            self.origin = {"checkpoint": encoder.name, "checkpoint_sha256": encoder.sha256}
            params = self.objective.adopt(state.params, encoder.params, f"config.init_from={self.config.init_from}")
            log.info("encoder taken from %s", encoder.name)
            state = init(params)
        return state, 0, {}

    def _require_same_task(self, before: dict[str, Any], other_images: bool) -> None:
        """A score is recorded with what it was learnt from: another encoder, seed or data set is another run.

        Raises:
          ConfigError: the workdir holds a run that started otherwise.
        """
        keys = ("seed:", "init_from:", "protocol.name:", "protocol.scratch:")
        changed = [line for line in changed_keys(before, self.config) if line.startswith(keys)]
        changed += ["config.data: other training images"] * other_images
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run that started otherwise ({'; '.join(changed)}); choose another --workdir"
            )

    def run(self) -> dict[str, Any]:
        """The loop, then evaluation, pictures and the summary."""
        config = self.config
        if distributed.first():
            metrics.write_json(self.folder / "config.json", config.to_dict())
        log.info(
            "training %d -> %d of batch %d on %d x %s, %s parameters",
            self.start, self.total, config.batch_size, self.mesh.size,
            self.mesh.devices.flat[0].device_kind, f"{parameters.count(self.state.params):,}",
        )  # fmt: skip
        with metrics.Progress(self.total, self.start, config.batch_size) as progress:
            with contextlib.closing(self._batches()) as batches:
                self.speed.restart()
                for step in range(self.start + 1, self.total + 1):
                    batch, undecodable, indices = next(batches)
                    self.state, scalars = self.train_step(self.state, batch)
                    self.pending.append((scalars, undecodable, indices))
                    if len(self.pending) > IN_FLIGHT:
                        self._agree([jax.block_until_ready(self.pending[-1 - IN_FLIGHT][0])])
                    self._after(step, progress)
        return self._finish()

    def _batches(self) -> Generator[tuple[Batch, int, np.ndarray], None, None]:
        """Batches on the device, how many of their images replace undecodable ones, and this process's indices."""
        pipeline = data.TrainPipeline(
            self.config, self.source, process_index=jax.process_index(), process_count=jax.process_count()
        )

        def put(batch: dict[str, np.ndarray]) -> tuple[Batch, int, np.ndarray]:
            if "label" in self.objective.inputs:
                batch = {**batch, "label": np.asarray(self.source.labels_of(batch["index"]), np.int32)}
            inputs = {name: batch[name] for name in self.objective.inputs}
            if distributed.processes() > 1:
                inputs[SIGNAL] = np.full(len(batch["index"]), self.interrupt.signal or 0, np.int32)
            return sharding.put_batch(inputs, self.mesh), int(batch["undecodable"]), batch["index"]

        with (
            contextlib.closing(pipeline),
            contextlib.closing(
                data.device_prefetch(pipeline.batches(self.start), put, self.config.data.prefetch)
            ) as ready,
        ):
            yield from ready

    def _agree(self, scalars: Sequence[Scalars]) -> None:
        """Takes note of a signal to any process that went through a step, which all processes do at the same step."""
        if distributed.processes() == 1:
            self.signal = self.interrupt.signal
        else:
            self.signal = self.signal or max(int(s[SIGNAL]) for s in scalars) or None

    def _after(self, step: int, progress: metrics.Progress) -> None:
        """What happens between steps; all of it between log points is a few comparisons."""
        every, last = self.config, step == self.total
        if last or step % every.log.every == 0:
            self._report(step, progress)
        if distributed.processes() == 1:
            self._agree(())
        save = last or step % every.save.every == 0 or self.signal is not None
        evaluate = not last and every.evaluation.every and step % every.evaluation.every == 0
        draw = not last and every.log.pictures_every and step % every.log.pictures_every == 0
        look = self.telemetry is not None and step % every.whitebox.every == 0
        if not (save or evaluate or draw or look):
            return
        self._report(step, progress)
        if save:
            self._save(step)
        if self.signal is not None and save and not last:
            self.checkpoints.wait()
            raise Interrupted(self.signal, f"at step {step}, state saved")
        if evaluate:
            self.writer.write(step, numbers(self.evaluation.scores(self.state.eval_params())))
        if draw:
            self._draw(step)
        if look and self.telemetry is not None:
            measured = jax.device_get(self.telemetry(self.state.eval_params()))
            self.writer.write(step, {name: float(value) for name, value in measured.items()})
        self.speed.restart()

    def _report(self, step: int, progress: metrics.Progress) -> None:
        """Waits for the steps since the last log point, checks and logs them.

        Raises:
          NonFiniteError: a loss or a gradient is NaN or infinite, and config.nonfinite.skip steps before it were.
        """
        if not self.pending:
            return
        scalars = jax.device_get([s for s, _, _ in self.pending])
        undecodable = sum(count for _, count, _ in self.pending)
        indices = [rows for _, _, rows in self.pending]
        self.pending = []
        self._agree(scalars)
        for values in scalars:
            values.pop(SIGNAL, None)
        speed = self.speed.add(len(scalars) * self.config.batch_size)
        first = step - len(scalars) + 1
        done = [v for i, v in enumerate(scalars) if self._counts(first + i, v, indices[i])]
        means = {k: float(np.mean([v[k] for v in done])) for k in scalars[0] if done} | {"lr": float(scalars[-1]["lr"])}
        if self.config.nonfinite.skip:
            means[nonfinite.SKIPPED] = len(scalars) - len(done)
            means["skipped_total"] = self.nonfinite.total
        self.record = {
            "loss": means.get("loss", self.record.get("loss", math.nan)),
            "images_per_sec": self.speed.average(),
            nonfinite.SKIPPED: {"streak": self.nonfinite.streak, "total": self.nonfinite.total},
        }
        progress.update(step, means, speed)
        self.writer.write(step, means | {"images_per_sec": speed, "undecodable": undecodable})

    def _counts(self, step: int, scalars: Mapping[str, np.ndarray], indices: np.ndarray) -> bool:
        """Whether a step was finite; one that was not is written down.

        Raises:
          NonFiniteError: it and as many before it as config.nonfinite.skip allows were not.
        """
        watch, allowed = self.nonfinite, self.config.nonfinite.skip
        what = watch.see(scalars)
        if not what:
            return True
        watch.write(step, scalars, indices, self.checkpoints.latest())
        if watch.streak > allowed:
            if allowed:
                what += f", as in the {watch.streak - 1} steps before (config.nonfinite.skip={allowed}),"
            raise self._non_finite(f"{what} at step {step}; its images are named in {watch.path(step)}")
        if distributed.first():
            log.warning("step %d skipped: %s; its images are named in %s", step, what, watch.path(step))
        return False

    def _non_finite(self, what: str) -> NonFiniteError:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        kept = f"the last finite checkpoint is step {latest} in {self.checkpoints.folder}"
        return NonFiniteError(
            f"{what}; {kept if latest else 'no checkpoint was saved yet'}; try a lower config.optimizer.lr, a longer "
            "warm-up or config.optimizer.clip_norm"
        )

    def _save(self, step: int) -> None:
        # A step's loss is taken before its update: it says nothing about the weights to be saved.
        if not all_finite((self.state.params, self.state.rest())):
            raise self._non_finite(f"the weights or the optimiser's state are not finite after step {step}")
        meta = {"config": self.config.to_dict(), "data": self.source.fingerprint(), "record": self.record}
        meta["origin"] = self.origin
        self.checkpoints.save(step, self.state.params, self.state.rest(), meta)

    def _shown(self, count: int) -> dict[str, np.ndarray]:
        """What the objective reads of `count` images of the evaluation, always the same ones."""
        source = self.evaluation.shown
        chosen = sample(len(source), count, self.config.seed)
        batch = next(data.eval_batches(self.config, source, chosen, count))
        return {name: batch[name] for name in self.objective.inputs}

    def _draw(self, step: int) -> str | None:
        """Writes a grid of the objective's pictures; returns its path."""
        if self.draw_pictures is None or not self.config.log.pictures:
            return None
        batch = self._shown(self.config.log.pictures)
        count = len(batch["image"])
        keys = jax.jit(
            lambda: jax.random.split(jax.random.key(self.config.seed), count),
            out_shardings=sharding.replicated(self.mesh),
        )()
        columns = jax.device_get(self.draw_pictures(self.state.eval_params(), batch, keys))
        named = dict(zip(self.objective.columns, columns, strict=True))
        return self.writer.write_image(step, self.objective.pictures_name, pictures.reconstruction_grid(named))

    def _finish(self) -> dict[str, Any]:
        """Evaluates what was trained, and what it is compared with; writes summary.json."""
        untrained = jax.jit(
            lambda: self.objective.init(jax.random.key(self.config.seed))[0],
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state.params),
        )
        scores = self.evaluation.final_scores(self.state.eval_params(), untrained)
        if numbers(scores):
            self.writer.write(self.total, numbers(scores))
        picture = self._draw(self.total)
        summary = {
            "steps": self.total,
            "loss": self.record["loss"],
            "images_per_sec": self.record["images_per_sec"],
            **({nonfinite.SKIPPED: self.nonfinite.total} if self.config.nonfinite.skip else {}),
            **scores,
            "params": parameters.count(self.state.params),
            "params_sha256": checkpoint.params_sha256(self.state.params),
            **self.origin,
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "pictures": picture,
        }
        self.checkpoints.wait()
        if distributed.first():
            metrics.write_json(self.folder / "summary.json", summary)
            summary["report"] = self._write_report()  # of the summary, among others
            metrics.write_json(self.folder / "summary.json", summary)
        return summary

    def _write_report(self) -> str | None:
        """Writes report.html; returns its path. A page that cannot be drawn is no reason to fail a run that is done."""
        if not self.config.log.report:
            return None
        try:
            from crate_jax.jobs import report  # here: drawing takes 0.3 s to import

            return report.of_training(self.folder, self.config, self.mesh)
        except Exception as e:
            log.warning("no report: %s: %s", type(e).__name__, e)
            return None
