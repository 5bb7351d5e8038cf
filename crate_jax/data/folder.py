"""A folder of images: an ImageFolder with one sub-folder per class, or any tree without labels."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.sources import (
    DEFAULT_TRAIN_SPLIT,
    Request,
    Source,
    digest,
    eval_splits,
    first_labelled,
    split_role,
    split_roles,
    train_splits,
)
from crate_jax.errors import DataError, escaped, some
from crate_jax.parallel import distributed
from crate_jax.workdir.folder import is_workdir, readable_set

# The names that Pillow gives to files of decoding.FORMATS. PFM is not a picture: its floats have no white.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".bmp", ".webp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
_ENDINGS = tuple(map(os.fsencode, EXTENSIONS))
FINGERPRINT_SIZES = 1000  # files whose size enters the fingerprint; to ask for all sizes is slow on network disks
# What archives, file systems and file managers leave behind, in lower case. Hidden files are not listed: they are never
# read.
LITTER_FOLDERS = frozenset(
    (b"__macosx", b"@eadir", b"@recycle", b"#recycle", b"#snapshot", b"$recycle.bin", b"recycler", b"lost+found",
     b"system volume information", b"__pycache__")
)  # fmt: skip
OF_A_RUN = frozenset((b"pictures", b"nonfinite"))  # folders with images, in the images' folder if it is a workdir
LITTER_FILES = frozenset((b"thumbs.db", b"ehthumbs.db", b"desktop.ini", b"icon\r"))
MAX_STRAYS = 5  # images beside class folders that are strays however few images the folders hold

log = logging.getLogger(__name__)


class FolderSource(Source):
    """All images below a folder, in the byte order of their relative paths.

    Labels exist if at least two sub-folders of the root hold images: these are the classes, in byte order. Images that
    lie beside them are left out if they are few (:func:`_are_strays`), and are said to take the labels away otherwise.
    One line of the log names what was left out: strays, files that are not images, litter.

    Args:
      root: the folder.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.
      like: the training split's folder, if the labels shall go by the names of its classes; one sub-folder of such a
        name is enough then.
      labelled: whether there may be labels.

    Raises:
      DataError: the folder is missing, cannot be read, is not a folder, or holds no images; it has classes that
        `like` lacks; or its classes have the names of splits.
    """

    def __init__(
        self,
        root: str,
        max_pixels: int = decoding.LARGEST,
        like: str | None = None,
        labelled: bool = True,
    ):
        self.root = root
        self._max_pixels = max_pixels
        rest = _Rest()
        paths = sorted(_walk(root, rest))
        if not paths:
            others = f", only {rest.others_text()}" if rest.others else ""
            raise DataError(
                f"{root}: no images found in this folder or below{others}; files count as images by their extension, "
                f"one of {' '.join(EXTENSIONS)}"
            )
        self.eval_folders = [os.fsdecode(name) for name in sorted(rest.eval_folders)]  # with an evaluation split's name
        firsts = [p.partition(b"/") for p in paths]
        found = sorted({first for first, slash, _ in firsts if slash})
        names = _class_names(root, found, like) if labelled else None
        strays = [p for p, (_, slash, _) in zip(paths, firsts, strict=True) if not slash] if names else []
        if strays and not _are_strays(len(strays), len(paths) - len(strays)):
            say_once(
                f"{root}: no labels, as {len(strays)} images lie beside the folders of the classes; move these images "
                "away or into a class"
            )
            names, strays = None, []
        paths = [p for p, (_, slash, _) in zip(paths, firsts, strict=True) if slash] if strays else paths
        # One block of bytes instead of a million strings: cheap to hold and to send to workers.
        self._blob = b"".join(paths)
        self._ends = np.cumsum([len(p) for p in paths], dtype=np.int64)
        self._labels: np.ndarray | None = None
        if names:
            number = {name: k for k, name in enumerate(names)}
            self._labels = np.array([number[first] for first, slash, _ in firsts if slash], np.int32)
            self.class_names = [escaped(os.fsdecode(name)) for name in names]
            alike = [] if like else _alike(names)
            if alike:
                say_once(
                    f"{root}: names that differ only in case or encoding are classes of their own: {_names(alike)}"
                )
            absent = [name for name in names if name not in found]
            if absent:
                say_once(f"{root}: has no image of {len(absent)} of {len(names)} classes: {_names(absent)}")
        rest.say(root, strays, found)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The image's path relative to the folder."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._blob[start : self._ends[index]])

    def located(self, index: int) -> str:
        """See Source.located."""
        return os.path.join(self.split, self.name(index))

    def path(self, index: int) -> str:
        """The path of an image's file."""
        return os.path.join(self.root, self.name(index))

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return decoding.open_image(decoding.read_file(self.path(index)), self._max_pixels)

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        sizes = []
        for i in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_SIZES).astype(int)):
            try:
                sizes.append(os.stat(self.path(int(i))).st_size)
            except OSError:
                sizes.append(-1)
        return digest(self._blob, self._ends, self._labels, sizes)


