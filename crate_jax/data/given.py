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
            return decoding.picture(image)
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
        array = np.asarray(images)
        _require_image(array, "images", (3, 4), channels)
        images = list(array[None] if array.ndim == 3 else array)
    elif not isinstance(images, Sequence):
        raise DataError(f"images: {_forms(channels)}, not {type(images).__name__}")
    else:
        images = [np.asarray(x) if hasattr(x, "__array__") and not isinstance(x, Image.Image) else x for x in images]
        for i, image in enumerate(images):
            if not isinstance(image, str | os.PathLike | Image.Image):
                _require_image(image, f"images[{i}]", (3,), channels)
    if not len(images):
        raise DataError("images: there are none")
    return Given(images, channels)


def _forms(channels: int) -> str:
    array = f"must be uint8 (n, H, W, {channels})"
    others = ", images of PIL, a list of images, or the path of an image or a folder"
    return f"{array}{others}" if channels in decoding.OF_FILES else array


def _require_image(image: Any, what: str, dimensions: tuple[int, ...], channels: int) -> None:
    if not isinstance(image, np.ndarray):
        raise DataError(f"{what}: {_forms(channels)}, not {type(image).__name__}")
    fits = image.ndim in dimensions and image.shape[-1] == channels and all(image.shape[-3:])
    if image.dtype != np.uint8 or not fits:
        raise DataError(
            f"{what}: {image.dtype} {image.shape}: {_forms(channels)}; values are 0..255, the channels come last"
        )
