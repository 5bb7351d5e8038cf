"""How many dimensions weights and features use: spectra, effective ranks, redundancy.

Features are read in one pass. Only R is kept of the rows read so far, the triangular factor of the QR decomposition of
[1 | X] (Demmel et al. 2012, "Communication-optimal parallel and sequential QR"): with n rows of mean m

    R = [sqrt(n)  sqrt(n) m^T]      R_c^T R_c = sum of (x - m)(x - m)^T
        [   0          R_c   ]

so that R has the mean, and the singular values of X and of the centred X. R is not squared, as a covariance is: in
float32 its singular values are exact to about 1e-7 of the largest one, while the roots of a covariance's eigenvalues
are noise below 3e-4 of it, where collapse shows. The same operation merges the factors of parts of the rows, over
batches and over devices.

Shapes: n rows, D width, X = 1 + D, L layers, M matrices of one shape. Leading axes are batch axes.
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

__all__ = ["Measures", "entropy_rank", "measure_features"]

HIGHEST = jax.lax.Precision.HIGHEST
EPS = 1e-7  # epsilon of RankMe and of LiDAR, added to each normalised singular value
# Ranks, counted from 1, on which the power law is fitted. alpha-ReQ leaves out the first ten, which seldom follow it.
FIRST_RANK, LAST_RANK = 11, 100
MIN_RANKS = 10  # with fewer ranks beyond the first ten, the fit starts at rank 1
CHUNK = 4096  # rows of features on the device at a time


@contextlib.contextmanager
def one_lapack_thread() -> Generator[None, None, None]:
    """Within it, a decomposition on a CPU uses one thread: each core is a device and may run a decomposition.

    LAPACK's threads spin while they wait for each other. With more threads than free cores, a decomposition of
    milliseconds took seconds.
    """
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield


def empty_factor(width: int, *leading: int) -> jax.Array:
    """Returns the factor of no rows: zeros (*leading, width, width).

    Args:
      width: length of a row; 1 + D for rows of :func:`with_ones`.
      *leading: sizes of the batch axes.
    """
    return jnp.zeros((*leading, width, width), jnp.float32)


def with_ones(x_nD: jax.Array, kept_n: jax.Array | None = None) -> jax.Array:
    """Puts a one in front of each row.

    Args:
      x_nD: rows (..., n, D).
      kept_n: 1 for a row to use, 0 for a row to replace by zeros, (n,); None: all rows are used.

    Returns:
      Rows, float32 (..., n, 1 + D).

    >>> with_ones(jnp.array([[2.0, 3.0], [4.0, 5.0]]), jnp.array([1, 0])).tolist()
    [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    """
    x_nD = x_nD.astype(jnp.float32)
    kept_n = jnp.ones(x_nD.shape[-2], jnp.float32) if kept_n is None else kept_n.astype(jnp.float32)
    ones_n1 = jnp.broadcast_to(kept_n[:, None], (*x_nD.shape[:-1], 1))
    return jnp.concatenate([ones_n1, jnp.where(ones_n1 > 0, x_nD, 0.0)], axis=-1)


def add_rows(factor_XX: jax.Array, rows_nX: jax.Array) -> jax.Array:
    """Returns the factor of the rows so far and of more rows.

    Args:
      factor_XX: factor of the rows so far, (..., X, X).
      rows_nX: more rows, (..., n, X), or another factor, (..., X, X), which stands for its rows. Rows of zeros change
        nothing.

    Returns:
      The factor (..., X, X).
    """
    return jnp.linalg.qr(jnp.concatenate([factor_XX, rows_nX], axis=-2), mode="r")


_add_rows = jax.jit(add_rows, donate_argnums=0)


def merge(factors_PXX: jax.Array) -> jax.Array:
    """Returns the factor (..., X, X) of all rows from the factors (P, ..., X, X) of P parts of the rows."""
    stacked = jnp.moveaxis(factors_PXX, 0, -3)
    *leading, P, X, _ = stacked.shape
    return jnp.linalg.qr(stacked.reshape(*leading, P * X, X), mode="r")


def factor(x_nD: np.ndarray | jax.Array) -> jax.Array:
    """Returns the factor (1 + D, 1 + D) of features (n, D), with CHUNK rows on the device at a time."""
    n, D = x_nD.shape
    out = empty_factor(1 + D)
    with one_lapack_thread():
        for start in range(0, n, CHUNK):
            part = np.asarray(x_nD[start : start + CHUNK], np.float32)
            short = min(CHUNK, n) - len(part)  # zeros fill the last part up: one shape, one program
            rows = np.pad(part, ((0, short), (0, 0)))
            out = _add_rows(out, with_ones(jnp.asarray(rows), jnp.arange(len(rows)) < len(part)))
        return out.block_until_ready()


def entropy_rank(values_D: jax.Array) -> jax.Array:
    """Returns the exponential (...) of the entropy of p = values / sum(values) + EPS, for values (..., D).

    It is D for D equal values, and 1 for a single value or for zeros only. For singular values of features it is RankMe
    (Garrido et al. 2023, arXiv 2210.02885, eq. 1 and its p_k), for the eigenvalues of the LDA matrix it is LiDAR
    (Thilak et al. 2024, arXiv 2312.04000), and for a weight's singular values it is the effective rank of Roy &
    Vetterli (2007).

    >>> print(f"{entropy_rank(jnp.array([2.0, 2.0, 2.0, 0.0])):.2f}")
    3.00
    """
    total = jnp.sum(values_D, axis=-1, keepdims=True)
    p_D = values_D / jnp.where(total > 0, total, 1.0) + EPS
    return jnp.exp(-jnp.sum(p_D * jnp.log(p_D), axis=-1))


def power_law(eigenvalues_D: jax.Array, first: jax.Array | int, last: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Fits eigenvalue(i) = c * i ** -alpha for the ranks first .. last, counted from 1.

    For the eigenvalues of the features' covariance, alpha is alpha-ReQ (Agrawal et al. 2022, "alpha-ReQ: Assessing
    representation quality in self-supervised learning by measuring eigenspectrum decay"). As in its authors' code and
    in Stringer et al. (2019), log eigenvalues are fitted on log ranks by least squares with weight 1 / rank, so that
    every decade of ranks counts equally.

    Args:
      eigenvalues_D: eigenvalues (..., D), decreasing.
      first: the first rank of the fit, (...).
      last: the last rank of the fit, (...).

    Returns:
      alpha and the fit's R^2 (with the weights of the fit), both (...); NaN for fewer than three ranks.

    >>> alpha, r2 = power_law(3.0 * jnp.arange(1.0, 51.0) ** -1.5, 1, 50)
    >>> print(f"{alpha:.2f} {r2:.2f}")
    1.50 1.00
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
    # The fit to a flat spectrum is exact.
    r2 = jnp.where(yy > 1e-12, slope * xy / jnp.where(yy > 1e-12, yy, 1.0), 1.0)
    return -slope, jnp.where(enough, r2, jnp.nan)


def fit_range(usable: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the first and the last rank for :func:`power_law` if `usable` eigenvalues are above rounding.

    They are FIRST_RANK and LAST_RANK, or the last usable rank; with fewer than 20 usable ranks the first is 1.

    >>> [tuple(int(rank) for rank in fit_range(usable)) for usable in (300, 60, 19)]
    [(11, 100), (11, 60), (1, 19)]
    """
    last = jnp.minimum(usable, LAST_RANK)
    return jnp.where(last - FIRST_RANK + 1 >= MIN_RANKS, FIRST_RANK, 1), last


def off_diagonal(covariance_DD: jax.Array) -> jax.Array:
    """Returns sum_{i != j} C_ij^2 / sum_ij C_ij^2, in 0..1, shape (...), of covariances C (..., D, D).

    This is VICReg's covariance term (Bardes et al. 2022, arXiv 2105.04906, eq. 4), divided so that it depends neither
    on the features' scale nor on their number: 0 for features without correlation, 1 - 1/D for D equal features.

    >>> off_diagonal(jnp.eye(4)).item(), off_diagonal(jnp.ones((4, 4))).item()
    (0.0, 0.75)
    """
    scale = jnp.max(jnp.abs(covariance_DD), axis=(-2, -1), keepdims=True)
    squared_DD = jnp.square(covariance_DD / jnp.where(scale > 0, scale, 1.0))
    total = jnp.sum(squared_DD, axis=(-2, -1))
    off = jnp.sum(squared_DD * (1 - jnp.eye(covariance_DD.shape[-1])), axis=(-2, -1))
    return off / jnp.where(total > 0, total, 1.0)


def correlation(covariance_DD: jax.Array, live_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean squared and the mean absolute correlation, both (...), over pairs of different features.

    Pairs with a constant feature are left out; both means are 0 if no pair is left. The first mean is Barlow Twins'
    redundancy per pair (Zbontar et al. 2021, arXiv 2103.03230, second term of eq. 1), between the features and
    themselves; the second is the mean |cosine| between centred features.

    Args:
      covariance_DD: covariances (..., D, D).
      live_D: whether a feature varies, bool (..., D).
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
    # The threshold of NumPy's matrix_rank. It is relative to the features before centring, as their rounding stays.
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
    """How many of their dimensions features use.

    Attributes:
      rows: number of rows, n.
      width: number of features, D.
      rankme: :func:`entropy_rank` of the singular values of the features, which are not centred, as RankMe is defined.
      effective_rank: :func:`entropy_rank` of the singular values of the centred features.
      stable_rank: sum of the covariance's eigenvalues / the largest of them.
      numerical_rank: number of singular values of the centred features above rounding.
      condition: largest / smallest singular value of the centred features; None if the numerical rank is below D.
      alpha_req: exponent of :func:`power_law` for the covariance's eigenvalues; None if it cannot be fitted.
      alpha_r2: R^2 of this fit; None if it cannot be fitted.
      alpha_range: the first and the last rank of this fit.
      off_diagonal: :func:`off_diagonal` of the covariance.
      mean_squared_correlation: see :func:`correlation`.
      mean_abs_correlation: see :func:`correlation`.
      constant: number of features that are equal in all rows.
      eigenvalues: eigenvalues of the covariance (with n - 1), decreasing, (D,).
      warnings: texts that say what limits these numbers.
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
        """Returns the measures in the form of JSON."""
        plain = dataclasses.asdict(self) | {"rank_limited": self.rank_limited, "eigenvalues": self.eigenvalues.tolist()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def rank_warning(rows: int, width: int, what: str = "rows") -> str | None:
    """Returns a warning if there are no more rows than features, else None.

    Args:
      rows: number of rows.
      width: number of features, D.
      what: name of the rows in the warning.
    """
    if rows > width:
        return None
    return (
        f"{rows} {what} for {width} features: the centred spectrum has at most {max(rows - 1, 0)} values above zero, "
        f"and all ranks are bounded by the {what}; use more than {width}, better ten times as many"
    )


def measures(factor_XX: jax.Array, rows: int) -> list[Measures]:
    """Returns the measures of each of M sets of features.

    Args:
      factor_XX: factors (M, 1 + D, 1 + D) of the sets.
      rows: number of rows in each set.

    Raises:
      NonFiniteError: a feature was NaN or infinite.
      ValueError: there are fewer than two rows.
    """
    if rows < 2:
        raise ValueError(f"a spectrum needs at least 2 rows of features, got {rows}")
    with one_lapack_thread():
        found = {k: np.asarray(v) for k, v in jax.device_get(_measure(factor_XX, jnp.float32(rows))).items()}
    width = factor_XX.shape[-1] - 1
    if not np.isfinite(found["eigenvalues"]).all():
        raise NonFiniteError("collapse: some of the features are NaN or infinite, so that they have no spectrum")
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


def measure_features(x_nD: np.ndarray | jax.Array) -> Measures:
    """Returns the measures of features (n, D).

    Raises:
      NonFiniteError: a feature is NaN or infinite.
      ValueError: there are fewer than two rows.
    """
    return measures(factor(x_nD)[None], len(x_nD))[0]
