"""The device mesh and where things lie on it.

Two axes, ``data`` and ``model``. A batch is split over both, parameters over ``model`` only, by the table RULES: with
``model`` = 1 each device holds them whole (data parallel), with ``data`` = 1 each holds a part (fully sharded), and
in between every ``model`` devices hold one copy together (hybrid). What only the weight update touches is split over
all devices in each case. A single device is a mesh of one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crate_jax.errors import ConfigError, UserError
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import is_stacked, names, path_name

DATA, MODEL = "data", "model"
BATCH = (DATA, MODEL)
WHOLE, LARGEST = "whole", "largest axis"
# How a parameter lies over the axis `model`: the first row whose pattern matches its whole name counts. LARGEST: split
# along the largest axis that divides (never the layer axis, which the scan walks along; the first of equal ones), if
# the array is large enough to be worth a message.
RULES: tuple[tuple[str, str], ...] = (
    (r".*(cls_token|mask_token|positions|relative_bias)", WHOLE),
    (r".*kernel", LARGEST),
    (r".*", WHOLE),  # biases, scales: vectors
)
SMALLEST_SPLIT = 2**14  # elements
MOST_CPU_DEVICES = 8  # each holds a copy of the parameters
PATIENCE = "xla_cpu_collective_call_terminate_timeout_seconds"


def use_cpu_cores(batch_size: int, accumulate: int, model: int = 1) -> None:
    """Makes of a CPU one device per core, so that a step on it splits the batch as over accelerators.

    XLA runs one CPU device's matrix products on all cores but much of the rest on one, so that this
    is up to twice as fast. Takes the largest number of devices that divides a micro-batch, up to the
    cores this process may use. Does nothing where the user chose (JAX_NUM_CPU_DEVICES or XLA_FLAGS),
    nothing to an accelerator, and nothing once JAX was used. `model` is config.mesh.model.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Devices wait for each other in threads of the pool that they compute with: with no more threads than devices that
    # can be all of them, and where parameters are split a device waits in several at once. And on a busy machine they
    # may wait for longer than XLA's 40 s, after which it aborts.
    os.environ.setdefault("NPROC", str((2 if model == 1 and distributed.processes() == 1 else 16) * cores))
    if PATIENCE not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{PATIENCE}=300".strip()
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    micro = batch_size // accumulate // distributed.processes()
    devices = max(n for n in range(1, min(cores, MOST_CPU_DEVICES) + 1) if micro % n == 0 or n == 1)
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", devices)


