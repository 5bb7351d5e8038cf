"""ArrayRecord files of tf.train.Example records, as TensorFlow Datasets and others write them, without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crate_jax.data import decoding, shards
from crate_jax.data.folder import files_below
from crate_jax.data.sources import (
    LABELS,
    ColumnSource,
    Request,
    candidates,
    class_numbers,
    digest,
    first_labelled,
    named,
    require_all_shards,
    split_of,
)
from crate_jax.errors import DataError, some
from crate_jax.workdir.folder import readable_set

ENDING = ".array_record"
IMAGES = ("image", "image/encoded", "image_raw", "img", "jpg", "jpeg", "png")  # usual names of a feature of images
CLASSES = ("image/class/label", *LABELS, "cls")
AT_ONCE = 256  # records that are read together when labels are collected


class RecordSource(ColumnSource):
    """The images of one feature of the records of several files; files are opened again in each process.

    Args:
      paths: the files.
      counts: the number of records of each file.
      feature: the name of the feature.
      labels: see ColumnSource.
      class_names: see ColumnSource.
      max_pixels: see ColumnSource.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        feature: str,
        labels: np.ndarray | None,
        class_names: list[str],
        max_pixels: int,
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        super().__init__(labels, class_names, max_pixels)
        self._paths = [str(path) for path in paths]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._feature = feature
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(self._paths, counts, strict=True)]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        try:
            values = _values(_features(self._records[int(index)]), self._feature)
        except Exception as e:  # a damaged file may raise any error
            raise decoding.DecodeError(f"cannot be read ({_one_line(e)})") from e
        if len(values) != 1 or not isinstance(values[0], bytes):
            raise decoding.DecodeError(f"its feature {self._feature} holds no image")
        return decoding.open_image(values[0], self._max_pixels)

    def name(self, index: int) -> str:
        """See Source.name."""
        file = int(np.searchsorted(self._ends, index, "right"))
        first = int(self._ends[file - 1]) if file else 0
        return f"{os.path.basename(self._paths[file])}[{int(index) - first}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        files = [(os.path.basename(path), os.stat(path).st_size) for path in self._paths]
        return digest(files, self._ends, self._feature, self._labels, self.class_names)


def open_records(path: str, request: Request) -> RecordSource | None:
    """Opens the training or the evaluation split of ArrayRecord files.

    All records are read once for their labels, which are kept for the next run. Classes have names if they are in the
    file ``FEATURE.labels.txt`` beside the records, as TensorFlow Datasets writes it.

    Args:
      path: a folder of files with ENDING in their names, in it or in sub-folders; or their paths, as
        :func:`crate_jax.data.shards.named_shards` takes them.
      request: what is asked for. The columns are features of the records. That of images 'auto' is one of IMAGES, or
        else the only one that holds an encoded image; that of labels one of CLASSES.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: a file is missing or damaged; its records are not tf.train.Example; or the features of images and
        labels are not known.
    """
    try:
        import array_record.python.array_record_module  # noqa: F401
    except ImportError as e:
        raise DataError(
            f"config.data.source={request.source!r} needs array_record, which cannot be imported ({e}): pip install "
            "array_record"
        ) from None
    root, paths = _shards(path)
    files: dict[str, list[Path]] = {}
    folders: dict[str, set[Path]] = {}
    for file in paths:
        name, folder = split_of(_plain(file.relative_to(root)))
        files.setdefault(name, []).append(file)
        folders.setdefault(name, set()).add(folder)
    for name, found in files.items():
        if len(folders[name]) > 1:
            several = some(sorted(str(root / folder) for folder in folders[name]), ", ")
            raise DataError(f"{root}: holds several sets; set config.data.source to array_record: and one of {several}")
        require_all_shards(name, list(map(_plain, found)))
    chosen = candidates(list(files), request)
    if not chosen:
        return None
    first = files[chosen[0]][0]
    example = _features(next(itertools.chain.from_iterable(map(_records, files[chosen[0]])), b""), first)
    image = _image_feature(first, example, request.image_column)
    label = _label_feature(first, example, request.label_column)
    counts: dict[str, list[int]] = {}
    columns: dict[str, np.ndarray] = {}
    for name, found in files.items():
        arrays = shards.kept("array_record", found, [label], functools.partial(_read, found, label))
        counts[name] = arrays["counts"].tolist()
        if not sum(counts[name]):
            raise DataError(f"{found[0]}: split {name}: holds no records")
        columns[f"{root}: {label} of {name}"] = arrays["labels"]
    numbers: Mapping[str, np.ndarray | None] = {}
    class_names: list[str] = []
    if label:
        by_column, class_names = class_numbers(columns)
        numbers = dict(zip(files, by_column.values(), strict=True))
        names = first.parent / f"{label.replace('/', '-')}.labels.txt"
        if names.is_file() and next(iter(columns.values())).dtype.kind == "i":
            class_names = named(f"{root}: {label}", class_names, names.read_text("utf-8", "replace").splitlines())
    return first_labelled(
        RecordSource(files[name], counts[name], image, numbers.get(name), class_names, request.max_pixels)
        for name in chosen
    )


