"""The learning-rate schedule and the optimisers, as optax transformations.

Weight decay acts on parameters with two axes or more, not counting the layer axis of stacked blocks. It does not act on
parameters that ``config.optimizer.decay_exclude`` matches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.parallel import parameters
from crate_jax.validation import Key, Section, anything, at_least, one_of, patterns, positive, within

ADAM_EPS = 1e-8  # PyTorch's default, which the recipes do not change
Mask = Callable[[Any], Any]  # tree -> tree of booleans


def schedule(config: ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the function step -> learning rate: a linear warm-up, then config.optimizer.schedule.

    The update number `step`, from 0, uses the rate of `step`: the first update uses warmup_lr, the rate is at its peak
    lr at step = warm-up steps, and a cosine or linear schedule ends with min_lr at `total_steps`. All rates are
    multiplied by batch_size / lr_batch unless lr_batch is 0.

    Args:
      config: the whole configuration.
      total_steps: optimiser steps of the run.
      steps_per_epoch: optimiser steps per pass over the data; needed for warmup_epochs.

    Returns:
      the function from an integer scalar to a float32 scalar.

    Raises:
      ConfigError: the warm-up is longer than the run, or starts or ends above the peak.
    """
    options = config.optimizer
    warmup = options.warmup_steps or round(options.warmup_epochs * steps_per_epoch)
    if warmup > total_steps:
        key = "warmup_steps" if options.warmup_steps else "warmup_epochs"
        raise ConfigError(
            f"config.optimizer.{key}={options[key]}: the warm-up takes {warmup} steps, the run has only {total_steps}"
        )
    for key in ("warmup_lr", "min_lr"):
        if options[key] > options.lr:
            raise ConfigError(
                f"config.optimizer.{key}={options[key]}: must not exceed config.optimizer.lr={options.lr}"
            )
    scale = config.batch_size / options.lr_batch if options.lr_batch else 1.0
    start, peak, end = (scale * value for value in (options.warmup_lr, options.lr, options.min_lr))
    if options.schedule == "constant":
        end = peak

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        rising = start + (peak - start) * t / max(warmup, 1)
        progress = jnp.clip((t - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        remaining = 1 - progress if options.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        falling = end + (peak - end) * remaining
        return jnp.where(t < warmup, rising, falling)

    return learning_rate


def decayed(config: ConfigDict, params: Any) -> tuple[str, ...]:
    """Returns the names of the parameters under weight decay.

    Raises:
      ConfigError: a pattern of config.optimizer.decay_exclude matches no parameter.
    """
    excluded = set(parameters.match(params, config.optimizer.decay_exclude, "optimizer.decay_exclude"))
    return tuple(
        name
        for name, leaf in parameters.names(params).items()
        if parameters.unstacked_ndim(name, leaf) >= 2 and name not in excluded
    )


def scale_by_layer_trust_ratio(trust_coefficient: float) -> optax.GradientTransformation:
    """optax.scale_by_trust_ratio with one ratio per layer: a stacked parameter (L, ...) has L ratios."""
    one = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        return one.update(update, optax.EmptyState(), param)[0]

    def leaf(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        stacked = parameters.is_stacked(parameters.path_name(path))
        return (jax.vmap(scale) if stacked else scale)(update, param)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("the trust ratio needs the parameters: call update(updates, state, params)")
        return jax.tree_util.tree_map_with_path(leaf, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _adamw(options: ConfigDict, learning_rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """AdamW as in torch.optim: the decay is decoupled from the gradient and multiplied by the learning rate."""
    return optax.adamw(
        learning_rate, options.b1, options.b2, eps=ADAM_EPS, weight_decay=options.weight_decay, mask=mask
    )


def _lars(options: ConfigDict, learning_rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """LARS (You et al., arXiv 1708.03888) as in optax.lars, but with one trust ratio per layer.

    Parameters outside the mask have neither decay nor trust ratio: for them LARS is SGD with momentum. As in the paper,
    the momentum sums steps that are already multiplied by the learning rate.
    """
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.masked(scale_by_layer_trust_ratio(options.trust_coefficient), mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(options.momentum),
    )


def _lion(options: ConfigDict, learning_rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """Lion (Chen et al., arXiv 2302.06675)."""
    return optax.lion(learning_rate, options.b1, options.b2, weight_decay=options.weight_decay, mask=mask)


def scale_by_layer(params: Any, decay: float, freeze: bool) -> optax.GradientTransformation:
    """Multiplies updates by decay ** (number of layers above): layer-wise learning rates (BEiT, MAE's fine-tuning).

    In an encoder of L blocks the embedding is layer 0 and block l, from 0, is layer l + 1. The encoder's last norm, a
    relative bias that all blocks share and the head are layer L + 1, which has the full rate.

    Args:
      params: the parameter tree, or its shapes.
      decay: the factor per layer.
      freeze: whether the encoder gets no update at all.

    Raises:
      ConfigError: the encoder is not frozen, and it has no stack of blocks whose leading axis would be L.
    """
    leaves = parameters.names(params)
    stacked = (name for name in leaves if name.startswith("encoder/") and parameters.is_stacked(name))
    depth = max((leaves[name].shape[0] for name in stacked), default=0)
    if not depth and not freeze:
        raise ConfigError(
            f"config.optimizer.layer_decay={decay}: this encoder has no stack of blocks to count layers in; set it to 1"
        )

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        name = parameters.path_name(path)
        if not name.startswith("encoder/") or name.startswith(("encoder/norm/", "encoder/relative_bias")):
            return update * float(not (freeze and name.startswith("encoder/")))
        if freeze:
            return jnp.zeros_like(update)
        if not parameters.is_stacked(name):
            return update * decay ** (depth + 1)
        factors = np.float32(decay) ** np.arange(depth, 0, -1, dtype=np.float32)
        return update * factors.reshape(-1, *[1] * (update.ndim - 1))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def updates_done(opt_state: Any) -> jax.Array:
    """The number of updates that the optimiser has made, int32 scalar: the schedule's present step."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return next(x.count for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x))


OPTIMIZERS = {"adamw": _adamw, "lars": _lars, "lion": _lion}


def build(
    config: ConfigDict, params: Any, total_steps: int, steps_per_epoch: float, frozen: bool = False
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds gradient clipping, the optimiser and its schedule, as config.optimizer says.

    Args:
      config: the whole configuration.
      params: the parameter tree, or its shapes from jax.eval_shape.
      total_steps: optimiser steps of the run.
      steps_per_epoch: optimiser steps per pass over the data.
      frozen: whether the encoder gets no update.

    Returns:
      the transformation, whose state has the parameters' dtype (float32), and the schedule.

    Raises:
      ConfigError: see :func:`schedule`, :func:`decayed` and :func:`scale_by_layer`.
    """
    options = config.optimizer
    learning_rate = schedule(config, total_steps, steps_per_epoch)
    selected = frozenset(decayed(config, params))
    optimizer = OPTIMIZERS[options.name](options, learning_rate, lambda tree: parameters.mask(tree, selected))
    if options.layer_decay < 1 or frozen:
        optimizer = optax.chain(optimizer, scale_by_layer(params, options.layer_decay, frozen))
    if options.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    return optimizer, learning_rate


def _check_optimizer(c: ConfigDict) -> None:
    if c.optimizer.warmup_steps and c.optimizer.warmup_epochs:
        raise ConfigError("config.optimizer: set warmup_steps or warmup_epochs, not both")


BETAS, LARS = ("optimizer.name", "adamw", "lion"), ("optimizer.name", "lars")

OPTIMIZER = Section(
    "optimizer",
    "How the weights are updated, and the learning rate over the run.",
    of_the_run=True,
    check=_check_optimizer,
    keys=dict(
        name=Key("adamw", one_of(*OPTIMIZERS), "optimiser"),
        lr=Key(1.5e-4, positive, "peak learning rate, per `lr_batch` images"),
        lr_batch=Key(
            256, at_least(0), "lr, warmup_lr, min_lr are multiplied by batch_size / lr_batch; 0: not multiplied"
        ),
        warmup_epochs=Key(0.0, at_least(0), "length of the linear warm-up in epochs"),
        warmup_steps=Key(0, at_least(0), "length of the linear warm-up in steps"),
        warmup_lr=Key(0.0, at_least(0), "rate at the start of the warm-up"),
        min_lr=Key(0.0, at_least(0), "rate at the end of the schedule"),
        schedule=Key("cosine", one_of("cosine", "linear", "constant"), "how the rate falls after the warm-up"),
        b1=Key(0.9, within(0, 1, "[)"), "decay of the gradient's mean", read_by=BETAS),
        b2=Key(
            0.95,
            within(0, 1, "[)"),
            "adamw: decay of the squared gradient's mean; lion: of the momentum",
            read_by=BETAS,
        ),
        momentum=Key(0.9, within(0, 1, "[)"), "decay of the sum of updates", read_by=LARS),
        trust_coefficient=Key(0.001, anything, "norm of an update over the norm of its weight", read_by=LARS),
        weight_decay=Key(0.05, at_least(0), "share of a weight taken off per update, times the learning rate"),
        layer_decay=Key(1.0, within(0, 1, "(]"), "factor on the learning rate per layer below the head"),
        decay_exclude=Key(
            (r".*(cls_token|mask_token|positions|relative_bias)",),
            patterns,
            "names of weights without decay; 1-D weights never have it",
        ),
        clip_norm=Key(0.0, at_least(0), "largest norm of the whole gradient; 0: off"),
        ema=Key(0.0, within(0, 1, "[)"), "decay of the weights' moving average, which evaluations use; 0: off"),
    ),
)
