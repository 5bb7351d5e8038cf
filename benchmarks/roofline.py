"""The shortest time that a program can take on a TPU, from its FLOPs and bytes and the chip's published figures."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from crate_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    flops: float  # bfloat16 operations per second
    bandwidth: float  # bytes of HBM per second
    hbm: float  # bytes
    source: str


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, "https://cloud.google.com/tpu/docs/v5e, key chip specifications"),
    "v5p": Chip(459e12, 2765e9, 95e9, "https://cloud.google.com/tpu/docs/v5p, key chip specifications"),
    "v6e": Chip(918e12, 1638e9, 32e9, "https://cloud.google.com/tpu/docs/v6e, key chip specifications"),
}


def chip_of(topology: str) -> tuple[Chip, int]:
    """The chip of a topology such as v5e:16x16, and the number of chips.

    Raises:
      UserError: the topology has another form, or the chip is not in CHIPS.

    >>> chip_of("v5e:4x8")[1]
    32
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", topology)
    if match is None or match.group(1) not in CHIPS:
        raise UserError(f"--topology={topology}: must be a chip ({', '.join(CHIPS)}) and a shape, such as v5e:4x4")
    return CHIPS[match.group(1)], math.prod(int(side) for side in match.group(2).split("x"))


def roofline(chip: Chip, flops: float, moved: float, images: float) -> dict[str, Any]:
    """The bound on a step of `flops` and `moved` bytes, and the images per second that the bound allows.

    Args:
      chip: the chip's figures.
      flops: FLOPs of a step per chip.
      moved: bytes that a step moves per chip.
      images: images of a step per chip.
    """
    compute, memory = flops / chip.flops, moved / chip.bandwidth
    return {
        "flop_time_ms": compute * 1e3,
        "bytes_time_ms": memory * 1e3,
        "bytes_time_over_flop_time": memory / compute,
        "bound_by": "bytes" if memory > compute else "FLOPs",
        "roofline_images_per_sec": images / max(compute, memory),
    }
