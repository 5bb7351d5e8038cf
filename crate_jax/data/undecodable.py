"""Files that cannot be decoded: named once in the log, counted, and too many stop the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from crate_jax.data.sources import Source
from crate_jax.errors import DataError

# Until this many files are seen, the share is taken of this many: one bad file in the first batch
# of a large set is no reason to stop.
MIN_FILES = 1000
NAMED = 5

_log = logging.getLogger(__name__)


class Undecodable:
    """Keeps the distinct undecodable files and judges their share.

    The run stops when there are more of them than `limit` times the files seen so far, where at
    least min(1000, size of the set) files count as seen.

    Args:
      source: names the files.
      limit: `config.data.max_undecodable`.
    """

    def __init__(self, source: Source, limit: float):
        self._source = source
        self._limit = limit
        self._seen = 0
        self.indices: set[int] = set()
        self._reasons: dict[int, str] = {}

    def add(self, bad: Iterable[tuple[int, str]], seen: int) -> None:
        """Notes undecodable files.

        Args:
          bad: (index, reason) of each; known ones are ignored.
          seen: files that were read since the last call, good or bad.

        Raises:
          DataError: the share is above the limit.
        """
        size = len(self._source)
        self._seen = min(size, self._seen + seen)
        for index, reason in bad:
            if index not in self.indices:
                self.indices.add(index)
                self._reasons[index] = reason
                _log.warning("skipping undecodable image %s: %s", self._source.name(index), reason)
        counted = max(self._seen, min(size, MIN_FILES))
        count = len(self.indices)
        if count > self._limit * counted:
            raise DataError(
                f"{count} of {counted} images cannot be decoded ({count / counted:.2%}, more than "
                f"config.data.max_undecodable={self._limit:g} allows); mend or remove them, or allow more: "
                f"{self.named()}"
            )

    def named(self) -> str:
        """The first few and what is wrong with them, for a message."""
        names = [f"{self._source.name(i)} ({self._reasons[i]})" for i in sorted(self.indices)[:NAMED]]
        return ", ".join(names) + (", ..." if len(self.indices) > NAMED else "")
