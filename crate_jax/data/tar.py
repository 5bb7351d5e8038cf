"""Images in plain tar files, of which an index gives every image at random; nothing is unpacked."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.sources import ColumnSource, digest
from crate_jax.errors import DataError

BLOCK = 512  # bytes; everything in a tar file begins at a multiple


@dataclasses.dataclass(frozen=True)
class Member:
    """One file in a tar file.

    Attributes:
      name: its path in the tar file.
      start: where it begins, in bytes from the beginning of the tar file.
      size: its bytes.
    """

    name: str
    start: int
    size: int


@dataclasses.dataclass
class Remarks:
    """What may be amiss with a tar file that can be read.

    Attributes:
      links: the names of links that are not followed: symbolic ones, and hard ones to what is not in the tar file.
      unfinished: whether it lacks the zeros at its end; then it was cut after a file, or its writer was stopped.
    """

    links: list[str] = dataclasses.field(default_factory=list)
    unfinished: bool = False


def members(path: Path, part: Member | None = None, remarks: Remarks | None = None) -> Iterator[Member]:
    """Yields the files of a tar file, or of the tar file that is a member of it.

    A hard link is the file that it leads to: so tar writes a file that has a second name.

    Args:
      path: the tar file.
      part: the member that is a tar file; None: the tar file itself.
      remarks: filled in.

    Raises:
      DataError: the tar file is damaged, cut short or compressed.
    """
    where = f"{path}: {part.name}" if part else f"{path}"
    start, end = (part.start, part.start + part.size) if part else (0, path.stat().st_size)
    offset = start
    seen: dict[str, Member] = {}
    with path.open("rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
                    offset = info.offset_data
                    if offset + info.size > end:
                        raise tarfile.ReadError("cut short")
                    if info.isreg():
                        member = seen[os.path.normpath(info.name)] = Member(info.name, offset, info.size)
                        yield member
                    elif info.islnk() and (target := seen.get(os.path.normpath(info.linkname))):
                        yield dataclasses.replace(target, name=info.name)
                    elif (info.islnk() or info.issym()) and remarks is not None:
                        remarks.links.append(info.name)
                    if tar.offset >= end:  # what follows is not of this part
                        break
                offset = tar.offset
        except (OSError, tarfile.TarError, ValueError) as e:
            raise DataError(f"{where}: damaged or cut short at offset {offset} ({' '.join(str(e).split())})") from None
        file.seek(offset)  # tarfile takes a damaged header for the end
        last = file.read(min(BLOCK, max(end - offset, 0)))
        if last.strip(b"\0"):
            raise DataError(f"{where}: damaged at offset {offset}, no header of a tar file")
        if remarks is not None:
            remarks.unfinished = len(last) < BLOCK


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the images of some tar files lie.

    Attributes:
      shards: the number of each image's tar file, int32 (n,).
      starts: where each image begins in its tar file, int64 (n,).
      sizes: the bytes of each image, int64 (n,).
      names: the images' names in their tar files, one after another, uint8.
      ends: where each name ends, int64 (n,).
      labels: the labels, texts or int64 (n,); (0,): there are none.
    """

    shards: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def name(self, i: int) -> str:
        """The name of image i in its tar file."""
        return os.fsdecode(self.names[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])].tobytes())

    @classmethod
    def of(cls, images: Iterable[tuple[int, Member]], labels: np.ndarray) -> Index:
        """The index of images, each given with the number of its tar file."""
        shards, found = zip(*images, strict=True)
        names = [os.fsencode(member.name) for member in found]
        return cls(
            np.array(shards, np.int32),
            np.array([member.start for member in found], np.int64),
            np.array([member.size for member in found], np.int64),
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([len(name) for name in names]),
            labels,
        )


class TarSource(ColumnSource):
    """The images of some tar files, in the order of the index.

    Args:
      shards: the paths of the tar files.
      index: where the images lie.
      labels: see ColumnSource.
      class_names: see ColumnSource.
      max_pixels: see ColumnSource.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        index: Index,
        labels: np.ndarray | None,
        class_names: list[str],
        max_pixels: int,
    ):
        super().__init__(labels, class_names, max_pixels)
        self._paths = [str(path) for path in shards]
        self._index = index

    def __len__(self) -> int:
        return len(self._index.ends)

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        path = self._paths[self._index.shards[index]]
        start, size = int(self._index.starts[index]), int(self._index.sizes[index])
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, start)
        except OSError as e:
            raise decoding.DecodeError(f"{path}: cannot be read ({e.strerror})") from e
        if len(data) < size:
            raise decoding.DecodeError(f"{path}: ends within the image at offset {start}")
        return decoding.open_image(data, self._max_pixels)

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"{os.path.basename(self._paths[self._index.shards[index]])}/{self._index.name(int(index))}"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        shards, i = [os.path.basename(path) for path in self._paths], self._index
        return digest(shards, i.shards, i.starts, i.sizes, i.names, self._labels, self.class_names)
