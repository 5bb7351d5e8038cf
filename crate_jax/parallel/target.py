"""What the program that is being traced will run on, and the kernels written for it.

A step is traced under the mesh that it is compiled for (:func:`crate_jax.parallel.sharding.on_mesh`), which
need not be of this machine's devices. Code that has something better than XLA's own for one platform asks here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from crate_jax.parallel.sharding import BATCH


def is_tpu() -> bool:
    """Whether what is being traced is for TPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"


# XLA would split a weight's gradient over the chips while computing it, in a loop reading both factors once a chip.
COMPILER_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """XLA's options for a step on this mesh."""
    return COMPILER_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}


def images_per_device(images: int) -> int:
    """How many of a batch each device of the mesh has; 0 where it cannot be split evenly, as a few pictures cannot."""
    devices = jax.sharding.get_abstract_mesh().size
    return 0 if images % devices else images // devices


def per_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Runs a kernel on each device's own images: XLA cannot split a kernel that it does not see into.

    Args:
      kernel: of arrays with a leading batch axis, to one such array.
      *arrays: (B, ...), split over all devices of the mesh that is traced for.
    """
    rows = PartitionSpec(BATCH)
    # Not differentiated through and nothing is summed over devices: what varies need not be tracked.
    split = jax.shard_map(kernel, in_specs=(rows,) * len(arrays), out_specs=rows, check_vma=False)
    return split(*arrays)
