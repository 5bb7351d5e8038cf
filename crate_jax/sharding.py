"""The device mesh and where things lie on it: parameters everywhere, batches split.

One axis, ``data``, over all local devices; a single device is a mesh of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crate_jax.errors import ConfigError

DATA = "data"


def make_mesh(batch_size: int, accumulate: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given).

    Raises:
      ConfigError: a micro-batch cannot be split evenly over the devices.
    """
    devices = list(devices if devices is not None else jax.devices())
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


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, host arrays (b, ...), as global arrays (B, ...) on the mesh."""
    sharding = split(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain_micro_batches(x: Any, mesh: Mesh) -> Any:
    """Keeps micro-batches (A, B / A, ...) split along their second axis, where each device's rows lie."""
    return jax.lax.with_sharding_constraint(x, split(mesh, axis=1))
