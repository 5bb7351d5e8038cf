"""ReSSL (Zheng et al., arXiv 2107.09282): the student keeps the relations of an image to those in a queue.

    L = H(softmax(k Q^T / T_k), softmax(q Q^T / T_q)), H(a, b) = - mean over images of sum a log b

with q = u(projector(features)) of the student's view 0, which is strongly augmented, k that of the target's view 1,
which is weakly augmented, and Q the keys of earlier batches; the image's own key is not among them. Then k of the batch
enters the queue. The target's distribution must be the sharper one: T_k < T_q.

As in solo-learn both views run through both networks; the other two passes only move the statistics of batch norm and
train the online classifier.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, positive


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """ReSSL of a validated config, for features of this width.

    Its own entries of `carried`: ``queue`` (Q, P) and ``queue_place``.

    Raises:
      ConfigError: the queue's length is not a multiple of the batch size.
    """
    o, own, rows = config.joint, config.ressl, joint.require_queue(config)

    def state(key: jax.Array) -> Own:
        return {
            "queue": joint.unit(jax.random.normal(key, (rows, o.out))),
            "queue_place": jnp.zeros((), jnp.int32),
        }

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        query_BP = joint.unit(projected[0])
        key_BP = joint.unit(step.target("projector", step.target_features)[1])
        queue_QP = step.own["queue"]
        relation_BQ = jax.nn.softmax(joint.similarities(key_BP, queue_QP) / own.target_temperature)
        logits_BQ = joint.similarities(query_BP, queue_QP) / own.student_temperature
        queue_QP, place = joint.push(queue_QP, step.own["queue_place"], key_BP)
        value = jnp.mean(optax.softmax_cross_entropy(logits_BQ, relation_BQ))
        return value, {"queue": queue_QP, "queue_place": place}, {"z_std": joint.spread(projected)}

    heads = {"projector": (MLP((o.hidden, o.out), norm=False, dtype=config.dtype), width)}
    return Algorithm(heads, loss, target=("encoder", "projector"), state=state)


def _check(c: ConfigDict) -> None:
    if c.ressl.target_temperature >= c.ressl.student_temperature:
        raise ConfigError(
            f"config.ressl.target_temperature={c.ressl.target_temperature}: must be below "
            f"config.ressl.student_temperature={c.ressl.student_temperature}"
        )


RESSL = Section(
    "ressl",
    "The method ressl.",
    of_the_run=True,
    resume=RECORDED,
    check=_check,
    keys=dict(
        student_temperature=Key(0.1, positive, "what the student's similarities are divided by, T_q"),
        target_temperature=Key(0.04, positive, "what the target's similarities are divided by, T_k; below T_q"),
    ),
)