class _Rest:
    """What lies between the images of a tree.

    Attributes:
      others: number of files that are not images, by the ending of their name in lower case.
      of_folders: the first folders of these files' paths.
      litter: paths of folders that were not entered.
      eval_folders: paths of folders with the name of an evaluation split.
    """

    def __init__(self) -> None:
        self.others: collections.Counter[bytes] = collections.Counter()
        self.of_folders: set[bytes] = set()
        self.litter: list[bytes] = []
        self.eval_folders: list[bytes] = []

    def add_file(self, path: bytes) -> None:
        """Counts a file that is not an image."""
        folder, name = os.path.split(path)
        if name.lower() not in LITTER_FILES:
            self.others[os.path.splitext(name)[1].lower()] += 1
            self.of_folders.add(folder.partition(b"/")[0])

    def others_text(self) -> str:
        """The numbers of files that are not images, in words."""
        numbers = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        texts = [f"{n} {os.fsdecode(ending) or 'without ending'}" for ending, n in numbers]
        total = self.others.total()
        return f"{total} other file{'s' if total > 1 else ''}: {some(texts, ', ')}"

    def say(self, root: str, strays: list[bytes], found: list[bytes]) -> None:
        """Writes one line to the log, if anything was left out.

        Args:
          root: the tree.
          strays: images that were left out.
          found: the sub-folders that hold images.
        """
        parts = [f"images beside the folders of the classes: {_names(strays)}"] if strays else []
        parts += [f"folders that are not part of the set: {_names(sorted(self.litter))}"] if self.litter else []
        parts += [self.others_text()] if self.others else []
        empty = sorted(self.of_folders - {b"", *found})
        parts += [f"folders without a readable image, which are not classes: {_names(empty)}"] if empty else []
        if parts:
            say_once(f"{root}: left out {'; '.join(parts)}")


def open_folder(path: str, request: Request) -> FolderSource | None:
    """Opens the training or the evaluation split of a folder.

    Args:
      path: the data set's folder.
      request: what is asked for. The split is the name of a sub-folder. 'train' (the default) also takes the sub-folder
        of another usual name, such as Train or training; if there is none, the whole tree is the training split and
        there is no evaluation split. '' is the whole tree. 'auto' is the first with labels among those with a usual
        name, test before val (if none has labels, the first).

    Returns:
      The split, or None if there is no evaluation split. The labels of the evaluation split go by the names of the
      training split's classes.

    Raises:
      DataError: a named split does not exist; several sub-folders may be the training split; only sub-folders with the
        names of other splits hold images; or FolderSource raises the error.
    """
    path = str(readable_set(path))
    if not os.path.lexists(path):
        raise DataError(f"config.data.source={request.source!r}: there is no folder {path}; name that of your images")
    source = _open_split(path, request)
    if source is not None and source.root != path:
        source.split = os.path.relpath(source.root, path)
    return source


