"""All4One (Estepa et al., arXiv 2303.09417): contrast of neighbours, of mixed neighbours, and of features.

With z_v the student's and z'_v the target's projections of view v, p_v and o_v two predictors of z_v, and n_v the five
rows of the queue nearest to u(z'_v), nearest first, before this step's rows enter:

    loss = (attention + neighbours + 10 feature) / 2
    neighbours = (nce(n_0[0], p_1; T) + nce(n_1[0], p_0; T)) / 2, NNCLR's loss
    attention = (nce(r_0, s_1; T_a) + nce(r_1, s_0; T_a)) / 2, r_v = f(n_v + e), s_v = f([o_v, n_v[:4]] + e)
    feature = (root mean square of C_ii - 1 + root mean square of C_ij, i != j, over C_0 and C_1) / 2,
              C_0 = c(u(z'_0))^T c(z_1) and C_1 = c(u(z'_1))^T c(z_0)

f is the first token of a small transformer, e a table of sines, c scales each channel to length 1 over the batch
(without centring it), nce(a, b; T) the cross entropy of u(a) u(b)^T / T and the diagonal. As in solo-learn: T_a is 0.1
whatever T is, e depends on the place in the vector more than on the token, and projector and first predictor run twice
per view, so that their running statistics, which nothing reads, move twice. u(z'_0) enters the queue.

Shapes: B batch, P width of the projections, Q rows of the queue, N = 5 neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import contrast, joint, neighbours
from crate_jax.methods.joint import LARGE, Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.post_norm import PostNorm
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, positive, within

NEIGHBOURS = 5
HEADS = 8  # of the transformer
SMALLEST = 1e-12  # mean square below which the root has no slope


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """All4One of a validated config, for features of this width.

    Raises:
      ConfigError: the queue is not a multiple of the batch size, or has too few rows.
    """
    o, options, queue = config.joint, config.all4one, joint.require_queue(config)
    if queue < NEIGHBOURS:
        raise ConfigError(f"config.joint.queue={queue}: must be at least {NEIGHBOURS}, the neighbours of an image")
    place_NP = jnp.asarray(positions(NEIGHBOURS, o.out), jnp.float32)

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        step.student("predictor", step.student("projector", step.features))  # moves the statistics, see above
        projected = step.student("projector", step.features)
        predicted = step.student("predictor", projected)
        odd = step.student("predictor2", projected)
        slow = list(map(joint.unit, step.target("projector", step.target_features)))
        rows = [jax.lax.top_k(joint.similarities(z_BP, step.own["queue"]), NEIGHBOURS)[1] for z_BP in slow]
        near = [step.own["queue"][row_BN] for row_BN in rows]
        keys = [jax.vmap(jax.random.fold_in, (0, None))(step.keys, i) for i in range(2 * LARGE)]
        mixed = step.student("transformer", [n_BNP + place_NP for n_BNP in near], keys[:LARGE])
        odd = [jnp.concatenate([o[:, None], n[:, :-1]], 1) + place_NP for o, n in zip(odd, near, strict=True)]
        seen = step.student("transformer", odd, keys[LARGE:])

        attention = crossed(mixed, seen, options.attention_temperature)
        neighbour = crossed([n_BNP[:, 0] for n_BNP in near], predicted, o.temperature)
        feature = redundancy(slow, projected)
        scalars = {
            "attention": attention,
            "neighbour": neighbour,
            "feature": feature,
            "nn_acc": neighbours.same_class(step.own, rows[0][:, 0], step.label),
            "z_std": joint.spread(projected),
        }
        value = (attention + neighbour + options.feature * feature) / 2
        return value, neighbours.pushed(step.own, slow[0], step.label), scalars

    heads = {
        "projector": (MLP((o.hidden, o.hidden, o.out), last="affine", dtype=config.dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), dtype=config.dtype), o.out),
        "predictor2": (MLP((o.predictor_hidden, o.out), dtype=config.dtype), o.out),
        "transformer": (
            PostNorm(options.depth, HEADS, 2 * o.out, options.dropout, config.dtype),
            (NEIGHBOURS, o.out),
        ),
    }
    return Algorithm(
        heads, loss, target=("encoder", "projector"), state=neighbours.start(queue, o.out), keyed=("transformer",)
    )


def positions(tokens: int, width: int) -> np.ndarray:
    """The table e, (tokens, width): sin (token j even) or cos (j odd) of d 10000^(-2 floor(j / 2) / J).

    d is the place in the vector; J is the number of tokens, plus 1 if it is odd.
    """
    even = tokens + tokens % 2
    rate = 10000.0 ** -(2 * (np.arange(tokens) // 2) / even)
    angle = rate[:, None] * np.arange(width)
    return np.where(np.arange(tokens)[:, None] % 2, np.cos(angle), np.sin(angle))


def crossed(a: Sequence[jax.Array], b: Sequence[jax.Array], temperature: float) -> jax.Array:
    """(nce(a_0, b_1) + nce(a_1, b_0)) / 2 of vectors (B, P) of two views."""
    return (contrast.info_nce(a[0], b[1], temperature) + contrast.info_nce(a[1], b[0], temperature)) / 2


def redundancy(slow: Sequence[jax.Array], projected: Sequence[jax.Array]) -> jax.Array:
    """The feature term of the target's and the student's projections (B, P) of two views."""
    C_2PP = jnp.stack(
        [
            jnp.matmul(joint.unit(x, 0).T, joint.unit(y, 0), precision="highest")
            for x, y in zip(slow, projected[::-1], strict=True)
        ]
    )
    width = C_2PP.shape[1]
    eye_PP = jnp.eye(width)
    diagonal = jnp.sum(jnp.square(C_2PP - 1) * eye_PP) / (LARGE * width)
    rest = jnp.sum(jnp.square(C_2PP) * (1 - eye_PP)) / (LARGE * width * (width - 1))
    # At 0 the root has an infinite slope.
    return (jnp.sqrt(jnp.maximum(diagonal, SMALLEST)) + jnp.sqrt(jnp.maximum(rest, SMALLEST))) / 2


def _check(c: ConfigDict) -> None:
    if c.joint.out % HEADS:
        raise ConfigError(f"config.joint.out={c.joint.out}: must be a multiple of {HEADS}, the transformer's heads")


ALL4ONE = Section(
    "all4one",
    "Method all4one.",
    of_the_run=True,
    check=_check,
    keys=dict(
        attention_temperature=Key(
            0.1, positive, "what similarities of mixed neighbours are divided by", resume=RECORDED
        ),
        feature=Key(10.0, positive, "weight of the feature term", resume=RECORDED),
        depth=Key(3, positive, "blocks of the transformer"),
        dropout=Key(0.1, within(0, 1, "[)"), "dropout in the transformer", resume=RECORDED),
    ),
)
