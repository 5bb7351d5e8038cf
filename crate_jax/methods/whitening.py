"""Whitening of features by VICReg's terms (Bardes et al., arXiv 2105.04906, eq. 1 and 3 to 4), also as a penalty.

    whitening(z) = variance v(z) + c(z)
    v = mean_j max(0, 1 - sqrt(var_j + 1e-4)), c = sum_{i != j} cov_ij^2 / P

var and cov are those of the global batch, with B - 1 in the denominator. arXiv 2411.00392 compares its penalties on
weights with such a one on features. It is added here to any method's loss by config.penalty.name="whiten", on the
representation of each large view; in reconstruction, on the pooled output of the encoder for the corrupted image.
Without v the features of a method that only reads directions, such as BYOL's, could
shrink instead of losing their correlations.

Shapes: B batch, P width.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.methods.method import Scalars


def hinge(z_BP: jax.Array) -> jax.Array:
    """The mean over channels of max(0, 1 - deviation over the batch), where the variance has 1e-4 added."""
    return jnp.mean(nn.relu(1 - jnp.sqrt(jnp.var(z_BP, axis=0, ddof=1) + 1e-4)))


def off_diagonal(z_BP: jax.Array) -> jax.Array:
    """The sum of the squared covariances of different channels, over P."""
    count, width = z_BP.shape
    z_BP = z_BP - jnp.mean(z_BP, 0)
    cov_PP = jnp.matmul(z_BP.T, z_BP, precision="highest") / (count - 1)
    return jnp.sum(jnp.square(cov_PP) * (1 - jnp.eye(width))) / width


def is_asked(config: ConfigDict) -> bool:
    """Whether a method must add :func:`penalty` to its loss."""
    return config.penalty.name == "whiten"


def penalty(views: Sequence[jax.Array], config: ConfigDict) -> tuple[jax.Array, Scalars]:
    """The penalty times its weight, as a mean over views, and the scalars to log.

    Args:
      views: for each view its representations (B, P) float32.
      config: the whole config.
    """
    options = config.penalty
    value = jnp.mean(jnp.stack([options.variance * hinge(z_BP) + off_diagonal(z_BP) for z_BP in views]))
    return options.weight * value, {"penalty": value}
