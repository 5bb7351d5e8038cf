"""Features of a whole image set from a frozen encoder, computed once and handed to every evaluation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from crate_jax.errors import DataError, NonFiniteError

# Batches queued on the device. Dispatch runs ahead of the device by this much, which hides every copy; waiting for
# the batch this far behind keeps the inputs of a large set from piling up in device memory.
IN_FLIGHT = 8


def extract(
    apply: Callable[[jax.Array], jax.Array],
    images_uint8: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> np.ndarray:
    """Encodes images in batches of one fixed size, so that `apply` compiles once.

    The last batch is filled up with copies of its last image, whose features are dropped. The host never waits for
    the batch it has just sent: results are copied back while later batches run, and gathered at the end.

    Args:
      apply: jitted function, uint8 [b, H, W, 3] on the device -> float [b, D]. Each row must depend on its own image
        only (no batch statistics).
      images_uint8: uint8 [n, H, W, 3]; with several processes, the same images in each.
      batch_size: images per call; rounded up to a multiple of the devices of `sharding`.
      sharding: how a batch is laid out over the devices; None: the default device.

    Returns:
      Float32 [n, D] on the host, in the order of the images; the same in every process.

    Raises:
      DataError: no images.
      TypeError: the images are not uint8 [n, H, W, 3].
      ValueError: `batch_size` is below 1, or `apply` does not return [b, D].
    """
    if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or images_uint8.shape[-1] != 3:
        raise TypeError(
            f"extract: images must be uint8 [n, H, W, 3], got {images_uint8.dtype} {list(images_uint8.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"extract: batch_size={batch_size} must be at least 1")
    n = len(images_uint8)
    if n == 0:
        raise DataError("evaluation: there are no images to encode; the split is empty")
    devices = len(sharding.device_set) if sharding is not None else 1
    size = -(-batch_size // devices) * devices
    outputs: list[jax.Array] = []
    for start in range(0, n, size):
        batch = images_uint8[start : start + size]
        if len(batch) < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        features = apply(_put(batch, sharding))
        if features.ndim != 2 or features.shape[0] != size:
            raise ValueError(f"extract: apply must return [{size}, D], got {list(features.shape)}")
        if features.is_fully_addressable:
            features.copy_to_host_async()
        outputs.append(features)
        if len(outputs) > IN_FLIGHT:
            outputs[-1 - IN_FLIGHT].block_until_ready()
    return np.concatenate([_gather(features) for features in outputs])[:n]


def _put(batch: np.ndarray, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(batch)
    # Every process holds the whole batch and puts only its own devices' rows.
    return jax.make_array_from_callback(batch.shape, sharding, lambda rows: batch[rows])


def _gather(features: jax.Array) -> np.ndarray:
    if not features.is_fully_addressable:
        features = multihost_utils.process_allgather(features, tiled=True)
    return np.asarray(features, np.float32)


def check_labelled(name: str, features: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Checks the features and labels that a classifier is fitted or scored on.

    Args:
      name: what they are, for the message ("train", "test").
      features: [n, D].
      labels: integers [n] in 0 .. num_classes - 1.
      num_classes: number of classes.

    Raises:
      DataError: nothing there, shapes that do not match, or labels out of range.
      NonFiniteError: a feature is NaN or infinite.
    """
    if features.ndim != 2 or labels.shape != (len(features),) or not features.size:
        raise DataError(
            f"evaluation: {name} features {list(features.shape)} and labels {list(labels.shape)} must be [n, D] and "
            "[n], n and D at least 1"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"evaluation: {name} labels must be integers in 0..{num_classes - 1}, got {labels.dtype} in "
            f"{labels.min()}..{labels.max()}"
        )
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise NonFiniteError(f"evaluation: the {name} features of {bad} of {len(features)} images are NaN or infinite")
