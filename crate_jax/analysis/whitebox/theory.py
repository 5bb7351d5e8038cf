"""Theorem 3 and Figure 3 of arXiv 2404.02446 as experiments: one compression step against denoising.

Tokens are drawn from the theorem's model: there are K orthogonal subspaces of dimension p = d / K; each token is drawn
from N(0, I / p) in one of them, plus noise N(0, sigma^2 I / d) in all directions. One gradient step on R^c(Z | U) is
compared with the theorem's formula for it, and with the exact denoiser of the same model.

All arrays are NumPy float64. As in the paper a token is a column, so Z is (d, N).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """One draw of the model.

    Attributes:
      bases: U, (K, d, p); all columns together are orthonormal.
      clean: the tokens X without noise, (d, N).
      noise: the noise Delta, (d, N).
      subspace: the number s of each token's subspace, (N,).
    """

    bases: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    subspace: np.ndarray

    @property
    def observed(self) -> np.ndarray:
        """Z = X + Delta."""
        return self.clean + self.noise


def draw(d: int, N: int, K: int, sigma: float, seed: int) -> Sample:
    """Draws N tokens of width d from K subspaces, with noise of level sigma.

    Raises:
      ValueError: K does not divide d.
    """
    if d % K:
        raise ValueError(f"draw: d={d} must be a multiple of K={K}, the number of subspaces")
    rng, p = np.random.default_rng(seed), d // K
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    bases = rotation.reshape(d, K, p).transpose(1, 0, 2)
    subspace = rng.integers(0, K, N)
    coordinates = rng.standard_normal((N, p)) / np.sqrt(p)
    clean = np.stack([bases[k] @ a for k, a in zip(subspace, coordinates, strict=True)], axis=1)
    return Sample(bases, clean, sigma / np.sqrt(d) * rng.standard_normal((d, N)), subspace)


def rate(z: np.ndarray, bases: np.ndarray, beta: float) -> float:
    """R^c(Z | U) = 1/2 sum_k log det(I + beta (U_k^T Z)^T U_k^T Z), eq. A.36, in nats."""
    return sum(0.5 * np.linalg.slogdet(np.eye(z.shape[1]) + beta * (w.T @ w))[1] for w in bases.transpose(0, 2, 1) @ z)


def rate_gradient(z: np.ndarray, bases: np.ndarray, beta: float) -> np.ndarray:
    """The gradient of :func:`rate`, sum_k U_k U_k^T Z (I / beta + (U_k^T Z)^T U_k^T Z)^-1, eq. A.38, (d, N)."""
    out = np.zeros_like(z)
    for basis in bases:
        w = basis.T @ z
        out += basis @ np.linalg.solve(np.eye(z.shape[1]) / beta + w.T @ w, w.T).T
    return out


def compressed(sample: Sample, beta: float, eta: float) -> np.ndarray:
    """The compression step Z+ = Z - eta grad R^c(Z | U), eq. A.39, (d, N)."""
    z = sample.observed
    return z - eta * rate_gradient(z, sample.bases, beta)


def predicted(sample: Sample, beta: float, eta: float) -> np.ndarray:
    """The approximation of Z+ by Theorem 3 (eq. A.40), (d, N).

    It is Delta - eta P(beta Delta) + (1 + 1 / beta - eta) / (1 + 1 / beta) X. P keeps, of a token in subspace k, its
    part in every other subspace k', except the directions in which k' has tokens (eq. A.116).
    """
    z = sample.noise.copy()
    for k, basis in enumerate(sample.bases):
        own = sample.subspace == k
        a = basis.T @ sample.clean[:, own]
        w = basis.T @ sample.noise[:, ~own]
        w = w - a @ np.linalg.solve(np.eye(a.shape[1]) / beta + a.T @ a, a.T @ w)
        z[:, ~own] -= eta * beta * (basis @ w)
    return z + (1 + 1 / beta - eta) / (1 + 1 / beta) * sample.clean


def bound(d: int, N: int, K: int, sigma: float, beta: float, eta: float) -> float:
    """The right side of eq. A.41 without its constant, which the paper does not give."""
    ratio = np.sqrt(N / d)
    return K * eta * (
        sigma**2 * beta**2 + sigma * (1 + ratio) + np.sqrt(K) * beta * sigma**2 * (1 + ratio) + ratio
    )  # fmt: skip


def best_beta(d: int, N: int, K: int, sigma: float) -> float:
    """Beta = p / (N eps^2) for the eps that minimises the bound with eta = 1 / beta (eq. A.48)."""
    return float(np.sqrt(sigma + np.sqrt(N / d)) / sigma)


def denoised(sample: Sample, sigma: float) -> np.ndarray:
    """The exact E[x | z] of each token under the model, the step along the score (eq. A.33), (d, N)."""
    z, (d, p) = sample.observed, sample.bases.shape[1:]
    noise = sigma**2 / d
    w = sample.bases.transpose(0, 2, 1) @ z
    inside = np.square(w).sum(1)
    # log N(z; 0, U_k U_k^T / p + noise I), up to a number that does not depend on k
    logits = 0.5 * inside * (1 / noise - 1 / (noise + 1 / p))
    weights = np.exp(logits - logits.max(0))
    weights /= weights.sum(0)
    return (1 / p) / (1 / p + noise) * np.sum(sample.bases @ (weights[:, None] * w), axis=0)


def outside(sample: Sample, z: np.ndarray) -> float:
    """The energy of `z` (d, N) outside each token's own subspace, as a share of the noise's energy there."""

    def energy(x: np.ndarray) -> float:
        own = ((basis, x[:, sample.subspace == k]) for k, basis in enumerate(sample.bases))
        return float(sum(np.square(part - basis @ (basis.T @ part)).sum() for basis, part in own))

    return energy(z) / energy(sample.noise)


def norm(x: np.ndarray) -> float:
    """The largest singular value.

    >>> norm(np.diag([3.0, -4.0]))
    4.0
    """
    return float(np.linalg.norm(x, 2))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one experiment.

    Attributes:
      sigma: the noise level.
      error: the operator norm of the difference between Z+ and the theorem's formula.
      bound: the theorem's bound on the error, without its constant.
      compression: the share of the noise outside the token's subspace that is left after the compression step.
      denoising: the share that is left after the exact denoiser; 0 after a projection.
      shrinkage: <X, Z+> / <X, X>, the factor on the clean tokens; the noise has mean 0 in it.
    """

    sigma: float
    error: float
    bound: float
    compression: float
    denoising: float
    shrinkage: float


def experiment(d: int, N: int, K: int, sigma: float, seed: int = 0) -> Outcome:
    """Draws tokens and makes one step with eta = 1 / beta and the best beta of Remark 4.

    Raises:
      ValueError: K does not divide d.
    """
    sample, beta = draw(d, N, K, sigma, seed), best_beta(d, N, K, sigma)
    z = compressed(sample, beta, 1 / beta)
    return Outcome(
        sigma,
        norm(z - predicted(sample, beta, 1 / beta)),
        bound(d, N, K, sigma, beta, 1 / beta),
        outside(sample, z),
        outside(sample, denoised(sample, sigma)),
        float(np.sum(sample.clean * z) / np.square(sample.clean).sum()),
    )
