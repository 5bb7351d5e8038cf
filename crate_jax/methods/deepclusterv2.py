"""DeepCluster v2 (Caron et al., arXiv 2006.09882, section 4 and appendix; DeepCluster: arXiv 1807.05520).

A memory holds the last unit projections of every image, one row per large view. When an epoch ends, the rows are
clustered by spherical k-means, once per head: head h takes the memory of view h mod 2. In the next epoch

    loss = mean over heads h of the cross entropy of c_h z / T and the image's cluster, a mean over images and views

where c_h are the head's K_h centres. They are no parameters. The first epoch only fills the memory: its loss is 0,
where solo-learn's is not a number. Weights move there by decay and by a penalty, if the optimiser applies them where
gradients are 0 (AdamW does, lars_torch does not). Images that no epoch has reached yet have no cluster (-1) and are
left out.

Memory: 8 N P bytes for the projections (split over the mesh's axis `model`), 4 H N for the clusters and 4 sum(K) P for
the centres (whole on every device): 51 MB + 0.6 MB + 4.6 MB for N = 50,000, P = 128 and three heads of 3000; for
ImageNet 1.3 GB of projections. One clustering costs 4 (rounds + 1) N sum(K) P operations, less than 1 % of an epoch of
a ResNet18 at 32 pixels; it goes through the rows in pieces, so that no N x K array exists.

Shapes: B batch, P width of the projections, N training images, K clusters of a head, H heads, n rows of a piece.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import ConfigError
from crate_jax.methods import joint
from crate_jax.methods.joint import LARGE, Algorithm, Own, Step
from crate_jax.methods.method import Params, Progress, Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import RECORDED, Key, Section, positive, several

log = logging.getLogger(__name__)

PIECE = 2**24  # entries of the array of similarities, at most
NONE = -1  # the cluster of an image that has none


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """DeepCluster v2 of a validated config, for features of this width.

    Raises:
      ConfigError: a head has more clusters than there are training images.
    """
    o, options, images = config.joint, config.deepclusterv2, len(source)
    sizes = tuple(options.prototypes)
    if 0 < config.epochs <= 1 or 0 < config.steps * config.batch_size <= images:
        log.warning("the run ends in its first epoch, in which deepclusterv2 only fills its memory and trains nothing")
    if max(sizes) > images:
        raise ConfigError(
            f"config.deepclusterv2.prototypes={sizes}: must not exceed the number of training images, {images}"
        )

    def state(key: jax.Array) -> Own:
        return {
            "memory": jnp.zeros((LARGE, images, o.out)),
            "assignments": jnp.full((len(sizes), images), NONE, jnp.int32),
            "centres": {str(h): jnp.zeros((size, o.out)) for h, size in enumerate(sizes)},
            "cluster_key": jax.random.key_data(key),
            "clustered": jnp.int32(0),
        }

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        units = list(map(joint.unit, projected))
        terms = []
        for h in range(len(sizes)):
            scores = [joint.similarities(z_BP, step.own["centres"][str(h)]) / o.temperature for z_BP in units]
            cluster_B = step.own["assignments"][h, step.index]
            terms.append(cross_entropy(jnp.concatenate(scores), jnp.tile(cluster_B, len(scores))))
        row_B = jnp.where(latest(step.index, step.keys), step.index, images)
        memory = step.own["memory"].at[:, row_B].set(jnp.stack(units), mode="drop")
        return jnp.mean(jnp.stack(terms)), {**step.own, "memory": memory}, {"z_std": joint.spread(projected)}

    def after(params: Params, own: Own, progress: Progress) -> tuple[Params, Own]:
        # Where config.nonfinite.skip undoes the update that ends an epoch, the next one clusters.
        epochs = progress.epochs(progress.done + 1)
        own = jax.lax.cond(epochs > own["clustered"], lambda own: clustered(own, options.rounds), dict, own)
        return params, {**own, "clustered": epochs}

    return Algorithm({"projector": (MLP((o.hidden, o.out), dtype=config.dtype), width)}, loss, state=state, after=after)


def cross_entropy(scores_BK: jax.Array, cluster_B: jax.Array) -> jax.Array:
    """The mean cross entropy of the images that have a cluster; 0 if none has."""
    known_B = cluster_B != NONE
    log_BK = jax.nn.log_softmax(scores_BK)
    own_B = jnp.take_along_axis(log_BK, jnp.maximum(cluster_B, 0)[:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(known_B, own_B, 0.0)) / jnp.maximum(jnp.sum(known_B), 1)


def latest(index_B: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One row of each image, bool (B,): a batch that ends an epoch may hold an image of the next epoch again.

    The images' keys choose, since the order of rows depends on the layout and that of equal writes on the device.
    """
    number_B = jax.vmap(jax.random.bits)(keys_B)
    other_BB = (index_B[:, None] == index_B[None]) & (number_B[None] > number_B[:, None])
    return ~jnp.any(other_BB, axis=1)


