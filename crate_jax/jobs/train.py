"""The job ``pretrain``; the jobs ``finetune``, ``segment`` and ``sweep`` train by the same function."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.analysis.records import OF_A_SUMMARY
from crate_jax.analysis.whitebox import measures
from crate_jax.config import (
    KEYS,
    OTHER_RUN,
    allowed_changes,
    base,
    keys_of_time,
    method_name,
    resumed_changes,
    validate,
)
from crate_jax.convert import pretrained
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.errors import ConfigError, escaped
from crate_jax.evals.classification import ClassifierEvaluation
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.evals.metrics import COMPARED, RANKS, reading
from crate_jax.evals.segmentation import SegmentationEvaluation
from crate_jax.jobs import report
from crate_jax.methods import METHODS
from crate_jax.methods.method import Method, Params, Scalars
from crate_jax.parallel import distributed, parameters, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.training import nonfinite, pace
from crate_jax.training.clock import Clock
from crate_jax.training.loop import Loop
from crate_jax.training.observer import Observer, Picture
from crate_jax.validation import FIXED, FREE, changed_keys, flatten, place
from crate_jax.workdir import checkpoint, metrics, mirror, pictures, readback, starts
from crate_jax.workdir.folder import lock, require_no_model

log = logging.getLogger(__name__)

Evaluation = FrozenEvaluation | ClassifierEvaluation | SegmentationEvaluation

EVALUATIONS: dict[str, type[Evaluation]] = {
    "pretrain": FrozenEvaluation,
    "finetune": ClassifierEvaluation,
    "segment": SegmentationEvaluation,
}
# Config keys (beginnings of lines of `changed_keys`) on which a score depends: with another value it is another run.
TASK_KEYS = ("seed:", "init_from:", "protocol.name:", "protocol.scratch:")

IMAGES = "training images"  # in place of a key, in the record of a start that found other ones


def training_images(config: ConfigDict) -> data.Source:
    """Opens the training set of a config.

    Raises:
      ConfigError: there is none.
    """
    source = data.open_split(config, "train")
    if source is None:
        raise ConfigError(f"config.data.source={config.data.source!r}: has no training images")
    return source


def method_of(config: ConfigDict, source: data.Source) -> Method:
    """Builds the method that a validated config trains, for the training set `source`."""
    return METHODS[method_name(config)].build(config, source)


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or continues to train, in `workdir`; returns what it wrote to summary.json.

    Raises:
      UserError: the config, the data or the workdir cannot be used; one line says why.
      Interrupted: one of `interrupt.SIGNALS` came; the state is saved.
      Stalled: images do not come.
    """
    clock = Clock()
    validate(config)
    sharding.use_cpu_cores(config.batch_size, config.accumulate, config.mesh.model)
    # Interrupt begins before the set-up: a library's callback could swallow the exception that a signal raises there.
    with Interrupt() as interrupt, lock(workdir) as folder:
        return run_in(folder, config, interrupt, clock)


def run_in(folder: Path, config: ConfigDict, interrupt: Interrupt, clock: Clock) -> dict[str, Any]:
    """Trains as :func:`run` does in a workdir that the caller has locked, so that the caller can add to it.

    Args:
      folder: the workdir.
      config: a validated config, for whose devices JAX was set up.
      interrupt: the open context that keeps signals.
      clock: runs since the job began.

    Raises:
      UserError, Interrupted, Stalled: see :func:`run`.
    """
    distributed.run_in_first(lambda: require_no_model(folder, "a training run"))
    with contextlib.ExitStack() as stack:
        mesh = sharding.make_mesh(config.batch_size, config.accumulate, data=config.mesh.data, model=config.mesh.model)
        interrupt.renew()  # a TPU's library, which is loaded with the first device, may have set handlers of its own
        source = training_images(config)
        method = method_of(config, source)
        if config.minutes:
            config = pace.decided(config, method, source, mesh, folder, interrupt, time_depends_on(config, mesh))
            method = method_of(config, source)
        recipe = {"recipe": True} if "views" in method.inputs else {}
        evaluation = EVALUATIONS[config.job](config, method.features, source, mesh, **recipe)
        changes: list[dict[str, Any]] = []
        loop = Loop(
            config, method, source, mesh, folder, interrupt, stack,
            start=functools.partial(pretrained.load, config.init_from, "config.init_from")
            if config.init_from else None,
            on_resume=functools.partial(resume, config, folder, changes),
            clock=clock,
        )  # fmt: skip
        if (written := finished(loop, folder, changes)) is not None:
            return written
        records = loop.open_records()
        if isinstance(evaluation, FrozenEvaluation):
            evaluation.remember(records(("rankme", "rankme_limit")))
        watching = observers(config, method, evaluation, mesh, loop.untrained)
        signum = distributed.max_over_processes(interrupt.signal or 0)
        if signum:
            raise Interrupted(signum, "before the first step")
        if distributed.first():
            metrics.write_json(folder / "config.json", as_begun(config, loop.changed))
            starts.append(folder, loop.run_id, loop.start_step, changes, devices(mesh))
        loop.run(watching)
        eval_split = "" if evaluation.shown is source else evaluation.shown.split
        summary = {**summarise(loop), "train_split": source.split, "eval_split": eval_split}
        if distributed.first():
            metrics.write_json(folder / "summary.json", summary)
            summary["report"] = write_report(folder, config, mesh)  # the report reads summary.json
            metrics.write_json(folder / "summary.json", summary)
        distributed.barrier("run finished")  # the others wait for the files of process 0
        return summary


