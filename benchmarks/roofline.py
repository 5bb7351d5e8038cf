"""The shortest time that a program can take on a chip, from its FLOPs and bytes and the chip's published figures."""

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


@dataclasses.dataclass(frozen=True)
class Family:
    """The chips that one compiler knows, and how their topologies are written."""

    chips: dict[str, Chip]
    sides: tuple[int, ...]  # the numbers of sides that a shape may have
    example: str


TPUS = Family(
    {
        "v5e": Chip(197e12, 819e9, 16e9, "https://cloud.google.com/tpu/docs/v5e, key chip specifications"),
        "v5p": Chip(459e12, 2765e9, 95e9, "https://cloud.google.com/tpu/docs/v5p, key chip specifications"),
        "v6e": Chip(918e12, 1638e9, 32e9, "https://cloud.google.com/tpu/docs/v6e, key chip specifications"),
    },
    (2, 3),
    "v5e:4x4",
)
# SXM modules. NVIDIA publishes FLOP/s "with sparsity" for all but the A100: twice those of dense products, which count.
GPUS = Family(
    {
        "a100": Chip(312e12, 2039e9, 80e9, "https://www.nvidia.com/en-us/data-center/a100, A100 80GB SXM"),
        "h100": Chip(989e12, 3350e9, 80e9, "https://www.nvidia.com/en-us/data-center/h100, SXM, half of 1979 TFLOPS"),
        "h200": Chip(989e12, 4800e9, 141e9, "https://www.nvidia.com/en-us/data-center/h200, SXM, half of 1979 TFLOPS"),
        "b200": Chip(
            2250e12,
            8000e9,
            180e9,
            "https://www.nvidia.com/en-us/data-center, of 8: hgx, half of 36 PFLOPS; dgx-b200, 64 TB/s, 1440 GB",
        ),
    },
    (3,),
    "h100:1x1x8",
)


def chip_of(topology: str, family: Family) -> tuple[Chip, int]:
    """The chip of a topology such as v5e:16x16, and the number of chips.

    Raises:
      UserError: the topology has another form, or the chip is not in the family.

    >>> chip_of("v5e:4x8", TPUS)[1]
    32
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    sides = [int(side) for side in match.group(2).split("x")] if match else []
    if match is None or match.group(1) not in family.chips or len(sides) not in family.sides:
        raise UserError(
            f"--topology={topology}: must be a chip ({', '.join(family.chips)}) and a shape, such as {family.example}"
        )
    return family.chips[match.group(1)], math.prod(sides)


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
