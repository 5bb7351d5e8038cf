"""Images in: sources, decoding, augmentation, batches; NumPy on the host up to `device_prefetch`."""

from __future__ import annotations

from ml_collections import ConfigDict

from crate_jax.data.decoding import DecodeError
from crate_jax.data.evaluation import eval_batches, eval_images
from crate_jax.data.folder import open_folder
from crate_jax.data.pairs import IGNORED, PairSource, open_pairs
from crate_jax.data.pipeline import TrainPipeline
from crate_jax.data.prefetch import DevicePrefetch, device_prefetch
from crate_jax.data.sources import Source, SyntheticSource, digits
from crate_jax.data.tfds_source import open_tfds
from crate_jax.errors import ConfigError, DataError

__all__ = [
    "DecodeError",
    "DevicePrefetch",
    "IGNORED",
    "PairSource",
    "Source",
    "TrainPipeline",
    "device_prefetch",
    "eval_batches",
    "eval_images",
    "open_split",
]


def open_split(config: ConfigDict, split: str, labels_required: bool = False) -> Source | None:
    """Opens one split of the data set that `config.data.source` names.

    Args:
      config: reads job and data; for the job ``segment`` the set holds pairs of images and masks.
      split: 'train' or 'eval'.
      labels_required: refuse a set without labels.

    Returns:
      The split, or None if the set has no evaluation split.

    Raises:
      ConfigError: an unknown source.
      DataError: the data cannot be found or read, or has no labels though they are required.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: must be 'train' or 'eval'")
    if config.job == "segment":
        return open_pairs(config, split)
    data = config.data
    kind, _, where = data.source.partition(":")
    source: Source | None
    if kind == "digits":
        source = digits(split)
    elif kind == "synthetic":
        source = SyntheticSource(split, data.image_size)
    elif kind == "folder":
        source = open_folder(where, split, data.train_split, data.eval_split)
    elif kind == "tfds":
        source = open_tfds(where, split, data.data_dir, data.train_split, data.eval_split)
    else:
        raise ConfigError(f"config.data.source={data.source!r}: must be digits, folder:PATH, tfds:NAME or synthetic")
    if labels_required and source is not None and source.class_names is None:
        raise DataError(
            f"config.data.source={data.source!r}: this job needs labels, but the {split} split has none; a folder has "
            "labels if each image lies in a sub-folder named after its class, and there are at least two"
        )
    return source
