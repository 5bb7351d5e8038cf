"""Second moments of labelled images, summed batch by batch: the alignment analysis reads nothing else of the data.

Pixels are bytes, so the sums are exact. A pixel minus 128 lies in -128 .. 127, a product of two is at most 2^14, and a
sum of up to 1024 products is at most 2^24. So every partial sum is a whole number that float32 holds, in whatever order
the device adds. Sums of batches are added as int32, and sums of FLUSH batches as float64 on the host (exact to 2^53).
Only the centring, in float64, rounds. With float32 sums, rounding would hide the smallest eigenvalues of natural
images, which are below 1e-7 of the largest.

Shapes: N images, D = H * W * 3 numbers per image in raster order (row, column, channel), C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from crate_jax.errors import DataError
from crate_jax.parallel import sharding

__all__ = ["Moments", "of_images"]

OFFSET = 128
ROWS = 1024  # images per device and batch; so many sums of products stay within 2^24
FLUSH = 64  # batches; so many sums stay within 2^31
LOW_BITS = 16  # low bits of the sums, which are added over devices apart from the high bits


@dataclasses.dataclass(frozen=True)
class Moments:
    """The second moments of N images and their targets; float64.

    Attributes:
      second_DD: X X^T.
      cross_DC: X Y^T.
      targets_CC: Y Y^T; for one-hot targets the number of images per class on its diagonal.
      count: N.
    """

    second_DD: np.ndarray
    cross_DC: np.ndarray
    targets_CC: np.ndarray
    count: int


def of_images(
    batches: Iterable[Mapping[str, np.ndarray]], classes: int, mesh: Mesh, noise: float = 1e-3, name: str = "the data"
) -> Moments:
    """Moments of labelled images, centred per pixel and divided by their common standard deviation.

    The authors of the paper do so too, but they draw the noise; here its expectation, N sigma^2 I, is added.

    Args:
      batches: ``image`` uint8 (b, H, W, 3) and ``label`` (b,) in 0 .. classes - 1, with at most ROWS images per
        device. All processes must give the same batches.
      classes: C.
      mesh: the devices; each takes a part of every batch and holds D x D sums of its own.
      noise: the standard deviation of the added noise, in units of the images' standard deviation.
      name: the name of the data in messages.

    Raises:
      DataError: there are no images, all have one label, or all are the same.
    """
    sums = exact_sums(batches, classes, mesh)
    if sums is None:
        raise DataError(f"{name}: there are no images, so there are no second moments")
    gram_DD, cross_CD, counts_C = sums
    count, D = float(counts_C.sum()), len(gram_DD)
    kept = counts_C > 0
    if kept.sum() < 2:
        raise DataError(f"{name}: all {int(count)} images have the same label; alignment needs two or more classes")
    total_D = cross_CD.sum(axis=0)  # every image has one label
    second_DD = gram_DD - np.outer(total_D, total_D) / count
    cross_DC = cross_CD.T - np.outer(total_D, counts_C) / count
    if np.trace(second_DD) <= 0:
        raise DataError(f"{name}: all {int(count)} images are the same")
    # The noise is scaled by the spread of all pixels about one mean, X by that of each pixel about its own.
    spread = np.trace(gram_DD) / (count * D) - (total_D.sum() / (count * D)) ** 2
    second_DD[np.diag_indices(D)] += count * noise**2 * spread
    variance = np.trace(second_DD) / (count * D)
    return Moments(second_DD / variance, cross_DC[:, kept] / np.sqrt(variance), np.diag(counts_C[kept]), int(count))


def exact_sums(
    batches: Iterable[Mapping[str, np.ndarray]], classes: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Sums over all images of z z^T (D, D), y z^T (C, D) and y (C,), where z are the pixels minus OFFSET, y is one-hot.

    The sums are whole numbers in float64, without rounding; None if there are no images. The arguments are those of
    :func:`of_images`.

    Raises:
      ValueError: a batch has more than ROWS images per device.
    """
    step, place = _make_step(mesh, classes), sharding.split(mesh)
    on_device: tuple[jax.Array, ...] = ()
    on_host: list[np.ndarray] = []
    counts_C = np.zeros(classes)
    size = waiting = 0

    def collect() -> None:
        for i, sums in enumerate(on_device):
            low, rest = jax.device_get(_over_devices(sums, mesh))
            on_host[i] += low.astype(np.float64) + rest.astype(np.float64) * 2**LOW_BITS

    for batch in batches:
        images, labels = batch["image"], np.asarray(batch["label"])
        size = max(size, -(-len(images) // mesh.size) * mesh.size)  # the last batch may be smaller and is filled up
        if size > ROWS * mesh.size:
            raise ValueError(f"a batch of {len(images)} images: at most {ROWS} on each of {mesh.size} devices")
        rows_ND = np.full((size, images[0].size), OFFSET, np.uint8)  # rows that fill up are z = 0 and add nothing
        rows_ND[: len(images)] = images.reshape(len(images), -1)
        labels_N = np.full(size, -1, np.int32)
        labels_N[: len(images)] = labels
        if not on_host:
            D = rows_ND.shape[1]
            on_host = [np.zeros((D, D)), np.zeros((classes, D))]
        if waiting % FLUSH == 0:
            collect()
            on_device = _zeros(mesh, ((D, D), (classes, D)))
        # Every process holds the whole batch and puts only its own devices' rows.
        x, y = (jax.make_array_from_callback(a.shape, place, a.__getitem__) for a in (rows_ND, labels_N))
        on_device = step(*on_device, x, y)
        counts_C += np.bincount(labels, minlength=classes)
        waiting += 1
    collect()
    return (on_host[0], on_host[1], counts_C) if on_host else None


def _zeros(mesh: Mesh, shapes: Sequence[tuple[int, ...]]) -> tuple[jax.Array, ...]:
    """int32 zeros of these shapes on every device; the leading axis counts the devices."""

    @functools.partial(jax.jit, out_shardings=(sharding.split(mesh),) * len(shapes))
    def make() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((mesh.size, *shape), jnp.int32) for shape in shapes)

    return make()


@functools.cache
def _make_step(mesh: Mesh, classes: int) -> Callable[..., tuple[jax.Array, ...]]:
    """The function that adds a batch to the sums of n devices.

    It maps (sums (n, D, D), sums (n, C, D), pixels (b, D), labels (b,)) to the two new sums.
    """

    def on_one_device(gram: jax.Array, cross: jax.Array, rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        z_bD = rows.astype(jnp.float32) - OFFSET
        y_bC = jax.nn.one_hot(labels, classes, dtype=jnp.float32)  # a row of zeros for label -1

        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)[None]

        return gram + product(z_bD, z_bD), cross + product(y_bC, z_bD)

    part = PartitionSpec(sharding.BATCH)
    split = jax.shard_map(on_one_device, mesh=mesh, in_specs=(part,) * 4, out_specs=(part,) * 2)
    return jax.jit(split, donate_argnums=(0, 1))


def _over_devices(sums: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Sums over the leading axis of the low bits and of the high bits: the whole sum could overflow int32."""
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=(everywhere, everywhere))
    def add(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x & (2**LOW_BITS - 1), axis=0), jnp.sum(x >> LOW_BITS, axis=0)

    return add(sums)
