"""What the weights of an encoder say about collapse: the spectra of their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from crate_jax.evals.spectra import entropy_rank, one_lapack_thread
from crate_jax.parallel import parameters
from crate_jax.training import orthogonality


def weight_eigenvalues(params: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The eigenvalues of W W^T, the smaller Gram matrix, of each named kernel and layer.

    All eigenvalues of an orthonormal weight are 1. Their squared distances from 1 sum to SO; the largest distance is
    SRIP (arXiv 2411.00392). Kernels of one shape share one batched decomposition.

    Args:
      params: a tree of arrays.
      names: names of dense or convolution kernels (see :func:`crate_jax.training.orthogonality.flatten_kernel`).

    Returns:
      the eigenvalues (L, n) by name, in decreasing order; L = 1 for a kernel that is not a stack of layers.

    Raises:
      ConfigError: a named parameter is not a matrix or a convolution's kernel.
    """
    leaves = parameters.names(params)
    out: dict[str, np.ndarray] = {}
    for batch in orthogonality.batches(params, tuple(names), "smaller"):
        w_Mnm = batch.gather({name: jnp.asarray(leaves[name], jnp.float32) for name in batch.names})
        with one_lapack_thread():
            eigenvalues_Mn = np.square(np.asarray(jnp.linalg.svd(w_Mnm, compute_uv=False)))
        counts = [leaves[name].shape[0] if parameters.is_stacked(name) else 1 for name in batch.names]
        parts = np.split(eigenvalues_Mn, np.cumsum(counts)[:-1])
        out.update(zip(batch.names, parts, strict=True))
    return {name: out[name] for name in leaves if name in out}


def weight_measures(eigenvalues_n: np.ndarray) -> dict[str, float | None]:
    """Ranks, condition number, SO and SRIP of one weight, from its :func:`weight_eigenvalues` (n,).

    The condition number is None if the weight has not full rank.

    >>> found = weight_measures(np.array([4.0, 1.0]))
    >>> [found[key] for key in ("stable_rank", "condition", "so", "srip")]
    [1.25, 2.0, 9.0, 3.0]
    """
    values = np.asarray(eigenvalues_n, np.float64)
    singular = np.sqrt(values)
    full = singular[-1] > singular[0] * len(values) * np.finfo(np.float32).eps
    return {
        "effective_rank": float(entropy_rank(jnp.asarray(singular))),
        "stable_rank": float(values.sum() / values[0]) if values[0] else 0.0,
        "condition": float(singular[0] / singular[-1]) if full else None,
        "so": float(np.sum((values - 1) ** 2)),
        "srip": float(np.max(np.abs(values - 1))),
    }
