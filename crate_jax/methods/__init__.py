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
      keys: the keys that the method reads, among those that only some readers of their section read, such as joint.tau.
    """

    build: Callable[[ConfigDict, Any], Method]
    parts: tuple[str, ...]
    sections: tuple[Section, ...] = ()
    keys: tuple[str, ...] = ()


JOINT = ("encoder", "views", "joint", "online")
SLOW = ("joint.tau", "joint.tau_final", "joint.judged")  # what a slow copy of networks reads
PREDICTOR, TEMPERATURE, QUEUE = "joint.predictor_hidden", "joint.temperature", "joint.queue"

METHODS: dict[str, Row] = {
    "reconstruction": Row(reconstruction.build, ("encoder", "corruption", "decoder", "loss"), reconstruction.SECTIONS),
    "byol": Row(joint.method(byol.algorithm), JOINT, (joint.JOINT, online.ONLINE), keys=(PREDICTOR, *SLOW)),
    "simclr": Row(joint.method(simclr.algorithm), JOINT, keys=(TEMPERATURE,)),
    "simsiam": Row(joint.method(simsiam.algorithm), JOINT, keys=(PREDICTOR,)),
    "supcon": Row(joint.method(supcon.algorithm), (*JOINT, "supcon"), (supcon.SUPCON,), keys=(TEMPERATURE,)),
    "mocov2plus": Row(
        joint.method(mocov2plus.algorithm),
        (*JOINT, "mocov2plus"),
        (mocov2plus.MOCOV2PLUS,),
        keys=(*SLOW, TEMPERATURE, QUEUE),
    ),
    "mocov3": Row(
        joint.method(mocov3.algorithm), (*JOINT, "mocov3"), (mocov3.MOCOV3,), keys=(PREDICTOR, *SLOW, TEMPERATURE)
    ),
    "nnclr": Row(
        joint.method(nnclr.algorithm), (*JOINT, "nnclr"), (nnclr.NNCLR,), keys=(PREDICTOR, TEMPERATURE, QUEUE)
    ),
    "nnbyol": Row(joint.method(nnbyol.algorithm), JOINT, keys=(PREDICTOR, *SLOW, QUEUE)),
    "nnsiam": Row(joint.method(nnsiam.algorithm), JOINT, keys=(PREDICTOR, QUEUE)),
    "ressl": Row(joint.method(ressl.algorithm), (*JOINT, "ressl"), (ressl.RESSL,), keys=(*SLOW, QUEUE)),
    "barlow_twins": Row(joint.method(barlow_twins.algorithm), (*JOINT, "barlow_twins"), (barlow_twins.BARLOW_TWINS,)),
    "vicreg": Row(joint.method(vicreg.algorithm), (*JOINT, "vicreg"), (vicreg.VICREG,)),
    "vibcreg": Row(joint.method(vibcreg.algorithm), (*JOINT, "vibcreg"), (vibcreg.VIBCREG,)),
    "wmse": Row(joint.method(wmse.algorithm), (*JOINT, "wmse"), (wmse.WMSE,)),
    "dino": Row(joint.method(dino.algorithm), (*JOINT, "dino"), (dino.DINO,), keys=SLOW),
    "swav": Row(joint.method(swav.algorithm), (*JOINT, "swav"), (swav.SWAV,), keys=(TEMPERATURE,)),
    "deepclusterv2": Row(
        joint.method(deepclusterv2.algorithm),
        (*JOINT, "deepclusterv2"),
        (deepclusterv2.DEEPCLUSTERV2,),
        keys=(TEMPERATURE,),
    ),
    "all4one": Row(
        joint.method(all4one.algorithm),
        (*JOINT, "all4one"),
        (all4one.ALL4ONE,),
        keys=(PREDICTOR, *SLOW, TEMPERATURE, QUEUE),
    ),
    "classify": Row(classify.build, ("encoder", "finetune"), classify.SECTIONS),
    "segment": Row(segment.build, ("encoder", "finetune", "segment"), segment.SECTIONS),
}
