"""What the training loop knows of a method, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = dict[str, Any]
Scalars = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is optimised. Pre-training and fine-tuning fill in the same fields.

    Attributes:
      inputs: what of a batch the loss reads: ``image`` uint8 (b, H, W, 3), ``label`` int32 (b,), ``mask``
        int16 (b, H, W).
      init: key -> (params, state); state is whatever the objective carries from step to step.
      adopt: (params, parameters of another run, what they are for messages) -> params that start from them.
      loss: (params, batch, keys (b,)) -> (scalar, scalars to log). One key per image, so that
        micro-batches draw what the whole batch would.
      penalty: (params, state, key) -> (weighted scalar, (new state, scalars to log)); once per step.
      penalised: names of the parameters that the penalty acts on.
      features: (params, images uint8) -> what the job's evaluation reads, of uncorrupted images: (b, D)
        float32, or the class of each pixel, int32 (b, H, W).
      columns: captions of what `pictures` returns, from left to right; empty: there are no pictures.
      pictures: (params, batch, keys) -> one (b, H, W, 3) array in 0..1 per column; the batch holds
        `inputs`, of images of the job's evaluation.
      pictures_name: of their files.
      telemetry: (params, batch, keys) -> scalars to log that say what the layers do; None: there are none.
    """

    inputs: tuple[str, ...]
    init: Callable[[jax.Array], tuple[Params, dict]]
    adopt: Callable[[Params, Params, str], Params]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Scalars]]
    penalty: Callable[[Params, dict, jax.Array], tuple[jax.Array, tuple[dict, Scalars]]]
    penalised: tuple[str, ...]
    features: Callable[[Params, jax.Array], jax.Array]
    columns: tuple[str, ...] = ()
    pictures: Callable[[Params, Batch, jax.Array], tuple[jax.Array, ...]] | None = None
    pictures_name: str = "reconstruction"
    telemetry: Callable[[Params, Batch, jax.Array], Scalars] | None = None
