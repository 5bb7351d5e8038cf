"""The job ``pretrain``, and the training that the jobs ``finetune``, ``segment`` and ``sweep`` do too."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.analysis.whitebox import measures
from crate_jax.config import base, method_name, validate
from crate_jax.convert import pretrained
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.errors import ConfigError
from crate_jax.evals.classification import ClassifierEvaluation
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.evals.segmentation import SegmentationEvaluation
from crate_jax.jobs import report
from crate_jax.methods import METHODS
from crate_jax.methods.method import Method, Params, Scalars
from crate_jax.parallel import distributed, parameters, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.training import nonfinite
from crate_jax.training.loop import Loop, Observer, Picture
from crate_jax.validation import changed_keys, flatten
from crate_jax.workdir import checkpoint, metrics, pictures
from crate_jax.workdir.folder import lock

log = logging.getLogger(__name__)

Evaluation = FrozenEvaluation | ClassifierEvaluation | SegmentationEvaluation

EVALUATIONS: dict[str, type[Evaluation]] = {
    "pretrain": FrozenEvaluation,
    "finetune": ClassifierEvaluation,
    "segment": SegmentationEvaluation,
}
# Of a config, what a score depends on: with another value it is another run.
TASK = ("seed:", "init_from:", "protocol.name:", "protocol.scratch:")


def method_of(config: ConfigDict, source: data.Source | None = None) -> Method:
    """The method that a validated config trains; `source` is the training set, which pre-training does not need."""
    return METHODS[method_name(config)].build(config, source)


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
        mesh = sharding.make_mesh(config.batch_size, config.accumulate, data=config.mesh.data, model=config.mesh.model)
        source = data.open_split(config, "train")
        if source is None:
            raise ConfigError(f"config.data.source={config.data.source!r}: has no training images")
        method = method_of(config, source)
        evaluation = EVALUATIONS[config.job](config, method.features, source, mesh)
        loop = Loop(
            config, method, source, mesh, folder, interrupt, stack,
            start=functools.partial(pretrained.load, config.init_from, "config.init_from")
            if config.init_from else None,
            on_resume=functools.partial(require_same_task, config, folder),
        )  # fmt: skip
        watching = observers(config, method, evaluation, mesh, loop.untrained)
        signum = distributed.max_over_processes(interrupt.signal or 0)
        if signum:
            raise Interrupted(signum, "before the first step")
        if distributed.first():
            metrics.write_json(folder / "config.json", config.to_dict())
        loop.run(watching)
        summary = summarise(loop)
        if distributed.first():
            metrics.write_json(folder / "summary.json", summary)
            summary["report"] = write_report(folder, config, mesh)  # of the summary, among others
            metrics.write_json(folder / "summary.json", summary)
        distributed.barrier("run finished")  # what process 0 wrote is there for all
        return summary


def show(summary: Mapping[str, Any]) -> None:
    """Prints the end of a pre-training run for a person."""
    print(f"steps {summary['steps']}  loss {summary['loss']:.4g}  parameters {summary['params']:,}")
    if summary["knn_top1"] is not None:
        print(f"{'top-1 accuracy':<20}{'k-NN':>8}{'probe':>8}")
        for label, suffix in (("trained encoder", ""), ("untrained encoder", "_untrained"), ("raw pixels", "_pixels")):
            print(f"{label:<20}{summary['knn_top1' + suffix]:>8.1%}{summary['probe_top1' + suffix]:>8.1%}")
    if summary["pictures"]:
        print(f"pictures: {summary['pictures']}")
    if summary["report"]:
        print(f"report: {summary['report']}")


def observers(
    config: ConfigDict, method: Method, evaluation: Evaluation, mesh: Mesh, untrained: Callable[[], Params]
) -> Sequence[Observer]:
    """What looks at the encoder while it is trained, each in its own period.

    Args:
      config: a validated config.
      method: what is trained.
      evaluation: scores it; its images are those that the others look at.
      mesh: the devices.
      untrained: the parameters that it is compared with at the end.
    """

    def shown(count: int) -> dict[str, np.ndarray]:
        """What the method reads of `count` images of the evaluation, always the same ones."""
        chosen = sample(len(evaluation.shown), count, config.seed)
        batch = next(data.eval_batches(config, evaluation.shown, chosen, count))
        return {name: batch[name] for name in method.inputs}

    out = [
        Observer(
            "evaluation",
            config.evaluation.every,
            evaluation.scores,
            lambda judged: evaluation.final_scores(judged, untrained),
        )
    ]
    if method.pictures is not None and config.log.pictures:
        draw = drawing(method, functools.partial(shown, config.log.pictures), config.seed, mesh)
        out.append(Observer("pictures", config.log.pictures_every, draw, draw))
    if config.whitebox.every:
        images = shown(config.whitebox.images)["image"]
        out.append(Observer("layers", config.whitebox.every, telemetry(config, images, mesh)))
    return out


def drawing(
    method: Method, shown: Callable[[], dict[str, np.ndarray]], seed: int, mesh: Mesh
) -> Callable[[Params], Picture]:
    """The function judged parameters -> a grid of the method's pictures.

    Args:
      method: draws them.
      shown: the images to draw, read each time anew.
      seed: of what is drawn at random, the same each time.
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
    """The function judged parameters -> measures of the layers, always of the same images and draws.

    Args:
      config: a validated config; its seed is that of the draws.
      images: uint8 (b, H, W, 3), the same in every process; split over the devices where b can be.
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


def require_same_task(config: ConfigDict, folder: Path, before: Mapping[str, Any], other_images: bool) -> None:
    """A score is recorded with what it was learnt from: another encoder, seed or data set is another run.

    Pre-training may go on with other images; its records name both.

    Raises:
      ConfigError: the workdir holds a run that started otherwise.
    """
    if config.job == "pretrain":
        return
    before = flatten(base()) | flatten(before)  # a key that came later had no other value than its default
    changed = [line for line in changed_keys(before, config) if line.startswith(TASK)]
    changed += ["config.data: other training images"] * other_images
    if changed:
        raise ConfigError(
            f"{folder} holds a run that started otherwise ({'; '.join(changed)}); choose another --workdir"
        )


def summarise(loop: Loop) -> dict[str, Any]:
    """What summary.json says of a run that is finished."""
    skipped = {nonfinite.SKIPPED: loop.nonfinite.total} if loop.config.nonfinite.skip else {}
    return {
        "steps": loop.total,
        "loss": loop.record["loss"],
        "images_per_sec": loop.record["images_per_sec"],
        **skipped,
        **loop.results["evaluation"],
        "params": parameters.count(loop.state.params),
        "params_sha256": checkpoint.params_sha256(loop.state.params),
        **loop.origin,
        "devices": f"{loop.mesh.size} x {loop.mesh.devices.flat[0].device_kind}",
        "pictures": loop.results.get("pictures", {}).get("path"),
    }


def write_report(folder: Path, config: ConfigDict, mesh: Mesh) -> str | None:
    """Writes report.html; returns its path. A page that cannot be drawn is no reason to fail a run that is done."""
    if not config.log.report:
        return None
    try:
        return report.of_training(folder, config, mesh)
    except Exception as e:
        log.warning("no report: %s: %s", type(e).__name__, e)
        return None
