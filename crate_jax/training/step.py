"""The training state and the one jitted step (loss, penalty, update) for every method, on any mesh.

All randomness of a step is a function of its number and config.seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.methods.method import Batch, Carried, Method, Params, Progress, Scalars
from crate_jax.parallel import sharding, target
from crate_jax.parallel.parameters import names, path_name
from crate_jax.training import groups, nonfinite, optimizer, orthogonality
from crate_jax.validation import MAX_WHOLE

# With several processes, each row of a batch holds the signal that its process got (0: none); the step's scalars hold
# the largest of them.
SIGNAL = "signal"

LossAndGrad = Callable[..., tuple[tuple[jax.Array, tuple[Carried, Scalars]], Params]]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: the number of optimiser steps done, int32 scalar.
      params: float32 parameters.
      carried: what the method carries from step to step; {} if it carries nothing.
      opt_state: the optimiser's state.
      penalty: the penalty's state, such as power-iteration vectors; {} if it has none.
      ema: the moving average of the parameters; None if config.optimizer.ema is 0.
      ema_carried: the moving averages of the entries of `carried` that `Method.averaged` selects; {} without `ema`.
    """

    step: jax.Array
    params: Params
    carried: Carried
    opt_state: optax.OptState
    penalty: orthogonality.State
    ema: Params | None
    ema_carried: Carried

    def judged(self, method: Method) -> Params:
        """The parameters that evaluations and pictures read."""
        return method.judged(self.params if self.ema is None else self.ema, {**self.carried, **self.ema_carried})

    def rest(self) -> dict[str, Any]:
        """All but the parameters, as a tree for a checkpoint; an empty entry adds nothing to the checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "params"}

    def judged_names(self, method: Method) -> dict[str, str]:
        """Where a checkpoint holds each array of :meth:`judged`, as ``params/NAME`` or ``rest/NAME``."""
        named = {"params": self.params, "rest": self.rest()}
        paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), named)
        return names(TrainState(params=paths["params"], **paths["rest"]).judged(method))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs besides the method.

    Attributes:
      tx: gradient clipping, optimiser and schedule.
      schedule: the function from the number of optimiser steps to the learning rate.
      penalty: the penalty on the parameters, for every method.
      total: optimiser steps of the run.
      per_epoch: optimiser steps per pass over the training images.
      draw: (start=None) -> :func:`init_params`. JAX traces it once per recipe, however many programs contain it.
    """

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    penalty: orthogonality.Penalty
    total: int
    per_epoch: float
    draw: Callable[..., tuple[Params, Carried]]


def total_steps(config: ConfigDict, images: int) -> tuple[int, float]:
    """Returns (optimiser steps of the run, optimiser steps per epoch) for a training set of `images`.

    Raises:
      ConfigError: config.epochs are more than MAX_WHOLE steps.

    >>> total_steps(ConfigDict({"steps": 0, "epochs": 3.0, "batch_size": 256}), images=1000)
    (12, 3.90625)
    """
    per_epoch = images / config.batch_size
    if not config.steps and config.epochs * per_epoch > MAX_WHOLE:
        raise ConfigError(
            f"config.epochs={config.epochs}: more than {MAX_WHOLE} steps of config.batch_size={config.batch_size}; "
            f"at most {MAX_WHOLE / per_epoch:.3g} epochs of {images} images"
        )
    return config.steps or max(1, round(config.epochs * per_epoch)), per_epoch


def make_recipe(config: ConfigDict, method: Method, images: int) -> Recipe:
    """The recipe of a validated config for a training set of `images`.

    Raises:
      ConfigError: the schedule does not fit the run, a pattern matches no parameter, or config.accumulate is above 1
        and the method's loss is not a mean over images, or config.encoder.norm_groups does not divide the batch.
    """
    if config.accumulate > 1 and not method.mean_over_images:
        method_too = f"config.method={config.method!r} and " if config.job == "pretrain" else ""
        raise ConfigError(
            f"config.accumulate={config.accumulate}: must be 1, since with {method_too}"
            f"config.encoder.name={config.encoder.name!r} the loss is not a mean over the images of a batch, and "
            "micro-batches would give another one; use more devices or a smaller config.batch_size"
        )
    if config.batch_size // config.accumulate % config.encoder.norm_groups:
        raise ConfigError(
            f"config.encoder.norm_groups={config.encoder.norm_groups}: must divide "
            f"config.batch_size={config.batch_size}"
        )
    total, per_epoch = total_steps(config, images)
    optimizer.schedule(config, total, per_epoch)  # a schedule that does not fit raises before the model is traced
    draw = jax.jit(functools.partial(init_params, config, method), inline=True)  # each program compiles as without jit
    shapes = jax.eval_shape(draw)[0]
    tx, schedule = optimizer.build(config, shapes, total, per_epoch, method.frozen, method.held)
    return Recipe(tx, schedule, orthogonality.build(config, shapes), total, per_epoch, draw)


