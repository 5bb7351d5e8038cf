"""The platform that a traced program will run on, and kernels written for that platform.

A step is traced under the mesh that it is compiled for (:func:`crate_jax.parallel.sharding.on_mesh`); the devices of
this mesh may belong to another machine. Code that is faster than XLA's own on one platform asks this module.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from crate_jax.parallel.sharding import BATCH


def is_tpu() -> bool:
    """Whether the program that is being traced is for TPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"


# Without it XLA would compute a weight's gradient part by part in a loop, and read both factors once for each chip.
COMPILER_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """XLA's compiler options for a step on this mesh."""
    return COMPILER_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}


def images_per_device(images: int) -> int:
    """The number of a batch's images on each device of the mesh; 0 if `images` cannot be split evenly over them."""
    devices = jax.sharding.get_abstract_mesh().size
    return 0 if images % devices else images // devices


def per_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Runs a kernel on each device's own images, since XLA cannot split a kernel.

    Args:
      kernel: the function from arrays (b, ...) of one device's images to one array (b, ...).
      *arrays: arrays (B, ...), split over all devices of the mesh.

    Returns:
      (B, ...), split in the same way.
    """
    rows = PartitionSpec(BATCH)
    # No gradient flows through the kernel and nothing is summed over devices, so check_vma is not needed.
    split = jax.shard_map(kernel, in_specs=(rows,) * len(arrays), out_specs=rows, check_vma=False)
    return split(*arrays)
