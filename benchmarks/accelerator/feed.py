"""The step fed by the real input pipeline, from a folder of JPEGs that it makes: does the feeding hide behind the step?

`overlap` is the images per second of the fed step over the smaller of those of the step and of the pipeline, each
alone: 1 where the two run at the same time and neither disturbs the other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from benchmarks import step
from benchmarks.accelerator.clock import timed
from benchmarks.accelerator.parts import Cases, Row, Settings
from benchmarks.accelerator.steps import Stepper, config_of
from benchmarks.data import write_images
from crate_jax import data
from crate_jax.parallel import sharding

MODELS = ("crate_mae_b", "byol_resnet50")
IN_FLIGHT = 8  # as in the training loop


def cases(name: str, settings: Settings) -> Cases:
    """One case per model."""
    return {model: functools.partial(measure, model, settings) for model in MODELS}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_folder(folder: Path, classes: int, images: int, size: tuple[int, int]) -> None:
    """Writes `classes` folders of JPEGs (width, height), of the size of ImageNet's files."""
    with ThreadPoolExecutor(cores()) as pool:
        folders = [folder / f"class{k}" for k in range(classes)]
        list(pool.map(lambda where: write_images(where, images // classes, size, 92, 12), folders))


@contextlib.contextmanager
def fed(prepared: step.Prepared, source: data.Source, first: int = 0) -> Iterator[Iterator[Mapping[str, jax.Array]]]:
    """Batches on the device, as the training loop gets them, from batch number `first`."""
    config, inputs = prepared.config, prepared.method.inputs
    pipeline = data.TrainPipeline(config, source, views="views" in inputs)

    def put(batch: dict[str, np.ndarray]) -> Mapping[str, jax.Array]:
        if "label" in inputs:
            batch = {**batch, "label": np.asarray(source.labels_of(batch["index"]), np.int32)}
        return sharding.put_batch({name: batch[name] for name in inputs}, prepared.mesh)

    with contextlib.closing(pipeline):
        ready = data.device_prefetch(pipeline.batches(first), put, config.data.prefetch)
        with contextlib.closing(ready):
            yield ready


def host_rate(prepared: step.Prepared, source: data.Source, seconds: float) -> list[float]:
    """Images per second of the pipeline alone, without the device, in three windows."""
    pipeline = data.TrainPipeline(prepared.config, source, views="views" in prepared.method.inputs)
    with contextlib.closing(pipeline):
        batches = pipeline.batches(0)
        for _ in range(max(3, 2 * prepared.config.data.workers)):  # what starting workers have filled
            next(batches)
        return [window(lambda: next(batches), prepared.config.batch_size, seconds) for _ in range(3)]


def window(call, images: int, seconds: float) -> float:
    """Images per second of calls of `images` each for at least `seconds`; the results' end counts."""
    start, count, pending = time.perf_counter(), 0, []
    while time.perf_counter() - start < seconds:
        pending.append(call())
        count += images
        if len(pending) > IN_FLIGHT:
            jax.block_until_ready(pending.pop(0))
    jax.block_until_ready(pending)
    return count / (time.perf_counter() - start)


def fed_rate(prepared: step.Prepared, stepper: Stepper, source: data.Source, seconds: float) -> list[float]:
    """Images per second of the step with batches of the pipeline, in three windows after the first batches."""
    with fed(prepared, source) as batches:
        for _ in range(max(3, 2 * prepared.config.data.workers)):
            jax.block_until_ready(stepper(next(batches)))
        return [window(lambda: stepper(next(batches)), prepared.config.batch_size, seconds) for _ in range(3)]


def measure(model: str, settings: Settings) -> Row:
    """The rates of the step alone, the pipeline alone, and both together."""
    seconds, count, size = (0.2, 32, (80, 60)) if settings.debug else (4.0, 1024, (500, 375))
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), 4, count, size)
        config = config_of(model, settings)
        config.data.source = f"folder:{folder}"
        config.data.workers = 0 if settings.debug else cores()
        config.data.memory_mb = 0  # ImageNet would not fit: each image is read and decoded for each batch
        source = data.open_split(config, "train")
        prepared = step.prepare(config, source)
        stepper = Stepper(prepared.step, prepared)
        times = timed(stepper, seconds / 4, 3)
        alone = config.batch_size / times["ms"] * 1e3
        together = fed_rate(prepared, stepper, source, seconds)
        host = host_rate(prepared, source, seconds)
        loss = stepper.loss()
    both, of_host = statistics.median(together), statistics.median(host)
    return {
        "batch": config.batch_size,
        "workers": config.data.workers,
        "cores": cores(),
        "step_images_per_sec": alone,
        "host_images_per_sec": of_host,
        "host_range": [min(host), max(host)],
        "fed_images_per_sec": both,
        "fed_range": [min(together), max(together)],
        "overlap": both / min(alone, of_host),
        "bound_by": "the pipeline" if of_host < alone else "the step",
        "loss": loss,
    }
