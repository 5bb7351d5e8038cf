"""Compiles the train step of a config for NVIDIA GPUs on a machine without one, and prints the cost per GPU.

    pip install "crate-jax[cuda12]"
    python -m benchmarks.gpu_aot --topology=h100:1x1x8 --config=configs/crate_mae.py:variant=B [--config.KEY=VALUE ...]

A topology is a GPU and three sides: groups of hosts, hosts of a group, GPUs of a host. XLA of JAX's CUDA plug-in
compiles on this machine's CPU for a GPU that it knows from a description. No GPU and no driver is needed. Prints one
JSON object; :mod:`benchmarks.aot` tells its keys and flags. Calls of cuBLAS and cuDNN and kernels of Triton cost their
operands and results, each read or written once, and the FLOPs of :mod:`benchmarks.hlo_products`. Workspaces do not
count. `hbm_traffic_per_chip` is `bytes_per_chip`: a program does not tell what stays in the GPU's caches.

What differs from a program that is compiled on the GPU itself: nothing is autotuned, as this needs the GPU. Matrix
products are cuBLAS calls; with the GPU at hand XLA would time them against Triton kernels of its own, and without
timing it picks tiles for these that are often bad, or none at all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

# Set before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU that is there must not be used
os.environ["XLA_FLAGS"] = (  # those that are given come last and win
    f"--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false {os.environ.get('XLA_FLAGS', '')}"
)

import jax
from jax.experimental import topologies

from benchmarks import aot
from benchmarks.roofline import GPUS
from crate_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Description:
    """What XLA's compiler must know of a GPU: its properties as CUDA reports them.

    The values are those of XLA's own descriptions, github.com/openxla/xla, xla/backends/gpu/target_config/specs.
    """

    name: str
    capability: str  # of CUDA, as text of XLA's proto
    cores: int  # streaming multiprocessors
    fpus: int  # per core
    shared: int  # bytes of shared memory per core
    shared_optin: int  # bytes of it that one block may take
    l2: int  # bytes
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes per second


_HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"
DESCRIPTIONS = {  # a100_sxm_80, h100_sxm, h200, b200
    "a100": Description(
        "NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000
    ),
    "h100": Description(
        "NVIDIA H100 80GB HBM3", _HOPPER, 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000
    ),
    "h200": Description(
        "NVIDIA H200 141GB HBM3e", _HOPPER, 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000
    ),
    "b200": Description(
        "NVIDIA B200", "major: 10 feature_extension: ACCELERATED_FEATURES", 148, 128, 233472, 232448, 132644864, 1.965,
        191514411008, 7672320000000,
    ),
}  # fmt: skip
RUNTIMES = {"jax_cuda12_plugin": "major: 12 minor: 9", "jax_cuda13_plugin": "major: 13"}  # plug-in -> CUDA


def target_config(gpu: Description, runtime: str) -> str:
    """The description as text of XLA's GpuTargetConfigProto, with cuDNN 9.10 and a CUDA runtime."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared_optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ {runtime} }}
device_description_str: "{gpu.name}"
"""


def topology_devices(topology: str) -> list[Any]:
    """Descriptions of the GPUs of a topology such as h100:1x1x8, for the compiler.

    Raises:
      UserError: JAX's CUDA plug-in is not installed, or it refuses the topology.
    """
    plugin = next((name for name in RUNTIMES if importlib.util.find_spec(name)), None)
    if plugin is None:
        raise UserError(
            "JAX's CUDA plug-in is not installed, and it holds the compiler for GPUs: pip install 'crate-jax[cuda12]'"
        )
    gpu, shape = topology.split(":")
    config = target_config(DESCRIPTIONS[gpu], RUNTIMES[plugin])
    try:
        with aot.quiet():
            described = topologies.get_topology_desc(
                platform="cuda", topology_name=gpu, topology=shape, target_config=config
            )
            return list(described.devices)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology={topology}: XLA refuses it: {str(e).splitlines()[0]}") from None


if __name__ == "__main__":
    meaning = "GPU and shape, groups of hosts x hosts x GPUs, such as h100:1x8x8."
    aot.start("h100:1x1x8", meaning, GPUS, topology_devices)
