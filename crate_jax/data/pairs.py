"""Folders of image/mask pairs: a mask holds the class of each pixel of its image.

Two layouts, where SPLIT is a split's name and MASKS one of masks, labels, annotations:

* ``DIR/images/SPLIT/*`` and ``DIR/MASKS/SPLIT/*.png``, as ADE20K has it;
* ``DIR/SPLIT/images/*`` and ``DIR/SPLIT/MASKS/*.png``.

A mask is a PNG of one channel (grey of any depth, or palette indices). It has the name of its image, except for the
ending, and the size that its image has when displayed.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.folder import FolderSource, sub_folders
from crate_jax.data.sources import DEFAULT_TRAIN_SPLIT, SPLITS, Request, Source, digest, eval_splits, train_splits
from crate_jax.errors import DataError, escaped, some
from crate_jax.parallel import distributed
from crate_jax.workdir.folder import readable_set

IMAGES, MASKS = "images", ("masks", "labels", "annotations")
IGNORED = -1  # in decoded masks: a pixel that is neither trained on nor scored
MAX_CLASSES = np.iinfo(np.int16).max
_MODES = ("1", "L", "P", "I", "I;16")

log = logging.getLogger(__name__)


class PairSource(Source):
    """Images that have one mask each, in the byte order of the images' paths.

    Args:
      images: the images.
      masks: the masks; one for each image, and no others.
      ignored: the value in the mask files that means "no class"; -1: there is no such value.
      reduce_zero_label: whether 0 also means "no class" and the classes start at 1.

    Raises:
      DataError: an image has no mask, a mask has no image, or a mask is not a PNG.
    """

    stretched = True  # so that every pixel of a mask is scored

    def __init__(self, images: FolderSource, masks: FolderSource, ignored: int, reduce_zero_label: bool):
        self._images, self._masks = images, masks
        self._ignored, self._reduce = ignored, reduce_zero_label
        self._mask_of = _match(images, masks)
        # `check` sets these.
        self.classes = 0
        self._highest, self._holder = IGNORED, 0  # the highest class, and the index of a mask that holds it
        self._pixels = np.zeros(1, np.int64)  # the number of pixels without a class, then of those of each class

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """See Source.name."""
        return self._images.name(index)

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        return self._images.open(index)

    def located(self, index: int) -> str:
        """See Source.located."""
        return self._images.located(index)

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest(self._images.fingerprint(), self._masks.fingerprint(), self._ignored, self._reduce)

    def mask_path(self, index: int) -> str:
        """The path of the file of an image's mask."""
        return self._masks.path(int(self._mask_of[index]))

    def mask(self, index: int) -> np.ndarray:
        """Reads the class of each pixel, int16 (H, W); IGNORED where a pixel has no class.

        Raises:
          DecodeError: the file is damaged or is not an image.
          DataError: the image is not a mask: it has several channels, or values above MAX_CLASSES.
        """
        path = self.mask_path(index)
        image = self._masks.open(int(self._mask_of[index]))
        if image.mode not in _MODES:
            raise DataError(
                f"{path}: a mask has one channel of class numbers, this file has mode {image.mode}; save it as an "
                "8-bit or 16-bit grey or as a palette PNG"
            )
        spread = decoding.GREY_STEP.get(decoding.raw_mode(image), 1)
        try:
            values = np.asarray(image).astype(np.int64) // spread
        except Exception as e:  # as in `decoding`: with a damaged file Pillow may raise any error
            raise decoding.DecodeError(f"{path}: {' '.join(str(e).split())}") from e
        nothing = values == self._ignored
        if self._reduce:
            nothing |= values == 0
            values = values - 1
        values[nothing] = IGNORED
        if values.max() >= MAX_CLASSES:
            raise DataError(f"{path}: holds class {values.max()}; at most {MAX_CLASSES} classes are possible")
        return values.astype(np.int16)

    def check(self, classes: int, threads: int) -> None:
        """Reads every mask and every image's header, so that a wrong pair is found before the run starts.

        Damaged files are not an error here: they are skipped and counted when they are used.

        Args:
          classes: number of classes, stored in `self.classes`; 0: the highest class found plus 1.
          threads: number of reading threads.

        Raises:
          DataError: a mask does not have the size of its image, has several channels, or holds a class that is not
            below `classes` (the message names the first such mask); or no mask holds a class.
        """
        start, adding = time.monotonic(), threading.Lock()
        pixels = np.zeros(MAX_CLASSES + 1, np.int64)

        def highest(index: int) -> int:
            try:
                mask, image = self.mask(index), _displayed_size(self._images.path(index))
            except decoding.DecodeError:
                return IGNORED
            if mask.shape != image:
                raise DataError(
                    f"{self.mask_path(index)}: is {_size(mask.shape)} pixels, its image {self.name(index)} "
                    f"{_size(image)}; a mask must have the size of its image"
                )
            counts = np.bincount(mask.ravel() - IGNORED)
            with adding:
                pixels[: len(counts)] += counts
            return len(counts) - 1 + IGNORED

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            found = np.fromiter(pool.map(highest, range(len(self))), np.int64, len(self))
        self._holder = int(found.argmax())
        self._highest = int(found[self._holder])
        if self._highest == IGNORED:
            raise DataError(f"{self._masks.root}: no mask holds a class; every pixel is ignored")
        self.classes = classes or self._highest + 1
        self.require_highest_below(self.classes)
        self._pixels = pixels[: self.classes + 1]
        log.info("checked %d masks, classes 0..%d, in %.1f s", len(self), self._highest, time.monotonic() - start)

    def only_class(self) -> str:
        """Says that the masks hold a single class, and which share of their pixels has none; '' if they hold more."""
        held = np.flatnonzero(self._pixels[1:])
        if len(held) > 1:
            return ""
        share, zero = self._pixels[0] / self._pixels.sum(), " and reduce_zero_label=True" if self._reduce else ""
        return (
            f"{self._masks.root}: the masks hold only class {held[0]}, and {share:.1%} of their "
            f"pixels have no class (config.segment.ignore_index={self._ignored}{zero}); segmentation needs two "
            "classes or more, written as 0, 1, ..."
        )

    def absent(self) -> list[int]:
        """The classes that no mask holds."""
        return np.flatnonzero(self._pixels[1:] == 0).tolist()

    def require_highest_below(self, classes: int) -> None:
        """Checks that the set holds only the classes 0 .. classes - 1.

        Raises:
          DataError: it holds a higher class; the message names a mask.
        """
        if self._highest >= classes:
            value = self._highest + int(self._reduce)
            raise DataError(
                f"{self.mask_path(self._holder)}: holds the value {value}, class {self._highest}, but there are "
                f"{classes} classes, 0..{classes - 1}; repair it, or set config.segment.classes, ignore_index or "
                "reduce_zero_label"
            )


