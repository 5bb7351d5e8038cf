"""Several augmented views of one image, outside of training batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax.data import decoding, recipes, sampling
from crate_jax.data.augmentation import DRAWS, Augmentation, empty, numbered
from crate_jax.data.randaugment import randaugment
from crate_jax.data.sources import Source
from crate_jax.data.undecodable import Undecodable


def augmented_views(
    config: ConfigDict, source: Source, indices: np.ndarray, views: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Draws views of each image by the training augmentation (crop, flip and RandAugment of config.data).

    A view is a function of config.seed, the image and the number of the view.

    Args:
      config: the whole config; reads config.seed and config.data.
      source: the images.
      indices: the indices of the images to draw views of.
      views: views per image, q.

    Yields:
      The views of one image, uint8 (q, H, W, 3), and its index; undecodable images are skipped.

    Raises:
      DataError: too many images cannot be decoded.
    """
    augmentation = Augmentation.from_config(config)
    undecodable = Undecodable(source, config.data.max_undecodable)
    for index in map(int, indices):
        try:
            image = Image.fromarray(source.read(index))
        except decoding.DecodeError as e:
            undecodable.add([(index, str(e))], 1)
            continue
        undecodable.add([], 1)
        first = index * views
        uniforms = sampling.uniforms(config.seed, first, views, DRAWS)
        boxes = augmentation.boxes(uniforms, np.full(views, image.height), np.full(views, image.width))
        flips = augmentation.flips(uniforms)
        out = np.empty((views, *augmentation.size, 3), np.uint8)
        for view in range(views):
            cropped = decoding.crop_resize(image, boxes[view], augmentation.size, augmentation.resample)
            pixels = np.asarray(cropped)[:, ::-1] if flips[view] else np.asarray(cropped)
            if augmentation.layers:
                rng = sampling.randaugment_generator(config.seed, first + view)
                whole = Image.fromarray(np.ascontiguousarray(pixels))
                pixels = np.asarray(randaugment(whole, augmentation.layers, augmentation.magnitude, rng))
            out[view] = pixels
        yield out, index


def shown_views(config: ConfigDict, source: Source, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Crops views of some images, as training crops them, to be shown to people.

    A view is a function of config.seed, the image and the number of the view.

    Args:
      config: the whole config; reads config.seed, config.data and config.views.
      source: the images.
      indices: the indices of images that can be decoded.

    Returns:
      'views', uint8 (b, 2, H, W, 3), and 'small_views', uint8 (b, S, h, w, 3), if config.views.small is above 0.

    Raises:
      DecodeError: an image cannot be decoded.
    """
    layout = recipes.layout(config)
    out = empty(layout, len(indices))
    for row, index in enumerate(map(int, indices)):
        image = Image.fromarray(source.read(index))
        for view, (name, place, a) in enumerate(numbered(layout)):
            uniforms = sampling.uniforms(config.seed, index, 1, DRAWS, view)
            (box,) = a.boxes(uniforms, np.array([image.height]), np.array([image.width]))
            (crop,) = decoding.crops(image, [box], [a.size], a.resample, a.alone)
            out[name][row, place] = np.asarray(crop)[:, :: -1 if a.flips(uniforms)[0] else 1]
    return out