def init_params(config: ConfigDict, method: Method, start: Params | None = None) -> tuple[Params, Carried]:
    """The method's first parameters and `carried`, a function of config.seed; `start` replaces random parameters."""
    params_key, _ = jax.random.split(jax.random.key(config.seed))
    return method.init(params_key, lambda drawn: drawn if start is None else start)


def drawn_params(config: ConfigDict, method: Method) -> Params:
    """The random parameters of config.seed that the method's `init` hands to `start`; they may hold statistics."""
    drawn: list[Params] = []

    def keep(params: Params) -> Params:
        drawn.append(params)
        return params

    method.init(jax.random.split(jax.random.key(config.seed))[0], keep)
    return drawn[0]


def completed(config: ConfigDict, method: Method, adopted: Params, mesh: Mesh) -> Params:
    """Parameters to start from, laid out on the mesh: those of `adopted`, and for its shapes the random ones.

    Only these are drawn, as :func:`drawn_params` would: a program for the encoder's too takes long to compile.

    Args:
      config: a validated config.
      method: the method to train.
      adopted: arrays, and a ShapeDtypeStruct for each array that is to be drawn.
      mesh: the devices.
    """
    leaves, tree = jax.tree.flatten(adopted)
    places = jax.tree.leaves(sharding.parameter_shardings(adopted, mesh))
    missing = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]

    def draw() -> list[jax.Array]:
        drawn = jax.tree.leaves(drawn_params(config, method))
        return [drawn[i] for i in missing]

    options = target.options_of_one_call(mesh)
    drawn = jax.jit(draw, out_shardings=[places[i] for i in missing], compiler_options=options)()
    for i, x in zip(missing, drawn, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(tree, [jax.device_put(x, place) for x, place in zip(leaves, places, strict=True)])


def init_state(config: ConfigDict, method: Method, recipe: Recipe) -> TrainState:
    """The state of step 0, a function of config.seed."""
    return first_state(config, method, recipe, *recipe.draw())


def first_state(config: ConfigDict, method: Method, recipe: Recipe, params: Params, carried: Carried) -> TrainState:
    """The state of step 0 with these parameters and this `carried`."""
    _, penalty_key = jax.random.split(jax.random.key(config.seed))
    averages = bool(config.optimizer.ema)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        carried=carried,
        opt_state=recipe.tx.init(params),
        penalty=recipe.penalty.init(penalty_key),
        ema=jax.tree.map(jnp.copy, params) if averages else None,
        ema_carried=jax.tree.map(jnp.copy, method.averaged(carried)) if averages else {},
    )


def state_shapes(config: ConfigDict, method: Method, recipe: Recipe, mesh: Mesh) -> TrainState:
    """The state as shapes and dtypes, with the places of the arrays on the mesh."""
    shapes = jax.eval_shape(functools.partial(init_state, config, method, recipe))
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, state_shardings(shapes, mesh)
    )


def make_draw(config: ConfigDict, method: Method, recipe: Recipe, mesh: Mesh) -> Callable[..., tuple[Params, Carried]]:
    """Returns the jitted function (start=None) -> :func:`init_params`, laid out on the mesh."""
    place = jax.tree.map(lambda x: x.sharding, state_shapes(config, method, recipe, mesh))
    return jax.jit(
        recipe.draw,
        out_shardings=(place.params, place.carried),
        compiler_options=target.options_of_one_call(mesh),
    )


def make_init(
    config: ConfigDict,
    method: Method,
    recipe: Recipe,
    mesh: Mesh,
    draw: Callable[..., tuple[Params, Carried]] | None = None,
) -> Callable[..., TrainState]:
    """Returns the function (start=None) -> :func:`init_state`, laid out on the mesh, in two compiled programs.

    Args:
      config: a validated config.
      method: the method to train.
      recipe: see :func:`make_recipe`.
      mesh: the devices.
      draw: the first program, of :func:`make_draw`, if the caller needs it too; None: it is made here.
    """
    draw = draw or make_draw(config, method, recipe, mesh)
    place = jax.tree.map(lambda x: x.sharding, state_shapes(config, method, recipe, mesh))

    def others(params: Params, carried: Carried) -> TrainState:
        state = first_state(config, method, recipe, params, carried)
        return dataclasses.replace(state, params={}, carried={})

    make_others = jax.jit(others, out_shardings=dataclasses.replace(place, params={}, carried={}))

    def init(start: Params | None = None) -> TrainState:
        params, carried = draw() if start is None else draw(start)
        return dataclasses.replace(make_others(params, carried), params=params, carried=carried)

    return init


