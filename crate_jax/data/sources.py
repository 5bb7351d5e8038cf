"""The interface of every data set, and the two sets that need no files."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax.data import decoding
from crate_jax.errors import DataError, escaped, some

# Usual names of splits, in lower case; config.data.eval_split='auto' looks for those of 'test' first.
SPLITS = {
    "train": ("train", "training", "trainval"),
    "test": ("test", "testing", "holdout"),
    "val": ("val", "validation", "valid", "validate", "dev", "eval", "evaluation"),
}
DEFAULT_TRAIN_SPLIT = "train"  # the only value of config.data.train_split that also takes a split of another name
_ROLE_OF = {name: role for role, names in SPLITS.items() for name in names}
_WORD = rf"({'|'.join(sorted(_ROLE_OF, key=len, reverse=True))})"
# A split's name with what people add to it: Training_Set, val2017, "test images".
_SPLIT = re.compile(
    rf"(?:(?:images?|imgs?|data|dataset)[ _.-]+)?{_WORD}"
    r"(?:[ _.-]*(?:set|split|data|dataset|images?|imgs?|folder))*[ _.-]*\d{0,4}"
)
_BOTH = re.compile(r"(?<![a-z])(train)[-_. ](val)(?![a-z])", re.IGNORECASE)
_PART = re.compile(rf"(?<![a-z]){_WORD}(?![a-z])")
AnySource = TypeVar("AnySource", bound="Source")
SYNTHETIC_CLASSES = 10
SYNTHETIC_IMAGES = {"train": 4096, "eval": 1024}
DIGITS_TRAIN_SHARE = 0.8
LABELS = ("label", "labels", "class", "target")  # usual names of a field of labels
# What follows the name of a split in the name of one of Hugging Face's shards; a hash may come after it.
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?:-\w+)?$")
MAX_CLASSES = 2**20  # a higher label is an identity or a measurement, not the number of a class


@dataclasses.dataclass(frozen=True)
class Request:
    """What `config.data` asks of a source.

    Attributes:
      source: config.data.source, for messages.
      split: 'train' or 'eval'.
      train_split: name of the training split; 'train' also takes the one that has another usual name.
      eval_split: name of the evaluation split; 'auto': those with a usual name, test before val; '': there is none.
      image_column: the name of the images; 'auto': a usual one, which each source documents.
      label_column: the name of the labels; 'auto': a usual one if it is there; '': the set is read without labels.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.
      channels: the number of channels of the images.
      data_dir: the folder of the sets of TensorFlow Datasets; '': its default.
      image_size: (height, width) in pixels, for images that are drawn.
    """

    source: str
    split: str
    train_split: str
    eval_split: str
    image_column: str
    label_column: str
    max_pixels: int
    channels: int
    data_dir: str
    image_size: tuple[int, int]

    @classmethod
    def from_config(cls, config: ConfigDict, split: str) -> Request:
        """Reads `config.data`."""
        d = config.data
        return cls(
            source=d.source,
            split=split,
            train_split=d.train_split,
            eval_split=d.eval_split,
            image_column=d.image_column,
            label_column=d.label_column,
            max_pixels=int(d.max_pixels),
            channels=int(d.channels),
            data_dir=d.data_dir,
            image_size=tuple(d.image_size),
        )

    @property
    def wanted(self) -> str:
        """`train_split` or `eval_split`, whichever names the split."""
        return self.train_split if self.split == "train" else self.eval_split


def split_role(name: str) -> str | None:
    """Returns the key of SPLITS that a folder's or a split's name stands for; None if it is not the name of a split.

    >>> [split_role(name) for name in ("Train", "training_set", "VALID", "Test Images", "val2017", "testament", "cat")]
    ['train', 'train', 'val', 'test', 'val', None, None]
    """
    found = _SPLIT.fullmatch(name.casefold().strip())
    return _ROLE_OF[found[1]] if found else None


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """Returns the keys of SPLITS that names beside each other stand for, without the names of other things.

    Besides those of :func:`split_role` these are names that differ only in the split.

    >>> split_roles(["Train", "cat", "Test"]), split_roles(["seg_test", "seg_train", "seg_pred", "train station"])
    ({'Train': 'train', 'Test': 'test'}, {'seg_test': 'test', 'seg_train': 'train'})
    """
    roles = {name: split_role(name) for name in names}
    parts = {name: _PART.split(name.casefold()) for name in roles}
    rests = {name: (part[0], part[2]) for name, part in parts.items() if len(part) == 3}
    for name, rest in rests.items():
        others = {_ROLE_OF[parts[other][1]] for other, its in rests.items() if its == rest}
        if "train" in others and len(others) > 1:
            roles[name] = _ROLE_OF[parts[name][1]]
    return {name: role for name, role in roles.items() if role is not None}


def train_splits(names: Iterable[str]) -> list[str]:
    """Returns the names that stand for the training split.

    >>> train_splits(["Training", "val", "cat"])
    ['Training']
    """
    return [name for name, role in split_roles(names).items() if role == "train"]


def eval_splits(names: Iterable[str]) -> list[str]:
    """Returns the names that stand for evaluation splits: those for test first, the usual ones first among equals.

    >>> eval_splits(["valid", "val", "a", "Test", "train"])
    ['Test', 'val', 'valid']
    """
    order, usual = list(SPLITS), list(_ROLE_OF)
    found = {name: role for name, role in split_roles(names).items() if role != "train"}

    def rank(name: str) -> tuple[int, int, str]:
        return order.index(found[name]), usual.index(name) if name in usual else len(usual), name

    return sorted(found, key=rank)


def split_of(path: Path) -> tuple[str, Path]:
    """Returns the name of the split that a file belongs to, and the folder of its configuration, both below the root.

    >>> [split_of(Path(name))[0] for name in ("data/train-00000-of-00002.parquet", "c/validation/0000.parquet")]
    ['train', 'validation']
    >>> [split_of(Path(name))[0] for name in ("a/cifar10-test.arrow", "a/extra-00000-of-00001.parquet", "a/b.parquet")]
    ['test', 'extra', 'train']
    >>> [split_of(Path(name))[0] for name in ("dev-kit-train-0.tar", "test-set-val-0.tar", "train_val-0.tar")]
    ['train', 'val', 'trainval']
    """
    stem = SHARD.sub("", path.stem)
    for text, folder in ((stem, path.parent), (path.parent.name, path.parent.parent)):
        # The last one, as what stands before it may be the name of the set; train_val is not a part of val.
        for word in reversed(re.split(r"[-_. ]", _BOTH.sub(r"\1\2", text))):
            if split_role(word):
                return word, folder
    numbered = stem != path.stem and stem not in ("data", "part")
    return (stem if numbered else "train"), path.parent


def require_all_shards(split: str, paths: Sequence[Path]) -> None:
    """Checks the numbers of shards, if their names have such: k-of-n.

    Raises:
      DataError: a shard is missing, or there are more than n.
    """
    shards = [match for path in paths if (match := SHARD.search(path.stem))]
    total = max((int(shard[2]) for shard in shards), default=0)
    missing = sorted(set(range(total)) - {int(shard[1]) for shard in shards})
    if missing or len(shards) > total:
        fault = f"shard {missing[0]} of {total} is missing" if missing else "shards of several versions"
        raise DataError(f"{paths[0].parent}: split {split}: {fault}")


def candidates(names: Sequence[str], request: Request) -> list[str]:
    """Returns which of a set's named splits may be the one to open, best first; :func:`first_labelled` decides.

    >>> request = Request("npz:a", "eval", "train", "auto", "auto", "auto", 9, 3, "", (8, 8))
    >>> candidates(["Training", "val", "test"], request)
    ['test', 'val']

    Raises:
      DataError: the set has no such split, or several splits may be the training split.
    """
    if request.split == "eval" and request.wanted in ("", "auto"):
        return eval_splits(names) if request.wanted else []
    return [named_split(request.wanted or DEFAULT_TRAIN_SPLIT, names, request)]


def named_split(name: str, names: Sequence[str], request: Request) -> str:
    """Returns the split of a set that has a name; DEFAULT_TRAIN_SPLIT is also the only one of another usual name.

    Raises:
      DataError: the set has no such split, or several splits may be the training split.
    """
    found = [name] if name in names else []
    if request.split == "train" and not found and name == DEFAULT_TRAIN_SPLIT:
        found = train_splits(names)
    if len(found) != 1:
        there = some(list(names), ", ")
        raise DataError(
            f"config.data.source={request.source!r}: has no split {request.wanted!r}; it has {there}; set "
            f"config.data.{request.split}_split to one of them"
        )
    return found[0]


def first_labelled(sources: Iterable[AnySource]) -> AnySource | None:
    """Returns the first set that has labels; if none has, the first one, or None if there are no sets."""
    first = None
    for source in sources:
        if source.class_names is not None:
            return source
        first = first or source
    return first


def label_text(label: bytes | str, where: str) -> str:
    r"""Returns a label that a file holds as UTF-8.

    Args:
      label: the bytes, or the text with surrogates in place of wrong bytes.
      where: the file and what else tells the place of the label, for the message.

    Raises:
      DataError: it is not UTF-8. With a mark in place of wrong bytes, ``b"B\xe4r"`` and ``b"B\xf6r"`` would be one
        class.
    """
    try:
        return (label.encode() if isinstance(label, str) else label).decode()
    except UnicodeError:
        raise DataError(
            f"{where}: the label {label!r} is not UTF-8; write it in UTF-8, or go without labels: "
            "config.data.label_column=''"
        ) from None


def class_numbers(columns: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray | None], list[str]]:
    """Turns the labels of a set's splits into the numbers of classes, the same in all splits.

    Args:
      columns: the labels of each split by the name that messages shall show, (n,) or (n, 1): whole numbers from 0 on,
        which are the numbers of the classes, or texts, whose byte order numbers them. In a split whose labels are not
        public all are negative.

    Returns:
      The labels of each split, int32 (n,), None where they are not public; one name per class.

    Raises:
      DataError: the labels are neither, or only some of a split are negative.

    >>> class_numbers({"train": np.array(["dog", "cat"]), "test": np.array([["dog"]])})
    ({'train': array([1, 0], dtype=int32), 'test': array([1], dtype=int32)}, ['cat', 'dog'])
    """
    flat = {}
    for name, column in columns.items():
        flat[name] = column[:, 0] if column.ndim == 2 and column.shape[1] == 1 else column
        problem = ""
        if flat[name].ndim != 1:
            problem = f"has the shape {column.shape}"
        elif column.dtype.kind not in "iubUS":
            problem = f"holds {column.dtype}"
        elif column.dtype.kind in "iu" and len(column):
            low, high = int(column.min()), int(column.max())
            if low < 0 <= high or high >= MAX_CLASSES:
                problem = f"holds numbers from {low} to {high}"
        if problem:
            raise DataError(
                f"{name}: {problem}; labels are one class per image, a text or a number from 0 to {MAX_CLASSES - 1}; "
                "config.data.label_column='' goes without labels"
            )
    if len({column.dtype.kind in "US" for column in flat.values()}) > 1:
        raise DataError(
            f"{', '.join(flat)}: some labels are texts, some numbers; config.data.label_column='' goes without"
        )
    if any(column.dtype.kind in "US" for column in flat.values()):
        for name, c in flat.items():
            if c.dtype.kind == "S":
                try:
                    flat[name] = np.char.decode(c, "utf-8")
                except UnicodeDecodeError:
                    flat[name] = np.array([label_text(label, name) for label in c.tolist()])
        texts, numbers = np.unique(np.concatenate(list(flat.values())), return_inverse=True)
        parts = np.split(numbers.astype(np.int32), np.cumsum([len(column) for column in flat.values()])[:-1])
        return dict(zip(flat, parts, strict=True)), [escaped(str(text)) for text in texts]
    public = {name: c.astype(np.int32) for name, c in flat.items() if len(c) and c.min() >= 0}
    classes = max((int(column.max()) + 1 for column in public.values()), default=0)
    return {name: public.get(name) for name in flat}, [str(k) for k in range(classes)]


def named(where: str, class_names: list[str], names: Sequence[object]) -> list[str]:
    """Returns the names of classes, fit to be shown, in place of their numbers.

    Raises:
      DataError: there are fewer names than classes.
    """
    if len(class_names) > len(names):
        raise DataError(f"{where} holds class {len(class_names) - 1}, but there are {len(names)} names")
    return [escaped(str(name)) for name in names]


def require_same_classes(train: Source, test: Source) -> None:
    """Checks that a number stands for the same class in both splits, if both have labels.

    Raises:
      DataError: their lists of classes differ.
    """
    ours, theirs = train.class_names, test.class_names
    if ours is not None and theirs is not None and (fault := difference(ours, theirs)):
        raise DataError(
            f"the classes of the training split {train.split!r} and of the evaluation split {test.split!r} differ: "
            f"{fault}; give both the same classes, or set config.data.eval_split=''"
        )


def difference(ours: Sequence[object], theirs: Sequence[object]) -> str:
    """Says where two lists of classes differ first; '' if they do not.

    >>> difference(["cat", "dog"], ["cat", "emu"]), difference(["cat", "dog"], ["cat"]), difference(["cat"], ["cat"])
    ('class 1 is dog in one and emu in the other', 'there are 2 and 1 classes', '')
    """
    for k, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"class {k} is {one} in one and {other} in the other"
    return "" if len(ours) == len(theirs) else f"there are {len(ours)} and {len(theirs)} classes"


class Source(abc.ABC):
    """A finite, indexable set of images; picklable, because worker processes get a copy.

    Attributes:
      class_names: one name per class, fit to be shown, or None if the set has no labels.
      split: the split's name in the set, such as that of a sub-folder; '' for a whole set.
      channels: C, the number of channels of an image.
      stretched: whether evaluation takes the whole of an image, whose aspect changes, and not its central part.
    """

    split: str = ""
    channels: int = 3
    stretched: bool = False
    class_names: list[str] | None = None
    _labels: np.ndarray | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def open(self, index: int) -> decoding.Picture:
        """Opens an image without necessarily decoding its pixels; pixels, uint8 (H, W, C), if C is not 3.

        Raises:
          DecodeError: the file is damaged or is not an image.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns a name of the image, such as its file name; messages show it by :func:`crate_jax.errors.escaped`."""

    def located(self, index: int) -> str:
        """Returns the image's name, for messages, with the folder of its split where the name alone lacks it."""
        return self.name(index)

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a short digest that changes when the set's names, sizes or labels change."""

    @property
    def labels(self) -> np.ndarray | None:
        """The label of each image, int32 (n,), or None if the set has no labels."""
        return self._labels

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Returns the labels of the images at `indices`, int32 (b,), without reading the labels of all images.

        None if the set has no labels.
        """
        labels = self.labels
        return None if labels is None else labels[np.asarray(indices, np.int64)]

    def read(self, index: int) -> np.ndarray:
        """Decodes an image to uint8 (H, W, C).

        Raises:
          DecodeError: the file is damaged or is not an image.
        """
        return decoding.decode(self.open(index))


class ColumnSource(Source):
    """Images of a set that has a column of labels, or none.

    Args:
      labels: the label of each image, int32 (n,), or None.
      class_names: one name per class.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.
    """

    def __init__(self, labels: np.ndarray | None, class_names: list[str], max_pixels: int):
        self._labels = labels
        self.class_names = None if labels is None else class_names
        self._max_pixels = max_pixels


class ArraySource(Source):
    """Images in memory.

    Args:
      name: the set's name.
      images: the images, uint8 (n, H, W, 3).
      labels: the label of each image, int32 (n,), or None.
      class_names: one name per class, or None if there are no labels.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray | None, class_names: list[str] | None):
        self._name = name
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return Image.fromarray(self._images[index])

    def read(self, index: int) -> np.ndarray:
        """See Source.read."""
        return self._images[index]

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest(self._name, self._images.shape, self._images.tobytes(), self._labels)