def _open_split(path: str, request: Request) -> FolderSource | None:
    """See :func:`open_folder`."""
    train_split, eval_split, max_pixels = request.train_split, request.eval_split, request.max_pixels
    _check_folder(path)
    names = sub_folders(path)
    train_root = _train_root(path, names, train_split)
    whole_tree = train_root is None
    if whole_tree and train_split and eval_split not in ("", "auto"):
        raise DataError(
            f"{path}: config.data.eval_split={eval_split!r} needs the training images in a sub-folder of their own, "
            f"but there is no {train_split!r}"
        )
    if request.split == "train":
        holders = list(_with_images(path, names)) if whole_tree else []
        only_splits = whole_tree and len(_roles(holders)) == len(holders)
        source = FolderSource(train_root or path, max_pixels, labelled=not only_splits)
        if not whole_tree and train_split == DEFAULT_TRAIN_SPLIT:
            _say_left_out(path, names, os.path.relpath(source.root, path), eval_split)
        if whole_tree and source.eval_folders:
            why = f"has no sub-folder {train_split!r}: " if train_split else ""
            included = some(source.eval_folders, ", ") + (" included, without labels" if only_splits else " included")
            say_once(f"{path}: {why}training on all of it, {included}")
        return source
    if not eval_split or (whole_tree and eval_split == "auto"):
        return None
    if eval_split == "auto":
        return _first_labelled(path, eval_splits(map(os.fsdecode, names)), train_root or path, max_pixels)
    eval_root = os.path.join(path, eval_split)
    if not os.path.isdir(eval_root):
        hint = _hint(names)
        raise DataError(f"{path}: has no sub-folder {eval_split!r}, which config.data.eval_split names{hint}")
    return FolderSource(_split_root(path, eval_split), max_pixels, train_root or path)


def _say_left_out(path: str, names: list[bytes], trained: str, eval_split: str) -> None:
    """Names the folders with images that no split takes: ``train`` may be a class, beside those of planes and buses."""
    evals = {name for name, role in _roles(names).items() if role != "train"}
    taken = {os.fsencode(folder.partition(os.sep)[0]) for folder in (trained, eval_split)}
    others = list(_with_images(path, [name for name in names if name not in evals | taken]))
    if others:
        say_once(
            f"{path}: trains on {trained} only; other folders with images are left out: {_names(others)}; "
            "config.data.train_split='' takes them all"
        )


def _split_root(path: str, split: str) -> str:
    """Returns the folder of a split's images; archives often hold one more of the same name: train/train/CLASS."""
    root = os.path.join(path, split)
    inner = [os.fsdecode(name) for name in sub_folders(root)]
    if len(inner) == 1 and inner[0].casefold() == os.path.basename(root).casefold() and not _loose(root):
        return os.path.join(root, inner[0])
    return root


def _train_root(path: str, names: list[bytes], train_split: str) -> str | None:
    """Returns the folder of the training images; None if it is the whole tree."""
    if not train_split:
        return None
    if os.path.isdir(os.path.join(path, train_split)):
        return _split_root(path, train_split)
    if train_split != DEFAULT_TRAIN_SPLIT:
        hint = _hint(names)
        raise DataError(f"{path}: has no sub-folder {train_split!r}, which config.data.train_split names{hint}")
    training = train_splits(map(os.fsdecode, names))
    if len(training) > 1:
        raise DataError(f"{path}: has the splits {', '.join(training)}; set config.data.train_split to one of them")
    if training:
        log.info("%s: training on the sub-folder %s", escaped(path), escaped(training[0]))
        return _split_root(path, training[0])
    roles = _roles(names)
    others = list(itertools.islice(_with_images(path, [name for name in names if name not in roles]), 2))
    evals = list(_with_images(path, list(roles)))
    if evals and not others:
        raise DataError(
            f"{path}: {_names(evals)} are names of splits, not of classes, and none is that of a training split; set "
            "config.data.train_split to the sub-folder to train on, or to '' for all of them without labels"
        )
    if len(others) == 1 and not evals and not _loose(path):
        below = os.path.join(path, os.fsdecode(others[0]))
        inner = _roles(sub_folders(below))
        if "train" in inner.values():
            raise DataError(
                f"{path}: the splits {_names(list(inner))} lie one folder deeper; set config.data.source=folder:{below}"
            )
    return None


