"""Closed forms of Balestriero & LeCun, "How Learning by Reconstruction Produces Uninformative Features For Perception".

Everything is computed in float64 on the host, from second moments (:class:`.moments.Moments`); docs/alignment.md
derives the equations. Shapes: D numbers per image, C classes, K latents.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.linalg

from crate_jax.analysis.alignment.moments import Moments
from crate_jax.errors import DataError

__all__ = ["Aligner", "Curve", "Optimum", "theorem1"]

RANK_TOLERANCE = 1e-12  # eigenvalues of X X^T below this share of the largest count as zero
DIRECT_SIZE = 4096  # D up to which all principal components are computed
ROUNDS = 4  # of subspace iteration, for a D above DIRECT_SIZE


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The minimum of the joint loss over all linear encoders, heads and decoders.

    Attributes:
      encoder_DK: the encoder V; V^T X are the latents, with V^T X X^T V = I.
      head_KC: the head W, the best regression of the targets on the latents.
      decoder_KD: the decoder Z, the best reconstruction from the latents.
      loss: the minimum of the loss.
    """

    encoder_DK: np.ndarray
    head_KC: np.ndarray
    decoder_KD: np.ndarray
    loss: float


def theorem1(moments: Moments, latents: int, lam: float) -> Optimum:
    """Theorem 1: the minimum of ||W^T V^T X - Y||_F^2 + lam ||Z^T V^T X - X||_F^2 over V, W and Z.

    With lam = 0 and at least C latents, W^T V^T is ordinary least squares (the solution of least norm where X X^T is
    singular). As lam grows, Z^T V^T becomes PCA.

    Args:
      moments: the moments of X and Y; X X^T may be singular (N < D, constant pixels).
      latents: K.
      lam: the weight of the reconstruction.

    Raises:
      ValueError: K is not between 1 and the rank of X X^T, or lam is negative.
    """
    variances, directions_DR = np.linalg.eigh(moments.second_DD)
    kept = variances > RANK_TOLERANCE * variances[-1]
    if not 1 <= latents <= kept.sum():
        raise ValueError(f"latents={latents}: must lie in 1..{kept.sum()}, the rank of the images")
    if lam < 0:
        raise ValueError(f"lam={lam}: must not be negative")
    variances, directions_DR = variances[kept], directions_DR[:, kept]
    whiten_DR = directions_DR / np.sqrt(variances)
    targets_RC = whiten_DR.T @ moments.cross_DC
    H_RR = targets_RC @ targets_RC.T + lam * np.diag(variances)
    R = len(variances)
    values, vectors_RK = scipy.linalg.eigh(H_RR, subset_by_index=[R - latents, R - 1])
    V = whiten_DR @ vectors_RK[:, ::-1]
    energy = np.trace(moments.targets_CC) + lam * np.trace(moments.second_DD)
    return Optimum(V, V.T @ moments.cross_DC, V.T @ moments.second_DD, float(energy - values.sum()))


class Curve(NamedTuple):
    """alignment(1) .. alignment(K), each in [0, 1], and an estimate of their largest error (0: exact)."""

    alignment_K: np.ndarray
    error: float


