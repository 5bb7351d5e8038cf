"""MoCo v2+ (He et al., arXiv 1911.05722, eq. 1; v2: Chen et al., arXiv 2003.04297): a key among a queue of older keys.

    L = (CE([q_0 k_1, q_0 Q_1] / T, 0) + CE([q_1 k_0, q_1 Q_0] / T, 0)) / 2

with unit queries q = u(projector(features)) of the student, unit keys k of the target, and for each view v a queue Q_v
of the keys of earlier batches. The batch's keys enter the queues after the loss. This is solo-learn's; the papers take
the first term only, with one queue (config.mocov2plus.symmetric=False).

The papers shuffle images over devices, since batch norm over one device's images tells a query its key. Here batch norm
is over the global batch: config.encoder.norm_groups cuts it into groups, at random for each network and view.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, anything


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """MoCo v2+ of a validated config, for features of this width.

    Its own entries of `carried`: ``queue`` (2, Q, P) or (1, Q, P) and ``queue_place``.

    Raises:
      ConfigError: the queue's length is not a multiple of the batch size.
    """
    o, rows = config.joint, joint.require_queue(config)
    # (view of the query, view of the key) of each term; queue i holds the keys of term i.
    pairs = ((1, 0), (0, 1)) if config.mocov2plus.symmetric else ((0, 1),)

    def state(key: jax.Array) -> Own:
        queue = joint.unit(jax.random.normal(key, (len(pairs), rows, o.out)))
        return {"queue": queue, "queue_place": jnp.zeros((), jnp.int32)}

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        queries = [joint.unit(z) for z in projected]
        keys = [joint.unit(z) for z in step.target("projector", step.target_features)]
        queue, place = step.own["queue"], step.own["queue_place"]
        terms = [term(queries[a], keys[b], queue[i], o.temperature) for i, (a, b) in enumerate(pairs)]
        new = [joint.push(queue[i], place, keys[b]) for i, (_, b) in enumerate(pairs)]
        own = {"queue": jnp.stack([rows for rows, _ in new]), "queue_place": new[0][1]}
        return jnp.mean(jnp.stack(terms)), own, {"z_std": joint.spread(projected)}

    heads = {"projector": (MLP((o.hidden, o.out), norm=False, dtype=config.dtype), width)}
    return Algorithm(heads, loss, target=("encoder", "projector"), state=state)


def term(query_BP: jax.Array, key_BP: jax.Array, queue_QP: jax.Array, temperature: float) -> jax.Array:
    """The mean cross entropy of a query's own key against all rows of a queue; all rows are of length 1."""
    own_B1 = jnp.sum(query_BP * key_BP, axis=1, keepdims=True)
    logits = jnp.concatenate([own_B1, joint.similarities(query_BP, queue_QP)], axis=1) / temperature
    return joint.cross_entropy(logits, jnp.zeros(len(logits), jnp.int32))


MOCOV2PLUS = Section(
    "mocov2plus",
    "The method mocov2plus.",
    of_the_run=True,
    keys=dict(
        symmetric=Key(
            True, anything, "each view asks for the other's key (solo-learn); False: the first only (papers)"
        ),
    ),
)
