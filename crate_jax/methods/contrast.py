"""Losses that tell an image's projection from those of other images.

Sums of exponentials are taken as log-sum-exp in float32: a temperature of 0.01 neither overflows nor gives NaN.

Shapes: B batch, N rows of all views, P width of the projections.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crate_jax.methods import joint


def nt_xent(projections_NP: jax.Array, id_N: jax.Array, temperature: float, outside: bool = False) -> jax.Array:
    """- mean over rows of log(sum over positives / (sum over positives + sum over negatives)) of exp(cos / T).

    With more than two views, or several images of a class, the sum over positives stands inside the logarithm, as in
    solo-learn; with one positive per row it is NT-Xent (arXiv 2002.05709, eq. 1).

    Args:
      projections_NP: the projections of all views (N, P).
      id_N: what makes rows positives: equal numbers, int32 (N,). Each row needs another one with its number.
      temperature: T.
      outside: each row takes the mean over its positives outside the logarithm (arXiv 2004.11362, eq. 2).
    """
    z_NP = joint.unit(projections_NP)
    logits_NN = joint.similarities(z_NP, z_NP) / temperature
    itself_NN = jnp.eye(len(id_N), dtype=bool)
    positive_NN = (id_N[:, None] == id_N[None]) & ~itself_NN
    all_N = jax.nn.logsumexp(jnp.where(itself_NN, -jnp.inf, logits_NN), axis=1)
    if outside:
        positive_N = jnp.mean(logits_NN, axis=1, where=positive_NN)
    else:
        positive_N = jax.nn.logsumexp(jnp.where(positive_NN, logits_NN, -jnp.inf), axis=1)
    return jnp.mean(all_N - positive_N)


def info_nce(query_BP: jax.Array, key_BP: jax.Array, temperature: float) -> jax.Array:
    """The mean cross entropy of cos(query, key) / T over all keys of the batch; row i's own key is key i.

    Args:
      query_BP: (B, P), of any length.
      key_BP: (B, P), of any length.
      temperature: T.
    """
    logits_BB = joint.similarities(joint.unit(query_BP), joint.unit(key_BP)) / temperature
    return joint.cross_entropy(logits_BB, jnp.arange(len(logits_BB)))