class Aligner:
    """Computes alignment(k) of one labelled data set under any corruption.

    alignment(k) = ||Y^T Y Q_k||_F^2 / ||Y^T Y Q_D||_F^2, where Q_k is an orthonormal basis of the rows of V_k^T X, and
    V_k are the first k columns of the optimal encoder. It is the share that k latents hold of the label Gram matrix, as
    far as linear maps of X can predict that matrix.

    The optimal encoders are (X X^T)^-1 U, where U are the leading eigenvectors of T = X X^T G^-1 X X^T. They are
    computed within the span of the first 1.5 K principal components (Rayleigh-Ritz) and multiplied by T once, which
    restores to first order what lies outside of that span. The change by this multiplication is reported as the error;
    it was at least ten times the true error in all cases measured (docs/alignment.md). Where 2 K > D, all components
    are used and the error is 0. Without corruption there is an error only where :func:`principal_components` iterates.

    Args:
      moments: the moments of images and one-hot labels; X X^T is not singular.
      latents: K.
      exact: whether to use all components for every K; this takes twice as long at D = 3072 and K = 1024.

    Raises:
      DataError: X X^T is singular, or no linear map of the images predicts anything about the labels.
      ValueError: K is not in 1 .. D.
    """

    def __init__(self, moments: Moments, latents: int, exact: bool = False) -> None:
        D = len(moments.second_DD)
        if not 1 <= latents <= D:
            raise ValueError(f"latents={latents}: must lie in 1..{D}, the numbers per image")
        self.moments, self.latents = moments, latents
        size = D if exact or 2 * latents > D else latents + latents // 2
        self._root_DD = _cholesky(moments.second_DD)  # X X^T = L L^T
        variances, components = principal_components(moments.second_DD, size)
        if components.shape[1] < D:
            self._projected = moments.second_DD @ components
        else:
            self._projected = components * variances
        self._components, self._variances = components, variances
        # The label Gram matrix in whitened coordinates: columns of L^-1 X Y^T times a root of Y Y^T.
        values_C, vectors_CC = np.linalg.eigh(moments.targets_CC)
        weighted_DC = moments.cross_DC @ (vectors_CC * np.sqrt(np.maximum(values_C, 0)))
        self._labels_DC = _solve(self._root_DD, weighted_DC)
        self._total = float(np.sum(self._labels_DC**2))
        if not self._total > 0:
            raise DataError("alignment: no linear map of these images says anything about their labels")

    def clean(self) -> Curve:
        """The curve without corruption, or with Gaussian noise of any strength: the first K principal components."""
        K = self.latents
        labels_KC = self._components[:, :K].T @ (self._root_DD @ self._labels_DC)
        within_K = np.cumsum(np.sum(labels_KC**2, axis=1) / self._variances[:K]) / self._total
        if is_direct(len(self._root_DD), self._components.shape[1]):
            return Curve(within_K, 0.0)
        alignment_K = self._alignment(self._root_DD.T @ self._projected[:, :K])  # multiplied by X X^T once more
        return Curve(alignment_K, float(np.max(np.abs(alignment_K - within_K))))

    def curve(self, corrupted_DD: np.ndarray) -> Curve:
        """The curve of the optimal denoising encoder under a corruption (Theorem 3).

        Args:
          corrupted_DD: G = E[X' X'^T] or a multiple of it, positive definite. The mean E[X'] of the corruption must be
            a multiple of X.

        Raises:
          DataError: G is not positive definite.
        """
        root_DD, K = _cholesky(corrupted_DD), self.latents
        half_Dm = _solve(root_DD, self._projected)
        values, vectors_mm = scipy.linalg.eigh(half_Dm.T @ half_Dm, driver="evd", overwrite_a=True, check_finite=False)
        values_K = np.maximum(values[::-1][:K], np.finfo(np.float64).eps * values[-1])
        vectors_mK = np.ascontiguousarray(vectors_mm[:, ::-1][:, :K])
        within_K = self._alignment(_solve(self._root_DD, self._components @ vectors_mK))
        if self._components.shape[1] == len(root_DD):
            return Curve(within_K, 0.0)
        # L^-1 T u = L^T G^-1 X X^T u
        times_T = self._root_DD.T @ _solve(root_DD, half_Dm @ (vectors_mK / values_K), transposed=True)
        alignment_K = self._alignment(times_T)
        return Curve(alignment_K, float(np.max(np.abs(alignment_K - within_K))))

    def _alignment(self, whitened_DK: np.ndarray) -> np.ndarray:
        """alignment(k) of V = L^-T W for the columns W given, which are made orthonormal one after the other."""
        gram_KK = whitened_DK.T @ whitened_DK
        scale_K = 1 / np.sqrt(np.diag(gram_KK))
        labels_KC = scale_K[:, None] * (whitened_DK.T @ self._labels_DC)
        seen_KC = _solve(_cholesky(gram_KK * np.outer(scale_K, scale_K)), labels_KC)
        return np.cumsum(np.sum(seen_KC**2, axis=1)) / self._total


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    try:
        return scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise DataError(
            "alignment: the second moments of the images are singular (fewer images than numbers per image, or "
            "constant pixels); config.align.noise must be larger"
        ) from None


def _solve(root_DD: np.ndarray, columns: np.ndarray, transposed: bool = False) -> np.ndarray:
    trans = "T" if transposed else "N"
    return scipy.linalg.solve_triangular(root_DD, columns, lower=True, trans=trans, check_finite=False)


def is_direct(D: int, count: int) -> bool:
    """Whether :func:`principal_components` decomposes the whole D x D matrix to find `count` components."""
    return D <= DIRECT_SIZE or 2 * count > D


def principal_components(second_DD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of X X^T in falling order, and their eigenvectors (D, count).

    Where :func:`is_direct` is false, block subspace iteration from a seeded start computes them, and the last ones are
    approximate.
    """
    D = len(second_DD)
    if is_direct(D, count):
        values, vectors = scipy.linalg.eigh(second_DD, driver="evd", check_finite=False)
        return values[::-1][:count], np.ascontiguousarray(vectors[:, ::-1][:, :count])
    basis = np.random.default_rng(0).normal(size=(D, count))
    for _ in range(ROUNDS):
        basis = scipy.linalg.qr(second_DD @ basis, mode="economic", check_finite=False)[0]
    values, vectors = np.linalg.eigh(basis.T @ second_DD @ basis)
    return values[::-1], basis @ vectors[:, ::-1]


def authors_scale(alignment_K: np.ndarray) -> np.ndarray:
    """100 sqrt(alignment), the numbers that the authors' code plots.

    >>> authors_scale(np.array([0.25, 1.0])).tolist()
    [50.0, 100.0]
    """
    return 100 * np.sqrt(alignment_K)
