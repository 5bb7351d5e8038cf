"""Groups of weights whose rate differs from the schedule's, or that are held still at the start of a run.

Most weights follow the schedule. Those that ``config.optimizer.constant_lr`` matches have the peak rate all the time,
those of ``config.optimizer.scaled_lr`` a multiple of the rate. A method may hold weights still in its first epochs
(`Method.held`). Each group is updated as if it were alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax.parallel import parameters

FOREVER = 2**31 - 1  # updates


@dataclasses.dataclass(frozen=True)
class Group:
    """How a weight differs from those that follow the schedule from the first update on.

    Attributes:
      constant: whether its rate is the peak rate in every update.
      still: the number of updates at the start of the run in which it does not move; FOREVER: it never moves.
      scale: the factor on its rate.
    """

    constant: bool = False
    still: int = 0
    scale: float = 1.0

    def __str__(self) -> str:
        still = "still" if self.still == FOREVER else f"still for {self.still} steps" if self.still else ""
        scale = f"rate x {self.scale:g}" if self.scale != 1 else ""
        return ", ".join(filter(None, ("constant rate" if self.constant else "", scale, still)))


def groups(
    config: ConfigDict, params: Any, steps_per_epoch: float, held: Iterable[tuple[str, float]] = ()
) -> dict[str, Group]:
    """Returns the group of each parameter.

    Args:
      config: the whole configuration.
      params: the parameter tree, or its shapes.
      steps_per_epoch: optimiser steps per pass over the data.
      held: (pattern, epochs), as in `Method.held`; math.inf: for the whole run. A weight that several patterns match is
        held for the longest time.

    Raises:
      ConfigError: a pattern matches no parameter.
    """
    options = config.optimizer
    constant = set(parameters.match(params, options.constant_lr, "optimizer.constant_lr"))
    scaled = dict.fromkeys(parameters.match(params, options.scaled_lr, "optimizer.scaled_lr"), options.scaled_lr_by)
    still = dict.fromkeys(parameters.names(params), 0)
    for pattern, epochs in held:
        # Updates 0, 1, ... below epochs * steps_per_epoch.
        steps = FOREVER
        if not math.isinf(epochs):
            steps = math.ceil(min(round(epochs * steps_per_epoch, 6), FOREVER - 1))
        for name in parameters.match(params, [pattern], "method"):
            still[name] = max(still[name], steps)
    return {name: Group(name in constant, steps, scaled.get(name, 1.0)) for name, steps in still.items()}


def by_group(
    of: Mapping[str, Group], make: Callable[[Group], optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Updates each group of weights with a transformation of its own; the default group alone has no wrapper.

    A group that is held counts its updates from 0 when it is let go, as an optimiser of PyTorch does for a weight that
    had no gradient before.
    """
    different = sorted({group for group in of.values() if group != Group()}, key=dataclasses.astuple)
    if not different:
        return make(Group())
    label = {group: str(i) for i, group in enumerate([Group(), *different])}

    def held(group: Group) -> optax.GradientTransformation:
        if group.still == FOREVER:
            return optax.set_to_zero()
        tx = make(group)
        return optax.conditionally_mask(tx, lambda step: step >= group.still) if group.still else tx

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: label[of[parameters.path_name(path)]], tree)

    return optax.partition({name: held(group) for group, name in label.items()}, labels)


def without_held(
    tx: optax.GradientTransformation, of: Mapping[str, Group], frozen: bool
) -> optax.GradientTransformation:
    """`tx` with gradients of 0 for weights that are still, so that they do not count in the norm of the gradient.

    If `frozen` is true, the encoder is still: a penalty has gradients there, too.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        done = updates_done(state)

        def leaf(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
            name = parameters.path_name(path)
            if frozen and name.startswith("encoder/"):
                return jnp.zeros_like(g)
            still = of[name].still
            return jnp.where(done < still, jnp.zeros_like(g), g) if still else g

        return tx.update(jax.tree_util.tree_map_with_path(leaf, updates), state, params)

    return optax.GradientTransformation(tx.init, update)


def updates_done(opt_state: Any) -> jax.Array:
    """The number of updates that the optimiser has made, int32 scalar: the schedule's present step.

    Weights that were held have made fewer updates than the others.
    """
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    counts = [x.count for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x)]
    return functools.reduce(jnp.maximum, counts)
