"""Files that a reader sees whole: each is written under another name, which then takes the file's place by a rename."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

ENDING = "crate_jax.tmp"  # of the temporary files
LEFT = re.compile(rf".*\.\d+\.{re.escape(ENDING)}")  # the names of what a process that was killed has left


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place when the block ends.

    If the block raises, the temporary file goes, and what was at `path` stays; if the process is killed, the temporary
    file stays too, for `remove_left`. After a power cut the new contents may be missing: see `durable`. Two processes
    may write the same file at once; the last one counts.

    Args:
      path: the file; its folder exists.

    Yields:
      The temporary file's path. The block creates the file.

    Raises:
      OSError: the file cannot be renamed.
    """
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.{ENDING}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def durable(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, as of `whole`, whose contents reach the disk before the rename: for records of a run.

    Raises:
      OSError: the file cannot be written.
    """
    with whole(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file whole, and creates its folder if it does not exist.

    Raises:
      OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def remove_left(folder: Path) -> None:
    """Removes what processes that were killed in `whole` have left in a folder; no other process may write there.

    Raises:
      OSError: a file cannot be removed.
    """
    for path in folder.glob(f"*.{ENDING}"):
        if LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
