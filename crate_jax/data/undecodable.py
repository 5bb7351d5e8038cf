"""Files that cannot be decoded: the log names each once, and too many stop the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from crate_jax.data.sources import Source
from crate_jax.errors import DataError, escaped

# The share is of at least this many files, even if fewer were read: one bad file in the first batch of a large set
# must not stop the run.
MIN_FILES = 1000
MAX_NAMED = 5  # files that one message names

log = logging.getLogger(__name__)


class Undecodable:
    """Records the distinct undecodable files and raises if their share is too large.

    Their number may be at most `limit` times the number of files read so far, which counts as at least
    min(MIN_FILES, size of the set).

    Args:
      source: the set, which names the files.
      limit: the largest share, `config.data.max_undecodable`.

    Attributes:
      indices: the undecodable files' indices in the set.
    """

    def __init__(self, source: Source, limit: float):
        self._source = source
        self._limit = limit
        self._seen = 0
        self.indices: set[int] = set()
        self._reasons: dict[int, str] = {}

    def add(self, bad: Iterable[tuple[int, str]], seen: int) -> None:
        """Adds undecodable files.

        Args:
          bad: (index, reason) of each file; a file that was added before is ignored.
          seen: number of files that were read since the last call, decodable or not.

        Raises:
          DataError: the share is above the limit.
        """
        size = len(self._source)
        self._seen = min(size, self._seen + seen)
        for index, reason in bad:
            if index not in self.indices:
                self.indices.add(index)
                self._reasons[index] = reason
                log.warning("skipping undecodable image %s: %s", escaped(self._source.located(index)), escaped(reason))
        counted = max(self._seen, min(size, MIN_FILES))
        count = len(self.indices)
        if count > self._limit * counted:
            raise DataError(
                f"{count} of {counted} images cannot be decoded ({count / counted:.2%}, more than "
                f"config.data.max_undecodable={self._limit:g} allows); repair or remove them, or allow more: "
                f"{self.named()}"
            )

    def named(self) -> str:
        """Names the first MAX_NAMED files and what is wrong with them, for a message."""
        names = [escaped(f"{self._source.located(i)} ({self._reasons[i]})") for i in sorted(self.indices)[:MAX_NAMED]]
        return ", ".join(names) + (", ..." if len(self.indices) > MAX_NAMED else "")
