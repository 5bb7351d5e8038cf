"""Data sets prepared by TensorFlow Datasets in the ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.sources import Request, Source, candidates, digest, first_labelled, named_split
from crate_jax.errors import DataError
from crate_jax.workdir.folder import readable_set

UNKNOWN = np.iinfo(np.int32).min  # of a label that was not read yet


class TfdsSource(Source):
    """One split of encoded images; it has a feature 'image' and may have a feature 'label'.

    Args:
      name: the data set's name.
      split: the split's name, as TFDS writes it.
      data: the split as a TFDS data source, whose images are not decoded.
      class_names: one name per class, or None if the split has no labels.
      max_pixels: see :func:`crate_jax.data.decoding.open_image`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data: Any,
        class_names: list[str] | None,
        max_pixels: int = decoding.LARGEST,
    ):
        self._name = name
        self.split = split
        self._data = data
        self.class_names = class_names
        self._max_pixels = max_pixels
        self._labels: np.ndarray | None = None
        # A record holds both image and label. What one of them has read of the other is not read once more.
        self._known = np.full(0 if class_names is None else len(data), UNKNOWN, np.int32)

    def __len__(self) -> int:
        return len(self._data)

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        record = self._data[int(index)]
        if self.class_names is not None:
            self._known[index] = record["label"]
        return decoding.open_image(record["image"], self._max_pixels)

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"{self._name}/{self.split}[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest(self._name, self.split, len(self), self.class_names, str(self._data.dataset_info.version))

    def labels_of(self, indices: Any) -> np.ndarray | None:
        """See Source.labels_of."""
        if self.class_names is None:
            return None
        if self._labels is not None:
            return self._labels[np.asarray(indices, np.int64)]
        wanted = np.asarray(indices, np.int64).reshape(-1)
        for i in wanted[self._known[wanted] == UNKNOWN].tolist():
            self._known[i] = self._data[i]["label"]
        return self._known[wanted]

    @property
    def labels(self) -> np.ndarray | None:
        """The label of each image, int32 (n,); the first access reads the whole split, as each record holds both."""
        if self._labels is None:
            self._labels = self.labels_of(range(len(self)))
        return self._labels


def open_tfds(name: str, request: Request) -> TfdsSource | None:
    """Opens a split of a data set that was prepared with `file_format='array_record'`.

    Args:
      name: the data set's name, as TFDS writes it: NAME, NAME/CONFIG or NAME:VERSION.
      request: what is asked for. The split may be a sub-split of TFDS, such as 'train[:90%]', or a sum, such as
        'train+validation'. 'auto' passes over splits without labels: all labels of imagenet2012's test split are -1.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: TFDS is not installed; the set is not prepared, or is prepared in another format; there is no such
        split; or the set has no feature 'image'.
    """
    data_dir = str(readable_set(request.data_dir)) if request.data_dir else ""
    where = data_dir or "TFDS's default data_dir"
    tfds, builder, splits = _builder(name, data_dir, where)
    if not splits:
        raise DataError(_not_prepared(name, where, "is not prepared"))
    chosen = _candidates(splits, request)
    if not chosen:
        return None
    features = builder.info.features
    if "image" not in features:
        raise DataError(f"config.data.source='tfds:{name}': has no feature 'image'; it has {', '.join(features)}")
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    class_names = list(features["label"].names) if labelled else None

    def read(split: str) -> TfdsSource:
        try:
            data = tfds.data_source(
                name,
                split=split,
                data_dir=data_dir or None,
                download=False,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
            labels_known = class_names is not None and len(data) > 0 and int(data[0]["label"]) >= 0
        except NotImplementedError:
            raise DataError(_not_prepared(name, where, f"is stored as {builder.info.file_format.value}")) from None
        except Exception as e:
            message = " ".join(str(e).split())
            raise DataError(f"config.data.source='tfds:{name}': {type(e).__name__}: {message[:200]}") from None
        return TfdsSource(name, split, data, class_names if labels_known else None, request.max_pixels)

    return first_labelled(map(read, chosen))


def _candidates(splits: Sequence[str], request: Request) -> list[str]:
    """As :func:`candidates`; the names of a sum and before slices are those of splits too."""
    if not set("[+") & set(request.wanted):
        return candidates(splits, request)
    terms = []
    for term in request.wanted.split("+"):
        name = term.partition("[")[0].strip()
        terms.append(term.replace(name, named_split(name, splits, request), 1))
    return ["+".join(terms)]


def _builder(name: str, data_dir: str, where: str) -> tuple[Any, Any, list[str]]:
    """Returns the module tensorflow_datasets, the builder of a data set, and the names of its splits."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise DataError(
            f"config.data.source='tfds:{name}' needs tensorflow-datasets, which cannot be imported ({e}): "
            "pip install tensorflow-datasets importlib_resources"
        ) from None
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        return tfds, builder, list(builder.info.splits)
    except Exception as e:
        raise DataError(
            f"config.data.source='tfds:{name}': {type(e).__name__}: no such data set in {where}, nor among the "
            "builders that TFDS knows; check the name and config.data.data_dir"
        ) from None


def _not_prepared(name: str, where: str, fault: str) -> str:
    return (
        f"config.data.source='tfds:{name}': {fault} in {where}; prepare it once as array_record, on a machine with "
        f"TensorFlow: tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare(), and set "
        "config.data.data_dir to that folder"
    )