def _first_labelled(path: str, names: list[str], train_root: str, max_pixels: int) -> FolderSource | None:
    """As :func:`first_labelled`, for those of the splits that can be used; the log says which one it is.

    Raises:
      DataError: no split has labels, and one cannot be used.
    """
    passed: list[str] = []
    failed: list[DataError] = []

    def usable() -> Iterator[FolderSource]:
        for name in names:
            try:
                source = FolderSource(_split_root(path, name), max_pixels, train_root)
            except DataError as e:
                failed.append(e)
                passed.append(str(e))
                continue
            if source.class_names is None:
                passed.append(f"{name} (no labels)")
            source.split = name
            yield source

    source = first_labelled(usable())
    labelled = source is not None and source.class_names is not None
    if failed and not labelled:
        raise failed[0]
    if source is not None:
        found = f"the evaluation split is {source.split}"
        if labelled and passed:
            say_once(f"{path}: {found}; passed over: {'; '.join(passed)}")
        else:
            log.info("%s: %s%s", escaped(path), escaped(found), "" if labelled else ", without labels")
    return source


def _hint(names: list[bytes]) -> str:
    found = list(_roles(names))
    return f"; there is {_names(found)}" if found else ""


def _roles(names: Sequence[bytes]) -> dict[bytes, str]:
    return {os.fsencode(name): role for name, role in split_roles(map(os.fsdecode, names)).items()}