def _shards(path: str) -> tuple[Path, list[Path]]:
    given = readable_set(path)
    if not given.is_dir():
        return shards.named_shards(str(given))
    found = files_below(given, lambda name: ENDING in name)
    if not found:
        raise DataError(f"{given}: holds no file with {ENDING} in its name")
    return given, found


def _plain(path: Path) -> Path:
    """Puts the ending last, which TensorFlow Datasets writes before the number of the shard.

    >>> str(_plain(Path("a/set-train.array_record-00000-of-00002")))
    'a/set-train-00000-of-00002.array_record'
    """
    stem, ending, rest = path.name.partition(ENDING)
    return path.with_name(stem + rest + ending)


def _records(path: Path) -> Iterator[bytes]:
    """Yields the records of a file.

    Raises:
      DataError: it is damaged, cut short, or not an ArrayRecord file.
    """
    with _reader(path) as reader:
        for start in range(0, reader.num_records(), AT_ONCE):
            yield from reader.read(start, min(start + AT_ONCE, reader.num_records()))


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Any]:
    """Opens a file; an error of the reader within the context becomes a DataError."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            raise ValueError("cut short, or another format")
        yield reader
        reader.close()
    except DataError:
        raise
    except Exception as e:  # a damaged file may raise any error
        raise DataError(f"{path}: damaged or not an ArrayRecord file ({_one_line(e)})") from None


def _features(record: bytes, where: object = "") -> Mapping[str, Any]:
    """Returns the features of a record that is a serialised tf.train.Example.

    Raises:
      DataError: it is not.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except Exception as e:  # google.protobuf.message.DecodeError, of a package that is not ours
        raise DataError(f"{where}: its records are not tf.train.Example ({_one_line(e)})") from None
    if not features:
        raise DataError(f"{where}: its records are not tf.train.Example, or have no features")
    return features


def _values(features: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the values of a feature: bytes, whole numbers or floats; none if there is no such feature."""
    kind = features[name].WhichOneof("kind") if name in features else None
    return list(getattr(features[name], kind).value) if kind else []


def _image_feature(path: Path, features: Mapping[str, Any], wanted: str) -> str:
    def may_be(name: str) -> bool:
        values = _values(features, name)
        return len(values) == 1 and isinstance(values[0], bytes)

    def is_image(name: str) -> bool:
        try:
            return may_be(name) and bool(decoding.open_image(_values(features, name)[0]).size)
        except decoding.DecodeError:
            return False

    usual = IMAGES if wanted == "auto" else (wanted,)
    found = [name for name in usual if may_be(name)][:1]
    if not found and wanted == "auto":
        found = [name for name in sorted(features) if is_image(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path}: has several features of images; set config.data.image_column to one of {found}")
    raise DataError(
        f"{path}: has no feature {'of images' if wanted == 'auto' else repr(wanted)} that holds one encoded image; "
        f"its features are {_listed(features)}"
    )


def _label_feature(path: Path, features: Mapping[str, Any], wanted: str) -> str:
    if wanted not in ("", "auto") and wanted not in features:
        raise DataError(
            f"{path}: has no feature {wanted!r}, which config.data.label_column names; its features are "
            f"{_listed(features)}"
        )
    return wanted if wanted != "auto" else next((name for name in CLASSES if name in features), "")


def _listed(features: Mapping[str, Any]) -> str:
    kinds = {name: (features[name].WhichOneof("kind") or "empty").removesuffix("_list") for name in sorted(features)}
    return some([f"{name} ({kind})" for name, kind in kinds.items()], ", ")


def _read(paths: Sequence[Path], label: str) -> dict[str, np.ndarray]:
    """Returns the number of records of each file, and, if `label` is not '', their labels."""
    counts: list[int] = []
    labels: list[Any] = []
    for path in paths:
        with _reader(path) as reader:
            counts.append(reader.num_records())
        for number, record in enumerate(_records(path) if label else ()):
            values = _values(_features(record, path), label)
            if len(values) != 1 or type(values[0]) is not type((labels or values)[0]):
                raise DataError(
                    f"{path}: record {number}: its feature {label} holds {some([repr(v) for v in values], ', ')}, "
                    "where one label is; config.data.label_column='' goes without labels"
                )
            labels.append(values[0])
    return {"counts": np.array(counts, np.int64), "labels": np.array(labels)}


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
