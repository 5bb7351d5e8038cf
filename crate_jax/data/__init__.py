"""Images: sources, decoding, augmentation, batches; NumPy arrays on the host until `device_prefetch`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ml_collections import ConfigDict

from crate_jax.data.array_record import open_records
from crate_jax.data.bands import Bands
from crate_jax.data.decoding import GREY, LARGEST, OF_FILES, DecodeError
from crate_jax.data.device_augmentation import pictures_of, views_of
from crate_jax.data.evaluation import eval_batches, eval_images
from crate_jax.data.folder import open_folder
from crate_jax.data.hugging_face import open_tables
from crate_jax.data.imagenet import open_archives
from crate_jax.data.npz import open_npz
from crate_jax.data.pairs import IGNORED, PairSource, open_pairs
from crate_jax.data.pipeline import TrainPipeline, batch_shapes
from crate_jax.data.prefetch import DevicePrefetch, device_prefetch
from crate_jax.data.recipes import VIEWS, preset
from crate_jax.data.scenes import SceneSource
from crate_jax.data.sources import Request, Source, SyntheticSource, digits, require_same_classes
from crate_jax.data.tfds_source import open_tfds
from crate_jax.data.views import shown_views
from crate_jax.data.webdataset import open_shards
from crate_jax.errors import ConfigError, DataError
from crate_jax.validation import (
    FREE,
    RECORDED,
    Key,
    Section,
    anything,
    at_least,
    increasing_pair,
    must,
    one_of,
    positive,
    within,
)
from crate_jax.workdir.folder import expanduser

__all__ = [
    "DATA",
    "DecodeError",
    "DevicePrefetch",
    "IGNORED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PairSource",
    "Source",
    "TrainPipeline",
    "VIEWS",
    "batch_shapes",
    "device_prefetch",
    "eval_batches",
    "eval_images",
    "is_source",
    "open_split",
    "pictures_of",
    "preset",
    "require_same_classes",
    "shown_views",
    "views_of",
    "write_out",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_CHANNELS = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table of sources.

    Attributes:
      open: the function (what follows the name and a colon, what is asked for) -> the split, or None if there is no
        evaluation split.
      rest: what follows the name and a colon, in the words of messages; '': the name stands alone.
      channels: the numbers of channels that the images may be asked for with; None: any number.
    """

    open: Callable[[str, Request], Source | None]
    rest: str = ""
    channels: tuple[int, ...] | None = OF_FILES


OF_ARRAYS = (GREY, 3)  # numbers of channels that images of three give

SOURCES: dict[str, Row] = {
    "scenes": Row(lambda _, request: SceneSource(request.split, request.image_size), channels=OF_ARRAYS),
    "digits": Row(lambda _, request: digits(request.split), channels=OF_ARRAYS),
    "folder": Row(open_folder, "PATH"),
    "npz": Row(open_npz, "PATH", channels=None),
    "hf": Row(open_tables, "PATH"),
    "webdataset": Row(open_shards, "SHARDS"),
    "array_record": Row(open_records, "SHARDS"),
    "imagenet": Row(open_archives, "PATH"),
    "tfds": Row(open_tfds, "NAME"),
    "synthetic": Row(lambda _, request: SyntheticSource(request.split, request.image_size), channels=OF_ARRAYS),
}
FORMS = ", ".join(f"{name}:{row.rest}" if row.rest else name for name, row in SOURCES.items())


def write_out(data: ConfigDict) -> None:
    """Writes short forms in `config.data` out, in place: the bare path of a folder, and one side of square images."""
    bare = data.source and ":" not in data.source and not is_source(data.source)
    if bare and expanduser(data.source).is_dir():
        data.source = f"folder:{data.source}"
    if len(data.image_size) == 1 and isinstance(data.image_size[0], int):  # else the error shows what was given
        data.image_size = (*data.image_size, *data.image_size)


