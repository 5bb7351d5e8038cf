"""The training path of small sets: images are decoded once, held in memory, and augmented as whole batches."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import time

import numpy as np
from PIL import Image

from crate_jax.data import decoding, sampling
from crate_jax.data.augmentation import DRAWS, Augmentation, Layout, empty, numbered, packed
from crate_jax.data.randaugment import randaugment
from crate_jax.data.reading import Readers, reading
from crate_jax.data.resampling import BatchResizer
from crate_jax.data.sources import Source
from crate_jax.data.undecodable import Undecodable

HEADERS = 64  # images whose headers are read before the whole set is decoded
MAX_TABLE_BYTES = 64 * 2**20  # with larger tables of weights (sides above 64 px) Pillow resizes image by image
CHUNK = 64  # images that a thread augments at once
# Pillow's calls on images up to this side (in pixels) are so short that threads mostly wait for Python's lock: four
# threads decode 32 px JPEGs at less than half the speed of one.
MAX_ONE_THREAD_SIDE = 64

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DecodedSet:
    """All images of a set.

    Attributes:
      planar: the images, uint8 (n, C, H, W).
      bad: whether an image cannot be decoded, bool (n,).
    """

    planar: np.ndarray
    bad: np.ndarray


def decode_set(
    source: Source, memory_mb: float, threads: int, undecodable: Undecodable, stall_seconds: float
) -> DecodedSet | None:
    """Decodes a whole set if all its images have one size and fit in memory.

    Args:
      source: the set.
      memory_mb: MiB that the decoded images may take.
      threads: number of decoding threads.
      undecodable: the record of files that cannot be decoded, to which these files are added.
      stall_seconds: the deadline of each 64 images.

    Returns:
      The images, or None if their sizes differ or the set is too large.

    Raises:
      DataError: too many images cannot be decoded.
      Stalled: images cannot be read in time.
    """
    size = _common_size(source, stall_seconds)
    if size is None or len(source) * size[0] * size[1] * source.channels > memory_mb * 2**20:
        return None
    start = time.monotonic()
    planar = np.zeros((len(source), source.channels, *size), np.uint8)
    bad = np.zeros(len(source), bool)
    reasons: list[tuple[int, str]] = []

    def decode(chunk: range) -> bool:
        for i in chunk:
            try:
                with reading(source, i):
                    image = source.read(i)
            except decoding.DecodeError as e:
                bad[i] = True
                reasons.append((i, str(e)))
                continue
            if image.shape[:2] != size:
                return False
            planar[i] = image.transpose(2, 0, 1)
        return True

    chunks = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    with Readers(1 if max(size) <= MAX_ONE_THREAD_SIDE else threads, stall_seconds) as readers:
        if not all(readers.map(decode, chunks, "images of the training set")):
            return None
    seconds, mb = time.monotonic() - start, planar.nbytes / 2**20
    taken = f"{mb:.{0 if mb >= 10 else 2}f}"
    log.info("decoded %d images of %dx%d into %s MiB of memory in %.1f s", len(source), *size, taken, seconds)
    undecodable.add(sorted(reasons), len(source))
    return DecodedSet(planar, bad)


def _common_size(source: Source, stall_seconds: float) -> tuple[int, int] | None:
    """Returns the (height, width) of a sample of the images, from their headers; None if they differ."""

    def size_of(i: int) -> tuple[int, int] | None:
        try:
            with reading(source, i):
                return decoding.oriented_size(source.open(i))
        except decoding.DecodeError:
            return None

    sizes = set()
    chosen = np.unique(np.linspace(0, len(source) - 1, HEADERS).astype(int)).tolist()
    with Readers(1, stall_seconds) as readers:
        for size in readers.map(size_of, chosen, "the size of an image"):
            sizes |= {size} - {None}
            if len(sizes) > 1:
                return None
    return sizes.pop() if sizes else None


class BatchAugmenter:
    """Makes training batches out of a decoded set, on a few threads."""

    def __init__(self, data: DecodedSet, layout: Layout, seed: int, threads: int):
        self._data = data
        self._layout = layout
        self._seed = seed
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        in_size = data.planar.shape[2:]
        self._resizers = {
            a.size: BatchResizer(in_size, a.size, a.interpolation, a.alone)
            for a in (crops[0] for crops in layout.values())
            if BatchResizer.table_bytes(in_size, a.size) <= MAX_TABLE_BYTES
        }

    def batch(self, first: int, count: int) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
        """Makes the images of the positions first ... first + count - 1.

        Returns:
          The entries of the layout, such as 'image', uint8 (count, H, W, C); the images' indices, int32 (count,); how
          many of them replace undecodable ones.
        """
        size = len(self._data.bad)
        indices = sampling.indices(self._seed, np.arange(first, first + count), size)
        replaced = np.flatnonzero(self._data.bad[indices])
        for row in replaced:
            attempt = 0
            while self._data.bad[indices[row]]:
                indices[row] = sampling.replacement(self._seed, first + int(row), attempt, size)
                attempt += 1
        crops = empty(self._layout, count, self._data.planar.shape[1])

        def fill(i: int) -> None:
            self._fill({k: x[i : i + CHUNK] for k, x in crops.items()}, indices[i : i + CHUNK], first + i)

        list(self._pool.map(fill, range(0, count, CHUNK)))
        for name, place, a in numbered(self._layout):
            if a.layers:
                each = map if max(a.size) <= MAX_ONE_THREAD_SIDE else self._pool.map
                images = crops[name][:, place]
                list(each(functools.partial(self._randaugment, a, images, first), range(count)))
        return packed(crops), indices, len(replaced)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def _fill(self, out: dict[str, np.ndarray], indices: np.ndarray, first: int) -> None:
        planar = self._data.planar[indices]
        heights, widths = np.broadcast_to(planar.shape[2:], (len(planar), 2)).T
        slow: list[tuple[np.ndarray, np.ndarray, Augmentation]] = []  # without a table of weights
        for view, (name, place, a) in enumerate(numbered(self._layout)):
            uniforms = sampling.uniforms(self._seed, first, len(planar), DRAWS, view)
            boxes, images = a.boxes(uniforms, heights, widths), out[name][:, place]
            if a.size in self._resizers:
                images[...] = self._resizers[a.size](planar, boxes)
            else:
                slow.append((images, boxes, a))
        if slow:
            sizes, a = [a.size for _, _, a in slow], slow[0][2]
            for row, image in enumerate(planar):
                whole = decoding.picture(np.ascontiguousarray(image.transpose(1, 2, 0)))
                cut = decoding.crops(whole, [boxes[row] for _, boxes, _ in slow], sizes, a.resample, a.alone)
                for (images, _, _), crop in zip(slow, cut, strict=True):
                    images[row] = np.asarray(crop)
        for view, (name, place, a) in enumerate(numbered(self._layout)):
            flips = a.flips(sampling.uniforms(self._seed, first, len(planar), DRAWS, view))
            out[name][flips, place] = out[name][flips, place, :, ::-1]

    def _randaugment(self, a: Augmentation, images: np.ndarray, first: int, row: int) -> None:
        rng = sampling.randaugment_generator(self._seed, first + row)
        images[row] = np.asarray(randaugment(Image.fromarray(images[row]), a.layers, a.magnitude, rng))
