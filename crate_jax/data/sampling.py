"""Chooses the image at each position of a run, and draws its random numbers.

A run is an endless sequence of positions: step s of a run with B images per step has the positions
s * B ... s * B + B - 1. All random numbers of a position are a function of (seed, position), by the counter-based
generator Philox (Salmon et al. 2011): any host, thread or worker can compute any batch, in any order, and a run that
resumes at step s needs only s. Only raw 64-bit words are drawn, because NumPy never changes their stream.
"""

from __future__ import annotations

import functools

import numpy as np

# Independent streams of one seed: the second word of Philox's key.
_ORDER, _AUGMENTATION, _REPLACEMENT, _RANDAUGMENT = range(4)
_WORDS_PER_COUNT = 4  # Philox yields four 64-bit words per value of its counter


def indices(seed: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Returns the image at each position; every epoch is a new permutation of all images.

    Args:
      seed: the run's seed.
      positions: positions in the run, int64 (B,).
      size: number of images in the set.

    Returns:
      The images' indices in the set, int32 (B,).

    >>> epochs = indices(seed=0, positions=np.arange(8), size=4).reshape(2, 4)
    >>> np.sort(epochs, axis=1).tolist()
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    positions = np.asarray(positions, np.int64)
    epochs = positions // size
    out = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(seed, int(epoch), size)[positions[here] % size]
    return out


@functools.lru_cache(maxsize=2)  # a batch may hold images of two epochs
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    words = np.random.Philox(key=[seed, _ORDER], counter=[0, epoch, 0, 0]).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int32)


def uniforms(seed: int, first: int, count: int, draws: int, view: int = 0) -> np.ndarray:
    """Returns uniform numbers in [0, 1) for the positions first ... first + count - 1.

    Args:
      seed: the run's seed.
      first: the first position.
      count: number of positions.
      draws: numbers per position, a multiple of 4.
      view: number of the view, for an image of which several are cropped.

    Returns:
      The numbers, float64 (count, draws); a row depends only on the seed, on its position and on the view.
    """
    start = first * (draws // _WORDS_PER_COUNT)
    words = np.random.Philox(key=[seed, _AUGMENTATION], counter=[start, view, 0, 0]).random_raw(count * draws)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(count, draws)


def replacement(seed: int, position: int, attempt: int, size: int) -> int:
    """Returns the index of the image that replaces an undecodable one, at the given attempt (0, 1, ...)."""
    return int(np.random.Philox(key=[seed, _REPLACEMENT], counter=[0, position, attempt, 0]).random_raw() % size)


def randaugment_generator(seed: int, position: int) -> np.random.Generator:
    """Returns the generator that makes RandAugment's choices at one position."""
    return np.random.Generator(np.random.Philox(key=[seed, _RANDAUGMENT], counter=[0, position, 0, 0]))


def sample(count: int, limit: int, seed: int) -> np.ndarray:
    """Returns the indices of `limit` images (0: all), drawn without replacement from `count` images.

    The first `limit` images would not do: folders are sorted by class.
    """
    return np.random.default_rng(seed).permutation(count)[: limit or count]
