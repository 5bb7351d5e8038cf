"""Several augmented views of one image, outside of training batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax.data import decoding, device_augmentation, recipes, sampling
from crate_jax.data.augmentation import DRAWS, Augmentation, empty, numbered
from crate_jax.data.randaugment import randaugment
from crate_jax.data.sources import Source
from crate_jax.data.undecodable import Undecodable


def augmented_views(
    config: ConfigDict, source: Source, indices: np.ndarray, views: int, recipe: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Draws views of each image as training draws them.

    A view is a function of config.seed, the image and the number of the view.

    Args:
      config: the whole config; reads config.seed and config.data and, with `recipe`, config.views.
      source: the images.
      indices: the indices of the images to draw views of.
      views: views per image, q, at least 2.
      recipe: whether the recipe of joint-embedding methods draws them: crop, flip, changes of colour, grey, blur,
        solarisation and equalisation of config.views, as for the large views 0, 1, 0, 1, ...; then they are rounded to
        bytes. Otherwise crop, flip and RandAugment of config.data.

    Yields:
      The views of one image, uint8 (q, H, W, C), and its index; undecodable images are skipped.

    Raises:
      DataError: too many images cannot be decoded.
    """
    draw = _by_recipe(config, views) if recipe else _by_augmentation(config, views)
    undecodable = Undecodable(source, config.data.max_undecodable)
    for index in map(int, indices):
        try:
            image = decoding.picture(source.read(index))
        except decoding.DecodeError as e:
            undecodable.add([(index, str(e))], 1)
            continue
        undecodable.add([], 1)
        yield draw(image, index), index


Draw = Callable[[decoding.Picture, int], np.ndarray]  # (an image, its index) -> views, uint8 (q, H, W, C)


def _by_augmentation(config: ConfigDict, views: int) -> Draw:
    augmentation = Augmentation.from_config(config)

    def draw(image: decoding.Picture, index: int) -> np.ndarray:
        first = index * views
        uniforms = sampling.uniforms(config.seed, first, views, DRAWS)
        height, width = decoding.oriented_size(image)
        boxes = augmentation.boxes(uniforms, np.full(views, height), np.full(views, width))
        flips = augmentation.flips(uniforms)
        out = np.empty((views, *augmentation.size, config.data.channels), np.uint8)
        for view in range(views):
            cropped = decoding.crop_resize(image, boxes[view], augmentation.size, augmentation.resample)
            pixels = np.asarray(cropped)[:, ::-1] if flips[view] else np.asarray(cropped)
            if augmentation.layers:
                rng = sampling.randaugment_generator(config.seed, first + view)
                whole = Image.fromarray(np.ascontiguousarray(pixels))
                pixels = np.asarray(randaugment(whole, augmentation.layers, augmentation.magnitude, rng))
            out[view] = pixels
        return out

    return draw


def _by_recipe(config: ConfigDict, views: int) -> Draw:
    crops = recipes.layout(config)["views"]
    options = tuple(device_augmentation.Options.of(config, kind) for kind in range(recipes.LARGE))

    def draw(image: decoding.Picture, index: int) -> np.ndarray:
        cropped = [_crop(config, image, index, view, crops[view % recipes.LARGE]) for view in range(views)]
        key = jax.random.key(config.seed)
        return np.asarray(_changed(np.stack(cropped), key, np.int32(index), options, config.views.sigma[1]))

    return draw


@functools.partial(jax.jit, static_argnames=("options", "sigma"))  # not a closure: compiled once for all evaluations
def _changed(
    images_qHWC: jax.Array,
    key: jax.Array,
    index: jax.Array,
    options: tuple[device_augmentation.Options, ...],
    sigma: float,
) -> jax.Array:
    """Crops of one image with the colours, blur and solarisation of the large views in turn, uint8 (q, H, W, 3)."""
    keys_q = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, index), jnp.arange(len(images_qHWC)))
    out_qHWC = images_qHWC
    for kind, option in enumerate(options):
        mine = slice(kind, None, len(options))
        drawn = device_augmentation.drawn(keys_q[mine], option)
        planes = device_augmentation.augmented(images_qHWC[mine], drawn, sigma)
        rounded = jnp.round(255.0 * jnp.clip(jnp.stack(planes, -1), 0.0, 1.0)).astype(jnp.uint8)
        out_qHWC = out_qHWC.at[mine].set(rounded)
    return out_qHWC


def _crop(config: ConfigDict, image: decoding.Picture, index: int, view: int, augmentation: Augmentation) -> np.ndarray:
    """A view's crop, flipped or not, uint8 (H, W, 3)."""
    uniforms = sampling.uniforms(config.seed, index, 1, DRAWS, view)
    height, width = decoding.oriented_size(image)
    (box,) = augmentation.boxes(uniforms, np.array([height]), np.array([width]))
    (crop,) = decoding.crops(image, [box], [augmentation.size], augmentation.resample, augmentation.alone)
    return np.asarray(crop)[:, :: -1 if augmentation.flips(uniforms)[0] else 1]


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
    out = empty(layout, len(indices), 3)
    for row, index in enumerate(map(int, indices)):
        image = Image.fromarray(source.read(index))
        for view, (name, place, a) in enumerate(numbered(layout)):
            out[name][row, place] = _crop(config, image, index, view, a)
    return out
