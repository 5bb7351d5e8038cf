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

    An orthonormal weight has ones only; their squared distances from 1 sum to SO, the largest distance is SRIP.

    Args:
      params: tree of arrays.
      names: dense or convolution kernels (see :func:`crate_jax.training.orthogonality.flatten_kernel`).

    Returns:
      by name, decreasing, (L, n), L = 1 for a kernel that is no stack of layers. Kernels of one shape go through
      one batched decomposition.

    Raises:
      ConfigError: a name is not a matrix or a convolution's kernel.
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
    """Of one weight's :func:`weight_eigenvalues`: its ranks, condition number, SO and SRIP."""
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
