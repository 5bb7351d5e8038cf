"""SimCLR (Chen et al., arXiv 2002.05709), NT-Xent: the other views of an image against all views of other images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SimCLR of a validated config, for features of this width; views of the same image are positives."""
    o = config.joint

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        ids = jnp.tile(step.index, len(projected))
        return nt_xent(jnp.concatenate(projected), ids, o.temperature), {}, {"z_std": joint.spread(projected)}

    heads = {"projector": (MLP((o.hidden, o.out), norm=False, dtype=config.dtype), width)}
    return Algorithm(heads, loss, small_views=True)


def nt_xent(projections_NP: jax.Array, id_N: jax.Array, temperature: float) -> jax.Array:
    """- mean over rows of log(sum over positives / (sum over positives + sum over negatives)) of exp(cos / T).

    With more than two views the sum over positives stands inside the logarithm, as in solo-learn; with two it is eq. 1
    of the paper.

    Args:
      projections_NP: the projections of all views (N, P).
      id_N: what makes rows positives: equal numbers, int32 (N,).
      temperature: T.
    """
    z_NP = joint.unit(projections_NP)
    logits_NN = z_NP @ z_NP.T / temperature
    same_NN = id_N[:, None] == id_N[None]
    itself_NN = jnp.eye(len(id_N), dtype=bool)
    positive_N = jax.nn.logsumexp(jnp.where(same_NN & ~itself_NN, logits_NN, -jnp.inf), axis=1)
    all_N = jax.nn.logsumexp(jnp.where(itself_NN, -jnp.inf, logits_NN), axis=1)
    return jnp.mean(all_N - positive_N)
