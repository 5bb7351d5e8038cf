"""A folder of images: an ImageFolder with one sub-folder per class, or any tree without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.sources import EVAL_SPLITS, Source, digest
from crate_jax.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
DEFAULT_TRAIN_SPLIT = "train"
FINGERPRINT_SIZES = 1000  # files whose size enters the fingerprint; to ask for all sizes is slow on network disks

log = logging.getLogger(__name__)


class FolderSource(Source):
    """All images below a folder, in the byte order of their relative paths.

    Labels exist if every image lies in a sub-folder of the root and there are at least two such
    sub-folders: these are the classes, in byte order.

    Args:
      root: the folder.

    Raises:
      DataError: the folder is missing, cannot be read, is not a folder, or holds no images.
    """

    def __init__(self, root: str):
        self.root = root
        paths = sorted(_walk(root))
        if not paths:
            raise DataError(
                f"{root}: no images found in this folder or below; files count as images by their extension, "
                f"one of {' '.join(EXTENSIONS)}"
            )
        # One block of bytes instead of a million strings: cheap to hold and to send to workers.
        self._blob = b"".join(paths)
        self._ends = np.cumsum([len(p) for p in paths], dtype=np.int64)
        self._labels: np.ndarray | None = None
        firsts = [p.partition(b"/") for p in paths]
        classes = sorted({first for first, slash, _ in firsts if slash})
        if len(classes) >= 2 and all(slash for _, slash, _ in firsts):
            number = {name: k for k, name in enumerate(classes)}
            self._labels = np.array([number[first] for first, _, _ in firsts], np.int32)
            self.class_names = [os.fsdecode(name) for name in classes]

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The image's path relative to the folder."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._blob[start : self._ends[index]])

    def path(self, index: int) -> str:
        """The path of an image's file."""
        return os.path.join(self.root, self.name(index))

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return decoding.open_image(decoding.read_file(self.path(index)))

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        sizes = []
        for i in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_SIZES).astype(int)):
            try:
                sizes.append(os.stat(self.path(int(i))).st_size)
            except OSError:
                sizes.append(-1)
        return digest(self._blob, self._ends, self._labels, sizes)

    @property
    def labels(self) -> np.ndarray | None:
        """See Source.labels."""
        return self._labels


def open_folder(path: str, split: str, train_split: str, eval_split: str) -> FolderSource | None:
    """Opens the training or the evaluation split of a folder.

    Args:
      path: the data set's folder.
      split: 'train' or 'eval'.
      train_split: sub-folder of the training images. If it is '', or is 'train' (the default) and there is no such
        sub-folder, the whole tree is the training split and there is no evaluation split.
      eval_split: sub-folder of the evaluation images; 'auto': the first of test, val, validation that exists; '':
        there is no evaluation split.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: as FolderSource raises it; or a named split is missing, or the classes of the evaluation split are
        not those of the training split.
    """
    path = os.path.expanduser(path)
    _check_folder(path)
    train_root = os.path.join(path, train_split) if train_split else path
    whole_tree = not train_split or not os.path.isdir(train_root)
    if whole_tree and train_split not in ("", DEFAULT_TRAIN_SPLIT):
        raise DataError(f"{path}: has no sub-folder {train_split!r}, which config.data.train_split names")
    if whole_tree and train_split and eval_split not in ("", "auto"):
        raise DataError(
            f"{path}: config.data.eval_split={eval_split!r} needs the training images in a sub-folder of their own, "
            f"but there is no {train_split!r}"
        )
    found = [s for s in EVAL_SPLITS if os.path.isdir(os.path.join(path, s))]
    if split == "train":
        if whole_tree and found:
            log.warning("%s has no sub-folder %r: training on all of it, %s included", path, train_split, found[0])
        return FolderSource(path if whole_tree else train_root)
    if eval_split == "auto":
        if whole_tree or not found:
            return None
        eval_split = found[0]
    elif not eval_split:
        return None
    eval_root = os.path.join(path, eval_split)
    if not os.path.isdir(eval_root):
        raise DataError(f"{path}: has no sub-folder {eval_split!r}, which config.data.eval_split names")
    source = FolderSource(eval_root)
    _check_classes(source, path if whole_tree else train_root)
    return source


def _check_folder(root: str) -> None:
    try:
        os.stat(root)
    except (OSError, ValueError) as e:
        raise DataError(f"{root}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not os.path.isdir(root):
        raise DataError(f"{root}: not a folder")


def _check_classes(source: FolderSource, train_root: str) -> None:
    if source.class_names is None:
        return
    train = _find_classes(train_root)
    missing, extra = sorted(train - set(source.class_names)), sorted(set(source.class_names) - train)
    if missing or extra:
        parts = [
            f"{verb} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for verb, names in (("lacks", missing), ("adds", extra))
            if names
        ]
        raise DataError(
            f"{source.root}: its classes must be those of {train_root}, but it {' and '.join(parts)}; if these folders "
            "are not classes, set config.data.eval_split=''"
        )


def _find_classes(root: str) -> set[str]:
    """Returns the names of the sub-folders that hold an image, without listing all images."""
    with os.scandir(root) as entries:
        folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return {name for name in folders if next(_walk(os.path.join(root, name)), None) is not None}


def _walk(root: str) -> Iterator[bytes]:
    """Yields the relative paths of all images below a folder, except hidden files and those in hidden folders."""
    _check_folder(root)
    extensions = tuple(os.fsencode(e) for e in EXTENSIONS)
    visited: set[bytes] = set()  # real paths, so that a link to a parent does not loop for ever
    pending = [b""]
    while pending:
        folder = pending.pop()
        path = os.path.join(os.fsencode(root), folder)
        try:
            real = os.path.realpath(path)
            if real in visited:
                continue
            visited.add(real)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if _is_dir(entry):
                        pending.append(os.path.join(folder, entry.name))
                    elif entry.name.lower().endswith(extensions):
                        yield os.path.join(folder, entry.name)
        except OSError as e:
            raise DataError(f"{os.fsdecode(path)}: cannot be read ({e.strerror})") from None


def _is_dir(entry: os.DirEntry[bytes]) -> bool:
    """Returns False for a link that leads nowhere or to itself: it counts as a file, which cannot be decoded."""
    try:
        return entry.is_dir()
    except OSError:
        return False
