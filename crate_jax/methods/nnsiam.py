"""NNSiam (solo-learn; no paper): SimSiam whose targets are nearest neighbours, in a queue, of the projections.

    L = -(cos(p_0, n_1) + cos(p_1, n_0)) / 2

with p = predictor(z), z = projector(features) and n_v the row of the queue nearest to u(z_v). Then u(z_0) of the batch
enters the queue, so that neighbours never come from the batch itself. Heads and rates are SimSiam's: the bias of the
projector's last linear layer keeps its first value, the predictor's rate is constant (config.optimizer.constant_lr).
"""

from __future__ import annotations

import math

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint, neighbours
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """NNSiam of a validated config, for features of this width.

    Raises:
      ConfigError: the queue's length is not a multiple of the batch size.
    """
    o, dtype = config.joint, config.dtype
    heads = {
        "projector": (MLP((o.hidden, o.hidden, o.out), last="plain", hidden_bias=False, dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), hidden_bias=False, dtype=dtype), o.out),
    }
    state = neighbours.start(joint.require_queue(config), o.out)
    return Algorithm(heads, loss, state=state, held=((r"projector/layer2/bias", math.inf),))


def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
    """A mean over views and images, in -1..1."""
    projected = step.student("projector", step.features)
    p_0, p_1 = step.student("predictor", projected)
    z_0, z_1 = map(joint.unit, projected)
    row_0, row_1 = (neighbours.nearest(step.own, z) for z in (z_0, z_1))
    n_0, n_1 = step.own["queue"][row_0], step.own["queue"][row_1]
    value = -(joint.cosine(p_0, n_1).mean() + joint.cosine(p_1, n_0).mean()) / 2
    scalars = {"z_std": joint.spread(projected), "nn_acc": neighbours.same_class(step.own, row_0, step.label)}
    return value, neighbours.pushed(step.own, z_0, step.label), scalars
