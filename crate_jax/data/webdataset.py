"""Shards of WebDataset: plain tar files, of which an index gives every image at random; no shard is unpacked.

A sample is what has the same path up to the first dot of its file name: ``000017.jpg`` with ``000017.cls`` or
``000017.json``. Headers are read once; the index is kept in the user's cache folder if that can be written to.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.sources import LABELS, Source, candidates, class_numbers, digest, first_labelled, split_of
from crate_jax.errors import DataError, UserError, some
from crate_jax.parallel import distributed
from crate_jax.workdir.folder import expanduser

IMAGES = ("jpg", "jpeg", "png", "webp")
CLASS = "cls"
MAX_LABEL_BYTES = 2**20  # of a file that holds a sample's label
BLOCK = 512  # bytes; everything in a tar file begins at a multiple
MAX_SHARDS = 10**6  # that one pattern names
VERSION = 1  # of the index that is kept

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the images of some shards lie.

    Attributes:
      shards: the number of each image's shard, int32 (n,).
      starts: where each image begins in its shard, int64 (n,).
      sizes: the bytes of each image, int64 (n,).
      names: the images' names in their shards, one after another, uint8.
      ends: where each name ends, int64 (n,).
      labels: the labels, texts or int64 (n,); (0,): there are none.
    """

    shards: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray


class ShardSource(Source):
    """The images of some shards, in the order of the shards and of the images in them.

    Args:
      shards: the paths of the shards.
      index: where the images lie.
      labels: the label of each image, int32 (n,), or None.
      class_names: one name per class.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        index: Index,
        labels: np.ndarray | None,
        class_names: list[str],
        max_pixels: int = decoding.LARGEST,
    ):
        self._paths = [str(path) for path in shards]
        self._index = index
        self._labels = labels
        self.class_names = None if labels is None else class_names
        self._max_pixels = max_pixels

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
        start = int(self._index.ends[index - 1]) if index else 0
        name = os.fsdecode(self._index.names[start : int(self._index.ends[index])].tobytes())
        return f"{os.path.basename(self._paths[self._index.shards[index]])}/{name}"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        shards, i = [os.path.basename(path) for path in self._paths], self._index
        return digest(shards, i.shards, i.starts, i.sizes, i.names, self._labels, self.class_names)


def open_shards(
    pattern: str,
    split: str,
    train_split: str,
    eval_split: str,
    image_column: str = "auto",
    label_column: str = "auto",
    max_pixels: int = decoding.LARGEST,
) -> ShardSource | None:
    """Opens the training or the evaluation split of WebDataset's shards.

    Args:
      pattern: a folder of .tar files, in it or in sub-folders; or their paths, with {000000..000009}, {train,val} or *.
        The split is told by the name of the file, or else of its folder.
      split: 'train' or 'eval'.
      train_split: see :func:`crate_jax.data.sources.candidates`.
      eval_split: see there.
      image_column: the ending of the images' names; 'auto': one of IMAGES.
      label_column: the ending of the files of labels, or a field of the .json files; 'auto': CLASS, or else one of
        LABELS in the .json files, if there is one; '': there are no labels.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: a shard is missing, compressed, cut short or damaged; no sample has an image; or a sample has several
        images, or no label though others have one.
    """
    shards: dict[str, list[Path]] = {}
    root, paths = _shards(pattern)
    for path in paths:
        shards.setdefault(split_of(path.relative_to(root))[0], []).append(path)
    chosen = candidates(f"webdataset:{pattern}", list(shards), split, train_split, eval_split)
    if not chosen:
        return None
    beside = len(list(paths[0].parent.glob("*.tar")))
    if split == "train" and len(paths) == 1 < beside and distributed.first():  # a shell takes the last of several flags
        log.warning("%s: only this one of %d shards is read; a pattern with {..} needs quotes", paths[0], beside)
    indices = {name: _index(shards[name], image_column, label_column) for name in shards}
    columns = {f"{pattern}: labels of {name}": index.labels for name, index in indices.items() if len(index.labels)}
    numbers, class_names = class_numbers(columns) if columns else ({}, [])
    return first_labelled(
        ShardSource(shards[name], indices[name], numbers.get(f"{pattern}: labels of {name}"), class_names, max_pixels)
        for name in chosen
    )


def _shards(pattern: str) -> tuple[Path, list[Path]]:
    """Returns the folder below which names tell the split, and the shards in the order of their names.

    Raises:
      DataError: there are none, or one that the pattern names is missing.
    """
    given = expanduser(pattern)
    if given.is_dir():
        found = sorted(given.rglob("*.tar"))
        if not found:
            packed = some(sorted(path.name for path in given.rglob("*.t*gz")), ", ")
            hint = f", only {packed}: unpack them with gunzip, as images are read at random" if packed else ""
            raise DataError(f"{given}: holds no .tar file{hint}")
        return given, found
    named = [Path(path) for path in _expanded(str(given))]
    found = []
    for path in named:
        matches = sorted(path.parent.glob(path.name)) if re.search(r"[*?\[]", path.name) else [path]
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


def _cache() -> Path:
    """The user's folder for caches; a relative path, where nothing is kept, if there is no home folder."""
    try:
        return expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    except UserError:
        return Path("~/.cache")


