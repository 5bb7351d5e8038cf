"""The training path of large sets: Grain reads, decodes and augments files image by image.

A Grain element is a chunk of a batch, made by one call in one thread of one worker. A chunk depends only on the
positions of its images: the numbers of chunks, threads and workers change only the speed. And a worker's queue holds
chunks, not whole batches, which may be large.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import absl.flags
import numpy as np
from PIL import Image

from crate_jax.data import decoding, reading, sampling
from crate_jax.data.augmentation import DRAWS, Augmentation, Layout, empty, numbered, packed
from crate_jax.data.pairs import IGNORED, PairSource, crop_mask
from crate_jax.data.randaugment import randaugment
from crate_jax.data.sources import Source

if TYPE_CHECKING:
    import grain

CHUNK = 64  # images at most
MAX_ATTEMPTS = 32  # images that are tried for one position
_ENDLESS = 2**40  # chunks: more than any run reads


@dataclasses.dataclass(frozen=True)
class ChunkSource:
    """Chunk k of this host's part of the run, as a Grain data source.

    Attributes:
      source: the images.
      layout: the crops of each image.
      seed: the run's seed.
      batch_size: images per step over all hosts.
      offset: this host's first row in each batch.
      rows: this host's rows in each batch.
      start_step: the step that chunk 0 belongs to.
    """

    source: Source
    layout: Layout
    seed: int
    batch_size: int
    offset: int
    rows: int
    start_step: int

    @property
    def chunks_per_batch(self) -> int:
        """Number of chunks of this host's part of a batch."""
        return -(-self.rows // CHUNK)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> dict[str, np.ndarray | list[tuple[int, str]]]:
        step, part = divmod(int(k), self.chunks_per_batch)
        low = part * self.rows // self.chunks_per_batch
        high = (part + 1) * self.rows // self.chunks_per_batch
        return self._load((self.start_step + step) * self.batch_size + self.offset + low, high - low)

    def _load(self, first: int, count: int) -> dict[str, np.ndarray | list[tuple[int, str]]]:
        """Loads the images of the positions first ... first + count - 1.

        A row whose file cannot be decoded is tried again with another file.

        Returns:
          the entries of the layout, such as 'image', uint8 (count, H, W, 3); 'mask', int16 (count, H, W), if the source
          has masks; 'index', int32 (count,), -1 where no attempt succeeded; 'bad', a list of (index, reason) of the
          undecodable files.
        """
        indices = sampling.indices(self.seed, np.arange(first, first + count), len(self.source))
        views = list(numbered(self.layout))
        uniforms = np.stack([sampling.uniforms(self.seed, first, count, DRAWS, view) for view in range(len(views))])
        crops = empty(self.layout, count, self.source.channels)
        masks = np.full((count, *views[0][2].size), IGNORED, np.int16) if isinstance(self.source, PairSource) else None
        bad: list[tuple[int, str]] = []
        rows = list(range(count))
        for attempt in range(MAX_ATTEMPTS):
            rows = self._load_rows(rows, indices, crops, masks, uniforms, first, bad)
            if not rows:
                break
            for row in rows:
                indices[row] = sampling.replacement(self.seed, first + row, attempt, len(self.source))
        indices[rows] = -1
        return {**packed(crops), **({} if masks is None else {"mask": masks}), "index": indices, "bad": bad}

    def _load_rows(
        self,
        rows: list[int],
        indices: np.ndarray,
        crops: dict[str, np.ndarray],
        masks: np.ndarray | None,
        uniforms: np.ndarray,
        first: int,
        bad: list[tuple[int, str]],
    ) -> list[int]:
        """Fills the given rows of `crops` and `masks`; adds undecodable files to `bad` and returns their rows."""
        opened, failed = [], []
        for row in rows:
            try:
                with reading.reading(self.source, int(indices[row])):
                    image = self.source.open(int(indices[row]))
                opened.append((row, image, decoding.oriented_size(image)))
            except decoding.DecodeError as e:
                bad.append((int(indices[row]), str(e)))
                failed.append(row)
        if not opened:
            return failed
        heights, widths = np.array([size for _, _, size in opened]).T
        views = list(numbered(self.layout))
        drawn = uniforms[:, [row for row, _, _ in opened]]
        boxes = [a.boxes(u, heights, widths) for (_, _, a), u in zip(views, drawn, strict=True)]
        flips = [a.flips(u) for (_, _, a), u in zip(views, drawn, strict=True)]
        for i, (row, image, _) in enumerate(opened):
            try:
                first_view, sizes = views[0][2], [a.size for _, _, a in views]
                cut = decoding.crops(
                    image, [box[i] for box in boxes], sizes, first_view.resample, alone=first_view.alone
                )
                for (name, place, a), crop, flip in zip(views, cut, flips, strict=True):
                    crops[name][row, place] = self._augment(a, crop, bool(flip[i]), first + row)
                if masks is not None and isinstance(self.source, PairSource):
                    with reading.reading(self.source, int(indices[row])):
                        mask = self.source.mask(int(indices[row]))
                    mask = crop_mask(mask, boxes[0][i], first_view.size)
                    masks[row] = mask[:, ::-1] if flips[0][i] else mask
            except decoding.DecodeError as e:
                bad.append((int(indices[row]), str(e)))
                failed.append(row)
        return failed

    def _augment(self, a: Augmentation, crop: decoding.Picture, flip: bool, position: int) -> np.ndarray:
        if isinstance(crop, np.ndarray):
            return crop[:, ::-1] if flip else crop
        if flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if a.layers:
            crop = randaugment(crop, a.layers, a.magnitude, sampling.randaugment_generator(self.seed, position))
        return np.asarray(crop)


def chunk_iterator(chunks: ChunkSource, workers: int, threads: int, stall_seconds: float) -> grain.DatasetIterator:
    """Iterates over chunks that worker processes read ahead.

    Args:
      chunks: the chunks.
      workers: number of worker processes; 0: threads of this process read.
      threads: number of reading threads per process.
      stall_seconds: the deadline of a batch.

    Returns:
      The iterator; its `close()` ends the workers.
    """
    import grain  # here: a second that `--help` need not spend

    per_batch = chunks.chunks_per_batch
    dataset = grain.MapDataset.source(chunks)
    ahead = max(threads, -(-per_batch // max(workers, 1)))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not absl.flags.FLAGS.is_parsed():  # Grain reads absl flags; not every program uses absl.app
            absl.flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        watch = functools.partial(reading.watch_worker, seconds=stall_seconds)
        dataset = dataset.mp_prefetch(options, worker_init_fn=watch)
    return iter(dataset)
