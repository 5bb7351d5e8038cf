"""The interface between the training loop and a method: pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Params = dict[str, Any]
Carried = dict[str, Any]
Scalars = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]
Start = Callable[[Params], Params]
LARGEST_BATCH = 2**20  # images, for which `Progress.epochs` is exact


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the run is when the step calls :attr:`Method.after`.

    Attributes:
      done: the number of updates before the present one, int32 scalar: 0 after the first update.
      total: the number of updates in the whole run.
      per_epoch: the number of updates per pass over the training images.
    """

    done: jax.Array
    total: int
    per_epoch: float

    def epochs(self, updates: jax.Array) -> jax.Array:
        """The number of whole passes in the first `updates` updates, int32 scalar.

        The epoch of the next update is ``epochs(done + 1)``.
        """
        # per_epoch is the float64 next to images / batch. This fraction is that of whole numbers, and no product below
        # needs more than 32 bits, for fewer than 2**30 images.
        images, batch = Fraction(self.per_epoch).limit_denominator(LARGEST_BATCH).as_integer_ratio()
        # updates * batch // images in whole numbers, since a float32 quotient may fall on the other side of a whole
        # number; bit by bit, since the product itself needs more bits.
        whole, rest = jnp.divmod(updates.astype(jnp.uint32), images)
        found = left = jnp.zeros_like(rest)
        for bit in f"{batch:b}":
            more, left = jnp.divmod(2 * left + int(bit) * rest, images)
            found = 2 * found + more
        return (whole * batch + found).astype(jnp.int32)


def batch_factor(config: ConfigDict) -> float:
    """What a config's learning rates are multiplied by: batch_size / optimizer.lr_batch; 1 if lr_batch is 0."""
    return config.batch_size / config.optimizer.lr_batch if config.optimizer.lr_batch else 1.0


def nothing_after(params: Params, carried: Carried, progress: Progress) -> tuple[Params, Carried]:
    """The default of :attr:`Method.after`: returns parameters and `carried` unchanged."""
    return params, carried


def nothing_averaged(carried: Carried) -> Carried:
    """The default of :attr:`Method.averaged`: selects no entry of `carried`."""
    return {}


def online(params: Params, carried: Carried) -> Params:
    """The default of :attr:`Method.judged`: returns the parameters that gradients train."""
    return params


@dataclasses.dataclass(frozen=True)
class Method:
    """What a run optimises: pre-training, fine-tuning and segmentation fill in the same fields.

    `carried` holds what goes from step to step without being trained by gradients: target networks, queues, centres,
    statistics. It is a dictionary of named trees of arrays, {} if there is nothing. It is treated like parameters: laid
    out over the devices by `crate_jax.parallel.sharding.RULES`, saved, checksummed and restored. Its arrays are global:
    on any number of devices a queue or a centre belongs to the whole batch.

    Attributes:
      inputs: the entries of a batch that the loss reads: ``image`` uint8 (b, H, W, C), C = ``config.data.channels``;
        ``label`` int32 (b,); ``mask`` int16 (b, H, W); ``index`` int32 (b,), the image's place in the training set;
        ``views`` uint8 (b, V, H, W, 3) and ``small_views`` uint8 (b, S, h, w, 3), crops of the image. An image without
        a label has the label -1.
      init: (key, start) -> (params, carried). `start` is a function that takes the random parameters and returns the
        parameters to begin with: the same, or others with the encoder of another run. `init` must copy a target network
        from what `start` returns.
      adopt: (params or their shapes, parameters of another run, the other run's name for errors, its images' grid of
        patches) -> params that start from them; what the other run does not give stays as it was. Raises
        CheckpointError if they do not fit.
      loss: (params, carried, batch, keys (b,)) -> (scalar, (carried, scalars to log)). There is one key per image, so
        that micro-batches draw what the whole batch would draw. The step adds the penalty, not this function.
        What depends on the progress of the run, such as a temperature, is an entry of `carried` that `after` sets.
      after: (params, carried, progress) -> (params, carried). The step calls it once per update, with the new
        parameters.
      judged: (params, carried) -> the parameters that evaluations, reports, exports and ``init_from`` read, with the
        key ``encoder``. It must select arrays and not compute, since checkpoints record where each array lies.
      averaged: carried -> those of its entries that ``config.optimizer.ema`` averages with the parameters. Like
        `judged` it selects.
      mean_over_images: whether the loss is a mean over the images of a batch. If it is not, the step cannot cut a batch
        into micro-batches (``config.accumulate``).
      features: (judged, images uint8 (b, H, W, C)) -> what the job's evaluation reads: features or class scores
        (b, D) float32, or the class of each pixel, int32 (b, H, W). The images are not corrupted.
      frozen: whether the encoder gets no update.
      held: (pattern, epochs) of weights that stay still in the first `epochs` passes over the training images: they get
        no update and no decay, and the optimiser's state of them does not move; math.inf: never. Patterns match whole
        names.
      healthy: name of a logged scalar -> its value when the projections are spread evenly over all directions. A
        collapse makes such a scalar small; the loop warns when it falls far below this value.
      columns: the captions of the arrays that `pictures` returns, from left to right; empty: there are no pictures.
      pictures: (judged, batch, keys (b,)) -> one (b, H, W, 3) array in 0..1 per column. The batch holds `inputs` of
        some of the evaluation's images.
      pictures_name: the name of the pictures' files.
    """

    inputs: tuple[str, ...]
    init: Callable[[jax.Array, Start], tuple[Params, Carried]]
    adopt: Callable[[Params, Params, str, tuple[int, int]], Params]
    loss: Callable[[Params, Carried, Batch, jax.Array], tuple[jax.Array, tuple[Carried, Scalars]]]
    features: Callable[[Params, jax.Array], jax.Array]
    after: Callable[[Params, Carried, Progress], tuple[Params, Carried]] = nothing_after
    judged: Callable[[Params, Carried], Params] = online
    averaged: Callable[[Carried], Carried] = nothing_averaged
    mean_over_images: bool = True
    frozen: bool = False
    held: tuple[tuple[str, float], ...] = ()
    healthy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()
    pictures: Callable[[Params, Batch, jax.Array], tuple[jax.Array, ...]] | None = None
    pictures_name: str = "reconstruction"
