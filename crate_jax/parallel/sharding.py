"""The device mesh, and where arrays lie on it.

The mesh has two axes, ``data`` and ``model``. A batch is split over both axes. Parameters are split over ``model``
only, by the table RULES: with ``model`` = 1 each device holds all parameters (data parallel), with ``data`` = 1 each
device holds a part of them (fully sharded), and in between ``model`` devices together hold one copy (hybrid). Arrays
that only the weight update touches are always split over all devices. A single device is a mesh of one.
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
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError, UserError
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import is_stacked, names, path_name
from crate_jax.validation import Key, Section, at_least

DATA, MODEL = "data", "model"
BATCH = (DATA, MODEL)
WHOLE, LARGEST_AXIS = "whole", "largest axis"
# How a parameter, or what a method carries, lies over the axis `model`: the first row whose pattern matches its whole
# name counts. LARGEST_AXIS: the array is split along its largest axis that `model` divides (the first of equal axes),
# if it has at least MIN_SPLIT elements. The layer axis is never split, since the scan walks along it.
RULES: tuple[tuple[str, str], ...] = (
    (r".*(cls_token|mask_token|positions|relative_bias)", WHOLE),
    (r".*kernel", LARGEST_AXIS),
    (r"carried/(queue|memory)", LARGEST_AXIS),  # rows of past batches, of all images
    (r".*", WHOLE),  # biases, scales: vectors
)
MIN_SPLIT = 2**14  # elements; splitting a smaller array is not worth its messages
MAX_CPU_DEVICES = 8  # each device holds a copy of the parameters
TIMEOUT_FLAG = "xla_cpu_collective_call_terminate_timeout_seconds"


def _check_mesh(c: ConfigDict) -> None:
    if not c.mesh.data and not c.mesh.model:
        raise ConfigError(
            "config.mesh.data=0, config.mesh.model=0: only one of the two can stand for the rest; set one to 1"
        )


MESH = Section(
    "mesh",
    "Devices along two axes; 0 stands for the rest of the devices. A batch is split over both axes.",
    of_the_run=False,
    effect=False,
    check=_check_mesh,
    keys=dict(
        data=Key(0, at_least(0), "number of copies of the parameters; data=1 with model=0: fully sharded"),
        model=Key(1, at_least(0), "number of devices that together hold one copy"),
    ),
)


def use_cpu_cores(batch_size: int, accumulate: int, model: int = 1) -> None:
    """Makes JAX see one CPU device per core, so that a step on the CPU splits the batch as it does on accelerators.

    XLA runs the matrix products of one CPU device on all cores, but much of the rest on one core, so several devices
    are up to twice as fast. The number of devices is the largest that divides a micro-batch and is not above the number
    of cores that this process may use. The number stays as it is if the user chose one (JAX_NUM_CPU_DEVICES or
    XLA_FLAGS) and once JAX was used. Accelerators are not concerned.

    Args:
      batch_size: images per step.
      accumulate: micro-batches per step.
      model: config.mesh.model.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A CPU device waits for the others in a thread of the pool that also computes. If there are no more threads than
    # devices, all of them can be waiting; where parameters are split, one device waits in several threads at once.
    # On a busy machine they may wait for more than 40 s, after which XLA would abort.
    if "NPROC" not in os.environ:
        _lend("NPROC", str((2 if model == 1 and distributed.processes() == 1 else 16) * cores))
    if TIMEOUT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        _lend("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --{TIMEOUT_FLAG}=300".strip())
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    micro = batch_size // accumulate // distributed.processes()
    devices = max(n for n in range(1, min(cores, MAX_CPU_DEVICES) + 1) if micro % n == 0 or n == 1)
    with contextlib.suppress(RuntimeError):  # raised once JAX has its devices
        jax.config.update("jax_num_cpu_devices", devices)


_LENT: dict[str, tuple[str | None, str]] = {}  # environment variables: before `use_cpu_cores`, and by it


def _lend(name: str, value: str) -> None:
    """Sets an environment variable until JAX has its devices; XLA reads it once, when it makes them."""
    _LENT[name], os.environ[name] = (os.environ.get(name), value), value


def _give_back() -> None:
    """Sets the variables of `_lend` back, so that the caller's other programs do not get them."""
    while _LENT:
        name, (before, ours) = _LENT.popitem()
        if os.environ.get(name) != ours:  # somebody has changed it since
            continue
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def all_devices() -> list[jax.Device]:
    """The devices of all processes. What `use_cpu_cores` has set in the environment for them is set back.

    Raises:
      UserError: there are no devices.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as e:  # no such platform, or its driver does not start
        why = str(e) or "the platform of JAX_PLATFORMS is not on this machine; unset it, or set it to cpu"
        raise UserError(f"JAX has no device to run on: {why}") from None
    _give_back()
    return found


def make_mesh(
    batch_size: int, accumulate: int, devices: Sequence[jax.Device] | None = None, data: int = 0, model: int = 1
) -> Mesh:
    """A mesh (data, model) of devices.

    Args:
      batch_size: images per step.
      accumulate: micro-batches per step.
      devices: the mesh's devices; None: all devices.
      data: the number of devices along the axis ``data``; 0: the rest of the devices.
      model: the number of devices along the axis ``model``; 0: the rest of the devices.

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
            f"config.mesh.data={data}, config.mesh.model={model}: {n} devices do not form such a mesh; its two sides "
            "must multiply to the number of devices, and 0 stands for the rest"
        )
    return Mesh(arrange(devices, *shape), BATCH, axis_types=(AxisType.Auto,) * 2)


