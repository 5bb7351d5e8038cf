"""The platform that a traced program will run on, and kernels written for that platform.

A step is traced under the mesh that it is compiled for (:func:`crate_jax.parallel.sharding.on_mesh`); the devices of
this mesh may belong to another machine. Code that is faster than XLA's own on one platform asks this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from crate_jax.parallel.sharding import BATCH


def is_tpu() -> bool:
    """Whether the program that is being traced is for TPUs."""
    return _device()[0] == "tpu"


def is_cpu() -> bool:
    """Whether the program that is being traced is for CPUs."""
    return _device()[0] == "cpu"


def is_nvidia() -> bool:
    """Whether the program that is being traced is for GPUs of NVIDIA."""
    return _of_nvidia(*_device())


def _of_nvidia(platform: str, kind: str) -> bool:
    return platform in ("gpu", "cuda") and "NVIDIA" in kind.upper()


def kernels() -> bool:
    """Whether programs may take kernels; the environment variable CRATE_JAX_KERNELS=0 leaves all to XLA.

    XLA has no Triton for GPUs before Ampere (compute capability 8.0).
    """
    _, kind = _device()
    same = (device for device in jax.local_devices() if is_nvidia() and device.device_kind == kind)
    old = any(float(getattr(device, "compute_capability", "8.0")) < 8 for device in same)
    return os.environ.get("CRATE_JAX_KERNELS", "1") != "0" and not old


def _device() -> tuple[str, str]:
    """Platform and kind of the devices of the present mesh; empty where a program is traced without one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return ("", "") if device is None else (device.platform, device.device_kind)


# Without it XLA would compute a weight's gradient part by part in a loop, and read both factors once for each chip.
TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
NVIDIA_OPTIONS: dict[str, str | bool] = {
    # Else, for GPUs without sums in bfloat16 (A100), XLA drops roundings to it, and stores tokens in float32 too.
    "xla_allow_excess_precision": False,
    # Else XLA makes each product a kernel of its own before it times cuBLAS, which then adds no bias and no residual.
    "xla_gpu_enable_triton_gemm": False,
}


LEVEL = "xla_backend_optimization_level"  # of the code that LLVM makes, 0 to 3


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """XLA's compiler options for a step on this mesh."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return TPU_OPTIONS
    return NVIDIA_OPTIONS if _of_nvidia(device.platform, device.device_kind) else {}


def options_of_one_call(mesh: Mesh) -> dict[str, str | bool | int]:
    """XLA's compiler options for a program that runs once: for CPUs, those that take less time to compile.

    Level 1 compiles the initialisation of configs/quickstart.py in half of the time that the default takes, and gives
    the same bits. A step compiled at level 1 would take 15 to 30 % longer, so the step keeps the default. If the
    variable XLA_FLAGS names a level, that level stays.
    """
    chosen = LEVEL in os.environ.get("XLA_FLAGS", "")
    return {LEVEL: 1} if mesh.devices.flat[0].platform == "cpu" and not chosen else {}


def kernel_memory() -> int:
    """The bytes of a TPU's scratch memory that a kernel's arrays may take.

    Cores up to v4 have 16 MiB, of which the compiler took up to 7 for itself; later ones have 64 or more.
    """
    return (9 if _device()[1].startswith(("TPU v2", "TPU v3", "TPU v4")) else 48) * 2**20


def images_per_device(images: int) -> int:
    """The number of a batch's images on each device of the mesh; 0 if `images` cannot be split evenly over them."""
    devices = jax.sharding.get_abstract_mesh().size
    return 0 if images % devices else images // devices


def per_device(kernel: Callable[..., Any], *arrays: jax.Array, shared: tuple[jax.Array, ...] = ()) -> Any:
    """Runs a kernel on each device's own images, since XLA cannot split a kernel.

    Args:
      kernel: the function from arrays (b, ...) of one device's images, and the shared ones, to arrays (b, ...).
      *arrays: arrays (B, ...), split over all devices of the mesh.
      shared: arrays that each device has as a whole.

    Returns:
      what the kernel returns, (B, ...) each, split in the same way.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays, *shared)
    rows = PartitionSpec(BATCH)
    # No gradient flows through the kernel and nothing is summed over devices, so check_vma is not needed.
    specs = (rows,) * len(arrays) + (PartitionSpec(),) * len(shared)
    return jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)(*arrays, *shared)
