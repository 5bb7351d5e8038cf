"""The methods, one file each, say what is optimised: pure functions without files, mesh or mutable state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from crate_jax.methods import (
    all4one,
    barlow_twins,
    byol,
    classify,
    deepclusterv2,
    dino,
    joint,
    mocov2plus,
    mocov3,
    nnbyol,
    nnclr,
    nnsiam,
    online,
    reconstruction,
    ressl,
    segment,
    simclr,
    simsiam,
    supcon,
    swav,
    vibcreg,
    vicreg,
    wmse,
)
from crate_jax.methods.method import Method
from crate_jax.validation import Section

__all__ = ["METHODS"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table of methods.

    Attributes:
      build: the function (validated config, training images) -> Method.
      parts: the names of the config sections that the method reads, among those that only some methods read.
      sections: the config sections that the method declares; other methods may read them too.
    """

    build: Callable[[ConfigDict, Any], Method]
    parts: tuple[str, ...]
    sections: tuple[Section, ...] = ()


JOINT = ("encoder", "views", "joint", "online")

METHODS: dict[str, Row] = {
    "reconstruction": Row(reconstruction.build, ("encoder", "corruption", "decoder", "loss"), reconstruction.SECTIONS),
    "byol": Row(joint.method(byol.algorithm), JOINT, (joint.JOINT, online.ONLINE)),
    "simclr": Row(joint.method(simclr.algorithm), JOINT),
    "simsiam": Row(joint.method(simsiam.algorithm), JOINT),
    "supcon": Row(joint.method(supcon.algorithm), (*JOINT, "supcon"), (supcon.SUPCON,)),
    "mocov2plus": Row(joint.method(mocov2plus.algorithm), (*JOINT, "mocov2plus"), (mocov2plus.MOCOV2PLUS,)),
    "mocov3": Row(joint.method(mocov3.algorithm), (*JOINT, "mocov3"), (mocov3.MOCOV3,)),
    "nnclr": Row(joint.method(nnclr.algorithm), (*JOINT, "nnclr"), (nnclr.NNCLR,)),
    "nnbyol": Row(joint.method(nnbyol.algorithm), JOINT),
    "nnsiam": Row(joint.method(nnsiam.algorithm), JOINT),
    "ressl": Row(joint.method(ressl.algorithm), (*JOINT, "ressl"), (ressl.RESSL,)),
    "barlow_twins": Row(joint.method(barlow_twins.algorithm), (*JOINT, "barlow_twins"), (barlow_twins.BARLOW_TWINS,)),
    "vicreg": Row(joint.method(vicreg.algorithm), (*JOINT, "vicreg"), (vicreg.VICREG,)),
    "vibcreg": Row(joint.method(vibcreg.algorithm), (*JOINT, "vibcreg"), (vibcreg.VIBCREG,)),
    "wmse": Row(joint.method(wmse.algorithm), (*JOINT, "wmse"), (wmse.WMSE,)),
    "dino": Row(joint.method(dino.algorithm), (*JOINT, "dino"), (dino.DINO,)),
    "swav": Row(joint.method(swav.algorithm), (*JOINT, "swav"), (swav.SWAV,)),
    "deepclusterv2": Row(
        joint.method(deepclusterv2.algorithm), (*JOINT, "deepclusterv2"), (deepclusterv2.DEEPCLUSTERV2,)
    ),
    "all4one": Row(joint.method(all4one.algorithm), (*JOINT, "all4one"), (all4one.ALL4ONE,)),
    "classify": Row(classify.build, ("encoder", "finetune"), classify.SECTIONS),
    "segment": Row(segment.build, ("encoder", "finetune", "segment"), segment.SECTIONS),
}
