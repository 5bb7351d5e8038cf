"""How many dimensions weights and features use: spectra, effective ranks, redundancy.

Features are read in one pass. What is kept of the rows read so far is R, the triangular factor of
the QR decomposition of [1 | X] (Demmel et al. 2012, "Communication-optimal parallel and sequential
QR"): with n rows of mean m

    R = [sqrt(n)  sqrt(n) m^T]      R_c^T R_c = sum of (x - m)(x - m)^T
        [   0          R_c   ]

so that it holds the mean and the singular values both of X and of the centred X. Unlike a covariance
it is not squared: in float32 singular values are right to some 1e-7 of the largest one, where the
roots of a covariance's eigenvalues are noise below 3e-4, which is just where collapse is looked for.
Factors of parts of the rows merge by the same operation, over batches as over devices.

Shapes: n rows, D width, X = 1 + D, L layers, M matrices of one shape, c surrogate classes, q views
of each. Leading axes are batch axes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401  (loads the LAPACK that XLA calls on a CPU, so that its threads can be set)
import threadpoolctl

from crate_jax.errors import NonFiniteError

HIGHEST = jax.lax.Precision.HIGHEST
EPS = 1e-7  # epsilon of RankMe and of LiDAR: what a normalised singular value is at least
DELTA = 1e-4  # added to the diagonal of LiDAR's within-class covariance
# Ranks, from 1, that the power law is fitted on. alpha-ReQ fits beyond the first ten, which are seldom on the line.
FIRST_RANK, LAST_RANK = 11, 100
FEWEST_RANKS = 10  # below so many ranks beyond the first ten the fit starts at rank 1
CHUNK = 4096  # rows of features on the device at a time


@contextlib.contextmanager
def one_lapack_thread() -> Generator[None, None, None]:
    """On a CPU, one thread per decomposition: every core is a device and may run one of its own.

    LAPACK's threads wait for each other by spinning. With more of them than free cores a decomposition of
    milliseconds was seen to take seconds.
    """
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield


def empty(width: int, *leading: int) -> jax.Array:
    """The factor of no rows, zeros (*leading, width, width); a width of 1 + D for rows :func:`with_ones`."""
    return jnp.zeros((*leading, width, width), jnp.float32)


def with_ones(x_nD: jax.Array, kept_n: jax.Array | None = None) -> jax.Array:
    """Rows (..., n, D) -> (..., n, 1 + D) with a one before each; rows that are not `kept` (0, not 1) become zeros."""
    x_nD = x_nD.astype(jnp.float32)
    kept_n = jnp.ones(x_nD.shape[-2], jnp.float32) if kept_n is None else kept_n.astype(jnp.float32)
    ones_n1 = jnp.broadcast_to(kept_n[:, None], (*x_nD.shape[:-1], 1))
    return jnp.concatenate([ones_n1, jnp.where(ones_n1 > 0, x_nD, 0.0)], axis=-1)


def grow(factor_XX: jax.Array, rows_nX: jax.Array) -> jax.Array:
    """The factor of the rows so far and of more: (..., X, X) and (..., n, X) -> (..., X, X). Rows of zeros add nothing.

    With another factor for rows, the factor of both parts.
    """
    return jnp.linalg.qr(jnp.concatenate([factor_XX, rows_nX], axis=-2), mode="r")


_grow = jax.jit(grow, donate_argnums=0)


def merge(factors_PXX: jax.Array) -> jax.Array:
    """One factor of P parts of the rows, (P, ..., X, X) -> (..., X, X)."""
    stacked = jnp.moveaxis(factors_PXX, 0, -3)
    *leading, P, X, _ = stacked.shape
    return jnp.linalg.qr(stacked.reshape(*leading, P * X, X), mode="r")


def factor(x_nD: np.ndarray | jax.Array) -> jax.Array:
    """The factor (1 + D, 1 + D) of features (n, D), of which CHUNK rows are on the device at a time."""
    n, D = x_nD.shape
    out = empty(1 + D)
    with one_lapack_thread():
        for start in range(0, n, CHUNK):
            part = np.asarray(x_nD[start : start + CHUNK], np.float32)
            short = min(CHUNK, n) - len(part)  # zeros fill the last piece up: one shape, one program
            rows = np.pad(part, ((0, short), (0, 0)))
            out = _grow(out, with_ones(jnp.asarray(rows), jnp.arange(len(rows)) < len(part)))
        return out.block_until_ready()


def entropy_rank(values_D: jax.Array, eps: float = EPS) -> jax.Array:
    """The exponential of the entropy of p = values / sum(values) + eps: D for D equal values, 1 for a single one.

    On singular values of features it is RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1 and its p_k), on the
    eigenvalues of the LDA matrix LiDAR (Thilak et al. 2024, arXiv 2312.04000), on a weight's singular values the
    effective rank of Roy & Vetterli (2007). Values that are all zero give 1.

    >>> print(f"{entropy_rank(jnp.array([2.0, 2.0, 2.0, 0.0])):.2f}")
    3.00
    """
    total = jnp.sum(values_D, axis=-1, keepdims=True)
    p_D = values_D / jnp.where(total > 0, total, 1.0) + eps
    return jnp.exp(-jnp.sum(p_D * jnp.log(p_D), axis=-1))


def power_law(eigenvalues_D: jax.Array, first: jax.Array | int, last: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Fits eigenvalue(i) = c * i ** -alpha for the ranks first .. last, counted from 1.

    alpha-ReQ (Agrawal et al. 2022, "alpha-ReQ: Assessing representation quality in self-supervised learning by
    measuring eigenspectrum decay") on the eigenvalues of the features' covariance. As in its authors' code and in
    Stringer et al. (2019): least squares of log eigenvalue on log rank with weight 1 / rank, which gives every decade
    of ranks the same say.

    Args:
      eigenvalues_D: (..., D), decreasing.
      first: (...).
      last: (...).

    Returns:
      alpha and the fit's R^2 (weighted as the fit), (...); NaN for fewer than three ranks.
    """
    rank_D = jnp.arange(1, eigenvalues_D.shape[-1] + 1, dtype=jnp.float32)
    first, last = jnp.asarray(first)[..., None], jnp.asarray(last)[..., None]
    inside = (rank_D >= first) & (rank_D <= last) & (eigenvalues_D > 0)
    weight = inside / rank_D
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    x = jnp.log(rank_D) - jnp.sum(weight * jnp.log(rank_D), axis=-1, keepdims=True)
    y = jnp.log(jnp.where(inside, eigenvalues_D, 1.0))
    y = y - jnp.sum(weight * y, axis=-1, keepdims=True)
    xx, xy, yy = (jnp.sum(weight * a * b, axis=-1) for a, b in ((x, x), (x, y), (y, y)))
    enough = jnp.sum(inside, axis=-1) >= 3
    slope = jnp.where(enough, xy / jnp.where(enough, xx, 1.0), jnp.nan)
    # A flat spectrum is fitted as well as can be.
    r2 = jnp.where(yy > 1e-12, slope * xy / jnp.where(yy > 1e-12, yy, 1.0), 1.0)
    return -slope, jnp.where(enough, r2, jnp.nan)


