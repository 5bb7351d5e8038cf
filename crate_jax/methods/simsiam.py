"""SimSiam (Chen and He, arXiv 2011.10566), eq. 4: each view predicts the other's projection, without a slow copy.

    L = -(cos(p_0, sg z_1) + cos(p_1, sg z_0)) / 2 with z = projector(features), p = predictor(z), sg: stop gradient.

As in the authors' code and solo-learn a linear layer before batch norm has no bias, but the projector's last has one
that keeps its first value, and the batch norm after it has no scale and bias. The predictor's rate is constant in the
paper: config.optimizer.constant_lr.
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


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SimSiam of a validated config, for features of this width."""
    o, dtype = config.joint, config.dtype
    heads = {
        "projector": (MLP((o.hidden, o.hidden, o.out), last="plain", hidden_bias=False, dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), hidden_bias=False, dtype=dtype), o.out),
    }
    return Algorithm(heads, loss, held=((r"projector/layer2/bias", math.inf),))


def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
    """Eq. 4, in -1..1."""
    projected = step.student("projector", step.features)
    (p_0, p_1), (z_0, z_1) = step.student("predictor", projected), jax.lax.stop_gradient(projected)
    value = -(joint.cosine(p_0, z_1).mean() + joint.cosine(p_1, z_0).mean()) / 2
    return value, {}, {"z_std": joint.spread(projected)}
