"""The device mesh and where things lie on it: parameters everywhere, batches and optimiser split.

One axis, ``data``, over all local devices; a single device is a mesh of one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crate_jax.errors import ConfigError, UserError

DATA = "data"
SMALLEST_SPLIT = 2**14  # elements
MOST_CPU_DEVICES = 8  # each holds a copy of the parameters
PATIENCE = "xla_cpu_collective_call_terminate_timeout_seconds"


def use_cpu_cores(batch_size: int, accumulate: int) -> None:
    """Makes of a CPU one device per two cores, so that a step on it splits the batch as over accelerators.

    XLA runs one CPU device's matrix products on all cores but much of the rest on one, so that this
    is up to 1.7 times as fast. Takes the largest number of devices that divides a micro-batch, up to
    half the cores this process may use. Does nothing where the user chose (JAX_NUM_CPU_DEVICES or
    XLA_FLAGS), nothing to an accelerator, and nothing once JAX was used.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Devices wait for each other in the threads that they compute with, one per core unless NPROC says more. With as
    # many devices as threads a busy machine can stop for ever; XLA gives up after 40 s, which a laptop may be asleep.
    os.environ.setdefault("NPROC", str(2 * cores))
    if PATIENCE not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{PATIENCE}=300".strip()
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    micro = batch_size // accumulate
    devices = max(n for n in range(1, max(1, min(cores // 2, MOST_CPU_DEVICES)) + 1) if micro % n == 0)
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(batch_size: int, accumulate: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given).

    Raises:
      ConfigError: a micro-batch cannot be split evenly over the devices.
      UserError: there are no devices.
    """
    try:
        devices = list(devices if devices is not None else jax.devices())
    except RuntimeError as e:  # no such platform, or its driver does not start
        raise UserError(f"JAX has no device to run on: {e}") from None
    micro = batch_size // accumulate
    if micro % len(devices):
        raise ConfigError(
            f"config.batch_size={batch_size}: a micro-batch of {micro} images (config.accumulate={accumulate}) cannot "
            f"be split over {len(devices)} devices; use a multiple of {accumulate * len(devices)}"
        )
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An array whose `axis` is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def split_update(shapes: Any, mesh: Mesh) -> Any:
    """Where to lay what only the weight update touches: every device keeps and updates 1/n of it.

    The optimiser's moments then cost 1/n of the memory and of the work; the gradients are summed
    straight into these parts and the new parameters gathered from them (arXiv 2004.13336).

    Args:
      shapes: tree of arrays or ShapeDtypeStructs.
      mesh: the mesh.

    Returns:
      the same tree of shardings: along the first axis that the devices divide, or whole where there
      is none or the array is too small to be worth a message.
    """
    return jax.tree.map(lambda x: _split_first(x.shape, mesh), shapes)


def _split_first(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    axis = next((i for i, side in enumerate(shape) if side % mesh.size == 0), None)
    if mesh.size == 1 or axis is None or np.prod(shape) < SMALLEST_SPLIT:
        return replicated(mesh)
    return split(mesh, axis)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, host arrays (b, ...), as global arrays (B, ...) on the mesh."""
    sharding = split(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain_micro_batches(x: Any, mesh: Mesh) -> Any:
    """Keeps micro-batches (A, B / A, ...) split along their second axis, where each device's rows lie."""
    return jax.lax.with_sharding_constraint(x, split(mesh, axis=1))
