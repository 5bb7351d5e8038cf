"""Evaluation images: central crops without any randomness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from crate_jax.data import decoding
from crate_jax.data.pairs import PairSource, crop_mask
from crate_jax.data.reading import Readers, reading
from crate_jax.data.sources import Source
from crate_jax.data.undecodable import Undecodable
from crate_jax.errors import DataError

# Images decoded at a time. At 224 px they take some 300 MB of the host's memory.
CHUNK = 2048


def central_box(height: int, width: int, size: Sequence[int], share: float) -> tuple[float, float, float, float]:
    """Returns the central part of an image that evaluation uses.

    Resizing this part to `size` gives what resizing the whole image and cropping its centre would give: for a square
    output the shorter side would be resized to side / share. Cropping first keeps very long images cheap.

    Args:
      height: the image's height in pixels.
      width: the image's width in pixels.
      size: (height, width) of the output in pixels.
      share: `config.data.eval_crop`.

    Returns:
      top, left, height and width of the part, in fractional pixels.

    >>> central_box(256, 512, (224, 224), 0.875)
    (16.0, 144.0, 224.0, 224.0)
    """
    scale = share * min(height / size[0], width / size[1])
    h, w = scale * size[0], scale * size[1]
    return (height - h) / 2, (width - w) / 2, h, w


def whole_box(height: int, width: int, share: float) -> tuple[float, float, float, float]:
    """Returns the central part of an image with a mask that evaluation uses: `share` of each side.

    Resizing this part to the output's size changes its aspect, as it does with training crops. With share 1 every
    pixel is scored.

    Returns:
      top, left, height and width of the part, in fractional pixels.
    """
    h, w = share * height, share * width
    return (height - h) / 2, (width - w) / 2, h, w


def eval_batches(
    config: ConfigDict, source: Source, indices: Sequence[int] | np.ndarray, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the evaluation images at `indices`, in the order of `indices`, without the undecodable ones.

    All batches but the last hold exactly `batch_size` images, so that a jitted function compiles at most twice.

    Args:
      config: the whole config; reads config.data.
      source: an opened split.
      indices: the images' indices in the split.
      batch_size: images per batch.

    Yields:
      'image', uint8 (b, H, W, C); 'index', int32 (b,); 'label', int32 (b,), if the set has labels; 'mask', int16
      (b, H, W), if it has masks.

    Raises:
      DataError: too many images cannot be decoded, or none can.
      Stalled: an image cannot be read in time.
    """
    size, share = tuple(config.data.image_size), config.data.eval_crop
    resample = decoding.RESAMPLING[config.data.interpolation]
    undecodable = Undecodable(source, config.data.max_undecodable)

    def load(index: int) -> dict[str, np.ndarray] | str:
        try:
            with reading(source, index):
                image = source.open(index)
                mask = source.mask(index) if isinstance(source, PairSource) else None
            height, width = decoding.oriented_size(image)
            box = whole_box(height, width, share) if source.stretched else central_box(height, width, size, share)
            more = {} if mask is None else {"mask": crop_mask(mask, box, size)}
            return {"image": np.asarray(decoding.crop_resize(image, box, size, resample))} | more
        except decoding.DecodeError as e:
            return str(e)

    indices = np.asarray(indices, np.int64)
    images: list[dict[str, np.ndarray]] = []
    kept: list[int] = []
    nothing_yielded = True
    with Readers(config.data.threads, config.data.stall_seconds) as readers:
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size].tolist()
            loaded = list(readers.map(load, chunk, "an evaluation image"))
            bad = [(i, x) for i, x in zip(chunk, loaded, strict=True) if isinstance(x, str)]
            undecodable.add(bad, len(chunk))
            images += [x for x in loaded if not isinstance(x, str)]
            kept += [i for i, x in zip(chunk, loaded, strict=True) if not isinstance(x, str)]
            if len(kept) >= batch_size:
                nothing_yielded = False
                yield _pack(source, images[:batch_size], kept[:batch_size])
                del images[:batch_size], kept[:batch_size]
    if kept:
        yield _pack(source, images, kept)
    elif nothing_yielded and len(indices):
        example = source.located(int(indices[0]))
        raise DataError(f"evaluation: none of {len(indices)} images can be decoded, for example {example}")


def eval_images(
    config: ConfigDict, source: Source, indices: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Loads all evaluation images at `indices` into one array; see :func:`eval_batches`.

    Returns:
      Images, uint8 (n, H, W, C), and labels, int32 (n,) (None if the set has none), without the undecodable images.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    parts = list(eval_batches(config, source, indices, 256))
    images = [part["image"] for part in parts] or [
        np.zeros((0, *config.data.image_size, config.data.channels), np.uint8)
    ]
    if source.class_names is None:
        return np.concatenate(images), None
    return np.concatenate(images), np.concatenate([part["label"] for part in parts] or [np.zeros(0, np.int32)])


def _pack(source: Source, images: list[dict[str, np.ndarray]], indices: list[int]) -> dict[str, np.ndarray]:
    batch = {k: np.stack([image[k] for image in images]) for k in images[0]}
    batch["index"] = np.array(indices, np.int32)
    labels = source.labels_of(indices)
    return batch if labels is None else {**batch, "label": labels}
