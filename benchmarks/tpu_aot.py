"""Compiles the train step of a config for a TPU slice on a machine without TPUs, and prints the cost per chip.

    pip install "crate-jax[tpu]"
    python -m benchmarks.tpu_aot --topology=v5e:16x16 --config=configs/crate_mae.py:variant=B [--config.KEY=VALUE ...]

libtpu's compiler runs on this machine's CPU. Prints one JSON object; :mod:`benchmarks.aot` tells its keys and flags.
The bytes are those that the instructions read and write, also where the compiler keeps an array in the chip's scratch
memory (VMEM). `hbm_traffic_per_chip` leaves scratch memory out.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# Set before jax is imported: libtpu must not look for a metadata server or for chips, and JAX must not use chips.
os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once, as they share no chip
    }
)

import jax
from jax.experimental import topologies

from benchmarks import aot
from benchmarks.roofline import TPUS
from crate_jax.errors import UserError


def topology_devices(topology: str) -> list[Any]:
    """Descriptions of the devices of a slice, for the compiler.

    Raises:
      UserError: libtpu is not installed, or it does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed, and it holds the compiler for TPUs: pip install 'crate-jax[tpu]'")
    try:
        with aot.quiet():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology={topology}: libtpu does not know this slice: {str(e).splitlines()[0]}") from None


if __name__ == "__main__":
    aot.start("v5e:4x4", "Chip and shape of the slice, such as v5e:16x16 or v5p:2x2x2.", TPUS, topology_devices)