def open_split(config: ConfigDict, split: str, labels_required: bool = False) -> Source | None:
    """Opens one split of the data set that `config.data.source` names.

    Args:
      config: the whole config; reads config.job and config.data. With the job ``segment`` the set must hold pairs of
        images and masks.
      split: 'train' or 'eval'.
      labels_required: whether a set without labels is an error.

    Returns:
      The split, or None if the set has no evaluation split.

    Raises:
      ConfigError: config.data.source does not have the form of one of SOURCES.
      DataError: the data cannot be found or read, or has no labels though labels are required.
      ValueError: `split` is neither 'train' nor 'eval'.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: must be 'train' or 'eval'")
    if config.job == "segment":
        return open_pairs(config, split)
    data = config.data
    if not is_source(data.source):
        raise ConfigError(f"config.data.source={data.source!r}: must be one of {FORMS}")
    name, _, rest = data.source.partition(":")
    source = SOURCES[name].open(rest, Request.from_config(config, split))
    if labels_required and source is not None and source.class_names is None:
        raise DataError(
            f"config.data.source={data.source!r}: this job needs labels, but the {split} split has none; a folder has "
            "labels if each image lies in a sub-folder named after its class, and there are at least two"
        )
    return source if source is None or source.channels == data.channels else Bands(source, data.channels)


def is_source(text: str) -> bool:
    """Whether a text has the form of one of SOURCES."""
    name, colon, rest = text.partition(":")
    return name in SOURCES and bool(SOURCES[name].rest) == bool(rest) == bool(colon)


def _check_channels(c: ConfigDict) -> None:
    data = c.data
    for name in ("mean", "std"):
        if len(data[name]) != data.channels:
            raise ConfigError(
                f"config.data.{name}={list(data[name])!r}: must be {data.channels} numbers, one per channel "
                f"(config.data.channels={data.channels})"
            )
    if data.channels == 3:
        return
    possible = SOURCES[data.source.partition(":")[0]].channels
    if possible is not None and data.channels not in possible:
        raise ConfigError(
            f"config.data.channels={data.channels}: must be one of {', '.join(map(str, possible))} with "
            f"config.data.source={data.source!r}; npz: has arrays of any number"
        )
    if data.randaugment_layers:
        raise ConfigError(
            f"config.data.randaugment_layers={data.randaugment_layers}: must be 0 with config.data.channels="
            f"{data.channels}, since it changes red, green and blue"
        )


DATA = Section(
    "data",
    "Images, how they are read, cropped and changed.",
    of_the_run=True,
    check=_check_channels,
    keys=dict(
        source=Key(
            "digits",
            must(f"be one of {FORMS}, or the path of a folder that exists", is_source),
            "where the images come from",
            resume=RECORDED,
        ),
        data_dir=Key("", anything, "tfds: the folder of the prepared (ArrayRecord) data sets", resume=RECORDED),
        image_column=Key(
            "auto",
            anything,
            "name of the images: npz: array (without _train); hf: column; webdataset: ending; array_record: feature",
            resume=RECORDED,
        ),
        label_column=Key(
            "auto",
            anything,
            "the same for the labels, or a field of .json; imagenet: file with the validation labels; empty: none",
            resume=RECORDED,
        ),
        train_split=Key(
            "train",
            anything,
            "folder: a sub-folder; train: also Training, ..., or else all",
            resume=RECORDED,
        ),
        eval_split=Key(
            "auto", anything, "auto: of test, val, valid and the like, the first with labels", resume=RECORDED
        ),
        image_size=Key((224, 224), anything, "height, width in pixels; one number: both"),
        channels=Key(
            3,
            within(1, MAX_CHANNELS),
            "channels of an image under reconstruction: 1, grey; 2 or 4, as files store them; any number from npz",
        ),
        mean=Key(
            IMAGENET_MEAN,
            must("be numbers, one per channel", bool),
            "mean per channel, of pixels scaled to [0, 1]",
        ),
        std=Key(
            IMAGENET_STD,
            must("be numbers, one per channel, all positive", lambda v: bool(v) and min(v) > 0),
            "standard deviation per channel, of pixels scaled to [0, 1]",
        ),
        crop_scale=Key(
            (0.2, 1.0),
            increasing_pair(0.0, 1.0),
            "share of the area that a random crop covers; 1, 1: no crop",
            resume=RECORDED,
        ),
        crop_ratio=Key(
            (3 / 4, 4 / 3),
            increasing_pair(0.0, math.inf),
            "width / height of the crop, drawn log-uniformly",
            resume=RECORDED,
        ),
        flip=Key(0.5, within(0, 1), "probability of a horizontal flip", resume=RECORDED),
        interpolation=Key("bicubic", one_of("bicubic", "bilinear"), "how images are resized", resume=RECORDED),
        randaugment_layers=Key(0, at_least(0), "RandAugment's operations per image (n); 0: off", resume=RECORDED),
        randaugment_magnitude=Key(14, within(0, 30), "strength of these operations (m)", resume=RECORDED),
        eval_crop=Key(
            0.875, within(0, 1, "(]"), "share of the shorter side in the central evaluation crop", resume=RECORDED
        ),
        workers=Key(0, within(0, 1024), "decoding processes; 0: threads of this process decode", effect=False),
        threads=Key(4, within(1, 1024), "reading threads per process", effect=False),
        prefetch=Key(2, within(1, 1024), "batches that are kept ready on the device", effect=False),
        stall_seconds=Key(
            600.0, positive, "after so many seconds without images a run saves and ends with status 75", effect=False
        ),
        memory_mb=Key(1024, at_least(0), "decoded sets up to this size, in MiB, are kept in memory", effect=False),
        # From here on Pillow warns of bombs. It takes up to 10 bytes per pixel: 0.9 GB in each reading thread.
        max_pixels=Key(
            89_478_485, within(1, LARGEST), "larger images (height x width) count as undecodable", resume=RECORDED
        ),
        max_undecodable=Key(
            0.01, within(0, 1), "share of files that may fail to decode before the run stops", resume=FREE
        ),
    ),
)