def arrange(devices: Sequence[Any], data: int, model: int) -> np.ndarray:
    """Arranges devices as an array (data, model), each row inside one slice where it fits into one.

    Raises:
      ConfigError: a row of `model` devices neither fits into one slice nor fills whole slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    inner = math.gcd(model, len(devices) // slices)  # devices of one row that lie in one slice
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
    """Which image of a batch lies in each row of the global array.

    A process fills the rows of its own devices with its part of the batch, one after the other. On a mesh that follows
    a TPU's wiring these rows need not be next to each other.

    Returns:
      int64 (batch_size,), for each row the number of its image; None if row i holds image i for all i.
    """
    processes = np.array([device.process_index for device in mesh.devices.flat])
    order = np.empty(batch_size, np.int64)
    order[np.argsort(np.repeat(processes, batch_size // mesh.size), kind="stable")] = np.arange(batch_size)
    return None if (order == np.arange(batch_size)).all() else order


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose `axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def parameter_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Where parameters lie, by the table RULES.

    Args:
      shapes: tree of arrays or ShapeDtypeStructs that holds parameters.
      mesh: the mesh.

    Returns:
      the tree with a sharding in place of each array.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _parameter_sharding(path_name(path), x.shape, mesh), shapes)


def _parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    parts = mesh.shape[MODEL]
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
    if rule == WHOLE or parts == 1 or math.prod(shape) < MIN_SPLIT:
        return replicated(mesh)
    axes = [i for i in range(is_stacked(name), len(shape)) if shape[i] % parts == 0]
    axis = max(axes, key=lambda i: shape[i], default=None)
    return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))


def update_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Where the arrays lie that only the weight update touches: each of n devices keeps and updates 1/n of them.

    The optimiser's moments then cost 1/n of the memory and of the work; the gradients are summed directly into these
    parts, and the new parameters are gathered from them (arXiv 2004.13336).

    Args:
      shapes: tree of arrays or ShapeDtypeStructs whose names are, or end with, those of the parameters.
      mesh: the mesh.

    Returns:
      the tree with a sharding in place of each array. An array whose parameter is split over ``model`` is also split
      over ``data``, along the same axis or, if that is not possible, along another one. Any other array is split along
      its first axis that the number of devices divides, the axis of layers last; it is whole if there is no such axis
      or if it has fewer than MIN_SPLIT elements.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _update_sharding(path_name(path), x.shape, mesh), shapes)


def _update_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    kept = _parameter_sharding(name, shape, mesh)
    layers = is_stacked(name)
    # Where parts lie along the layers, XLA for GPUs sums gradients whole and then exchanges parts.
    order = (*range(layers, len(shape)), *range(layers))
    if kept.is_fully_replicated:
        axis = next((i for i in order if shape[i] % mesh.size == 0), None)
        if mesh.size == 1 or axis is None or math.prod(shape) < MIN_SPLIT:
            return kept
        return split(mesh, axis)
    spec: list[Any] = [*kept.spec, *[None] * (len(shape) - len(kept.spec))]
    axis = spec.index(MODEL)
    if shape[axis] % mesh.size == 0:
        spec[axis] = (MODEL, DATA)
    else:
        other = next((i for i in order if i != axis and shape[i] % mesh.shape[DATA] == 0), None)
        if other is not None:
            spec[other] = DATA
    return NamedSharding(mesh, PartitionSpec(*spec))


def layouts(shapes: Any, mesh: Mesh) -> dict[str, str]:
    """For each parameter that is split over ``model``: {name: along which axis and in how many parts}, for a log."""
    placed = names(parameter_shardings(shapes, mesh))
    split_ones = {name: at.spec for name, at in placed.items() if not at.is_fully_replicated}
    return {name: f"axis {spec.index(MODEL)} in {mesh.shape[MODEL]}" for name, spec in split_ones.items()}


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """The bytes that a tree of arrays or ShapeDtypeStructs takes on each device, given the tree of its shardings."""
    sizes = jax.tree.map(lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function that traces `function` with `mesh` set, as :func:`keep_split_by_batch` needs it."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def keep_split_by_batch(x_BND: jax.Array) -> jax.Array:
    """Keeps tokens (..., B, N, D) split over the batch if parameters are split over ``model``; else changes nothing.

    Without this, XLA may lay tokens out as the parameters are, and move activations instead of weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if MODEL not in mesh.axis_names or mesh.shape[MODEL] == 1 or x_BND.shape[-3] % mesh.size:
        return x_BND
    return jax.lax.with_sharding_constraint(x_BND, PartitionSpec(*[None] * (x_BND.ndim - 3), BATCH))


def keep_rows_split(x: jax.Array) -> jax.Array:
    """Keeps an array (B, ...) of a row per image, and its gradient, split over the batch on every mesh.

    XLA does not look through an optimization barrier to see how an array is split. Without this, what comes behind one
    is laid out as the optimiser's state is, over the channels, and each device gathers the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if MODEL not in mesh.axis_names or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch, host arrays (b, ...), on the mesh as parts of global arrays (B, ...)."""
    sharding = split(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain_micro_batches(x: Any, mesh: Mesh) -> Any:
    """Keeps A micro-batches (A, B / A, ...) split along their second axis, so that each device keeps its rows."""
    return jax.lax.with_sharding_constraint(x, split(mesh, axis=1))
