"""The training state and the one jitted step: loss, penalty, update, for every objective, on any mesh.

All randomness of a step is a function of its number and config.seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax.methods.method import Batch, Objective, Params, Scalars
from crate_jax.parallel import sharding, target
from crate_jax.training import nonfinite, optimizer

SIGNAL = "signal"  # in a batch of several processes: what signal each got, per row; in the scalars: the largest


@struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
      step: optimiser steps done, int32 scalar.
      params: float32 parameters.
      opt_state: the optimiser's.
      objective: what the objective carries along (power-iteration vectors, for one).
      ema: moving average of the parameters, or None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    objective: dict
    ema: Params | None

    def eval_params(self) -> Params:
        """The parameters that evaluations and pictures use."""
        return self.params if self.ema is None else self.ema

    def rest(self) -> dict[str, Any]:
        """All but the parameters, as a tree for a checkpoint."""
        return {"step": self.step, "opt_state": self.opt_state, "objective": self.objective, "ema": self.ema}


def init_state(
    config: ConfigDict, objective: Objective, tx: optax.GradientTransformation, params: Params | None = None
) -> TrainState:
    """The state of step 0, a function of config.seed; `params` replaces the random ones."""
    drawn, carried = objective.init(jax.random.key(config.seed))
    params = drawn if params is None else params
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), carried, ema)


def make_train_step(
    config: ConfigDict, objective: Objective, tx: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """The jitted step (state, batch of `objective.inputs`) -> (state, scalars); donates the state.

    With config.accumulate = A the batch is cut into A micro-batches whose gradients are averaged.
    Randomness is per image and the penalty is taken once, so the update is that of the whole batch.
    With config.nonfinite.skip a step that is not finite changes nothing but its number.
    """
    loss_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
    penalty_and_grad = jax.value_and_grad(objective.penalty, has_aux=True)
    A, decay = config.accumulate, config.optimizer.ema
    order = sharding.row_order(mesh, config.batch_size)  # a key goes with its image

    def averaged(params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, Scalars, Params]:
        if A == 1:
            (loss, scalars), grads = loss_and_grad(params, batch, keys_B)
            return loss, scalars, grads

        def micro_batches(x: jax.Array) -> jax.Array:  # interleaved: every device keeps its own rows
            return sharding.constrain_micro_batches(x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), mesh)

        def add(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, loss_and_grad(params, *micro)), None

        micro = jax.tree.map(micro_batches, (batch, keys_B))
        shapes = jax.eval_shape(loss_and_grad, params, *jax.tree.map(lambda x: x[0], micro))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (loss, scalars), grads = jax.tree.map(lambda x: x / A, jax.lax.scan(add, zero, micro)[0])
        return loss, scalars, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        batch = dict(batch)
        signal_B = batch.pop(SIGNAL, None)
        image_key, penalty_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        keys_B = jax.random.split(image_key, config.batch_size)
        loss, scalars, grads = averaged(state.params, batch, keys_B if order is None else keys_B[order])
        (penalty, (carried, penalty_scalars)), penalty_grads = penalty_and_grad(
            state.params, state.objective, penalty_key
        )
        grads = jax.tree.map(jnp.add, grads, penalty_grads)
        grads = jax.lax.with_sharding_constraint(grads, sharding.split_update(grads, mesh))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - decay)
        scalars = {
            "loss": loss + penalty,
            **scalars,
            **penalty_scalars,
            "lr": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            **({} if signal_B is None else {SIGNAL: jnp.max(signal_B)}),
        }
        new = TrainState(state.step + 1, params, opt_state, carried, ema)
        if config.nonfinite.skip:
            scalars["lr"] = schedule(optimizer.updates_done(state.opt_state))
            new, scalars[nonfinite.SKIPPED] = nonfinite.keep(scalars, new, dataclasses.replace(state, step=new.step))
        return new, scalars

    whole = sharding.replicated(mesh)
    state = state_shardings(jax.eval_shape(lambda: init_state(config, objective, tx)), mesh)
    return jax.jit(
        sharding.on_mesh(mesh, train_step),
        donate_argnums=0,
        in_shardings=(state, sharding.split(mesh)),
        out_shardings=(state, whole),
        compiler_options=target.compiler_options(mesh),
    )


def state_shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of a state (or of its shapes) lies: parameters by their rules, the optimiser's split."""
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    return whole.replace(
        params=sharding.of_parameters(shapes.params, mesh),
        ema=sharding.of_parameters(shapes.ema, mesh),
        opt_state=sharding.split_update(shapes.opt_state, mesh),
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
