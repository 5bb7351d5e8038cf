"""Weighted k-nearest-neighbour classification by cosine similarity.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4; the protocol
of DINO (Caron et al. 2021): the k most similar training images vote for their class with weight exp(similarity / T).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.evals.features import check_labelled


def knn_sweep(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk: int = 512,
) -> np.ndarray:
    """Predicts the class of each test row for every k and temperature; the neighbours are found once.

    Ties: of equally similar training rows the earlier one is the nearer neighbour; of classes with equal votes the
    lower one wins. A row of zeros has similarity 0 to everything.

    Args:
      train_x: features [n, D].
      train_y: integer labels [n] in 0 .. num_classes - 1.
      test_x: features [m, D].
      num_classes: number of classes.
      ks: neighbours that vote; clamped to n, so that a small training set makes all of it vote.
      temperatures: T; a low one leaves the vote to the nearest.
      chunk: test rows at a time; memory is chunk x n similarities in float32, never m x n.

    Returns:
      Labels, int32 [len(ks), len(temperatures), m].

    Raises:
      DataError: labels out of range, or shapes that do not match.
      NonFiniteError: NaN or infinite training features.
      ValueError: a k, a temperature or `chunk` is not positive.
    """
    if not ks or not temperatures or min(ks) < 1 or chunk < 1 or not min(temperatures) > 0:
        raise ValueError(f"knn: k={list(ks)}, temperature={list(temperatures)} and chunk={chunk} must be positive")
    check_labelled("train", train_x, train_y, num_classes)
    labels = _predict(
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.asarray(test_x, jnp.float32),
        jnp.asarray(temperatures, jnp.float32),
        num_classes=num_classes,
        ks=tuple(min(k, len(train_x)) for k in ks),
        chunk=min(chunk, len(test_x)),
    )
    return np.asarray(labels)


def knn_top1(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
) -> float:
    """Share of the test rows (0..1) whose class :func:`knn_sweep` gets right; same arguments and errors."""
    check_labelled("test", test_x, test_y, num_classes)
    predicted = knn_sweep(train_x, train_y, test_x, num_classes, [k], [temperature])[0, 0]
    return float(np.mean(predicted == test_y))


def _unit(x: jax.Array) -> jax.Array:
    """Rows scaled to length 1. Dividing by the largest entry first keeps the squares from over- or underflowing."""
    tiny = jnp.finfo(x.dtype).tiny
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), tiny)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of the rows of (m, n), ties included, without sorting whole rows.

    An element among the k largest lies in one of the k groups of columns with the largest maxima, the earlier of equal
    ones. Sorting some 2 sqrt(n k) numbers in place of n is 25 times as fast on a CPU at n = 50,000 and k = 20.
    """
    m, n = x.shape
    size = max(1, round(math.sqrt(n / k)))
    groups = -(-n // size)
    if groups <= k or size == 1:
        return jax.lax.top_k(x, k)
    padded = jnp.pad(x, ((0, 0), (0, groups * size - n)), constant_values=-jnp.inf).reshape(m, groups, size)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(padded, axis=2), k)[1], axis=1)  # in order: ties go to the earlier column
    candidates = jnp.take_along_axis(padded, chosen[:, :, None], axis=1).reshape(m, k * size)
    values, place = jax.lax.top_k(candidates, k)
    group = jnp.take_along_axis(chosen, place // size, axis=1)
    return values, group * size + place % size


@functools.partial(jax.jit, static_argnames=("num_classes", "ks", "chunk"))
def _predict(
    train_x: jax.Array,
    train_y: jax.Array,
    test_x: jax.Array,
    temperatures_T: jax.Array,
    *,
    num_classes: int,
    ks: tuple[int, ...],
    chunk: int,
) -> jax.Array:
    m, width = test_x.shape
    train_x = _unit(train_x)
    test_x = jnp.pad(test_x, ((0, -m % chunk), (0, 0))).reshape(-1, chunk, width)
    classes = jnp.arange(num_classes)

    def vote(nearest: jax.Array, labels: jax.Array, temperature: jax.Array) -> jax.Array:
        # Relative to the nearest: the winner is the same, and exp cannot overflow at a low temperature.
        weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
        # A reduction rather than scatter-add: its order of summation, and so a tie, is the same on every run.
        votes = jnp.sum(jnp.where(labels[:, :, None] == classes, weights[:, :, None], 0.0), axis=1)
        return jnp.argmax(votes, axis=-1).astype(jnp.int32)

    def predict(rows: jax.Array) -> jax.Array:
        # Full float32: the default of GPUs and TPUs (TF32, bfloat16) is too coarse to rank close neighbours.
        similarity = jnp.matmul(_unit(rows), train_x.T, precision=jax.lax.Precision.HIGHEST)
        nearest, index = _top_k(similarity, max(ks))
        labels = train_y[index]
        return jnp.stack([jnp.stack([vote(nearest[:, :k], labels[:, :k], t) for t in temperatures_T]) for k in ks])

    chunks = jax.lax.map(predict, test_x)  # (chunks, ks, T, chunk)
    return jnp.moveaxis(chunks, 0, 2).reshape(len(ks), len(temperatures_T), -1)[..., :m]