def _index(shards: Sequence[Path], image_column: str, label_column: str) -> Index:
    """Returns the index of shards: the one that was kept if the shards are the same, or else a new one."""
    try:
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    except OSError as e:
        raise DataError(f"{e.filename}: cannot be read ({e.strerror})") from None
    kept = Path(_cache(), "crate_jax", f"webdataset-{digest(VERSION, states, image_column, label_column)}.npz")
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return Index(**arrays)
    except Exception as e:  # a damaged file may raise any error; the index is made anew
        log.debug("%s: %s", kept, e)
    log.info("reading the headers of %d shards of %s", len(shards), shards[0].parent)
    index = _read(shards, image_column, label_column)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        if not kept.is_absolute():
            return index
        kept.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **vars(index))
        os.replace(temporary, kept)
    except OSError as e:
        log.info("the index of the shards cannot be kept in %s (%s)", kept.parent, e.strerror)
    return index


@dataclasses.dataclass(frozen=True)
class _Member:
    """One file of a shard: the name up to its first dot, the rest in lower case, where it begins, its bytes."""

    key: str
    ending: str
    start: int
    size: int


def _members(path: Path) -> Iterator[_Member]:
    """Yields the files of a shard.

    Raises:
      DataError: the shard is damaged or cut short.
    """
    end, offset = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
                offset = info.offset_data
                if offset + info.size > end:
                    raise tarfile.ReadError("cut short")
                folder, name = os.path.split(info.name)
                stem, dot, ending = name.partition(".")
                if info.isreg() and stem and dot:
                    yield _Member(os.path.join(folder, stem), ending.lower(), info.offset_data, info.size)
            offset = tar.offset
    except (OSError, tarfile.TarError, ValueError) as e:
        raise DataError(f"{path}: damaged or cut short at offset {offset} ({' '.join(str(e).split())})") from None
    with path.open("rb") as file:  # tarfile takes a damaged header for the end
        file.seek(offset)
        if file.read(BLOCK).strip(b"\0"):
            raise DataError(f"{path}: damaged at offset {offset}, no header of a tar file")


def _read(shards: Sequence[Path], image_column: str, label_column: str) -> Index:
    """Reads the headers of all shards, and the samples' labels."""
    endings = IMAGES if image_column == "auto" else (image_column.lower(),)
    numbers, starts, sizes, names, labels = [], [], [], [], []
    for number, path in enumerate(shards):
        with path.open("rb") as file:
            for key, group in itertools.groupby(_members(path), lambda member: member.key):
                members = {member.ending: member for member in group}
                images = [members[ending] for ending in members if ending in endings]
                if len(images) > 1:
                    found = " and ".join(image.ending for image in images)
                    raise DataError(f"{path}: the sample {key} has images {found}; set config.data.image_column to one")
                if not images:
                    continue
                numbers.append(number)
                starts.append(images[0].start)
                sizes.append(images[0].size)
                names.append(os.fsencode(f"{key}.{images[0].ending}"))
                label = _label(file.fileno(), path, key, members, label_column)
                if label is not None:
                    labels.append(label)
                if len(labels) not in (0, len(names)):
                    fault = "no label, though others have one" if label is None else "a label, though others have none"
                    raise DataError(
                        f"{path}: the sample {key} at offset {images[0].start} has {fault}; "
                        "config.data.label_column='' goes without labels"
                    )
    if not names:
        raise DataError(f"{shards[0]}: no image in {len(shards)} shards; its endings are to be {', '.join(endings)}")
    whole = all(re.fullmatch(r"-?\d{1,9}", label) for label in labels)
    return Index(
        np.array(numbers, np.int32),
        np.array(starts),
        np.array(sizes),
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum([len(name) for name in names]),
        np.array([int(label) for label in labels], np.int64) if whole else np.array(labels),
    )


def _label(file: int, path: Path, key: str, members: dict[str, _Member], wanted: str) -> str | None:
    """Returns the label of a sample as a text; None if it has none."""
    ending = CLASS if wanted == "auto" else wanted.lower()
    member = members.get(ending) or members.get("json")
    if not wanted or member is None:
        return None
    if member.size > MAX_LABEL_BYTES:
        raise DataError(f"{path}: {key}.{member.ending} at offset {member.start}: {member.size} bytes are no label")
    text = os.pread(file, member.size, member.start).decode("utf-8", "replace").strip()
    if member.ending == ending:
        return text
    try:
        fields = json.loads(text)
    except ValueError as e:
        raise DataError(f"{path}: {key}.json at offset {member.start} is damaged ({e})") from None
    for field in (CLASS, *LABELS) if wanted == "auto" else (wanted,):
        value = fields.get(field) if isinstance(fields, dict) else None
        if isinstance(value, int | str):
            return str(value)
    return None
