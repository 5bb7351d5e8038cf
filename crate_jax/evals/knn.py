"""Weighted k-nearest-neighbour classification by cosine similarity.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4; the protocol
of DINO (Caron et al. 2021): the k most similar training images vote for their class with weight exp(similarity / T).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.evals.features import check_labelled


def knn_predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 512,
) -> np.ndarray:
    """Predicts the class of each test row from its neighbours among the training rows.

    Ties: of equally similar training rows the earlier one is the nearer neighbour; of classes with equal votes the
    lower one wins. A row of zeros has similarity 0 to everything.

    Args:
      train_x: features [n, D].
      train_y: integer labels [n] in 0 .. num_classes - 1.
      test_x: features [m, D].
      num_classes: number of classes.
      k: neighbours that vote; clamped to n, so that a small training set makes all of it vote.
      temperature: T; a low one leaves the vote to the nearest.
      chunk: test rows at a time; memory is chunk x n similarities in float32, never m x n.

    Returns:
      Labels, int32 [m].

    Raises:
      DataError: labels out of range, or shapes that do not match.
      NonFiniteError: NaN or infinite training features.
      ValueError: `k`, `temperature` or `chunk` not positive.
    """
    if k < 1 or chunk < 1 or not temperature > 0:
        raise ValueError(f"knn: k={k}, temperature={temperature} and chunk={chunk} must be positive")
    check_labelled("train", train_x, train_y, num_classes)
    k, chunk = min(k, len(train_x)), min(chunk, len(test_x))
    labels = _predict(
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.asarray(test_x, jnp.float32),
        jnp.float32(temperature),
        num_classes=num_classes,
        k=k,
        chunk=chunk,
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
    chunk: int = 512,
) -> float:
    """Share of the test rows (0..1) whose class :func:`knn_predict` gets right; same arguments and errors."""
    check_labelled("test", test_x, test_y, num_classes)
    predicted = knn_predict(train_x, train_y, test_x, num_classes, k, temperature, chunk)
    return float(np.mean(predicted == test_y))


def _unit(x: jax.Array) -> jax.Array:
    """Rows scaled to length 1. Dividing by the largest entry first keeps the squares from over- or underflowing."""
    tiny = jnp.finfo(x.dtype).tiny
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), tiny)


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "chunk"))
def _predict(
    train_x: jax.Array,
    train_y: jax.Array,
    test_x: jax.Array,
    temperature: jax.Array,
    *,
    num_classes: int,
    k: int,
    chunk: int,
) -> jax.Array:
    m, width = test_x.shape
    train_x = _unit(train_x)
    test_x = jnp.pad(test_x, ((0, -m % chunk), (0, 0))).reshape(-1, chunk, width)

    def vote(rows: jax.Array) -> jax.Array:
        # Full float32: the default of GPUs and TPUs (TF32, bfloat16) is too coarse to rank close neighbours.
        similarity = jnp.matmul(_unit(rows), train_x.T, precision=jax.lax.Precision.HIGHEST)
        nearest, index = jax.lax.top_k(similarity, k)
        # Relative to the nearest: the winner is the same, and exp cannot overflow at a low temperature.
        weights = jnp.exp((nearest - jnp.max(nearest, axis=1, keepdims=True)) / temperature)
        # One-hot rather than scatter-add: its order of summation, and so a tie, is the same on every run.
        one_hot = jax.nn.one_hot(train_y[index], num_classes, dtype=jnp.float32)
        return jnp.argmax(jnp.sum(weights[:, :, None] * one_hot, axis=1), axis=-1).astype(jnp.int32)

    return jax.lax.map(vote, test_x).reshape(-1)[:m]
