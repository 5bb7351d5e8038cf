"""The loss of VICReg and VIbCReg: invariance, variance and a third term that each method defines.

Shapes: B batch, P width of the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.methods import joint
from crate_jax.methods.method import Scalars
from crate_jax.methods.whitening import hinge


def loss(
    projected: Sequence[jax.Array],
    covariance: Callable[[jax.Array], jax.Array],
    options: ConfigDict,
    share: float = 1.0,
) -> tuple[jax.Array, Scalars]:
    """The weighted sum of three terms, and the terms.

    It is similarity s(z, z') + variance (v(z) + v(z')) + covariance (c(z) + c(z')). s is the mean over all
    entries of (z - z')^2, v is :func:`crate_jax.methods.whitening.hinge`.

    Args:
      projected: z and z', each (B, P).
      covariance: c.
      options: the weights ``similarity``, ``variance`` and ``covariance``.
      share: the factor on the sum of the two variance terms.
    """
    one_BP, two_BP = projected
    similarity = jnp.mean(jnp.square(one_BP - two_BP))
    variance = share * (hinge(one_BP) + hinge(two_BP))
    third = covariance(one_BP) + covariance(two_BP)
    value = options.similarity * similarity + options.variance * variance + options.covariance * third
    terms = {"similarity": similarity, "variance": variance, "covariance": third}
    return value, {**terms, "z_std": joint.spread(projected)}