def _check_folder(root: str) -> None:
    try:
        os.stat(root)
    except (OSError, ValueError) as e:
        raise DataError(f"{root}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not os.path.isdir(root):
        raise DataError(f"{root}: not a folder")


def _class_names(root: str, found: list[bytes], like: str | None) -> list[bytes] | None:
    """Returns the classes that a tree's labels go by; None if it has no labels.

    Args:
      root: the tree.
      found: its sub-folders that hold images.
      like: see FolderSource.
    """
    classes = None if like is None else _find_classes(like)
    if classes is None:
        if len(found) < 2:
            return None
        if len(_roles(found)) == len(found):
            raise DataError(
                f"{root}: {_names(found)} are names of splits, not of classes; set config.data.source, train_split and "
                "eval_split to the folders that hold the classes"
            )
        return found
    extra, missing = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if len(extra) == len(found) < 2:
        return None
    theirs = {_plain(name) for name in missing}
    if extra and all(_plain(name) in theirs for name in extra):  # such names look the same
        raise DataError(
            f"{root}: its classes must be those of {like}, and differ from them only in case, spaces or the encoding "
            f"of letters, which copying may change: {_names(extra)}; rename the folders so that the names are equal"
        )
    if extra:
        lacks = f"lacks {_names(missing)} and " if missing else ""
        raise DataError(
            f"{root}: its classes must be those of {like}, but it {lacks}adds {_names(extra)}; if these folders are "
            "not classes, set config.data.eval_split=''"
        )
    return classes


def _alike(names: Sequence[bytes]) -> list[bytes]:
    """Returns the names that other names equal but for case, spaces around them, and encoding of their letters.

    >>> _alike([b"Cat", b"cat", b"dog"])
    [b'Cat', b'cat']
    """
    plain = list(map(_plain, names))
    times = collections.Counter(plain)
    return [name for name, text in zip(names, plain, strict=True) if times[text] > 1]


def _plain(name: bytes) -> str:
    return unicodedata.normalize("NFKC", os.fsdecode(name)).casefold().strip()


def _find_classes(root: str) -> list[bytes] | None:
    """Returns the classes that FolderSource finds, without listing all images; None if there are no labels."""
    classes, loose = list(_with_images(root, sub_folders(root))), _loose(root)
    if len(classes) < 2:
        return None
    if loose:
        inside = itertools.islice((path for path in _walk(root) if b"/" in path), 10 * loose + 1)
        if not _are_strays(loose, sum(1 for _ in inside)):
            return None
    return classes


def _are_strays(loose: int, inside: int) -> bool:
    """Returns whether `loose` images beside class folders with `inside` images are there by mistake.

    >>> _are_strays(1, 2), _are_strays(6, 60), _are_strays(6, 61)
    (True, False, True)
    """
    return 10 * loose < inside or loose <= MAX_STRAYS and loose < inside


def _loose(root: str) -> int:
    """Returns the number of images that lie directly in a folder."""
    with os.scandir(os.fsencode(root)) as entries:
        return sum(not e.name.startswith(b".") and _is_image(e.name) and not _is_dir(e) for e in entries)


def sub_folders(root: str) -> list[bytes]:
    """Returns the names of the sub-folders that may hold images, sorted."""
    try:
        with os.scandir(os.fsencode(root)) as entries:
            found = sorted(e.name for e in entries if not e.name.startswith(b".") and _is_dir(e))
    except OSError as e:
        raise DataError(f"{root}: cannot be read ({e.strerror})") from None
    left_out = OF_A_RUN if is_workdir(os.fsencode(root)) else frozenset()
    return [name for name in found if name not in left_out and name.lower() not in LITTER_FOLDERS]


def _with_images(root: str, names: Sequence[bytes]) -> Iterator[bytes]:
    """Yields those sub-folders that hold an image which a walk of the whole folder finds, too."""
    return (name for name in names if next(_walk(root, start=name), None) is not None)


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Returns the files below a folder whose names are wanted, sorted; folders are entered as for images.

    Path.rglob would not enter a link to a folder, and would find the hidden files that macOS leaves beside others.

    Raises:
      DataError: a folder cannot be read.
    """
    return sorted(root / os.fsdecode(path) for path in _walk(str(root), wanted=lambda name: wanted(os.fsdecode(name))))


def _is_image(name: bytes) -> bool:
    """Returns whether a file has the name of an image."""
    return name.lower().endswith(_ENDINGS)


def _walk(
    root: str, rest: _Rest | None = None, wanted: Callable[[bytes], bool] = _is_image, start: bytes = b""
) -> Iterator[bytes]:
    """Yields the relative paths of all images below a folder, except hidden files and those in hidden folders.

    Workdirs of this library are not entered. A link to a folder counts as a folder, unless it leads back to a folder
    that holds it. So the images do not depend on the order in which the file system lists them. What else lies there is
    added to `rest`. Other files than images are those that are wanted by their names.
    With `start`, a sub-folder, only those below it: the same ones that the walk of the whole folder finds there.
    """
    _check_folder(root)
    above = frozenset((os.path.realpath(os.fsencode(root)),)) if start else frozenset()
    pending = [(start, above)]  # folders, each with the real paths of those that hold it
    rest = _Rest() if rest is None else rest
    while pending:
        folder, holders = pending.pop()
        path = os.path.join(os.fsencode(root), folder)
        try:
            real = os.path.realpath(path)
            if real in holders:
                continue
            holders |= {real}
            of_a_run = is_workdir(path)
            if of_a_run and folder:  # a run's pictures are not photos
                rest.litter.append(folder)
                continue
            with os.scandir(path) as entries:
                for entry in entries:  # one by one: who asks for the first image need not wait for a list of a million
                    if entry.name.startswith(b"."):
                        continue
                    inner = os.path.join(folder, entry.name)
                    if _is_dir(entry):
                        if entry.name.lower() in LITTER_FOLDERS or (of_a_run and entry.name in OF_A_RUN):
                            rest.litter.append(inner)
                            continue
                        if split_role(os.fsdecode(entry.name)) in ("val", "test"):
                            rest.eval_folders.append(inner)
                        pending.append((inner, holders))
                    elif wanted(entry.name):
                        yield inner
                    else:
                        rest.add_file(inner)
        except OSError as e:
            raise DataError(f"{os.fsdecode(path)}: cannot be read ({e.strerror})") from None


def _is_dir(entry: os.DirEntry[bytes]) -> bool:
    """Returns False for a link that leads nowhere or to itself: it counts as a file, which cannot be decoded."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _names(names: Sequence[bytes]) -> str:
    return some([os.fsdecode(name) for name in names], ", ")


@functools.lru_cache(maxsize=1000)
def say_once(text: str) -> None:
    """Writes a warning to the log of process 0, once: a set is opened again for each evaluation and report."""
    if distributed.first():
        log.warning("%s", escaped(text))
