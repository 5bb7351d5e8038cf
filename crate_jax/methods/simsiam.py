"""SimSiam (Chen and He, arXiv 2011.10566), eq. 4: each view predicts the other's projection; no slow copy, no negatives.

    L = -(cos(p_0, sg z_1) + cos(p_1, sg z_0)) / 2 with z = projector(features), p = predictor(z), sg: stop gradient.

As in the authors' code and solo-learn the bias of the projector's last linear layer keeps its first value: batch norm
follows it. The authors' last batch norm has no scale and bias, solo-learn's has (config.simsiam.projector_affine).
The predictor's rate is constant in the paper: config.optimizer.constant_lr.
"""

from __future__ import annotations

import math

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, anything


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SimSiam of a validated config, for features of this width."""
    o, dtype = config.joint, config.dtype
    last = "affine" if config.simsiam.projector_affine else "plain"
    heads = {
        "projector": (MLP((o.hidden, o.hidden, o.out), last=last, dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), dtype=dtype), o.out),
    }
    return Algorithm(heads, loss, held=((r"projector/layer2/bias", math.inf),))


def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
    """Eq. 4, in -1..1."""
    projected = step.student("projector", step.features)
    (p_0, p_1), (z_0, z_1) = step.student("predictor", projected), jax.lax.stop_gradient(projected)
    value = -(joint.cosine(p_0, z_1).mean() + joint.cosine(p_1, z_0).mean()) / 2
    return value, {}, {"z_std": joint.spread(projected)}


SIMSIAM = Section(
    "simsiam",
    "The method simsiam.",
    of_the_run=True,
    keys=dict(
        projector_affine=Key(
            True, anything, "scale and bias in the projector's last batch norm (solo-learn); False: none (authors)"
        ),
    ),
)
