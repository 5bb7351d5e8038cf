"""G = E[X' X'^T] of a corruption X' of X, from the second moments of X alone (Theorem 3; docs/alignment.md).

Alignment does not depend on the scale of G. The mean of a corruption multiplies X by a number, and every G here is
divided by the square of that number, as if E[X'] = X. An image is a row of H * W * 3 numbers (row, column, channel).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from crate_jax.errors import ConfigError

CHANNELS = 3


def patch_of_number(image_size: tuple[int, int], patch: tuple[int, int], channels: int = CHANNELS) -> np.ndarray:
    """The patch in which each of the D numbers of an image lies, int (D,); patches are counted in raster order.

    Patches at the right and lower border may be cut.

    >>> patch_of_number((2, 3), (2, 2), channels=1).tolist()
    [0, 0, 1, 0, 0, 1]
    """
    rows, columns = np.meshgrid(np.arange(image_size[0]), np.arange(image_size[1]), indexing="ij")
    across = -(-image_size[1] // patch[1])
    return np.repeat((rows // patch[0] * across + columns // patch[1]).reshape(-1), channels)


def masking(second_DD: np.ndarray, patch_D: np.ndarray, ratio: float) -> np.ndarray:
    """G of a mask that sets each patch, with all its channels, to the mean with probability `ratio`, independently.

    It is X X^T plus ratio / (1 - ratio) times the diagonal blocks of X X^T, one block per patch.

    Args:
      second_DD: X X^T.
      patch_D: the patch of each number.
      ratio: the removed share, in [0, 1).

    >>> masking(np.ones((2, 2)), np.array([0, 1]), 0.75).tolist()
    [[4.0, 1.0], [1.0, 4.0]]
    """
    return second_DD * np.where(patch_D[:, None] == patch_D[None, :], 1 / (1 - ratio), 1.0)


def masking_of_count(second_DD: np.ndarray, patch_D: np.ndarray, kept: int) -> np.ndarray:
    """G of a mask that keeps exactly `kept` of the N patches, drawn without replacement, as in this library's training.

    It is X X^T with the diagonal blocks times N / kept, and all else times N (kept - 1) / (kept (N - 1)). Up to a
    factor it equals :func:`masking` with the ratio 1 - (kept - 1) / (N - 1).

    Args:
      second_DD: X X^T.
      patch_D: the patch of each number.
      kept: the number of patches that stay, 1 .. N.
    """
    N = int(patch_D.max()) + 1
    apart = N * (kept - 1) / (kept * max(N - 1, 1))
    return second_DD * np.where(patch_D[:, None] == patch_D[None, :], N / kept, apart)


def gaussian(second_DD: np.ndarray, count: int, std: float) -> np.ndarray:
    """G of independent noise of standard deviation `std`, added to every number of N = `count` images."""
    return second_DD + count * std**2 * np.eye(len(second_DD))


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Second moments of a random projection's matrix P over N tokens, P_ij = s_i s_j [h_i = h_j] c_{h_i}.

    h are the buckets, s independent symmetric signs, and c the factor of a bucket's sum (in the exact projector, one
    over the number of the bucket's tokens).

    Attributes:
      mean: E[P_ii], which is equal for all i; E[P_ij] = 0 for i != j.
      together_NN: E[[h_i = h_j] c_{h_i}^2]; on the diagonal E[c_{h_i}^2].
      apart_NN: E[c_{h_i} c_{h_j}].
    """

    mean: float
    together_NN: np.ndarray
    apart_NN: np.ndarray


def mixing(tokens: int, buckets: int, kind: str = "balanced", scale: float = 0.0) -> Mixing:
    """:class:`Mixing` of the projections that `crate_jax.models.corruption` draws.

    Args:
      tokens: N.
      buckets: K', at most N.
      kind: "balanced" (a permutation for each run of K' tokens; cyclically shifted where K' does not divide N) or
        "independent".
      scale: the factor of every bucket's sum; 0: the exact projector.

    Raises:
      ValueError: K' is not in 1 .. N.

    >>> mixing(8, 2).mean  # K' / N
    0.25
    """
    if not 1 <= buckets <= tokens:
        raise ValueError(f"buckets={buckets}: must lie in 1..{tokens}, the number of tokens")
    together, apart = (_balanced if kind == "balanced" else _independent)(tokens, buckets, scale)
    # The exact P is symmetric and idempotent, so E[P_ii] = sum_k E[P_ik^2]. With one scale, P_ii is that scale.
    return Mixing(scale or float(together[0].sum()), together, apart)


