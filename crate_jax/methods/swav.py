"""SwAV (Caron et al., arXiv 2006.09882), eq. 1 to 4: a view predicts to which prototypes another view was assigned.

With s_a = z_a W^T the dot products of unit projections with K unit prototypes:

    loss = mean over large views a and all other views b of - sum_k q_a log softmax(s_b / T)
    q_a = sinkhorn(s_a), the assignments without gradient that use all prototypes equally over batch and queue

The queue of a large view holds its last projections, newest first, and enters from the epoch `queue_from` on, but not
before it is full: solo-learn's enters at its epoch, with rows of zeros if there were too few steps to fill it. The
prototypes are held in the first epochs. Differences from the paper's code: it scales the prototypes to length 1 after
each step (swav.prototype_norm="after"), where solo-learn has weight norm ("weight"); it holds them for a number of
steps.

Shapes: B batch, P width of the projections, K prototypes, Q rows of a queue, N images that are assigned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import joint
from crate_jax.methods.joint import LARGE, Algorithm, Own, Step
from crate_jax.methods.method import Params, Progress, Scalars
from crate_jax.models.projector import MLP
from crate_jax.models.prototypes import Prototypes, unit_columns
from crate_jax.validation import IF_FITS, RECORDED, Key, Section, at_least, one_of, positive


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SwAV of a validated config, for features of this width."""
    o, options = config.joint, config.swav
    renormalised = options.prototype_norm == "after"
    prototypes = Prototypes(options.prototypes, weight_norm=not renormalised)

    def state(key: jax.Array) -> Own:
        if not options.queue:
            return {}
        return {
            "queue": jnp.zeros((LARGE, options.queue, o.out)),
            "queue_enters": jnp.asarray(False),
        }

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        units = list(map(joint.unit, projected))
        scores = step.student("prototypes", units)
        targets = [assign(s, a, step) for a, s in enumerate(scores[:LARGE])]
        logs = [jax.nn.log_softmax(s / o.temperature) for s in scores]
        terms = [-jnp.mean(jnp.sum(q * log, -1)) for a, q in enumerate(targets) for b, log in enumerate(logs) if a != b]
        own = dict(step.own)
        if options.queue:
            kept = options.queue - step.index.shape[0]
            own["queue"] = jnp.concatenate([jnp.stack(units[:LARGE]), own["queue"][:, :kept]], 1)
        return jnp.mean(jnp.stack(terms)), own, {"z_std": joint.spread(projected)}

    def assign(scores_BK: jax.Array, view: int, step: Step) -> jax.Array:
        scores_BK = jax.lax.stop_gradient(scores_BK)
        balanced = lambda scores: sinkhorn(scores, options.epsilon, options.rounds)  # noqa: E731
        if not options.queue:
            return balanced(scores_BK)
        (older_QK,) = map(jax.lax.stop_gradient, step.student("prototypes", [step.own["queue"][view]]))
        return jax.lax.cond(
            step.own["queue_enters"],
            lambda: balanced(jnp.concatenate([scores_BK, older_QK]))[: scores_BK.shape[0]],
            lambda: balanced(scores_BK),
        )

    def after(params: Params, own: Own, progress: Progress) -> tuple[Params, Own]:
        if options.queue:
            epoch = progress.epochs(progress.done + 1)
            full = jnp.any(own["queue"][0, -1] != 0)  # it begins with zeros, and projections have length 1
            # A weak type would compile twice.
            own = {**own, "queue_enters": full & (epoch >= jnp.float32(options.queue_from))}
        if renormalised:
            kernel_PK = unit_columns(params["prototypes"]["kernel"])
            params = {**params, "prototypes": {**params["prototypes"], "kernel": kernel_PK}}
        return params, own

    return Algorithm(
        {"projector": (MLP((o.hidden, o.out), dtype=config.dtype), width), "prototypes": (prototypes, o.out)},
        loss,
        state=state,
        after=after,
        held=((r"prototypes/.*", options.hold_epochs),) if options.hold_epochs else (),
        small_views=True,
    )


def sinkhorn(scores_NK: jax.Array, epsilon: float, rounds: int) -> jax.Array:
    """Assignments exp(s / epsilon), scaled in turn so that each prototype and each image has its equal share.

    Eq. 4 and the algorithm of the paper's appendix, on logarithms, so that no score overflows. The last scaling is that
    of the images.

    Args:
      scores_NK: dot products (N, K), float32.
      epsilon: the smoothness; large: all assignments are equal.
      rounds: how often prototypes and images are scaled.

    Returns:
      (N, K), whose rows have the sum 1.
    """
    log_NK = scores_NK.astype(jnp.float32) / epsilon
    for _ in range(rounds):
        log_NK = log_NK - jax.nn.logsumexp(log_NK, axis=0, keepdims=True)
        log_NK = log_NK - jax.nn.logsumexp(log_NK, axis=1, keepdims=True)
    return jnp.exp(log_NK)


def _check(c: ConfigDict) -> None:
    if c.swav.queue % c.batch_size:
        raise ConfigError(
            f"config.swav.queue={c.swav.queue}: must be a multiple of config.batch_size={c.batch_size}, which enters "
            "it at each step"
        )


SWAV = Section(
    "swav",
    "Method swav.",
    of_the_run=True,
    check=_check,
    keys=dict(
        prototypes=Key(3000, positive, "number of prototypes"),
        epsilon=Key(0.05, positive, "smoothness of the assignments", resume=RECORDED),
        rounds=Key(3, positive, "how often prototypes and images are scaled to equal shares", resume=RECORDED),
        queue=Key(3840, at_least(0), "rows of each large view's queue, a multiple of batch_size; 0: no queue"),
        queue_from=Key(
            50.0, at_least(0), "the epoch, from 0, from which on the queue enters once it is full", resume=RECORDED
        ),
        hold_epochs=Key(2.0, at_least(0), "epochs at the start in which the prototypes get no update", resume=IF_FITS),
        prototype_norm=Key("weight", one_of("weight", "after"), "length 1 by weight norm, or by scaling after a step"),
    ),
)  # fmt: skip
