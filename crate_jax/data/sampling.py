"""Which image stands at which position of the run, and its random numbers.

A run is one endless row of positions: step s of a run with B images per step holds the positions
s * B ... s * B + B - 1. Everything random about a position is a function of (seed, position) by the
counter-based generator Philox (Salmon et al., 2011): any batch can be computed by any host, thread
or worker, in any order, and a run that resumes at step s needs nothing but s. Only raw 64-bit words
are drawn, whose stream NumPy never changes.
"""

from __future__ import annotations

import functools

import numpy as np

# Independent streams of one seed: the second word of Philox's key.
_ORDER, _AUGMENTATION, _REPLACEMENT, _RANDAUGMENT = range(4)
_WORDS_PER_COUNT = 4  # Philox yields four 64-bit words per value of its counter


def indices(seed: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Returns the image at each position; every epoch is one fresh permutation of all images.

    Args:
      seed: of the run.
      positions: int64 [B], not decreasing.
      size: number of images.

    Returns:
      int32 [B].
    """
    positions = np.asarray(positions, np.int64)
    epochs = positions // size
    out = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(seed, int(epoch), size)[positions[here] % size]
    return out


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    words = np.random.Philox(key=[seed, _ORDER], counter=[0, epoch, 0, 0]).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int32)


def uniforms(seed: int, first: int, count: int, draws: int) -> np.ndarray:
    """Returns uniform numbers in [0, 1) for the positions first ... first + count - 1.

    Args:
      seed: of the run.
      first: the first position.
      count: number of positions.
      draws: numbers per position, a multiple of 4.

    Returns:
      float64 [count, draws]; each row depends on (seed, its position) alone.
    """
    start = first * (draws // _WORDS_PER_COUNT)
    words = np.random.Philox(key=[seed, _AUGMENTATION], counter=start).random_raw(count * draws)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(count, draws)


def replacement(seed: int, position: int, attempt: int, size: int) -> int:
    """Returns the image that takes the place of an undecodable one, at the given attempt (0, 1, ...)."""
    return int(np.random.Philox(key=[seed, _REPLACEMENT], counter=[0, position, attempt, 0]).random_raw() % size)


def randaugment_generator(seed: int, position: int) -> np.random.Generator:
    """Returns the generator of RandAugment's choices at one position."""
    return np.random.Generator(np.random.Philox(key=[seed, _RANDAUGMENT], counter=[0, position, 0, 0]))


def sample(count: int, limit: int, seed: int) -> np.ndarray:
    """A seeded choice of `limit` (0: all) of `count` images: folders come sorted by class, their head would be one."""
    return np.random.default_rng(seed).permutation(count)[: limit or count]
