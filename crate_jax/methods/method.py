"""What the training loop knows of a method, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = dict[str, Any]
Carried = dict[str, Any]
Scalars = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]
Start = Callable[[Params], Params]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is when :attr:`Method.after` is called.

    Attributes:
      done: updates before the present one, int32 scalar: 0 after the first update.
      total: updates of the whole run.
      per_epoch: updates per pass over the training images.
    """

    done: jax.Array
    total: int
    per_epoch: float


def nothing_after(params: Params, carried: Carried, progress: Progress) -> tuple[Params, Carried]:
    """The default of :attr:`Method.after`."""
    return params, carried


def online(params: Params, carried: Carried) -> Params:
    """The default of :attr:`Method.judged`: the parameters that gradients train."""
    return params


@dataclasses.dataclass(frozen=True)
class Method:
    """What is optimised: pre-training, fine-tuning and segmentation fill in the same fields.

    `carried` is what goes from step to step and is not trained by gradients: target networks, queues, centres,
    statistics. It is a dictionary with names, {} if there is nothing. Like parameters it is laid out over the
    devices by `crate_jax.parallel.sharding.RULES`, saved, checksummed and restored. Its arrays are global: a queue
    or a centre is that of the whole batch on any number of devices.

    Attributes:
      inputs: what the loss reads of a batch: ``image`` uint8 (b, H, W, 3), ``label`` int32 (b,), ``mask`` int16
        (b, H, W).
      init: (key, start) -> (params, carried). `start` takes the random parameters and returns those to begin with:
        the same ones, or with the encoder of another run. A target network is copied from what it returns.
      adopt: (params, parameters of another run, where these come from) -> params that start from them. Raises
        CheckpointError if they do not fit.
      loss: (params, carried, batch, keys (b,)) -> (scalar, (carried, scalars to log)). There is one key per image, so
        that micro-batches draw what the whole batch would. The penalty is added by the step, not here.
      after: (params, carried, progress) -> (params, carried), once per update, with the new parameters.
      judged: (params, carried) -> the parameters that evaluations, reports, exports and ``init_from`` read, with the
        key ``encoder``. It selects and does not compute: checkpoints record where each array lies.
      averaged: names of the entries of `carried` that ``config.optimizer.ema`` averages with the parameters.
      mean_over_images: whether the loss is a mean over the images of a batch. If it is not, a batch cannot be cut into
        micro-batches (``config.accumulate``).
      features: (judged, images uint8) -> what the job's evaluation reads, of uncorrupted images: (b, D) float32, or
        the class of each pixel, int32 (b, H, W).
      columns: captions of what `pictures` returns, from left to right; empty: there are no pictures.
      pictures: (judged, batch, keys) -> one (b, H, W, 3) array in 0..1 per column; the batch holds `inputs`, of
        images of the job's evaluation.
      pictures_name: the name of the pictures' files.
    """

    inputs: tuple[str, ...]
    init: Callable[[jax.Array, Start], tuple[Params, Carried]]
    adopt: Callable[[Params, Params, str], Params]
    loss: Callable[[Params, Carried, Batch, jax.Array], tuple[jax.Array, tuple[Carried, Scalars]]]
    features: Callable[[Params, jax.Array], jax.Array]
    after: Callable[[Params, Carried, Progress], tuple[Params, Carried]] = nothing_after
    judged: Callable[[Params, Carried], Params] = online
    averaged: tuple[str, ...] = ()
    mean_over_images: bool = True
    columns: tuple[str, ...] = ()
    pictures: Callable[[Params, Batch, jax.Array], tuple[jax.Array, ...]] | None = None
    pictures_name: str = "reconstruction"
