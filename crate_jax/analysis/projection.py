"""Random projection against masking, without training: the noise of inner products, and the number of patterns.

ROPIM (arXiv 2310.18737) argues that a projection has noise of bounded variance (Proposition 2) and covers more patterns
than a mask that removes the same share. Both are questions about the draws alone.

Shapes: N tokens, K' kept dimensions (the rank of P), M pairs of images with one number for each token.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Plot

from crate_jax.config import base
from crate_jax.models import corruption as corruptions
from crate_jax.report.section import Figure, Section, Table
from crate_jax.report.style import tidy

TOKENS, KEPT = 196, 28  # the paper's 14 x 14 patches, of which 1/7 is kept
DRAWS = 5_000
BATCH = 500
PEAKS = (196, 98, 49, 28, 14, 7, 4, 2, 1)  # numbers of tokens that hold all of the energy


@dataclasses.dataclass(frozen=True)
class Noise:
    """How an estimate of the inner product <x, y> of two images of N tokens, made from what a corruption keeps, varies.

    The estimate is (N / K') <x, P y>; its mean is <x, y>. All numbers are in units of |x|^2 |y|^2.

    Attributes:
      measured: the variance over draws, (M,).
      exact: the variance, in closed form, (M,).
      bound: for a projection (1 / K')(<x, y>^2 + |x|^2 |y|^2), the bound for count sketches of K' buckets, (M,).
    """

    measured: np.ndarray
    exact: np.ndarray
    bound: np.ndarray


def noise(name: str, x_NM: np.ndarray, y_NM: np.ndarray, kept: int, draws: int = DRAWS, seed: int = 0) -> Noise:
    """Measures the noise of ``mask`` or ``rop`` (balanced buckets), with the samplers that training uses.

    Args:
      name: the corruption.
      x_NM: one image of each pair.
      y_NM: the other one.
      kept: K', a divisor of N.
      draws: the number of draws.
      seed: their seed.
    """
    tokens, pairs = x_NM.shape
    config = base()
    config.corruption.name, config.corruption.mask_fill = name, "zero"
    config.corruption.rop_ratio, config.corruption.mask_ratio = kept / tokens, 1 - (kept + 0.5) / tokens
    draw = corruptions.sampler(config, tokens, pairs)
    x, y = jnp.asarray(x_NM, jnp.float32), jnp.asarray(y_NM, jnp.float32)

    @jax.jit
    def estimates(keys_B: jax.Array) -> jax.Array:
        seen_BNM = draw(keys_B).view(jnp.broadcast_to(y, (len(keys_B), tokens, pairs)))
        return tokens / kept * jnp.sum(x * seen_BNM, axis=1)

    keys = jax.random.split(jax.random.key(seed), draws)
    found_BM = np.concatenate([np.asarray(estimates(keys[i : i + BATCH]), np.float64) for i in range(0, draws, BATCH)])
    unit_M = np.sum(x_NM**2, axis=0) * np.sum(y_NM**2, axis=0)
    variance = variance_of_masks if name == "mask" else variance_of_projections
    of_pairs = list(zip(x_NM.T, y_NM.T, strict=True))
    return Noise(
        np.mean(np.square(found_BM - np.sum(x_NM * y_NM, axis=0)), axis=0) / unit_M,
        np.array([variance(*pair, kept) for pair in of_pairs]) / unit_M,
        np.array([bound(*pair, kept) for pair in of_pairs]) / unit_M,
    )


def variance_of_masks(x_N: np.ndarray, y_N: np.ndarray, kept: int) -> float:
    """Of a sum over K' of N tokens, drawn without replacement, times N / K'."""
    tokens = len(x_N)
    return tokens**2 / kept * (1 - kept / tokens) * float(np.var(x_N * y_N, ddof=1))


def variance_of_projections(x_N: np.ndarray, y_N: np.ndarray, kept: int) -> float:
    """The sum over i != j of q_ij (x_i^2 y_j^2 + x_i y_i x_j y_j), q_ij the chance that i and j share a bucket.

    In balanced buckets q_ij is 1 / K', and 0 within a run of K' tokens.
    """
    xx, yy, xy = (v.reshape(-1, kept).sum(1) for v in (x_N**2, y_N**2, x_N * y_N))
    return float((np.sum(xx) * np.sum(yy) - xx @ yy + np.sum(xy) ** 2 - xy @ xy) / kept)


def bound(x_N: np.ndarray, y_N: np.ndarray, kept: int) -> float:
    """Proposition 2's bound on the variance of a sketch of K' buckets."""
    return float((x_N @ y_N) ** 2 + np.sum(x_N**2) * np.sum(y_N**2)) / kept


def patterns(tokens: int, kept: int) -> dict[str, float]:
    """The binary logarithm of the number of different P that keep K' of N dimensions; K' divides N.

    A mask chooses K' tokens. A projection with balanced buckets permutes the K' tokens of each of N / K' runs and draws
    N signs; names of buckets, and a sign for all of a bucket, change nothing.

    >>> {name: round(2**bits) for name, bits in patterns(4, 2).items()}
    {'mask': 6, 'rop': 8}
    """

    def log2_factorial(n: int) -> float:
        return math.lgamma(n + 1) / math.log(2)

    masks = log2_factorial(tokens) - log2_factorial(kept) - log2_factorial(tokens - kept)
    return {"mask": masks, "rop": (tokens / kept - 1) * log2_factorial(kept) + tokens - kept}


def section() -> Section:
    """The section on noise and patterns; it needs no run and no images."""
    rng = np.random.default_rng(0)
    x_NM = np.zeros((TOKENS, len(PEAKS)))
    for m, peak in enumerate(PEAKS):
        x_NM[rng.permutation(TOKENS)[:peak], m] = 1
    y_NM = x_NM * rng.choice([0.5, 1.5], x_NM.shape)
    mask, rop = (noise(name, x_NM, y_NM, KEPT) for name in ("mask", "rop"))
    columns = (mask.measured, mask.exact, rop.measured, rop.exact, rop.bound)
    rows = [(peak, *(float(v[m]) for v in columns)) for m, peak in enumerate(PEAKS)]
    plot = Plot(figsize=(6.4, 3.4), layout="constrained")
    axes = plot.subplots()
    axes.loglog(PEAKS, mask.exact, "o-", label="mask")
    axes.loglog(PEAKS, rop.exact, "s-", label="projection")
    axes.loglog(PEAKS, rop.bound, "--", label="bound of projections")
    axes.set_xlabel("tokens that hold the energy")
    tidy(axes, "variance / (|x|² |y|²)", grid="both")
    axes.legend(frameon=False, fontsize=8)
    bits = patterns(TOKENS, KEPT)
    return Section(
        title="What does a projection do that a mask does not?",
        text="After arXiv 2310.18737, Proposition 2 and section 3.2, for "
        f"{TOKENS} tokens of which 1/{TOKENS // KEPT} is kept, over {DRAWS:,} draws of the samplers of training. "
        "Noise: the variance of (N / K') <x, P y>, an estimate of <x, y> from what is kept. A projection's is below "
        "its bound for all images; a mask's has no bound of this kind: it grows as fewer tokens hold an image's "
        "energy, and is smaller than a projection's where all tokens are alike. Patterns: there are "
        f"2^{bits['mask']:.0f} masks and 2^{bits['rop']:.0f} projections with balanced buckets.",
        figures=(Figure("Variance of the estimated inner product, in closed form.", plot),),
        tables=(
            Table(
                "Variance in units of |x|² |y|²: measured and in closed form.",
                ("tokens with energy", "mask", "mask, exact", "projection", "projection, exact", "bound"),
                tuple(rows),
            ),
        ),
        numbers={"log2 patterns": bits},
    )
