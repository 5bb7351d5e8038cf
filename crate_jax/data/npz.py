"""Arrays of images in NumPy's .npz files, as MedMNIST, Keras and papers' own sets have them; pickles are not read."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from crate_jax.data import decoding
from crate_jax.data.sources import (
    ColumnSource,
    Request,
    candidates,
    class_numbers,
    digest,
    first_labelled,
    split_role,
)
from crate_jax.errors import DataError, some
from crate_jax.workdir.folder import readable_set

IMAGES = ("images", "image", "imgs", "x", "data")
LABELS = ("labels", "label", "y", "targets", "target")
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member; its last two numbers are the lengths of name and extra
_READING = threading.Lock()  # threads that ask for the first images wait for one of them to read the array


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of an .npz file, not read yet.

    Attributes:
      path: the file.
      name: the array's name.
      shape: the array's shape.
      dtype: the type of its numbers.
      fortran: whether the first axis is the fastest.
      size: the bytes of its numbers, unpacked, as the zip archive has it.
      start: where the numbers begin in the file; None: they are compressed.
      crc: the checksum that the zip archive has of it.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    size: int
    start: int | None
    crc: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}"

    def read(self) -> np.ndarray:
        """Reads the array: mapped from the file if it is not compressed, else into memory.

        Raises:
          DataError: the file is damaged.
        """
        try:
            if self.start is not None and 0 not in self.shape:
                order: Any = "F" if self.fortran else "C"
                return np.memmap(self.path, self.dtype, "r", self.start, self.shape, order)
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as e:  # a damaged file may raise any error
            raise DataError(f"{self.path}: the array {self.name} cannot be read ({' '.join(str(e).split())})") from None


class NpzSource(ColumnSource):
    """The images of one array; a copy of the source in another process reads them again from the file.

    Args:
      images: the array, uint8 (n, H, W), (n, H, W, C) or (n, C, H, W).
      channels: C; images of 3 channels may be stored as grey ones.
      labels: see ColumnSource.
      class_names: see ColumnSource.
      max_pixels: see ColumnSource.
    """

    def __init__(
        self, images: Member, channels: int, labels: np.ndarray | None, class_names: list[str], max_pixels: int
    ):
        super().__init__(labels, class_names, max_pixels)
        self._member = images
        self.channels = channels
        self._channels_first = decoding.layouts(images.shape, channels)[1]
        self._images: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return self._member.shape[0]

    def open(self, index: int) -> decoding.Picture:
        """See Source.open."""
        with _READING:
            if self._images is None:
                self._images = self._member.read()
        image = self._images[index]
        if self._channels_first:
            image = image.transpose(1, 2, 0)
        return decoding.from_array(image, self.channels)

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"{os.path.basename(self._member.path)}:{self._member.name}[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        member = self._member
        return digest(os.path.basename(member.path), str(member), member.crc, self._labels, self.class_names)


def open_npz(path: str, request: Request) -> NpzSource | None:
    """Opens the training or the evaluation split of an .npz file, or of a folder with one such file per split.

    Args:
      path: the file, whose arrays have names such as images and labels (of the training split), x_train, test_images;
        or the folder, of train.npz, test.npz and the like.
      request: what is asked for. The columns are the names of arrays, apart from the name of a split; 'auto': one of
        IMAGES, one of LABELS.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: a file cannot be read, its arrays have no such names, or they are not images and their labels.
    """
    root = readable_set(path)
    files = sorted(p for p in root.glob("*.npz") if not p.name.startswith(".")) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{root}: holds no .npz file")
    members = {file: _members(file) for file in files}
    images: dict[str, Member] = {}
    columns: dict[str, Member] = {}
    for file in files:
        default = file.stem if root.is_dir() else "train"
        _find(images, members[file], IMAGES if request.image_column == "auto" else (request.image_column,), default)
        if request.label_column:
            wanted = LABELS if request.label_column == "auto" else (request.label_column,)
            _find(columns, members[file], wanted, default)
    there = some([str(member) for found in members.values() for member in found], ", ")
    if not images:
        names = "/".join(IMAGES) if request.image_column == "auto" else request.image_column
        raise DataError(
            f"{root}: has no array of images; it holds {there}; name it {names}, with _train or _test if there are "
            "several, or set config.data.image_column"
        )
    for member in (*images.values(), *columns.values()):
        _require_readable(member)
    for member in images.values():
        _require_images(member, request.channels, request.max_pixels)
    numbers: dict[str, np.ndarray | None] = {}
    class_names: list[str] = []
    for name, member in columns.items():
        if name in images and member.shape[:1] != images[name].shape[:1]:
            raise DataError(f"{member.path}: {member} are not the labels of {images[name]}: their numbers differ")
    if columns:
        texts = {f"{member.path}: {member.name}": member.read() for member in columns.values()}
        found, class_names = class_numbers(texts)
        numbers = dict(zip(columns, found.values(), strict=True))
    elif request.label_column not in ("", "auto"):
        raise DataError(
            f"{root}: has no array {request.label_column!r}, which config.data.label_column names; it holds {there}"
        )
    return first_labelled(
        NpzSource(images[name], request.channels, numbers.get(name), class_names, request.max_pixels)
        for name in candidates(list(images), request)
    )


def _find(found: dict[str, Member], members: list[Member], names: tuple[str, ...], default: str) -> None:
    """Adds those arrays of a file that have one of `names` to `found`, by the name of their split.

    Raises:
      DataError: two arrays of one split have such names.
    """
    for member in members:
        folded = member.name.casefold()
        for name in map(str.casefold, names):
            if folded == name:
                split = default
            elif folded.startswith(f"{name}_") and split_role(folded[len(name) + 1 :]):
                split = folded[len(name) + 1 :]
            elif folded.endswith(f"_{name}") and split_role(folded[: -len(name) - 1]):
                split = folded[: -len(name) - 1]
            else:
                continue
            if split in found and found[split].path != member.path:
                raise DataError(f"{found[split].path} and {member.path} both hold the split {split}; name one file")
            if split in found:
                raise DataError(
                    f"{member.path}: both {found[split]} and {member} may be meant; set config.data.image_column and "
                    "label_column"
                )
            found[split] = member


def _members(path: Path) -> list[Member]:
    """Reads the headers of a file's arrays.

    Raises:
      DataError: the file is not an .npz file, or is damaged.
    """
    members = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, dtype = read(file)
                    header = file.tell()
                start = None
                if info.compress_type == zipfile.ZIP_STORED:
                    raw.seek(info.header_offset)
                    lengths = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))[1:]
                    start = raw.tell() + sum(lengths) + header
                name, size = info.filename.removesuffix(".npy"), info.file_size - header
                members.append(Member(str(path), name, shape, dtype, fortran, size, start, info.CRC))
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:  # a damaged file may raise any error
        raise DataError(f"{path}: not an .npz file, or damaged ({' '.join(str(e).split())})") from None
    return members


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_readable(member: Member) -> None:
    """Checks, before an array is read, that it can be.

    Raises:
      DataError: it is a pickle, has not the size that its header says, or would not fit in memory.
    """
    size = math.prod(member.shape) * member.dtype.itemsize
    if member.dtype.hasobject:
        raise DataError(f"{member.path}: the array {member.name} holds Python objects, and pickles are not read")
    if size != member.size:
        raise DataError(f"{member.path}: the array {member} must have {size} bytes, but has {member.size}")
    if member.start is None and size > machine_memory() // 2:
        raise DataError(
            f"{member.path}: the array {member} takes {size / 2**30:.1f} GiB unpacked, more than half of this "
            "machine's memory; save it with numpy.savez, which does not compress"
        )


def _require_images(member: Member, channels: int, max_pixels: int) -> None:
    shape, stored = member.shape, decoding.stored(channels)
    last, second = decoding.layouts(shape, channels)
    if member.dtype != np.uint8 or last == second:
        raise DataError(
            f"{member.path}: the array {member} must be images, uint8 (n, height, width), (n, height, width, channels) "
            f"or (n, channels, height, width) with {' or '.join(map(str, stored))} channels"
            + (", but it may be either" if last and second else "")
            + ("; config.data.channels says how many" if member.dtype == np.uint8 else "")
        )
    height, width = (shape[1], shape[2]) if last else (shape[2], shape[3])
    if not 0 < height * width <= max_pixels or not shape[0]:
        raise DataError(
            f"{member.path}: the array {member} holds no image, or images of more than "
            f"config.data.max_pixels={max_pixels}"
        )
