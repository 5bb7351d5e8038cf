"""Images of one, two or four channels from a source of images of three."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crate_jax.data import decoding
from crate_jax.data.sources import Source, digest


class Bands(Source):
    """The images of a source with another number of channels: see :func:`crate_jax.data.decoding.of_channels`.

    Args:
      source: images of three channels.
      channels: 1, 2 or 4.
    """

    def __init__(self, source: Source, channels: int) -> None:
        self._source = source
        self.channels = channels
        self.split = source.split
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def open(self, index: int) -> decoding.Picture:
        """See Source.open."""
        return decoding.of_channels(self._source.open(index), self.channels)

    def name(self, index: int) -> str:
        """See Source.name."""
        return self._source.name(index)

    def located(self, index: int) -> str:
        """See Source.located."""
        return self._source.located(index)

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest(self._source.fingerprint(), self.channels)

    @property
    def labels(self) -> np.ndarray | None:
        """See Source.labels."""
        return self._source.labels

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """See Source.labels_of."""
        return self._source.labels_of(indices)
