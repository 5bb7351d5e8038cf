"""Features of a whole image set from a frozen encoder, computed once and handed to every evaluation."""

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

# Batches queued on the device. Dispatch runs ahead of the device by this much, which hides every copy; waiting for
# the batch this far behind keeps the inputs of a large set from piling up in device memory.
IN_FLIGHT = 8


def extract(
    apply: Callable[[jax.Array], jax.Array],
    batches: Iterable[np.ndarray],
    rows: int,
    place: jax.sharding.NamedSharding,
) -> np.ndarray:
    """Encodes this process's images in batches of one fixed size, so that `apply` compiles once.

    A smaller batch is filled up with copies of its last image, whose features are dropped. The host never waits for
    the batch it has just sent: results are copied back while later batches run, and gathered at the end.

    Args:
      apply: jitted function, uint8 [b, H, W, 3] on the devices -> float [b, D], laid out as its input. Each row must
        depend on its own image only (no batch statistics).
      batches: uint8 [n, H, W, 3], n at most `rows`; equally many in every process.
      rows: images of this process per call, a multiple of its devices.
      place: how a batch is laid out over the devices of all processes.

    Returns:
      Float32 [n, D] on the host, in the order of this process's images.

    Raises:
      ValueError: `apply` does not return [b, D].
    """
    outputs: list[tuple[jax.Array, int]] = []
    for images in batches:
        features = apply(jax.make_array_from_process_local_data(place, filled(images, rows)))
        if features.ndim != 2 or features.shape[0] != rows * distributed.processes():
            raise ValueError(f"extract: apply must return [{rows * distributed.processes()}, D], got {features.shape}")
        if features.is_fully_addressable:
            features.copy_to_host_async()
        outputs.append((features, len(images)))
        if len(outputs) > IN_FLIGHT:
            outputs[-1 - IN_FLIGHT][0].block_until_ready()
    return np.concatenate([_own_rows(features)[:count] for features, count in outputs])


def of_split(
    apply: Callable[[jax.Array], jax.Array], config: ConfigDict, source: Source, indices: np.ndarray, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the images at `indices` that can be decoded, in their order.

    Each process decodes and encodes its part of them; all get the whole result.

    Args:
      apply: jitted function, uint8 [b, H, W, 3] on the devices -> float [b, D], row by row.
      config: reads data and evaluation.batch_size.
      source: an opened, labelled split.
      indices: of the images.
      mesh: the devices that encode.

    Returns:
      float32 [n, D] and int32 [n].

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    labels = [np.zeros(0, np.int32)]

    def images() -> Iterator[np.ndarray]:
        for batch in lockstep(config, source, indices, mesh):
            labels.extend([batch["label"]] if "label" in batch else [])
            yield batch["image"]

    own = extract(apply, images(), per_process(config, mesh), sharding.split(mesh))
    features, labels_N = distributed.in_order(own), distributed.in_order(np.concatenate(labels))
    if not len(features):
        raise DataError(f"evaluation: none of {len(indices)} images can be decoded, {source.name(0)} for one")
    return features, labels_N


def per_process(config: ConfigDict, mesh: Mesh) -> int:
    """Images that each process gives to a call: its part of evaluation.batch_size, a multiple of its devices."""
    return -(-config.evaluation.batch_size // mesh.size) * mesh.size // distributed.processes()


def lockstep(config: ConfigDict, source: Source, indices: np.ndarray, mesh: Mesh) -> Iterator[Mapping[str, np.ndarray]]:
    """Evaluation batches of this process's part of `indices`, equally many in every process.

    All hold at most :func:`per_process` images; those that only other processes still need have an empty ``image``.
    """
    parts = np.array_split(np.asarray(indices), distributed.processes())
    batches = eval_batches(config, source, parts[jax.process_index()], per_process(config, mesh))
    empty = {"image": np.zeros((0, *config.data.image_size, 3), np.uint8)}
    for _ in range(-(-len(parts[0]) // per_process(config, mesh))):
        yield next(batches, empty)


def filled(x: np.ndarray, size: int) -> np.ndarray:
    """Rows repeated at the end, or zeros where there are none, up to `size`; always a copy."""
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