def make_train_step(
    config: ConfigDict, method: Method, recipe: Recipe, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """Returns the jitted step (state, batch of `method.inputs`) -> (state, scalars); the step donates its state.

    With config.accumulate = A the step cuts the batch into A micro-batches and averages their gradients. Each image has
    its own random key and the penalty is computed once, so the update is that of the whole batch. With
    config.nonfinite.skip, a step that is not finite changes only the number of steps.

    Args:
      config: a validated config.
      method: the method to train.
      recipe: see :func:`make_recipe`.
      mesh: the devices.
    """
    loss_and_grad = accumulated(jax.value_and_grad(method.loss, has_aux=True), config.accumulate, mesh)
    penalty_and_grad = jax.value_and_grad(orthogonality.penalty_term(config, recipe.penalty), has_aux=True)
    order = sharding.row_order(mesh, config.batch_size)  # each image has the same key in every layout

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        inputs = {name: batch[name] for name in method.inputs}
        image_key, penalty_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        keys_B = jax.random.split(image_key, config.batch_size)
        keys_B = keys_B if order is None else keys_B[order]

        (loss, (carried, scalars)), grads = loss_and_grad(state.params, state.carried, inputs, keys_B)
        (extra, (penalty, penalty_scalars)), extra_grads = penalty_and_grad(state.params, state.penalty, penalty_key)
        grads = jax.tree.map(jnp.add, grads, extra_grads)
        grads = jax.lax.with_sharding_constraint(grads, sharding.update_shardings(grads, mesh))

        updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, carried = method.after(params, carried, Progress(state.step, recipe.total, recipe.per_epoch))
        ema, ema_carried = averaged(config, state, params, carried)

        new = TrainState(state.step + 1, params, carried, opt_state, penalty, ema, ema_carried)
        scalars = {
            "loss": loss + extra,
            **scalars,
            **penalty_scalars,
            "lr": recipe.schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            **({SIGNAL: jnp.max(batch[SIGNAL])} if SIGNAL in batch else {}),
        }
        if config.nonfinite.skip:
            scalars["lr"] = recipe.schedule(groups.updates_done(state.opt_state))
            old = dataclasses.replace(state, step=new.step)
            new, scalars[nonfinite.SKIPPED] = nonfinite.revert_if_nonfinite(scalars, new, old)
        return new, scalars

    place = jax.tree.map(lambda x: x.sharding, state_shapes(config, method, recipe, mesh))
    return jax.jit(
        sharding.on_mesh(mesh, train_step),
        donate_argnums=0,
        in_shardings=(place, sharding.split(mesh)),
        out_shardings=(place, sharding.replicated(mesh)),
        compiler_options=target.compiler_options(mesh),
    )


def accumulated(loss_and_grad: LossAndGrad, parts: int, mesh: Mesh) -> LossAndGrad:
    """Returns a function like `loss_and_grad` that cuts its batch into micro-batches and goes through them in turn.

    Loss, scalars and gradients are averaged over the micro-batches; `carried` goes from each one to the next.

    Args:
      loss_and_grad: the function (params, carried, batch, keys (B,)) -> ((loss, (carried, scalars)), gradients).
      parts: the number of micro-batches; 1: `loss_and_grad` itself is returned.
      mesh: the devices.
    """
    if parts == 1:
        return loss_and_grad

    def cut(x: jax.Array) -> jax.Array:  # interleaved, so that every device keeps its own rows
        return sharding.constrain_micro_batches(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), mesh)

    def whole(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[tuple[jax.Array, tuple[Carried, Scalars]], Params]:
        def add(so_far: tuple[Any, Carried], micro: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Carried], None]:
            total, carried = so_far
            (loss, (carried, scalars)), grads = loss_and_grad(params, carried, *micro)
            return (jax.tree.map(jnp.add, total, (loss, scalars, grads)), carried), None

        micro = jax.tree.map(cut, (batch, keys_B))
        (loss, (_, scalars)), grads = jax.eval_shape(
            loss_and_grad, params, carried, *jax.tree.map(lambda x: x[0], micro)
        )
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, scalars, grads))
        (total, carried), _ = jax.lax.scan(add, (zero, carried), micro)
        loss, scalars, grads = jax.tree.map(lambda x: x / parts, total)
        return (loss, (carried, scalars)), grads

    return whole


def averaged(config: ConfigDict, state: TrainState, params: Params, carried: Carried) -> tuple[Params | None, Carried]:
    """The moving averages after an update, of the parameters and of the averaged entries of `carried`."""
    if state.ema is None:
        return None, {}
    new = (params, {name: carried[name] for name in state.ema_carried})
    return optax.incremental_update(new, (state.ema, state.ema_carried), 1.0 - config.optimizer.ema)


def state_shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of a state (or of its shapes) lies.

    Arrays that the forward pass reads lie by the table `crate_jax.parallel.sharding.RULES`; the optimiser's state is
    split over all devices.
    """
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    by_rules = {name: getattr(shapes, name) for name in ("params", "carried", "ema", "ema_carried")}
    return whole.replace(
        **sharding.parameter_shardings(by_rules, mesh), opt_state=sharding.update_shardings(shapes.opt_state, mesh)
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or an infinity, a boolean scalar.

    >>> bool(all_finite({"a": jnp.zeros(2), "b": jnp.array([1.0, jnp.inf])}))
    False
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