def finished(loop: Loop, folder: Path, changes: Sequence[Any]) -> dict[str, Any] | None:
    """The contents of summary.json, if the run was finished before and this start changes nothing; None otherwise.

    A start that changed only how the run is judged wrote another summary and no checkpoint, so config.json, which is
    written before each summary, is compared too. All processes must call it.

    Args:
      loop: the training loop, which has not run.
      folder: the workdir.
      changes: the keys that this start changes.
    """
    if loop.start_step < loop.total or changes:
        return None
    sha256 = checkpoint.params_sha256(loop.state.params)
    try:
        summary: Any = readback.parse((folder / "summary.json").read_text(encoding="utf-8", errors="replace"))
        files = [summary[name] for name in ("pictures", "report") if summary[name]]
        stored: Any = readback.parse((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
        found = (summary["steps"], summary["params_sha256"], summary.get("changed", []))
        same = found == (loop.total, sha256, loop.changed)
        same = same and not resumed_changes(ConfigDict(as_begun(loop.config, loop.changed)), stored)
        same = same and not readback.wrong(summary, OF_A_SUMMARY)  # else the report asks for another one
        whole = same and bool(summary["report"]) == loop.config.log.report and all(map(os.path.exists, files))
        _ = told(summary) if loop.config.job == "pretrain" else reading(summary)  # as it will be printed
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if distributed.max_over_processes(int(not whole)):
        return None
    log.info("the run in %s was finished before; nothing is computed again", folder)
    return summary


def show(summary: Mapping[str, Any]) -> None:
    """Prints the results of a pre-training run for people."""
    print("\n".join(told(summary)))


def told(summary: Mapping[str, Any]) -> list[str]:
    """The results of a pre-training run in lines for people."""
    lines = [f"steps {summary['steps']}  loss {summary['loss']:.4g}  parameters {summary['params']:,}"]
    if summary["knn_top1"] is not None:
        lines.append(f"{'top-1 accuracy':<20}{'k-NN':>8}{'probe':>8}")
        for suffix, label in COMPARED.items():
            lines.append(f"{label:<20}{summary['knn_top1' + suffix]:>8.1%}{summary['probe_top1' + suffix]:>8.1%}")
        lines += reading(summary)
    for name, shown in RANKS.items():
        if name in summary:
            before = f"untrained {summary[name + '_untrained']:.1f}"
            lines.append(f"{shown:<20}{summary[name]:>8.1f} of {summary[name + '_limit']:.0f}, {before}")
    files = {name: mirror.shown(summary[name]) for name in ("pictures", "report") if summary[name]}
    return lines + [escaped(f"{name}: {path}") for name, path in files.items()]


def observers(
    config: ConfigDict, method: Method, evaluation: Evaluation, mesh: Mesh, untrained: Callable[[], Params]
) -> Sequence[Observer]:
    """The observers of a training run, each with its own period.

    Args:
      config: a validated config.
      method: the method that is trained.
      evaluation: scores the encoder; the other observers use its images too.
      mesh: the devices.
      untrained: returns the parameters of an untrained run, whose scores the evaluation adds at the end.
    """

    def shown(count: int) -> dict[str, np.ndarray]:
        """`count` of the evaluation's images with the method's inputs, the same each time."""
        chosen = sample(len(evaluation.shown), count, config.seed)
        batch = next(data.eval_batches(config, evaluation.shown, chosen, count))
        if "views" in method.inputs:
            batch |= data.shown_views(config, evaluation.shown, batch["index"])
        unlabelled = {"label": np.full(len(batch["index"]), -1, np.int32)}
        return {name: x for name, x in (unlabelled | batch).items() if name in ("image", *method.inputs)}

    look = evaluation.scores
    if isinstance(evaluation, FrozenEvaluation):
        look = functools.partial(evaluation.watched_scores, untrained=untrained)
    out = [
        Observer(
            "evaluation",
            config.evaluation.every,
            evaluation.mark,
            look,
            lambda judged: evaluation.final_scores(judged, untrained),
        )
    ]
    if method.pictures is not None and config.log.pictures:
        draw = drawing(method, functools.partial(shown, config.log.pictures), config.seed, mesh)
        out.append(Observer("pictures", config.log.pictures_every, metrics.PICTURES + method.pictures_name, draw, draw))
    if config.whitebox.every:
        images = shown(config.whitebox.images)["image"]
        out.append(Observer("layers", config.whitebox.every, "whitebox", telemetry(config, images, mesh)))
    return out


def drawing(
    method: Method, shown: Callable[[], dict[str, np.ndarray]], seed: int, mesh: Mesh
) -> Callable[[Params], Picture]:
    """Returns the function from judged parameters to a grid of the method's pictures.

    Args:
      method: the method, which has pictures.
      shown: returns the inputs to draw; it is called for each grid.
      seed: the seed of the corruptions, so that they are the same each time.
      mesh: the devices.
    """
    assert method.pictures is not None
    whole = sharding.replicated(mesh)
    columns_of = jax.jit(sharding.on_mesh(mesh, method.pictures), out_shardings=whole)

    def draw(judged: Params) -> Picture:
        batch = shown()
        count = len(batch["image"])
        keys = jax.jit(lambda: jax.random.split(jax.random.key(seed), count), out_shardings=whole)()
        columns = jax.device_get(columns_of(judged, batch, keys))
        named = dict(zip(method.columns, columns, strict=True))
        return Picture(method.pictures_name, pictures.reconstruction_grid(named))

    return draw


def telemetry(config: ConfigDict, images: np.ndarray, mesh: Mesh) -> Callable[[Params], dict[str, float]]:
    """Returns the function from judged parameters to measures of the layers, with the same images and draws each time.

    Args:
      config: a validated config; its seed also determines the draws.
      images: uint8 (b, H, W, 3), the same in every process; split over the devices if their number divides b.
      mesh: the devices.
    """
    scalars = measures.telemetry(config)

    def measure(judged: Params, images_uint8: jax.Array, keys_B: jax.Array) -> Scalars:
        return scalars(judged, normalise(images_uint8, config), keys_B)

    whole = sharding.replicated(mesh)
    rows = whole if len(images) % mesh.size else sharding.split(mesh)
    placed = jax.make_array_from_callback(images.shape, rows, lambda index: images[index])
    keys = jax.jit(lambda: jax.random.split(jax.random.key(config.seed), len(images)), out_shardings=rows)()
    compiled = jax.jit(sharding.on_mesh(mesh, measure), out_shardings=whole)
    return lambda judged: {k: float(v) for k, v in jax.device_get(compiled(judged, placed, keys)).items()}


def time_depends_on(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What the time of a step may depend on, as :func:`pace.decided` takes it: keys of the config, and the devices."""
    return keys_of_time(config) | {"devices": devices(mesh)}


def devices(mesh: Mesh) -> str:
    """Number and kind of the devices, for people."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def resume(
    config: ConfigDict,
    folder: Path,
    changes: list[dict[str, Any]],
    step: int,
    before: Mapping[str, Any],
    other: bool,
    runs: tuple[str, str] | None,
) -> list[dict[str, Any]]:
    """Compares a start with the run that it continues.

    Args:
      config: the config of the present command.
      folder: the workdir.
      changes: gets an entry for each changed key: ``step``, ``key``, ``old``, ``new``.
      step: the step of the checkpoint.
      before: the config of the checkpoint.
      other: whether the training images have changed.
      runs: the ids of the checkpoint's run and of this one; None: it is the same run.

    Returns:
      The entries that checkpoints, summary and report record.

    Raises:
      ConfigError: the checkpoint is another run's, or keys have changed that must not change; the error names all such
        keys.
    """
    allowed = allowed_changes(config)
    if runs is not None and OTHER_RUN not in allowed:
        raise ConfigError(
            f"{folder} holds a checkpoint of step {step} of another run ({runs[0]}; this run is {runs[1]}); move it "
            f"away, choose another --workdir, or allow it by --config.allow_change={OTHER_RUN}"
        )
    require_same_task(config, folder, before, other)
    found = resumed_changes(config, before)
    refused = {key: (old, new) for key, (old, new, may) in found.items() if may == FIXED and key not in allowed}
    if refused:
        listed = ", ".join(f"config.{key}={old!r}, not {new!r}" for key, (old, new) in refused.items())
        raise ConfigError(
            f"{folder} holds a run with {listed}: its weights would mean something else; set back what has changed, "
            f"choose another --workdir, or allow it by --config.allow_change={','.join(refused)}"
        )
    if "batch_size" in found and config.epochs:
        old, new, _ = found["batch_size"]
        log.warning(
            "config.batch_size=%d, not %d: the run counts its %d updates as if all had had %d images, so epoch, "
            "schedule and place among the images are %.3g times what they were",
            *(new, old, step, new, new / old),
        )
    changes += [{"step": step, "key": key, "old": old, "new": new} for key, (old, new, _) in found.items()]
    recorded = [change for change in changes if found[change["key"]][2] != FREE]
    if other:
        images = {"step": step, "key": IMAGES, "old": "those of the checkpoint", "new": "others"}
        changes.append(images)
        recorded.append(images)
    if runs is not None:
        run = {"step": step, "key": OTHER_RUN, "old": runs[0], "new": runs[1]}
        changes.append(run)
        recorded.append(run)
    return recorded


def as_begun(config: ConfigDict, changed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The config that a run began with, as a dictionary: the present one without the recorded changes."""
    begun = config.to_dict()
    for change in reversed(changed):
        if change["key"] in KEYS:
            group, leaf = place(begun, change["key"])
            group[leaf] = change["old"]
    return begun


def require_same_task(config: ConfigDict, folder: Path, before: Mapping[str, Any], other_images: bool) -> None:
    """Checks that a fine-tuning run continues with the encoder, seed and images that it started with.

    The record of its score names only one of each. Pre-training may continue with other images, since its records name
    both.

    Args:
      config: the config of the present command.
      folder: the workdir.
      before: the config of the checkpoint.
      other_images: whether the training images have changed.

    Raises:
      ConfigError: the workdir holds a run that started differently.
    """
    if config.job == "pretrain":
        return
    before = flatten(base()) | flatten(before)  # a key that is newer than the run had its default
    allowed = allowed_changes(config)
    changed = [line for line in changed_keys(before, config) if line.startswith(TASK_KEYS)]
    changed = [line for line in changed if line.partition(":")[0] not in allowed]
    changed += ["config.data: other training images"] * (other_images and "data.source" not in allowed)
    if changed:
        raise ConfigError(
            f"{folder} holds a run that started differently ({'; '.join(changed)}); choose another --workdir"
        )


def summarise(loop: Loop) -> dict[str, Any]:
    """The contents of summary.json for a finished run."""
    skipped = {nonfinite.SKIPPED: loop.nonfinite.total} if loop.config.nonfinite.skip else {}
    return {
        "steps": loop.total,
        "loss": loop.record["loss"],
        "images_per_sec": loop.record["images_per_sec"],
        "goodput": loop.clock.goodput(),
        **skipped,
        **loop.results["evaluation"],
        "params": parameters.count(loop.state.params),
        "params_sha256": checkpoint.params_sha256(loop.state.params),
        **loop.origin,
        **({"changed": loop.changed} if loop.changed else {}),
        "devices": devices(loop.mesh),
        "pictures": loop.results.get("pictures", {}).get("path"),
    }


def write_report(folder: Path, config: ConfigDict, mesh: Mesh) -> str | None:
    """Writes report.html and returns its path; None if the report is off or fails, which must not fail the run."""
    if not config.log.report:
        return None
    try:
        return report.write_for_training(folder, config, mesh)
    except Exception as e:
        log.warning("no report: %s: %s", type(e).__name__, e)
        return None
