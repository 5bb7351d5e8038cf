"""Features of a whole image set from a frozen encoder, computed once for all evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax.data.evaluation import eval_batches
from crate_jax.data.sources import Source
from crate_jax.errors import DataError, NonFiniteError
from crate_jax.parallel import distributed, sharding

# Batches that the host may be ahead of the device: enough to hide every copy, and few enough that the inputs of a large
# set do not fill the device's memory.
MAX_IN_FLIGHT = 8


def extract(
    apply: Callable[[jax.Array], jax.Array],
    batches: Iterable[np.ndarray],
    rows: int,
    place: jax.sharding.NamedSharding,
) -> np.ndarray:
    """Encodes this process's images in batches of one fixed size, so that `apply` compiles once.

    A smaller batch is padded with copies of its last image, whose features are dropped. The host never waits for
    the batch that it has just sent: results are copied back while later batches run, and gathered at the end.

    Args:
      apply: the jitted function from images, uint8 (b, H, W, 3), to features, float (b, D), both on the devices and
        with the same sharding. A row must depend only on its own image (no batch statistics).
      batches: batches of images, uint8 (n, H, W, 3), n at most `rows`; every process must give the same number of
        batches.
      rows: images per call in this process, a multiple of the number of its devices.
      place: sharding of a batch over the devices of all processes.

    Returns:
      The features, float32 (n, D), on the host, in the order of this process's images.

    Raises:
      ValueError: `apply` does not return (b, D).
    """
    outputs: list[tuple[jax.Array, int]] = []
    for images in batches:
        features = apply(jax.make_array_from_process_local_data(place, pad_rows(images, rows)))
        if features.ndim != 2 or features.shape[0] != rows * distributed.processes():
            raise ValueError(f"extract: apply must return ({rows * distributed.processes()}, D), got {features.shape}")
        if features.is_fully_addressable:
            features.copy_to_host_async()
        outputs.append((features, len(images)))
        if len(outputs) > MAX_IN_FLIGHT:
            outputs[-1 - MAX_IN_FLIGHT][0].block_until_ready()
    return np.concatenate([_own_rows(features)[:count] for features, count in outputs])


def encode_split(
    apply: Callable[[jax.Array], jax.Array], config: ConfigDict, source: Source, indices: np.ndarray, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and labels of the decodable images at `indices`, in the order of `indices`.

    Each process decodes and encodes a part of the images; every process gets the whole result.

    Args:
      apply: the jitted function from images, uint8 (b, H, W, 3), to features (or class scores), float (b, D), as
        :func:`extract` needs it.
      config: the whole config; reads config.data and config.evaluation.batch_size.
      source: an opened, labelled split.
      indices: the images' indices in the split.
      mesh: the devices that encode.

    Returns:
      The features, float32 (n, D), and the labels, int32 (n,).

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    labels = [np.zeros(0, np.int32)]

    def images() -> Iterator[np.ndarray]:
        for batch in process_batches(config, source, indices, mesh):
            labels.extend([batch["label"]] if "label" in batch else [])
            yield batch["image"]

    own = extract(apply, images(), images_per_process(config, mesh), sharding.split(mesh))
    features, labels_N = distributed.gather_rows(own), distributed.gather_rows(np.concatenate(labels))
    return features, labels_N


def images_per_process(config: ConfigDict, mesh: Mesh) -> int:
    """Returns how many images a process encodes per call: its part of config.evaluation.batch_size, rounded up.

    It is a multiple of the number of the process's devices.
    """
    return -(-config.evaluation.batch_size // mesh.size) * mesh.size // distributed.processes()


def process_batches(
    config: ConfigDict, source: Source, indices: np.ndarray, mesh: Mesh
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the evaluation batches of this process's part of `indices`; every process gets the same number of batches.

    A batch holds at most :func:`images_per_process` images. A process that has no more images yields batches whose
    ``image`` has shape (0, H, W, 3).
    """
    parts = np.array_split(np.asarray(indices), distributed.processes())
    batches = eval_batches(config, source, parts[distributed.process()], images_per_process(config, mesh))
    empty = {"image": np.zeros((0, *config.data.image_size, config.data.channels), np.uint8)}
    for _ in range(-(-len(parts[0]) // images_per_process(config, mesh))):
        yield next(batches, empty)


def pad_rows(x: np.ndarray, size: int) -> np.ndarray:
    """Returns a copy of rows (n, ...) with the last row repeated up to (size, ...); with zeros if there is no row.

    >>> pad_rows(np.array([[1, 2], [3, 4]]), 3).tolist()
    [[1, 2], [3, 4], [3, 4]]
    """
    more = np.repeat(x[-1:], size - len(x), axis=0) if len(x) else np.zeros((size, *x.shape[1:]), x.dtype)
    return np.concatenate([x, more])


def _own_rows(features: jax.Array) -> np.ndarray:
    if features.is_fully_addressable:
        return np.asarray(features, np.float32)
    parts = {shard.index[0].start or 0: shard.data for shard in features.addressable_shards}
    return np.concatenate([np.asarray(parts[start], np.float32) for start in sorted(parts)])


def check_labelled(name: str, features: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Checks the features and labels that a classifier is fitted or scored on.

    Args:
      name: the split's name for the message ("train", "test").
      features: features (n, D).
      labels: integer labels (n,) in 0 .. num_classes - 1.
      num_classes: number of classes.

    Raises:
      DataError: there are no features, shapes do not match, or a label is out of range.
      NonFiniteError: a feature is NaN or infinite.
    """
    if features.ndim != 2 or labels.shape != (len(features),) or not features.size:
        raise DataError(
            f"evaluation: {name} features {features.shape} and labels {labels.shape} must have shapes (n, D) and "
            "(n,), n and D at least 1"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"evaluation: {name} labels must be integers in 0..{num_classes - 1}, got {labels.dtype} in "
            f"{labels.min()}..{labels.max()}"
        )
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise NonFiniteError(f"evaluation: the {name} features of {bad} of {len(features)} images are NaN or infinite")
