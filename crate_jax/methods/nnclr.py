"""NNCLR (Dwibedi et al., arXiv 2104.14548): an image's nearest neighbour in a queue is the positive of its other view.

    L = (CE(u(n_0) u(p_1)^T / T, diagonal) + CE(u(n_1) u(p_0)^T / T, diagonal)) / 2

with p = predictor(z), z = projector(features) and n_v the row of the queue nearest to u(z_v). Then u(z_0) of the batch
enters the queue, so that neighbours never come from the batch itself.

The paper also adds the terms with the softmax along the other axis, over neighbours for a given prediction, and finds
no difference (config.nnclr.both_axes, here as a mean over the axes); solo-learn has not.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import contrast, joint, neighbours
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, anything


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """NNCLR of a validated config, for features of this width.

    Raises:
      ConfigError: the queue's length is not a multiple of the batch size.
    """
    o, dtype, both_axes = config.joint, config.dtype, config.nnclr.both_axes

    def term(neighbour_BP: jax.Array, predicted_BP: jax.Array) -> jax.Array:
        value = contrast.info_nce(neighbour_BP, predicted_BP, o.temperature)
        return (value + contrast.info_nce(predicted_BP, neighbour_BP, o.temperature)) / 2 if both_axes else value

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        p_0, p_1 = step.student("predictor", projected)
        z_0, z_1 = map(joint.unit, projected)
        row_0, row_1 = (neighbours.nearest(step.own, z) for z in (z_0, z_1))
        queue_QP = step.own["queue"]
        value = (term(queue_QP[row_0], p_1) + term(queue_QP[row_1], p_0)) / 2
        scalars = {"z_std": joint.spread(projected), "nn_acc": neighbours.same_class(step.own, row_0, step.label)}
        return value, neighbours.pushed(step.own, z_0, step.label), scalars

    heads = {
        "projector": (MLP((o.hidden, o.hidden, o.out), last="affine", dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), dtype=dtype), o.out),
    }
    return Algorithm(heads, loss, state=neighbours.start(joint.require_queue(config), o.out))


NNCLR = Section(
    "nnclr",
    "The method nnclr.",
    of_the_run=True,
    keys=dict(
        both_axes=Key(False, anything, "also tell each prediction's neighbour among the batch's (paper)"),
    ),
)