class SyntheticSource(Source):
    """Smooth random images, computed from their index: a few waves, whose frequency depends on the class.

    They need no disk and no download, and a network can learn their classes: a set for smoke tests and benchmarks.

    Args:
      split: 'train' or 'eval'.
      size: (height, width) of the images in pixels.
    """

    def __init__(self, split: str, size: Sequence[int]):
        self.split = split
        self._size = (int(size[0]), int(size[1]))
        self.class_names = [f"class{k}" for k in range(SYNTHETIC_CLASSES)]

    def __len__(self) -> int:
        return SYNTHETIC_IMAGES[self.split]

    def read(self, index: int) -> np.ndarray:
        """See Source.read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        split = sorted(SYNTHETIC_IMAGES).index(self.split)
        rng = np.random.Generator(np.random.Philox(key=[split, index]))
        frequency = 1 + index % SYNTHETIC_CLASSES
        height, width = self._size
        y = np.arange(height, dtype=np.float32)[:, None] / height + rng.random((1, 3), np.float32)
        x = np.arange(width, dtype=np.float32)[:, None] / width + rng.random((1, 3), np.float32)
        turn = np.float32(2 * np.pi)
        rows = np.sin(turn * frequency * y)[:, None, :]
        columns = np.cos(turn * rng.random(dtype=np.float32) * 4 * x)[None, :, :]
        mean = rng.uniform(96, 160, (1, 1, 3)).astype(np.float32)
        return (mean + 48 * rows * columns + 47 * columns).astype(np.uint8)

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return Image.fromarray(self.read(index))

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"synthetic[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest("synthetic", self.split, self._size, len(self))

    @property
    def labels(self) -> np.ndarray:
        """See Source.labels."""
        return (np.arange(len(self)) % SYNTHETIC_CLASSES).astype(np.int32)


def digits(split: str) -> ArraySource:
    """Loads scikit-learn's handwritten digits: 1797 grey images of 8 x 8 pixels in 10 classes.

    The set has no official split. It is shuffled with `numpy.random.RandomState(0)`, whose stream NumPy never changes;
    the first 80 % (1437 images) are the training split, the other 360 images the evaluation split.

    Args:
      split: 'train' or 'eval'.
    """
    from sklearn.datasets import load_digits  # here: a second that `--help` need not spend

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.images))
    cut = int(DIGITS_TRAIN_SHARE * len(order))
    chosen = order[:cut] if split == "train" else order[cut:]
    grey = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)  # stored as 0..16
    images = np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))
    names = [str(name) for name in data.target_names]
    source = ArraySource(f"digits/{split}", images, data.target[chosen].astype(np.int32), names)
    source.split = split
    return source


def digest(*parts: object) -> str:
    """Hashes strings, bytes, arrays and tuples of numbers to 16 hexadecimal digits.

    >>> digest("digits", np.arange(3)) == digest("digits", np.arange(3)), digest("ab", "c") == digest("a", "bc")
    (True, False)
    """
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = part.tobytes()
        data = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")  # a file's odd name
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]