def fit_range(usable: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The ranks of :func:`power_law` where `usable` eigenvalues are above rounding: 11 .. 100, or what there is.

    With fewer than 20 the first ten count too.
    """
    last = jnp.minimum(usable, LAST_RANK)
    return jnp.where(last - FIRST_RANK + 1 >= FEWEST_RANKS, FIRST_RANK, 1), last


def off_diagonal(covariance_DD: jax.Array) -> jax.Array:
    """The share of a covariance's squared mass off its diagonal, sum_{i != j} C_ij^2 / sum_ij C_ij^2, in 0..1.

    VICReg's covariance term (Bardes et al. 2022, arXiv 2105.04906, eq. 4) divided so that it depends neither on the
    features' scale nor on their number: 0 for features without correlation, 1 - 1/D for D times the same one.
    """
    scale = jnp.max(jnp.abs(covariance_DD), axis=(-2, -1), keepdims=True)
    squared_DD = jnp.square(covariance_DD / jnp.where(scale > 0, scale, 1.0))
    total = jnp.sum(squared_DD, axis=(-2, -1))
    off = jnp.sum(squared_DD * (1 - jnp.eye(covariance_DD.shape[-1])), axis=(-2, -1))
    return off / jnp.where(total > 0, total, 1.0)


def correlation(covariance_DD: jax.Array, live_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over the pairs of distinct features that are not constant: of squared and of absolute correlation.

    The first is Barlow Twins' redundancy (Zbontar et al. 2021, arXiv 2103.03230, second term of eq. 1) of the features
    with themselves, per pair; the second the mean |cosine| between centred features. 0 where there is no pair.

    Args:
      covariance_DD: (..., D, D).
      live_D: (..., D), whether a feature varies.
    """
    deviation_D = jnp.sqrt(jnp.where(live_D, jnp.diagonal(covariance_DD, axis1=-2, axis2=-1), 1.0))
    pairs_DD = live_D[..., :, None] & live_D[..., None, :] & ~jnp.eye(live_D.shape[-1], dtype=bool)
    r_DD = jnp.where(pairs_DD, covariance_DD / (deviation_D[..., :, None] * deviation_D[..., None, :]), 0.0)
    count = jnp.maximum(jnp.sum(pairs_DD, axis=(-2, -1)), 1)
    return jnp.sum(jnp.square(r_DD), axis=(-2, -1)) / count, jnp.sum(jnp.abs(r_DD), axis=(-2, -1)) / count


@jax.jit
def _measure(factor_XX: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
    centred_DD = factor_XX[..., 1:, 1:]
    D = centred_DD.shape[-1]
    singular_D = jnp.linalg.svd(factor_XX[..., :, 1:], compute_uv=False)
    centred_D = jnp.linalg.svd(centred_DD, compute_uv=False)
    # NumPy's matrix_rank on the factor. Relative to the features as they are: a mean is subtracted with their rounding.
    noise = singular_D[..., :1] * ((1 + D) * jnp.finfo(jnp.float32).eps)
    eigenvalues_D = jnp.square(centred_D) / jnp.maximum(rows - 1, 1)
    numerical_rank = jnp.sum(centred_D > noise, axis=-1)
    first, last = fit_range(numerical_rank)
    alpha, r2 = power_law(eigenvalues_D, first, last)
    covariance_DD = jnp.einsum("...kd,...ke->...de", centred_DD, centred_DD, precision=HIGHEST)
    column_D = jnp.linalg.norm(centred_DD, axis=-2)
    whole_D = jnp.linalg.norm(factor_XX[..., :, 1:], axis=-2)
    live_D = column_D > whole_D * ((1 + D) * jnp.finfo(jnp.float32).eps)
    barlow, cosine = correlation(covariance_DD, live_D)
    largest, smallest = centred_D[..., 0], centred_D[..., -1]
    full = numerical_rank == D
    return {
        "rankme": entropy_rank(singular_D),
        "effective_rank": entropy_rank(centred_D),
        "stable_rank": jnp.sum(jnp.square(centred_D / jnp.where(largest > 0, largest, 1.0)[..., None]), axis=-1),
        "numerical_rank": numerical_rank,
        "condition": jnp.where(full, largest / jnp.where(full, smallest, 1.0), jnp.nan),
        "alpha_req": alpha,
        "alpha_r2": r2,
        "alpha_first": first,
        "alpha_last": last,
        "off_diagonal": off_diagonal(covariance_DD),
        "mean_squared_correlation": barlow,
        "mean_abs_correlation": cosine,
        "constant": D - jnp.sum(live_D, axis=-1),
        "eigenvalues": eigenvalues_D,
    }


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a set of features (n rows, D wide) uses of its dimensions.

    Attributes:
      rows: n.
      width: D.
      rankme: :func:`entropy_rank` of the singular values of the features, not centred, as RankMe is defined.
      effective_rank: the same of the centred features.
      stable_rank: sum of the covariance's eigenvalues over the largest.
      numerical_rank: singular values of the centred features above rounding.
      condition: largest over smallest singular value of the centred features; None below full numerical rank.
      alpha_req: :func:`power_law`'s exponent of the covariance's eigenvalues; None if it cannot be fitted.
      alpha_r2: of that fit.
      alpha_range: the ranks it was fitted on, first and last.
      off_diagonal: :func:`off_diagonal` of the covariance.
      mean_squared_correlation: see :func:`correlation`.
      mean_abs_correlation: see :func:`correlation`.
      constant: features that are the same for all rows.
      eigenvalues: of the covariance (over n - 1), decreasing, (D,).
      warnings: what limits these numbers, in words.
    """

    rows: int
    width: int
    rankme: float
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    condition: float | None
    alpha_req: float | None
    alpha_r2: float | None
    alpha_range: tuple[int, int]
    off_diagonal: float
    mean_squared_correlation: float
    mean_abs_correlation: float
    constant: int
    eigenvalues: np.ndarray
    warnings: tuple[str, ...]

    @property
    def rank_limited(self) -> bool:
        """Whether the number of rows, not the encoder, bounds the rank: n <= D."""
        return self.rows <= self.width

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        plain = dataclasses.asdict(self) | {"rank_limited": self.rank_limited, "eigenvalues": self.eigenvalues.tolist()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def rank_warning(rows: int, width: int, what: str = "rows") -> str | None:
    """What to say where a spectrum of D values comes from no more than D rows, else None."""
    if rows > width:
        return None
    return (
        f"{rows} {what} for {width} features: the centred spectrum has at most {max(rows - 1, 0)} values above zero, "
        f"and all ranks are bounded by the {what}; use more than {width}, better ten times as many"
    )


def measures(factor_XX: jax.Array, rows: int) -> list[Measures]:
    """The measures of each of M factors (M, 1 + D, 1 + D) of `rows` rows.

    Raises:
      NonFiniteError: a feature was NaN or infinite.
      ValueError: there are no two rows.
    """
    if rows < 2:
        raise ValueError(f"a spectrum needs at least 2 rows of features, got {rows}")
    with one_lapack_thread():
        found = {k: np.asarray(v) for k, v in jax.device_get(_measure(factor_XX, jnp.float32(rows))).items()}
    width = factor_XX.shape[-1] - 1
    if not np.isfinite(found["eigenvalues"]).all():
        raise NonFiniteError("collapse: some of the features are NaN or infinite, their spectrum cannot be taken")
    warning = rank_warning(rows, width)
    out = []
    for i in range(factor_XX.shape[0]):
        value = {k: v[i].item() for k, v in found.items() if k != "eigenvalues"}
        for name in ("condition", "alpha_req", "alpha_r2"):
            value[name] = value[name] if np.isfinite(value[name]) else None
        alpha_range = (value.pop("alpha_first"), value.pop("alpha_last"))
        texts = [warning] if warning else []
        if value["constant"]:
            texts.append(f"{value['constant']} of {width} features are constant")
        out.append(
            Measures(
                rows,
                width,
                alpha_range=alpha_range,
                eigenvalues=found["eigenvalues"][i],
                warnings=tuple(texts),
                **value,
            )
        )
    return out


def of_features(x_nD: np.ndarray | jax.Array) -> Measures:
    """The measures of features (n, D); errors as :func:`measures`."""
    return measures(factor(x_nD)[None], len(x_nD))[0]


def grow_classes(
    within_DD: jax.Array, between_XX: jax.Array, x_cqD: jax.Array, kept_c: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """LiDAR's two factors with more classes: views (..., c, q, D) of c images; the ones not `kept` add nothing.

    Args:
      within_DD: factor of the views minus their image's mean, (..., D, D).
      between_XX: factor of the images' means :func:`with_ones`, (..., 1 + D, 1 + D).
      x_cqD: features.
      kept_c: 1 or 0 for each image.
    """
    x_cqD = x_cqD.astype(jnp.float32)
    kept_c = jnp.ones(x_cqD.shape[-3], jnp.float32) if kept_c is None else kept_c.astype(jnp.float32)
    mean_cD = jnp.mean(x_cqD, axis=-2)
    deviations = (x_cqD - mean_cD[..., None, :]) * kept_c[:, None, None]
    rows = deviations.reshape(*deviations.shape[:-3], -1, deviations.shape[-1])
    return grow(within_DD, rows), grow(between_XX, with_ones(mean_cD, kept_c))


@dataclasses.dataclass(frozen=True)
class Lidar:
    """LiDAR of one set of features.

    Attributes:
      value: effective rank of the LDA matrix, 1 to min(D, classes - 1).
      classes: images.
      views: of each.
      eigenvalues: of the LDA matrix, decreasing, (D,).
      warnings: what limits it, in words.
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
    triangle_DD = grow(within_DD, ridge_DD)
    between_DD = between_XX[..., 1:, 1:] / jnp.sqrt(classes - 1)
    white_DD = jax.scipy.linalg.solve_triangular(triangle_DD, jnp.swapaxes(between_DD, -1, -2), trans="T")
    eigenvalues_D = jnp.square(jnp.linalg.svd(white_DD, compute_uv=False))
    return entropy_rank(eigenvalues_D), eigenvalues_D


def lidar(within_MDD: jax.Array, between_MXX: jax.Array, classes: int, views: int, delta: float = DELTA) -> list[Lidar]:
    """LiDAR of each of M pairs of factors that :func:`grow_classes` made.

    Thilak et al. 2024 (arXiv 2312.04000): every image is a class of its own, its q augmented or corrupted views are
    the samples. With the covariances S_b of the classes' means (over c - 1) and S_w of the views around them (over
    c (q - 1)), plus delta I, it is :func:`entropy_rank` of the eigenvalues of S_w^-1/2 S_b S_w^-1/2: the directions
    in which images differ by more than their views do.

    Args:
      within_MDD: (M, D, D).
      between_MXX: (M, 1 + D, 1 + D).
      classes: c, at least 2.
      views: q, at least 2.
      delta: in units of the features' variance; positive.

    Raises:
      ValueError: fewer than two classes or views, or `delta` not positive.
      NonFiniteError: a feature was NaN or infinite.
    """
    if classes < 2 or views < 2 or not delta > 0:
        raise ValueError(f"lidar: classes={classes} and views={views} must be at least 2, delta={delta} positive")
    numbers = [jnp.float32(v) for v in (classes, views, delta)]
    with one_lapack_thread():
        values, eigenvalues_MD = jax.device_get(_lidar(within_MDD, between_MXX, *numbers))
    if not np.isfinite(eigenvalues_MD).all():
        raise NonFiniteError("lidar: some of the features are NaN or infinite")
    width = within_MDD.shape[-1]
    warnings = [w for w in (rank_warning(classes, width, "images"),) if w]
    if classes * (views - 1) < width:
        warnings.append(
            f"{classes} images x {views} views leave the within-class covariance of {width} features singular: "
            f"delta={delta:g} stands in for it"
        )
    return [Lidar(float(v), classes, views, e, tuple(warnings)) for v, e in zip(values, eigenvalues_MD, strict=True)]