def clustered(own: Own, rounds: int) -> Own:
    """The entries of `carried` after a clustering of the whole memory."""
    filled_2N = jnp.any(own["memory"] != 0, axis=2)
    key, rows = starts(own, filled_2N[0])
    assignments, centres = [], {}
    for h, start_K in enumerate(rows):
        memory_NP, filled_N = own["memory"][h % LARGE], filled_2N[h % LARGE]
        cluster_N, centres[str(h)] = k_means(memory_NP, filled_N, memory_NP[start_K], rounds)
        assignments.append(cluster_N)
    return {**own, "assignments": jnp.stack(assignments), "centres": centres, "cluster_key": key}


def starts(own: Own, filled_N: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the next key, and for each head different random rows at which k-means starts, filled ones first."""
    key, *draws = jax.random.split(jax.random.wrap_key_data(own["cluster_key"]), 1 + len(own["centres"]))
    rows = []
    for h, draw in enumerate(draws):
        number_N = jnp.where(filled_N, jax.random.uniform(draw, filled_N.shape), -1.0)
        rows.append(jax.lax.top_k(number_N, own["centres"][str(h)].shape[0])[1])
    return jax.random.key_data(key), rows


def k_means(
    memory_NP: jax.Array, filled_N: jax.Array, centres_KP: jax.Array, rounds: int
) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means: rows go to the centre of largest dot product, centres to the direction of their rows' mean.

    A centre without rows stays where it is.

    Args:
      memory_NP: unit rows.
      filled_N: bool; rows that are not filled do not count.
      centres_KP: the unit centres at the start.
      rounds: how often the centres move.

    Returns:
      (the cluster of each row, int32 (N,), -1 for rows that are not filled; centres).
    """
    N, P = memory_NP.shape
    K = centres_KP.shape[0]
    n = min(N, max(1, PIECE // K))
    rows_mnP = jnp.pad(memory_NP, ((0, -N % n), (0, 0))).reshape(-1, n, P)
    filled_mn = jnp.pad(filled_N, (0, -N % n)).reshape(-1, n)

    def piece(centres_KP: jax.Array, rows_nP: jax.Array, filled_n: jax.Array) -> jax.Array:
        return jnp.where(filled_n, jnp.argmax(joint.similarities(rows_nP, centres_KP), axis=1).astype(jnp.int32), NONE)

    def move(_: int, centres_KP: jax.Array) -> jax.Array:
        def add(sums_KP: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            rows_nP, filled_n = part
            # A product and no scatter, whose order of sums is not fixed on a GPU. A row without cluster is all 0.
            one_nK = jax.nn.one_hot(piece(centres_KP, rows_nP, filled_n), K)
            return sums_KP + jnp.matmul(one_nK.T, rows_nP, precision="highest"), None

        sums_KP, _ = jax.lax.scan(add, jnp.zeros_like(centres_KP), (rows_mnP, filled_mn))
        empty_K = ~jnp.any(sums_KP != 0, axis=1)
        return joint.unit(jnp.where(empty_K[:, None], centres_KP, sums_KP))

    centres_KP = jax.lax.fori_loop(0, rounds, move, centres_KP)
    cluster_N = jax.lax.map(lambda part: piece(centres_KP, *part), (rows_mnP, filled_mn)).reshape(-1)[:N]
    return cluster_N, centres_KP


DEEPCLUSTERV2 = Section(
    "deepclusterv2",
    "Method deepclusterv2.",
    of_the_run=True,
    keys=dict(
        prototypes=Key((3000, 3000, 3000), several(positive), "number of clusters of each head"),
        rounds=Key(10, positive, "how often the centres move in a clustering", resume=RECORDED),
    ),
)
