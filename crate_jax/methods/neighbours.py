"""The queue of past projections in which the methods of nearest neighbours look for the neighbour of an image.

Its entries of `carried`: ``queue`` (Q, P) rows of length 1, ``queue_label`` int32 (Q,) the class of each row's image
(-1: unknown), ``queue_place`` int32 scalar, where the next rows are written.

Shapes: B batch, P width of the projections, Q rows of the queue.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crate_jax.methods import joint
from crate_jax.methods.joint import Own


def start(rows: int, width: int) -> Callable[[jax.Array], Own]:
    """The function key -> the queue of step 0: random directions without a class."""

    def state(key: jax.Array) -> Own:
        return {
            "queue": joint.unit(jax.random.normal(key, (rows, width))),
            "queue_label": jnp.full(rows, -1, jnp.int32),
            "queue_place": jnp.zeros((), jnp.int32),
        }

    return state


def nearest(own: Own, direction_BP: jax.Array) -> jax.Array:
    """The row of the queue with the largest cosine to each direction, int32 (B,).

    Args:
      own: the queue.
      direction_BP: (B, P), rows of length 1.
    """
    return jnp.argmax(joint.similarities(direction_BP, own["queue"]), axis=1).astype(jnp.int32)


def same_class(own: Own, row_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """The share of labelled images whose neighbour has their class; 0 without labels.

    Args:
      own: the queue.
      row_B: each image's row of the queue, int32 (B,).
      label_B: the images' classes, int32 (B,); -1: unknown.
    """
    known_B = label_B >= 0
    return jnp.sum(known_B & (own["queue_label"][row_B] == label_B)) / jnp.maximum(jnp.sum(known_B), 1)


def pushed(own: Own, direction_BP: jax.Array, label_B: jax.Array) -> Own:
    """The queue with the batch's directions (B, P) and classes (B,) in place of its oldest rows."""
    queue_QP, place = joint.push(own["queue"], own["queue_place"], direction_BP)
    label_Q, _ = joint.push(own["queue_label"], own["queue_place"], label_B)
    return {"queue": queue_QP, "queue_label": label_Q, "queue_place": place}
