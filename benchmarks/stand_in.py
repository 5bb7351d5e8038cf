"""The training set that a config names, without its files: a program depends on its number of images and classes."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import data

# Images and classes of the training split.
SIZES = {
    "tfds:cifar10": (50_000, 10),
    "tfds:cifar100": (50_000, 100),
    "folder:imagenet100": (126_689, 100),
    "tfds:imagenet2012": (1_281_167, 1000),
}


class StandIn(data.Source):
    """A set that knows how many images and classes it has, and holds no image.

    Args:
      images: number of images.
      classes: number of classes.
    """

    def __init__(self, images: int, classes: int) -> None:
        self._images = images
        self.class_names = [f"class{k}" for k in range(classes)]

    def __len__(self) -> int:
        return self._images

    def open(self, index: int) -> Image.Image:
        """See Source.open; there is nothing to open."""
        raise data.DecodeError("a stand-in holds no images")

    def name(self, index: int) -> str:
        """See Source.name."""
        return f"stand-in[{index}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        return f"stand-in {self._images} {len(self.class_names or ())}"

    @property
    def labels(self) -> np.ndarray:
        """See Source.labels."""
        return np.arange(self._images, dtype=np.int32) % len(self.class_names or ())


def training_set(config: ConfigDict) -> data.Source:
    """The stand-in for config.data.source; a set whose size is not in SIZES counts as ImageNet."""
    if config.data.source in ("digits", "synthetic") and (source := data.open_split(config, "train")) is not None:
        return source
    return StandIn(*SIZES.get(config.data.source, SIZES["tfds:imagenet2012"]))
