"""Images that the caller holds, as a source: arrays, images of PIL, paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.folder import FolderSource
from crate_jax.data.sources import Source, digest
from crate_jax.errors import DataError
from crate_jax.workdir.folder import readable

Images = np.ndarray | Image.Image | str | os.PathLike[str] | Sequence[Any] | Source


class Given(Source):
    """Images that the caller holds."""

    def __init__(self, images: Sequence[Any], channels: int) -> None:
        self._images = images
        self.channels = channels

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> decoding.Picture:
        """See Source.open."""
        return decoding.of_channels(self._opened(self._images[index]), self.channels)

    def _opened(self, image: Any) -> decoding.Picture:
        if isinstance(image, Image.Image):
            try:
                copy = image.copy()  # decoding may change it, and the caller's stays as it is
                copy.format = image.format  # which a copy lacks: it tells a dark file of 16 bits from bytes
                return copy
            except Exception as e:  # the file under it is damaged
                raise decoding.DecodeError(str(e)) from e
        if isinstance(image, np.ndarray):
            return decoding.from_array(image, self.channels)
        return decoding.open_image(decoding.read_file(str(readable(image))))

    def name(self, index: int) -> str:
        """See Source.name."""
        image = self._images[index]
        return os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return digest(*map(self.name, range(len(self))))


def source(images: Images, channels: int) -> Source:
    """The images as a source; `channels` is how many an image of the encoder has.

    Raises:
      DataError: they are none of the forms that :class:`crate_jax.Encoder` takes, or there are none.
    """
    if isinstance(images, Source):
        if images.channels != channels:
            raise DataError(f"images: of {images.channels} channels, where the encoder takes {channels}")
        return images
    if channels not in decoding.OF_FILES and not hasattr(images, "__array__"):
        raise DataError(f"images: {_forms(channels)}")
    if isinstance(images, str | os.PathLike) and not readable(images).is_file():
        folder = FolderSource(str(readable(images)), labelled=False)
        return folder if channels == folder.channels else Given([folder.path(i) for i in range(len(folder))], channels)
    if isinstance(images, str | os.PathLike | Image.Image):
        return Given([images], channels)
    if hasattr(images, "__array__"):
        images = list(_stack(np.asarray(images), channels))
    elif not isinstance(images, Sequence):
        raise DataError(f"images: {_forms(channels)}, not {type(images).__name__}")
    else:
        images = [np.asarray(x) if hasattr(x, "__array__") and not isinstance(x, Image.Image) else x for x in images]
        for i, image in enumerate(images):
            if not isinstance(image, str | os.PathLike | Image.Image):
                images[i] = _one(image, f"images[{i}]", channels)
    if not len(images):
        raise DataError("images: there are none")
    return Given(images, channels)


def _forms(channels: int) -> str:
    grey = ", or grey (n, H, W)" if 1 in decoding.stored(channels) else ""
    array = f"must be uint8 (n, H, W, {channels}){grey}"
    others = ", images of PIL, a list of images, or the path of an image or a folder"
    return f"{array}{others}" if channels in decoding.OF_FILES else array


def _stack(array: np.ndarray, channels: int) -> np.ndarray:
    """Images (n, H, W) or (n, H, W, C) of an array; (H, W, C) is one image.

    Raises:
      DataError: it is not such images, or may be one image as well as several.
    """
    if array.ndim == 3 and array.shape[2] == channels:
        return _arranged(array[None], array, "images", channels)
    if array.ndim == 3 and array.dtype == np.uint8 and (array.shape[0] == channels > 1 or array.shape[2] == 1):
        raise DataError(
            f"images: uint8 {array.shape}: may be one image or several; give one image as (1, H, W, C), grey ones as "
            "(n, H, W, 1)"
        )
    return _arranged(array, array, "images", channels)


def _one(image: Any, what: str, channels: int) -> np.ndarray:
    """One image of a list, (H, W) or (H, W, C).

    Raises:
      DataError: it is not an image.
    """
    if not isinstance(image, np.ndarray):
        raise DataError(f"{what}: {_forms(channels)}, not {type(image).__name__}")
    return _arranged(image[None], image, what, channels)[0]


def _arranged(array: np.ndarray, given: np.ndarray, what: str, channels: int) -> np.ndarray:
    """Images (n, H, W), which are grey, or (n, H, W, C), out of any layout that the reader of .npz files takes.

    Args:
      array: the images, one axis of which counts them.
      given: what the caller has given, for the message.
      what: its name, for the message.
      channels: how many an image of the encoder has.

    Raises:
      DataError: the array has no such layout.
    """
    if array.dtype == np.uint8 and all(array.shape[1:]):
        last, first = decoding.layouts(array.shape, channels)
        if last != first or (array.ndim == 4 and array.shape[3] == channels):  # as documented, whatever else it may be
            return array if last else array.transpose(0, 2, 3, 1)
    raise DataError(
        f"{what}: {given.dtype} {given.shape}: {_forms(channels)}; values are 0..255, the channels come last"
    )
