"""NNBYOL (solo-learn; no paper): BYOL whose targets are nearest neighbours, in a queue, of the target's projections.

    L = [2 - 2 cos(p_0, n_1)] + [2 - 2 cos(p_1, n_0)]

with p = predictor(projector(features)) of the student and n_v the row of the queue nearest to u(z'_v), the target's
projection of view v. Then u(z'_0) of the batch enters the queue, so that neighbours never come from the batch itself.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint, neighbours
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """NNBYOL of a validated config, for features of this width.

    Raises:
      ConfigError: the queue's length is not a multiple of the batch size.
    """
    o, dtype = config.joint, config.dtype
    heads = {
        "projector": (MLP((o.hidden, o.out), dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), dtype=dtype), o.out),
    }
    state = neighbours.start(joint.require_queue(config), o.out)
    return Algorithm(heads, loss, target=("encoder", "projector"), state=state)


def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
    """A sum of two batch means, in 0..8."""
    projected = step.student("projector", step.features)
    p_0, p_1 = step.student("predictor", projected)
    z_0, z_1 = map(joint.unit, step.target("projector", step.target_features))
    row_0, row_1 = (neighbours.nearest(step.own, z) for z in (z_0, z_1))
    n_0, n_1 = step.own["queue"][row_0], step.own["queue"][row_1]
    value = (2 - 2 * joint.cosine(p_0, n_1)).mean() + (2 - 2 * joint.cosine(p_1, n_0)).mean()
    scalars = {"z_std": joint.spread(projected), "nn_acc": neighbours.same_class(step.own, row_0, step.label)}
    return value, neighbours.pushed(step.own, z_0, step.label), scalars