def _independent(N: int, K: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Second moments for uniform buckets: the other tokens of one bucket are binomial, those of two multinomial."""
    same = np.eye(N, dtype=bool)
    if scale:
        return scale**2 * np.where(same, 1.0, 1 / K), np.full((N, N), scale**2)
    own = _expectation(N - 1, [1 / K], lambda a: 1 / (1.0 + a) ** 2)
    if N == 1:
        return np.full((1, 1), own), np.full((1, 1), own)
    both = _expectation(N - 2, [1 / K], lambda a: 1 / (2.0 + a) ** 2) / K
    distinct = 0.0
    if K > 1:
        distinct = (1 - 1 / K) * _expectation(N - 2, [1 / K, 1 / K], lambda a, b: 1 / ((1.0 + a) * (1.0 + b)))
    return np.where(same, own, both), np.where(same, own, both + distinct)


def _expectation(draws: int, probabilities: list[float], value: Callable[..., np.ndarray]) -> float:
    """E[value(counts)] over the counts of one or two outcomes of a multinomial distribution."""
    log_factorial = np.array([math.lgamma(i + 1) for i in range(draws + 1)])
    counts = np.meshgrid(*[np.arange(draws + 1)] * len(probabilities), indexing="ij")
    rest = draws - sum(counts)
    left = max(0.0, 1 - sum(probabilities))
    possible = (rest >= 0) & ((left > 0) | (rest == 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = log_factorial[draws] - log_factorial[np.maximum(rest, 0)]
        logs = logs + np.where(rest > 0, rest * math.log(left or 1.0), 0.0)
        for count, p in zip(counts, probabilities, strict=True):
            logs = logs + count * math.log(p) - log_factorial[count]
    return float(np.sum(np.where(possible, np.exp(logs) * value(*counts), 0.0)))


def _balanced(N: int, K: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Second moments for balanced buckets.

    Every run of K tokens fills each bucket once, independently of other runs. The last run may be cut to t tokens, and
    then all tokens are shifted. A bucket holds `full` = ceil(N / K) tokens if the last run reached it, else one less.
    """
    full, t = -(-N // K), N % K
    run_N = np.arange(N) // K
    large, small = scale or 1 / full, scale or 1 / max(full - 1, 1)
    same_run = run_N[:, None] == run_N[None, :]
    same = np.eye(N, dtype=bool)
    if not t:
        together = large**2 * np.where(same, 1.0, np.where(same_run, 0.0, 1 / K))
        return together, np.full((N, N), large**2)
    # The probability that a token's bucket is full: 1 for a token of the last run, else t / K.
    last_N = run_N == run_N[-1]
    one = t / K
    chance_N = np.where(last_N, 1.0, one)
    square_N = chance_N * large**2 + (1 - chance_N) * small**2
    together = np.where(same, square_N[:, None], 0.0)
    different = ~same_run
    # Two tokens in one bucket: it is full if either token is in the last run.
    either = last_N[:, None] | last_N[None, :]
    neither_last = one * large**2 + (1 - one) * small**2
    together = np.where(different, np.where(either, large**2, neither_last) / K, together)
    apart = together.copy()
    # Two tokens in two buckets: both are full, one of them, or neither.
    if K > 1:
        both = t * (t - 1) / (K * (K - 1))
        neither = (K - t) * (K - t - 1) / (K * (K - 1))
        free = both * large**2 + neither * small**2 + (1 - both - neither) * large * small
        # One token is in the last run; the bucket of the other is one of K - 1, of which t - 1 are full.
        other = (t - 1) / (K - 1)
        with_last = large * (other * large + (1 - other) * small)
        two_last = last_N[:, None] & last_N[None, :]
        in_two = np.where(two_last, large**2, np.where(either, with_last, free))
        share = np.where(same, 0.0, np.where(same_run, 1.0, 1 - 1 / K))
        apart = apart + share * in_two
    return _shifted(together), _shifted(apart)


def _shifted(matrix_NN: np.ndarray) -> np.ndarray:
    """The mean over all cyclic shifts of the tokens: each entry is the mean of its wrapped diagonal."""
    N = len(matrix_NN)
    i = np.arange(N)
    means = np.array([matrix_NN[i, (i + d) % N].mean() for d in range(N)])
    return means[(i[None, :] - i[:, None]) % N]


def projection(second_DD: np.ndarray, patch_D: np.ndarray, mix: Mixing) -> np.ndarray:
    """G of random orthogonal projection over patches as tokens, the closed form of docs/alignment.md.

    G_ij = apart_ij C_ij + together_ij C_ji for i != j, and G_ii = sum_k together_ik C_kk, both divided by mean^2. C_ij
    is the P x P block of X X^T for the tokens i and j, each with P numbers in one order.

    Args:
      second_DD: X X^T.
      patch_D: the token of each number; all tokens hold equally many numbers.
      mix: the second moments of the projection's matrix.

    Raises:
      ConfigError: the tokens do not hold equally many numbers.
    """
    order_D = np.argsort(patch_D, kind="stable")  # sorted by token, and in raster order within a token
    N = len(mix.together_NN)
    P = len(order_D) // N
    if N * P != len(order_D) or np.any(np.bincount(patch_D, minlength=N) != P):
        raise ConfigError("alignment under projection: the patches must divide the image into tokens of one size")
    blocks_NPNP = second_DD[np.ix_(order_D, order_D)].reshape(N, P, N, P)
    i = np.arange(N)
    own_NPP = blocks_NPNP[i, :, i, :]
    together_NN = mix.together_NN - np.diag(np.diag(mix.together_NN))
    apart_NN = mix.apart_NN - np.diag(np.diag(mix.apart_NN))
    out_NPNP = apart_NN[:, None, :, None] * blocks_NPNP
    out_NPNP += together_NN[:, None, :, None] * blocks_NPNP.transpose(0, 3, 2, 1)  # C_ji
    out_NPNP[i, :, i, :] = np.tensordot(mix.together_NN, own_NPP, axes=1)
    out = np.empty_like(second_DD)
    out[np.ix_(order_D, order_D)] = out_NPNP.reshape(len(order_D), -1) / mix.mean**2
    return out