def all_devices() -> list[jax.Device]:
    """The devices of all processes.

    Raises:
      UserError: there are none.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # no such platform, or its driver does not start
        why = str(e) or "that of JAX_PLATFORMS is not on this machine; unset it, or set it to cpu"
        raise UserError(f"JAX has no device to run on: {why}") from None


def make_mesh(
    batch_size: int, accumulate: int, devices: Sequence[jax.Device] | None = None, data: int = 0, model: int = 1
) -> Mesh:
    """A mesh of all devices (or of those given).

    Args:
      batch_size: images per step.
      accumulate: micro-batches per step.
      devices: of the mesh; None: all.
      data: devices along the axis ``data``; 0: as many as there are.
      model: devices along the axis ``model``; 0: as many as there are.

    Raises:
      ConfigError: the devices do not form such a mesh, or a micro-batch cannot be split evenly over them.
      UserError: there are no devices.
    """
    devices = list(devices if devices is not None else all_devices())
    micro = batch_size // accumulate
    if micro % len(devices):
        raise ConfigError(
            f"config.batch_size={batch_size}: a micro-batch of {micro} images (config.accumulate={accumulate}) cannot "
            f"be split over {len(devices)} devices; use a multiple of {accumulate * len(devices)}"
        )
    n = len(devices)
    shape = (data or n // max(model, 1), model or n // max(data, 1))
    if shape[0] * shape[1] != n:
        raise ConfigError(
            f"config.mesh.data={data}, config.mesh.model={model}: {n} devices do not form such a mesh; both must "
            "divide their number, and 0 stands for the rest"
        )
    return Mesh(arrange(devices, *shape), BATCH, axis_types=(AxisType.Auto,) * 2)


def arrange(devices: Sequence[Any], data: int, model: int) -> np.ndarray:
    """Devices as an array (data, model) whose rows lie close together: inside a slice where they fit into one.

    Raises:
      ConfigError: rows of this length neither fit into a slice nor fill whole ones.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    inner = math.gcd(model, len(devices) // slices)  # of a row, in one slice
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
        within = (len(devices) // slices // inner, inner)
        across = (data // within[0], model // inner)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError) as e:
        raise ConfigError(
            f"config.mesh.data={data}, config.mesh.model={model}: {len(devices)} devices in {slices} slices do not "
            f"form such a mesh ({' '.join(str(e).split())})"
        ) from None


def row_order(mesh: Mesh, batch_size: int) -> np.ndarray | None:
    """Which image of a batch lies in each row of the global array; None: each in its own.

    A process fills the rows of its own devices with its part of the batch, one after the other. On a mesh that follows
    a TPU's wiring these rows need not be next to each other.
    """
    processes = np.array([device.process_index for device in mesh.devices.flat])
    order = np.empty(batch_size, np.int64)
    order[np.argsort(np.repeat(processes, batch_size // mesh.size), kind="stable")] = np.arange(batch_size)
    return None if (order == np.arange(batch_size)).all() else order


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An array whose `axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def of_parameters(shapes: Any, mesh: Mesh) -> Any:
    """Where to lay parameters, or a tree that holds some: the same tree of shardings, by the table RULES."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _of_parameter(path_name(path), x.shape, mesh), shapes)


def _of_parameter(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    parts = mesh.shape[MODEL]
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
    if rule == WHOLE or parts == 1 or math.prod(shape) < SMALLEST_SPLIT:
        return replicated(mesh)
    axes = [i for i in range(is_stacked(name), len(shape)) if shape[i] % parts == 0]
    axis = max(axes, key=lambda i: shape[i], default=None)
    return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))


def split_update(shapes: Any, mesh: Mesh) -> Any:
    """Where to lay what only the weight update touches: every device keeps and updates 1/n of it.

    The optimiser's moments then cost 1/n of the memory and of the work; the gradients are summed
    straight into these parts and the new parameters gathered from them (arXiv 2004.13336).

    Args:
      shapes: tree of arrays or ShapeDtypeStructs, named as the parameters, or with those names at the end.
      mesh: the mesh.

    Returns:
      the same tree of shardings. Where the parameter is split over ``model``: along the same axis, or failing that
      another one, also over ``data``. Else along the first axis that the devices divide, or whole where there is none
      or the array is too small to be worth a message.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _of_update(path_name(path), x.shape, mesh), shapes)


def _of_update(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    kept = _of_parameter(name, shape, mesh)
    if kept.is_fully_replicated:
        axis = next((i for i, side in enumerate(shape) if side % mesh.size == 0), None)
        if mesh.size == 1 or axis is None or math.prod(shape) < SMALLEST_SPLIT:
            return kept
        return split(mesh, axis)
    spec: list[Any] = [*kept.spec, *[None] * (len(shape) - len(kept.spec))]
    axis = spec.index(MODEL)
    if shape[axis] % mesh.size == 0:
        spec[axis] = (MODEL, DATA)
    else:
        other = next((i for i, side in enumerate(shape) if i != axis and side % mesh.shape[DATA] == 0), None)
        if other is not None:
            spec[other] = DATA
    return NamedSharding(mesh, PartitionSpec(*spec))


def layouts(shapes: Any, mesh: Mesh) -> dict[str, str]:
    """Says of each parameter that is split over ``model`` along which axis, by name, for a log."""
    placed = names(of_parameters(shapes, mesh))
    split_ones = {name: at.spec for name, at in placed.items() if not at.is_fully_replicated}
    return {name: f"axis {spec.index(MODEL)} in {mesh.shape[MODEL]}" for name, spec in split_ones.items()}


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """What a tree of arrays or ShapeDtypeStructs takes on each device under a tree of shardings."""
    sizes = jax.tree.map(lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be traced where :func:`by_batch` knows the mesh."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def by_batch(x_BND: jax.Array) -> jax.Array:
    """Keeps tokens (..., B, N, D) split over the batch where parameters are split over ``model``; else as they are.

    Without it XLA may lay them out as the parameters are, and move activations instead of weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if MODEL not in mesh.axis_names or mesh.shape[MODEL] == 1 or x_BND.shape[-3] % mesh.size:
        return x_BND
    return jax.lax.with_sharding_constraint(x_BND, PartitionSpec(*[None] * (x_BND.ndim - 3), BATCH))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, host arrays (b, ...), as global arrays (B, ...) on the mesh."""
    sharding = split(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain_micro_batches(x: Any, mesh: Mesh) -> Any:
    """Keeps micro-batches (A, B / A, ...) split along their second axis, where each device's rows lie."""
    return jax.lax.with_sharding_constraint(x, split(mesh, axis=1))
