"""VICReg (Bardes et al., arXiv 2105.04906), eq. 6: invariance, variance and covariance of the projections.

    loss = similarity s(z, z') + variance (v(z) + v(z')) + covariance (c(z) + c(z'))
    s = mean over all entries of (z - z')^2, v = mean_j max(0, 1 - sqrt(var_j + 1e-4)), c = sum_{i != j} cov_ij^2 / P

var and cov are those of the global batch, with B - 1 in the denominator. The authors' code takes the mean of the two
variance terms, not their sum as in the paper and in solo-learn: vicreg.variance_terms="mean".

Shapes: B batch, P width of the projections.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import three_terms, whitening
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, at_least, one_of


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """VICReg of a validated config, for features of this width."""
    o, options = config.joint, config.vicreg
    share = {"sum": 1.0, "mean": 0.5}[options.variance_terms]

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        value, scalars = three_terms.loss(projected, whitening.off_diagonal, options, share)
        return value, {}, scalars

    return Algorithm({"projector": (MLP((o.hidden, o.hidden, o.out), dtype=config.dtype), width)}, loss)


VICREG = Section(
    "vicreg",
    "Method vicreg.",
    of_the_run=True,
    keys=dict(
        similarity=Key(25.0, at_least(0), "weight of the squared differences between the views", resume=RECORDED),
        variance=Key(25.0, at_least(0), "weight of the deviations below 1", resume=RECORDED),
        covariance=Key(1.0, at_least(0), "weight of the covariances of different channels", resume=RECORDED),
        variance_terms=Key("sum", one_of("sum", "mean"), "over the views: sum as in the paper, mean as in its code"),
    ),
)
