"""MoCo v3 (Chen, Xie and He, arXiv 2104.02057), eq. 1 and algorithm 1: each view's key among the batch's keys.

    L = 2 T [CE(u(p_0) u(z'_1)^T / T, diagonal) + CE(u(p_1) u(z'_0)^T / T, diagonal)]

with p = predictor(projector(features)) of the student and z' = projector(features) of the target. The factor 2 T stands
in the paper's algorithm 1 and in both codes, not in its eq. 1 (config.mocov3.scale="1").

The paper's ViT keeps its random patch embedding (config.mocov3.freeze_patch_embedding); solo-learn trains it.
"""

from __future__ import annotations

import math

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import contrast, joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models import ENCODERS
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, anything, one_of


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """MoCo v3 of a validated config, for features of this width."""
    o, own = config.joint, config.mocov3
    factor = 2 * o.temperature if own.scale == "2t" else 1.0

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        p_0, p_1 = step.student("predictor", projected)
        k_0, k_1 = step.target("projector", step.target_features)
        terms = contrast.info_nce(p_0, k_1, o.temperature) + contrast.info_nce(p_1, k_0, o.temperature)
        return factor * terms, {}, {"z_std": joint.spread(projected)}

    held = ((r"encoder/embedding/patch_embed/.*", math.inf),) if own.freeze_patch_embedding else ()
    return Algorithm(heads(config, width), loss, target=("encoder", "projector"), held=held)


def heads(config: ConfigDict, width: int) -> dict[str, tuple[MLP, int]]:
    """Projector and predictor without biases; after a ViT they have one layer and one batch norm more."""
    o, kind = config.joint, config.mocov3.heads
    deep = kind == "vit" or (kind == "auto" and not _is_resnet(config))
    projector = (o.hidden, o.hidden, o.out) if deep else (o.hidden, o.out)
    return {
        "projector": (MLP(projector, last="plain", bias=False, dtype=config.dtype), width),
        "predictor": (
            MLP((o.predictor_hidden, o.out), last="plain" if deep else "none", bias=False, dtype=config.dtype),
            o.out,
        ),
    }


def _is_resnet(config: ConfigDict) -> bool:
    return not ENCODERS[config.encoder.name].patches


def _check(c: ConfigDict) -> None:
    if c.mocov3.freeze_patch_embedding and _is_resnet(c):
        raise ConfigError(
            f"config.mocov3.freeze_patch_embedding=True: must be False, since config.encoder.name={c.encoder.name!r} "
            "has no patch embedding"
        )


MOCOV3 = Section(
    "mocov3",
    "The method mocov3.",
    of_the_run=True,
    check=_check,
    keys=dict(
        heads=Key("auto", one_of("auto", "resnet", "vit"), "depth of the heads; auto: by the encoder"),
        scale=Key("2t", one_of("2t", "1"), "factor of the loss: 2 * temperature (algorithm 1, codes) or 1 (eq. 1)"),
        freeze_patch_embedding=Key(False, anything, "the patch embedding stays as it was drawn (paper's ViT)"),
    ),
)
