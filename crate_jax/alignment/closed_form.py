"""Closed forms of Balestriero & LeCun, "Learning by Reconstruction Produces Uninformative Features For Perception".

All in float64 on the host, from second moments (:class:`crate_jax.alignment.moments.Moments`); docs/alignment.md
derives what is used here. Shapes: D numbers per image, C classes, K latents.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

from crate_jax.alignment.moments import Moments
from crate_jax.errors import DataError

RANK_TOLERANCE = 1e-12  # eigenvalues of X X^T below this share of the largest count as zero


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The minimum of the joint loss over all linear encoders, heads and decoders.

    Attributes:
      encoder_DK: V; V^T X are the latents, with V^T X X^T V = I.
      head_KC: W, the best regression of the targets on the latents.
      decoder_KD: Z, the best reconstruction from the latents.
      loss: the minimum.
    """

    encoder_DK: np.ndarray
    head_KC: np.ndarray
    decoder_KD: np.ndarray
    loss: float


def joint_loss(moments: Moments, lam: float, optimum: Optimum) -> float:
    """||W^T V^T X - Y||_F^2 + lam ||Z^T V^T X - X||_F^2 of any V, W and Z; `optimum.loss` is not read."""

    def residual(map_DT: np.ndarray, cross_DT: np.ndarray, energy: float) -> float:
        return float(np.sum(map_DT * (moments.second_DD @ map_DT)) - 2 * np.sum(map_DT * cross_DT) + energy)

    V, W, Z = optimum.encoder_DK, optimum.head_KC, optimum.decoder_KD
    supervised = residual(V @ W, moments.cross_DC, float(np.trace(moments.targets_CC)))
    return supervised + lam * residual(V @ Z, moments.second_DD, float(np.trace(moments.second_DD)))


def theorem1(moments: Moments, latents: int, lam: float) -> Optimum:
    """Theorem 1: the minimum of ||W^T V^T X - Y||_F^2 + lam ||Z^T V^T X - X||_F^2 over V, W and Z.

    With lam = 0 and at least C latents, W^T V^T is ordinary least squares (of least norm where X X^T is singular); as
    lam grows, Z^T V^T becomes PCA.

    Args:
      moments: of X and Y; may be singular (N < D, constant pixels).
      latents: K.
      lam: weight of the reconstruction.

    Raises:
      ValueError: K is not in 1 .. rank of X X^T, or lam is negative.
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


class Aligner:
    """alignment(k) of one labelled set under any corruption.

    alignment(k) = ||Y^T Y Q_k||_F^2 / ||Y^T Y Q_D||_F^2 with Q_k an orthonormal basis of the rows of V_k^T X, V_k the
    first k columns of the optimal encoder: the share of the label Gram matrix, as far as linear maps of X see it, that
    is left in k latents.

    Args:
      moments: of images and one-hot labels, X X^T not singular.

    Raises:
      DataError: X X^T is singular, or the images say nothing about the labels.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        try:
            self._root_DD = np.linalg.cholesky(moments.second_DD)  # X X^T = L L^T
        except np.linalg.LinAlgError:
            raise DataError(
                "alignment: the second moments of the images are singular (fewer images than numbers per image, or "
                "constant pixels); config.align.noise must be larger"
            ) from None
        # What the label Gram matrix sees: columns of L^-1 X Y^T times a root of Y Y^T.
        values_C, vectors_CC = np.linalg.eigh(moments.targets_CC)
        weighted_DC = moments.cross_DC @ (vectors_CC * np.sqrt(np.maximum(values_C, 0)))
        self._labels_DC = scipy.linalg.solve_triangular(self._root_DD, weighted_DC, lower=True)
        self._total = float(np.sum(self._labels_DC**2))
        if not self._total > 0:
            raise DataError("alignment: no linear map of these images says anything about their labels")

    @property
    def size(self) -> int:
        """D."""
        return len(self._root_DD)

    def curve(self, corrupted_DD: np.ndarray | None, latents: int) -> np.ndarray:
        """alignment(1) .. alignment(K) of the optimal denoising encoder (Theorem 3), each in [0, 1].

        Args:
          corrupted_DD: G = E[X' X'^T], or any multiple of it, positive definite, for a corruption whose mean E[X'] is
            a multiple of X; None: no corruption, which is PCA.
          latents: K.

        Raises:
          ValueError: K is not in 1 .. D.
        """
        if not 1 <= latents <= self.size:
            raise ValueError(f"latents={latents}: must lie in 1..{self.size}, the numbers per image")
        second_DD = self.moments.second_DD
        if corrupted_DD is None:
            kept_DD = second_DD
        else:  # X X^T G^-1 X X^T
            root_DD = scipy.linalg.cholesky(corrupted_DD, lower=True, check_finite=False)
            half_DD = scipy.linalg.solve_triangular(root_DD, second_DD, lower=True, check_finite=False)
            kept_DD = half_DD.T @ half_DD
        values_K, vectors_DK = top_eigenvectors(kept_DD, latents)
        return self.curve_of(vectors_DK * np.sqrt(np.maximum(values_K, np.finfo(np.float64).tiny)))

    def curve_of(self, decoder_DK: np.ndarray) -> np.ndarray:
        """alignment(1) .. alignment(K) of the encoder V = (X X^T)^-1 U, U the columns given."""
        # L^T V = L^-1 U; its columns, made orthonormal one after the other, are Q in whitened coordinates.
        whitened_DK = scipy.linalg.solve_triangular(self._root_DD, decoder_DK, lower=True, check_finite=False)
        gram_KK = whitened_DK.T @ whitened_DK
        scale_K = 1 / np.sqrt(np.diag(gram_KK))
        root_KK = np.linalg.cholesky(gram_KK * np.outer(scale_K, scale_K))
        seen_KC = scipy.linalg.solve_triangular(
            root_KK, scale_K[:, None] * (whitened_DK.T @ self._labels_DC), lower=True
        )
        return np.cumsum(np.sum(seen_KC**2, axis=1)) / self._total


def top_eigenvectors(matrix_DD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues (falling) and their eigenvectors (D, count) of a symmetric matrix."""
    D = len(matrix_DD)
    values, vectors = scipy.linalg.eigh(matrix_DD, driver="evd", check_finite=False, overwrite_a=False)
    return values[: D - count - 1 : -1] if count < D else values[::-1], vectors[:, ::-1][:, :count]


def authors_scale(alignment_K: np.ndarray) -> np.ndarray:
    """100 sqrt(alignment): what the authors' code plots."""
    return 100 * np.sqrt(alignment_K)
