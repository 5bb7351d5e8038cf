"""Sets in several large files: which files a text names, and what was read out of them, kept for the next run."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crate_jax.data.sources import digest
from crate_jax.errors import DataError
from crate_jax.workdir.folder import cache, expanduser
from crate_jax.workdir.whole import save_arrays

MAX_SHARDS = 10**6  # that one pattern names
VERSION = 4  # of what is kept

log = logging.getLogger(__name__)


def named_shards(pattern: str) -> tuple[Path, list[Path]]:
    """Returns the shards that a pattern such as {000000..000009}, {train,val} or * names.

    Returns:
      The folder below which names tell the split, and the shards in the order of their names.

    Raises:
      DataError: one of them is missing.
    """
    found = []
    for path in map(Path, _expanded(str(expanduser(pattern)))):
        matches = [path]
        if re.search(r"[*?\[]", path.name):  # as in a shell, * is not the beginning of a hidden name
            hidden = path.name.startswith(".")
            matches = sorted(p for p in path.parent.glob(path.name) if hidden or not p.name.startswith("."))
        found += [match for match in matches if match.is_file()]
        if not matches or not matches[0].is_file():
            raise DataError(f"{path}: no such shard, which config.data.source names")
    return Path(os.path.commonpath([path.parent for path in found])), found


def _expanded(pattern: str) -> Iterator[str]:
    """Yields what the braces in a pattern stand for, as a shell does.

    >>> list(_expanded("{train,val}-{09..10}.tar"))
    ['train-09.tar', 'train-10.tar', 'val-09.tar', 'val-10.tar']
    """
    parts: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", part)
        if span:
            numbers = range(int(span[1]), min(int(span[2]), int(span[1]) + MAX_SHARDS) + 1)
            parts.append([f"{number:0{len(span[1])}d}" for number in numbers])
        else:
            parts.append(part[1:-1].split(",") if part.startswith("{") and part.endswith("}") else [part])
    count = math.prod(map(len, parts))
    if not 0 < count <= MAX_SHARDS:
        raise DataError(f"{pattern}: names {'no shard' if not count else f'more than {MAX_SHARDS} shards'}")
    return map("".join, itertools.product(*parts))


def kept(
    kind: str, paths: Sequence[Path], options: Sequence[str], read: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays that `read` makes of some files: those that were kept if the files are the same.

    They are kept in the user's cache folder if that can be written to.

    Args:
      kind: the kind of the set.
      paths: the files.
      options: on what else the arrays depend.
      read: makes the arrays.

    Raises:
      DataError: a file cannot be read.
    """
    try:
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError as e:
        raise DataError(f"{e.filename}: cannot be read ({e.strerror})") from None
    folder = cache()
    file = folder and folder / "crate_jax" / f"{kind}-{digest(VERSION, states, *options)}.npz"
    if file:
        try:
            with np.load(file, allow_pickle=False) as found:
                return dict(found)
        except Exception as e:  # a damaged file may raise any error; the arrays are made anew
            log.debug("%s: %s", file, e)
    log.info("reading %d file%s of %s", len(paths), "s" * (len(paths) > 1), paths[0].parent)
    arrays: dict[str, Any] = read()
    if file:
        try:
            save_arrays(file, arrays)
        except OSError as e:
            log.info("what was read of the set cannot be kept in %s (%s)", file.parent, e.strerror)
    return arrays
