"""VIbCReg (Lee and Aune, arXiv 2109.00783): VICReg with correlations for covariances, on whitened projections.

    loss = similarity s(z, z') + variance (v(z) + v(z')) + covariance (c(z) + c(z'))

s and v are those of VICReg; c is the mean over all P^2 pairs of channels, 0 for i = j, of their squared correlation
over the global batch. The projector has GELU and ends in IterNorm (models/iter_norm.py), which solo-learn computes per
device and this library over the global batch.

Shapes: B batch, P width of the projections.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint, three_terms
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.iter_norm import IterNorm
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, anything, at_least


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """VIbCReg of a validated config, for features of this width."""
    o, options = config.joint, config.vibcreg
    gelu = functools.partial(nn.gelu, approximate=False)
    mlp = MLP((o.hidden, o.hidden, o.out), activation=gelu, dtype=config.dtype)
    heads: dict[str, tuple[nn.Module, Any]] = {"projector": (mlp, width)}
    if options.whitening:
        heads["whitening"] = (IterNorm(), o.out)

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        if options.whitening:
            projected = step.student("whitening", projected)
        value, scalars = three_terms.loss(projected, correlation, options)
        return value, {}, scalars

    return Algorithm(heads, loss)


def correlation(z_BP: jax.Array) -> jax.Array:
    """The mean over all pairs of channels of the squared correlation, 0 for a channel with itself."""
    z_BP = joint.unit(z_BP - jnp.mean(z_BP, 0), axis=0)
    r_PP = jnp.matmul(z_BP.T, z_BP, precision="highest")
    return jnp.mean(jnp.square(r_PP) * (1 - jnp.eye(z_BP.shape[1])))


VIBCREG = Section(
    "vibcreg",
    "Method vibcreg.",
    of_the_run=True,
    keys=dict(
        similarity=Key(25.0, at_least(0), "weight of the squared differences between the views", resume=RECORDED),
        variance=Key(25.0, at_least(0), "weight of the deviations below 1", resume=RECORDED),
        covariance=Key(200.0, at_least(0), "weight of the squared correlations of different channels", resume=RECORDED),
        whitening=Key(True, anything, "IterNorm at the end of the projector"),
    ),
)