def _displayed_size(path: str) -> tuple[int, int]:
    """Reads (height, width) of an image from its header, without the whole file.

    Raises:
      DecodeError: the header cannot be read.
    """
    try:
        with decoding.open_file(path) as file, Image.open(file, formats=decoding.FORMATS) as image:
            return decoding.oriented_size(image)
    except Exception as e:
        raise decoding.DecodeError(" ".join(str(e).split())) from e


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _match(images: FolderSource, masks: FolderSource) -> np.ndarray:
    """Returns the index of each image's mask, int32 (n,)."""
    number: dict[str, int] = {}
    for i in range(len(masks)):
        stem, ending = os.path.splitext(masks.name(i))
        if ending.lower() != ".png":
            raise DataError(f"{masks.path(i)}: a mask must be a PNG; other formats may change class numbers")
        number[stem] = i
    stems = [os.path.splitext(images.name(i))[0] for i in range(len(images))]
    for i, stem in enumerate(stems):
        if stem not in number:
            raise DataError(f"{images.path(i)}: has no mask; expected {os.path.join(masks.root, stem)}.png")
    unused = sorted(number.keys() - set(stems))
    if unused:
        raise DataError(
            f"{masks.path(number[unused[0]])}: has no image; expected {os.path.join(images.root, unused[0])}.jpg or "
            "another image format"
        )
    return np.array([number[stem] for stem in stems], np.int32)


