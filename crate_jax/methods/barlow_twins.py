"""Barlow Twins (Zbontar et al., arXiv 2103.03230), eq. 1 and 2: the two views' channels correlate one to one.

With z^ the projections of a view, each channel with mean 0 and variance 1 over the batch, and C = z^_0^T z^_1 / B:

    loss = scale (sum_i (C_ii - 1)^2 + lamb sum_{i != j} C_ij^2)

C is that of the global batch. The paper's eq. 1 has no `scale`; its code has 0.024, with lamb 0.005 and projections of
8192 channels. The defaults are solo-learn's for CIFAR and 2048 channels.

Shapes: B batch, P width of the projections.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.batch_norm import EPS
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, at_least, positive


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """Barlow Twins of a validated config, for features of this width."""
    o, options = config.joint, config.barlow_twins

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        z_BP, y_BP = projected = step.student("projector", step.features)
        value = options.scale * redundancy(standardised(z_BP), standardised(y_BP), options.lamb)
        return value, {}, {"z_std": joint.spread(projected)}

    return Algorithm({"projector": (MLP((o.hidden, o.hidden, o.out), dtype=config.dtype), width)}, loss)


def standardised(z_BP: jax.Array) -> jax.Array:
    """Channels with mean 0 and (biased) variance 1 over the batch, as batch norm without scale and bias."""
    centred_BP = z_BP - jnp.mean(z_BP, 0)
    return centred_BP * jax.lax.rsqrt(jnp.mean(jnp.square(centred_BP), 0) + EPS)


def redundancy(z_BP: jax.Array, y_BP: jax.Array, lamb: float) -> jax.Array:
    """sum_i (C_ii - 1)^2 + lamb sum_{i != j} C_ij^2 of standardised channels."""
    C_PP = jnp.matmul(z_BP.T, y_BP, precision="highest") / z_BP.shape[0]
    eye_PP = jnp.eye(C_PP.shape[0])
    return jnp.sum(jnp.square(C_PP - eye_PP) * jnp.where(eye_PP > 0, 1.0, lamb))


BARLOW_TWINS = Section(
    "barlow_twins",
    "Method barlow_twins.",
    of_the_run=True,
    resume=RECORDED,
    keys=dict(
        lamb=Key(0.0051, at_least(0), "weight of the correlations of different channels"),
        scale=Key(0.1, positive, "what the whole loss is multiplied by"),
    ),
)
