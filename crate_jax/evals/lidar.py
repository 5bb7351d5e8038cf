"""LiDAR: in how many dimensions images differ more than views of one image (Thilak et al. 2024, arXiv 2312.04000).

Each image is a class of its own. Views are read in one pass, into two factors as in :mod:`crate_jax.evals.spectra`: one
of the views around the mean of their image, one of these means.

Shapes: c images, q views of each, D width, X = 1 + D, M pairs of factors. Leading axes are batch axes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.errors import NonFiniteError
from crate_jax.evals import spectra

DELTA = 1e-4  # added to the diagonal of the within-class covariance


def add_classes(
    within_DD: jax.Array, between_XX: jax.Array, x_cqD: jax.Array, kept_c: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Adds the views of c images to LiDAR's two factors.

    Args:
      within_DD: factor of the views minus the mean of their image, (..., D, D).
      between_XX: factor of the images' means (:func:`crate_jax.evals.spectra.with_ones`), (..., 1 + D, 1 + D).
      x_cqD: features of the q views of each image, (..., c, q, D).
      kept_c: 1 for an image to add, 0 for an image to leave out, (c,); None: all images are added.

    Returns:
      The two new factors.
    """
    x_cqD = x_cqD.astype(jnp.float32)
    kept_c = jnp.ones(x_cqD.shape[-3], jnp.float32) if kept_c is None else kept_c.astype(jnp.float32)
    mean_cD = jnp.mean(x_cqD, axis=-2)
    deviations = (x_cqD - mean_cD[..., None, :]) * kept_c[:, None, None]
    rows = deviations.reshape(*deviations.shape[:-3], -1, deviations.shape[-1])
    return spectra.add_rows(within_DD, rows), spectra.add_rows(between_XX, spectra.with_ones(mean_cD, kept_c))


_add_classes = jax.jit(add_classes, donate_argnums=(0, 1))


@dataclasses.dataclass(frozen=True)
class Lidar:
    """LiDAR of one set of features.

    Attributes:
      value: effective rank of the LDA matrix, from 1 to min(D, classes - 1).
      classes: number of images.
      views: number of views per image.
      eigenvalues: eigenvalues of the LDA matrix, decreasing, (D,).
      warnings: texts that say what limits the value.
    """

    value: float
    classes: int
    views: int
    eigenvalues: np.ndarray
    warnings: tuple[str, ...]


@jax.jit
def _lidar(within_DD: jax.Array, between_XX: jax.Array, classes: jax.Array, views: jax.Array, delta: jax.Array) -> Any:
    D = within_DD.shape[-1]
    within_DD = within_DD / jnp.sqrt(classes * (views - 1))
    # Triangular T with T^T T = S_w + delta I, without squaring: S_w^-1/2 S_b S_w^-1/2 is similar to T^-T S_b T^-1.
    ridge_DD = jnp.broadcast_to(jnp.sqrt(delta) * jnp.eye(D), within_DD.shape)
    triangle_DD = spectra.add_rows(within_DD, ridge_DD)
    between_DD = between_XX[..., 1:, 1:] / jnp.sqrt(classes - 1)
    white_DD = jax.scipy.linalg.solve_triangular(triangle_DD, jnp.swapaxes(between_DD, -1, -2), trans="T")
    eigenvalues_D = jnp.square(jnp.linalg.svd(white_DD, compute_uv=False))
    return spectra.entropy_rank(eigenvalues_D), eigenvalues_D


def measures(
    within_MDD: jax.Array, between_MXX: jax.Array, classes: int, views: int, delta: float = DELTA
) -> list[Lidar]:
    """Returns LiDAR of each of M pairs of factors that :func:`add_classes` made.

    Each image is a class, and its q augmented or corrupted views are the samples of the class (Thilak et al. 2024,
    arXiv 2312.04000). S_b is the covariance of the classes' means (with c - 1), S_w the covariance of the views around
    these means (with c (q - 1)) plus delta I. LiDAR is :func:`crate_jax.evals.spectra.entropy_rank` of the eigenvalues
    of S_w^-1/2 S_b S_w^-1/2: it counts the directions in which images differ more than views of one image.

    Args:
      within_MDD: factors of the views around their means, (M, D, D).
      between_MXX: factors of the means, (M, 1 + D, 1 + D).
      classes: number of images, c, at least 2.
      views: number of views per image, q, at least 2.
      delta: number added to the diagonal of S_w, in units of the features' variance; positive.

    Raises:
      ValueError: there are fewer than two classes or views, or `delta` is not positive.
      NonFiniteError: a feature was NaN or infinite.
    """
    if classes < 2 or views < 2 or not delta > 0:
        raise ValueError(f"lidar: classes={classes} and views={views} must be at least 2, delta={delta} positive")
    numbers = [jnp.float32(v) for v in (classes, views, delta)]
    with spectra.one_lapack_thread():
        values, eigenvalues_MD = jax.device_get(_lidar(within_MDD, between_MXX, *numbers))
    if not np.isfinite(eigenvalues_MD).all():
        raise NonFiniteError("lidar: some of the features are NaN or infinite")
    width = within_MDD.shape[-1]
    warnings = [w for w in (spectra.rank_warning(classes, width, "images"),) if w]
    if classes * (views - 1) < width:
        warnings.append(
            f"{classes} images x {views} views leave the within-class covariance of {width} features singular: "
            f"delta={delta:g} takes its place"
        )
    return [Lidar(float(v), classes, views, e, tuple(warnings)) for v, e in zip(values, eigenvalues_MD, strict=True)]


def of_views(x_cqD: np.ndarray, delta: float = DELTA) -> Lidar:
    """Returns LiDAR of features (c, q, D) of q views of each of c images, ``spectra.CHUNK`` rows at a time.

    Raises:
      ValueError, NonFiniteError: see :func:`measures`.
    """
    c, q, D = x_cqD.shape
    images = min(max(1, spectra.CHUNK // q), c)
    within, between = spectra.empty_factor(D), spectra.empty_factor(1 + D)
    with spectra.one_lapack_thread():
        for start in range(0, c, images):
            part = np.asarray(x_cqD[start : start + images], np.float32)
            kept = jnp.arange(images) < len(part)  # zeros fill the last part up: one shape, one program
            padded = np.pad(part, ((0, images - len(part)), (0, 0), (0, 0)))
            within, between = _add_classes(within, between, jnp.asarray(padded), kept)
        jax.block_until_ready((within, between))
    return measures(within[None], between[None], c, q, delta)[0]
