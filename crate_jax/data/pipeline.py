"""Training batches as a function of (seed, step), so that a checkpoint holds no state of the pipeline."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from crate_jax.data import recipes
from crate_jax.data.augmentation import Augmentation, Layout
from crate_jax.data.memory import BatchAugmenter, decode_set
from crate_jax.data.pairs import PairSource
from crate_jax.data.reading import Stalled
from crate_jax.data.sources import Source
from crate_jax.data.streaming import MAX_ATTEMPTS, ChunkSource, chunk_iterator
from crate_jax.data.undecodable import Undecodable
from crate_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class TrainPipeline:
    """This host's part of the training batches.

    Host p of P gets the rows p * b ... (p + 1) * b - 1 of each batch of B = P * b images: together the hosts get the
    batch that a single host would get. Every epoch covers each image once, in a new order; a batch may hold images of
    two epochs. A file that cannot be decoded is replaced by another, drawn from (seed, position).

    Sets whose images have one size and fit in `config.data.memory_mb` are decoded once, into memory; other sets, and
    pairs of images and masks, are streamed from their files by `config.data.workers` processes. Both ways give the
    same images, crops and flips.

    Args:
      config: the whole config; reads config.seed, config.batch_size, config.data and, for views, config.views.
      source: the training split.
      views: whether a batch holds the views of config.views instead of one crop of each image.
      process_index: this host's number p, from 0.
      process_count: the number of hosts P.

    Raises:
      ConfigError: the batch size is not a multiple of the number of hosts.
      DataError: too many images cannot be decoded.
      Stalled: an image cannot be read in time.
    """

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        *,
        views: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if config.batch_size % process_count:
            raise ConfigError(
                f"config.batch_size={config.batch_size}: must be a multiple of the {process_count} processes sharing it"
            )
        data = config.data
        self._source = source
        self._seed = int(config.seed)
        self._batch_size = int(config.batch_size)
        self._rows = self._batch_size // process_count
        self._offset = process_index * self._rows
        self._workers, self._threads = int(data.workers), int(data.threads)
        self._stall_seconds = float(data.stall_seconds)
        self._layout: Layout = recipes.layout(config) if views else {"image": (Augmentation.from_config(config),)}
        self.undecodable = Undecodable(source, data.max_undecodable)
        self._iterators: list[Generator[Batch, None, None]] = []
        self._augmenter: BatchAugmenter | None = None
        decoded = None
        if not isinstance(source, PairSource):
            decoded = decode_set(source, data.memory_mb, self._threads, self.undecodable, self._stall_seconds)
        if decoded is not None:
            if decoded.bad.all():
                raise DataError(f"none of the {len(source)} images can be decoded: {self.undecodable.named()}")
            self._augmenter = BatchAugmenter(decoded, self._layout, self._seed, self._threads)
        else:
            log.info("streaming %d images, %d workers, %d threads", len(source), self._workers, self._threads)

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches of the steps start_step, start_step + 1, ... without end.

        Yields:
          'image', uint8 (b, H, W, C), or 'views', uint8 (b, 2, H, W, 3), and 'small_views', uint8 (b, S, h, w, 3), if
          there are small ones; 'mask', int16 (b, H, W), if the source has masks; 'index', int32 (b,), the images'
          indices in the set; 'undecodable', int32 (), how many files could not be decoded for this batch.

        Raises:
          DataError: too many images cannot be decoded.
          Stalled: a worker process is gone.
        """
        augmenter = self._augmenter
        iterator = self._from_files(start_step) if augmenter is None else self._from_memory(augmenter, start_step)
        self._iterators.append(iterator)
        return iterator

    def close(self) -> None:
        """Ends threads and worker processes, except an iterator of :meth:`batches` in which another thread hangs."""
        for iterator in self._iterators:
            with contextlib.suppress(ValueError):  # another thread is in it
                iterator.close()
        self._iterators.clear()
        if self._augmenter is not None:
            self._augmenter.close()

    def _from_memory(self, augmenter: BatchAugmenter, step: int) -> Generator[Batch, None, None]:
        while True:
            crops, indices, replaced = augmenter.batch(step * self._batch_size + self._offset, self._rows)
            yield {**crops, "index": indices, "undecodable": np.array(replaced, np.int32)}
            step += 1

    def _from_files(self, start_step: int) -> Generator[Batch, None, None]:
        chunks = ChunkSource(
            self._source,
            self._layout,
            self._seed,
            self._batch_size,
            self._offset,
            self._rows,
            start_step,
        )
        reader = chunk_iterator(chunks, self._workers, self._threads, self._stall_seconds)
        try:
            while True:
                parts = [self._chunk(reader) for _ in range(chunks.chunks_per_batch)]
                bad = [entry for part in parts for entry in part["bad"]]
                self.undecodable.add(bad, self._rows)
                indices = np.concatenate([part["index"] for part in parts])
                if (indices < 0).any():
                    raise DataError(
                        f"{MAX_ATTEMPTS} images in a row cannot be decoded; {len(self.undecodable.indices)} so far: "
                        f"{self.undecodable.named()}"
                    )
                arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0] if k not in ("index", "bad")}
                yield {**arrays, "index": indices, "undecodable": np.array(len(bad), np.int32)}
        finally:
            reader.close()

    @staticmethod
    def _chunk(reader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(reader)
        except RuntimeError as e:
            if gone := re.match(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(e)):
                raise Stalled(ended(int(gone[1]))) from None
            raise


def ended(status: int) -> str:
    """What became of a worker process, for people.

    >>> ended(-9)
    'a worker process of config.data.workers was ended by SIGKILL, perhaps because memory was short'
    """
    if status >= 0:
        return f"a worker process of config.data.workers ended with status {status}; read its last lines"
    name = signal.Signals(-status).name
    perhaps = ", perhaps because memory was short" if name == "SIGKILL" else ""
    return f"a worker process of config.data.workers was ended by {name}{perhaps}"


def batch_shapes(config: ConfigDict, inputs: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch's entries, of all hosts together, without opening the images.

    Args:
      config: a validated config.
      inputs: the names of the entries, as in `Method.inputs`.
    """
    B, size, C = int(config.batch_size), tuple(config.data.image_size), int(config.data.channels)
    shapes = {
        "image": ((*size, C), np.uint8),
        "mask": (size, np.int16),
        "label": ((), np.int32),
        "index": ((), np.int32),
    }
    if "views" in (names := tuple(inputs)):
        crops = recipes.layout(config)
        shapes |= {name: ((len(views), *views[0].size, C), np.uint8) for name, views in crops.items()}
    return {name: jax.ShapeDtypeStruct((B, *shapes[name][0]), shapes[name][1]) for name in names}
