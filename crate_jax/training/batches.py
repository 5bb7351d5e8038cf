"""A method's batches on the devices: what a step takes of the images, laid out on the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods.method import Batch, Method
from crate_jax.parallel import distributed, sharding
from crate_jax.parallel.interrupt import Interrupt
from crate_jax.training import clock as clocks
from crate_jax.training.step import SIGNAL

# A batch on the device, the number of undecodable images in it, and the indices of the images in this process's rows.
Placed = tuple[Batch, int, np.ndarray]


@contextlib.contextmanager
def placed_batches(
    config: ConfigDict,
    method: Method,
    source: data.Source,
    mesh: Mesh,
    interrupt: Interrupt,
    clock: clocks.Clock,
    start_step: int = 0,
) -> Iterator[data.DevicePrefetch[dict[str, np.ndarray], Placed]]:
    """A context with a method's batches on the devices, from `start_step` on."""
    with clock.spent(clocks.INPUT):
        pipeline = data.TrainPipeline(
            config,
            source,
            views="views" in method.inputs,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def put(batch: dict[str, np.ndarray]) -> Placed:
        if "label" in method.inputs:
            labels = source.labels_of(batch["index"])
            unlabelled = np.full(len(batch["index"]), -1, np.int32)
            batch = {**batch, "label": unlabelled if labels is None else np.asarray(labels, np.int32)}
        inputs = {name: batch[name] for name in method.inputs}
        if distributed.processes() > 1:
            inputs[SIGNAL] = np.full(len(batch["index"]), interrupt.signal or 0, np.int32)
        return sharding.put_batch(inputs, mesh), int(batch["undecodable"]), batch["index"]

    with (
        contextlib.closing(pipeline),
        contextlib.closing(
            data.device_prefetch(pipeline.batches(start_step), put, config.data.prefetch, config.data.stall_seconds)
        ) as ready,
    ):
        yield ready
