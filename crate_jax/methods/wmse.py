"""W-MSE (Ermolov et al., arXiv 2007.06346): the distance between whitened projections of two views.

The batch is cut at random into slices. In each slice and view, with x the projections, mu and S their mean and
covariance over the slice (n - 1 in the denominator), and L L^T = (1 - eps) S + eps I:

    w = L^-1 (x - mu),    loss = mean over images of 2 - 2 cos(w_0, w_1)

Both views have the same slices, and their loss is the mean over `iterations` of them. In the paper the gradient goes
through both views; in solo-learn through the first only: wmse.gradient="first". A slice whose covariance is singular
gives a loss that is not finite: eps > 0 or larger slices help.

Shapes: B batch, P width of the projections, S slices of n images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, one_of, positive, within


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """W-MSE of a validated config, for features of this width."""
    o, options = config.joint, config.wmse
    first_only = options.gradient == "first"

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        z_BP, y_BP = projected = step.student("projector", step.features)
        terms = []
        for i in range(options.iterations):
            order_B = order(jax.vmap(jax.random.fold_in, (0, None))(step.keys, i))
            z_SnP, y_SnP = (whitened(x[order_B].reshape(-1, options.slice, o.out), options.eps) for x in (z_BP, y_BP))
            y_SnP = jax.lax.stop_gradient(y_SnP) if first_only else y_SnP
            terms.append(jnp.mean(2 - 2 * joint.cosine(z_SnP, y_SnP)))
        return jnp.mean(jnp.stack(terms)), {}, {"z_std": joint.spread(projected)}

    return Algorithm({"projector": (MLP((o.hidden, o.out), dtype=config.dtype), width)}, loss)


def order(keys_B: jax.Array) -> jax.Array:
    """A random order of the images, int32 (B,): by one number of each image's key, so that no layout changes it."""
    return jnp.argsort(jax.vmap(jax.random.bits)(keys_B))


def whitened(x_SnP: jax.Array, eps: float) -> jax.Array:
    """Projections whose covariance over each slice is the identity (if eps is 0), float32 (S, n, P)."""
    x_SnP = x_SnP.astype(jnp.float32)
    x_SnP = x_SnP - jnp.mean(x_SnP, 1, keepdims=True)
    cov_SPP = jnp.einsum("snp,snq->spq", x_SnP, x_SnP, precision="highest") / (x_SnP.shape[1] - 1)
    lower_SPP = jnp.linalg.cholesky((1 - eps) * cov_SPP + eps * jnp.eye(x_SnP.shape[2]))
    return jax.lax.linalg.triangular_solve(lower_SPP, x_SnP, lower=True, transpose_a=True)


def _check(c: ConfigDict) -> None:
    if c.wmse.slice <= c.joint.out + 1:
        raise ConfigError(
            f"config.wmse.slice={c.wmse.slice}: must exceed config.joint.out + 1 = {c.joint.out + 1}, or the "
            "covariance of a slice is singular"
        )
    if c.batch_size % c.wmse.slice:
        raise ConfigError(f"config.batch_size={c.batch_size}: must be a multiple of config.wmse.slice={c.wmse.slice}")


WMSE = Section(
    "wmse",
    "Method wmse.",
    of_the_run=True,
    check=_check,
    keys=dict(
        slice=Key(128, positive, "images that are whitened together; more than joint.out + 1"),
        iterations=Key(1, positive, "how often the batch is cut into slices"),
        eps=Key(0.0, within(0, 1, "[)"), "share of the identity in a covariance"),
        gradient=Key("both", one_of("both", "first"), "views that have a gradient: both as in the paper, or the first"),
    ),
)