def open_pairs(config: ConfigDict, split: str) -> PairSource | None:
    """Opens and checks the training or the evaluation split of a folder of pairs.

    Args:
      config: the whole config; reads config.data and config.segment.
      split: 'train' or 'eval'.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: the source is not a folder, the folder has neither of the two layouts, a named split is missing, a
        pair is wrong (see PairSource), or the training masks hold only one class.
    """
    data, options = config.data, config.segment
    kind, _, root = data.source.partition(":")
    if kind != "folder":
        raise DataError(f"config.data.source={data.source!r}: image/mask pairs are read from folder:DIR")
    root = str(readable_set(root))
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; expected image/mask pairs, as docs/segmentation.md lays them out")
    wanted = Request.from_config(config, split).wanted
    if split == "eval" and not wanted:
        return None
    inner = os.path.join(root, IMAGES)
    names = sorted({os.fsdecode(n) for f in (root, inner) if os.path.isdir(f) for n in sub_folders(f)})
    tried: Sequence[str] = (wanted,)
    if split == "train" and wanted in ("", DEFAULT_TRAIN_SPLIT):
        tried = list(dict.fromkeys([*SPLITS["train"][:2], *train_splits(names)]))
    elif split == "eval" and wanted == "auto":
        tried = eval_splits(names)
    found = next(((name, folders) for name in tried if (folders := _find(root, name))), None)
    if found is None:
        if split == "eval" and wanted == "auto":
            return None
        raise DataError(
            f"{root}: has no pairs of split {' or '.join(map(repr, tried))}; expected images/SPLIT and MASKS/SPLIT, or "
            f"SPLIT/images and SPLIT/MASKS, MASKS being one of {', '.join(MASKS)}"
        )
    pair = [FolderSource(folder, data.max_pixels, labelled=False) for folder in found[1]]
    source = PairSource(pair[0], pair[1], options.ignore_index, options.reduce_zero_label)
    source.split, pair[0].split = found[0], os.path.relpath(pair[0].root, root)
    source.check(options.classes, data.threads)
    # Masks of 0 and 255 are common, and 255 is ignore_index: what is left is one class, which scores 100 %. Whatever
    # config.segment.classes says, nothing can be learned from it; an evaluation split may be that small.
    only, absent = source.only_class(), list(map(str, source.absent()))
    if only and split == "train":
        raise DataError(only)
    if only and distributed.first():
        log.warning("%s", escaped(only))
    if absent and split == "train" and distributed.first():
        log.warning(
            "%s: no mask holds %d of %d classes: %s", pair[1].root, len(absent), source.classes, some(absent, ", ")
        )
    return source


def _find(root: str, split: str) -> tuple[str, str] | None:
    """Returns the folders of a split's images and masks, in either layout; None if there are none."""
    for layout in ("{kind}/{split}", "{split}/{kind}"):
        images, *masks = [os.path.join(root, layout.format(kind=kind, split=split)) for kind in (IMAGES, *MASKS)]
        found = [path for path in masks if os.path.isdir(path)]
        if not found or not os.path.isdir(images):
            continue
        if len(found) > 1:
            raise DataError(f"both {found[0]} and {found[1]} exist; keep the one with the masks to use")
        return images, found[0]
    return None


def crop_mask(mask: np.ndarray, box: Sequence[float] | np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Cuts `box` out of a mask and resizes it to `size`: each pixel gets the class nearest to its centre.

    The same box of an image, cut out by `decoding.crop_resize`, stays aligned with it.

    Args:
      mask: the classes, (H, W).
      box: (top, left, height, width) in pixels; may be fractional.
      size: (height, width) of the result in pixels.

    >>> crop_mask(np.array([[0, 1, 2, 3]]), box=(0, 1, 1, 2), size=(1, 4)).tolist()
    [[1, 1, 2, 2]]
    """
    top, left, height, width = (float(v) for v in box)
    rows, columns = (
        np.clip(np.floor(start + (np.arange(n) + 0.5) * (length / n)).astype(int), 0, side - 1)
        for start, length, n, side in ((top, height, size[0], mask.shape[0]), (left, width, size[1], mask.shape[1]))
    )
    return mask[rows[:, None], columns]
