"""The learning-rate schedule and the optimisers, as optax transformations.

Weight decay acts on parameters with two axes or more, not counting the layer axis of stacked blocks; with
``config.optimizer.decay_vectors`` it acts on all. It does not act on parameters that ``config.optimizer.decay_exclude``
matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.methods.method import batch_factor
from crate_jax.parallel import parameters
from crate_jax.training.groups import Group, by_group, groups, without_held
from crate_jax.validation import (
    FIXED,
    IF_FITS,
    MAX_WHOLE,
    RECORDED,
    Key,
    Section,
    anything,
    at_least,
    one_of,
    patterns,
    positive,
    within,
)

ADAM_EPS = 1e-8  # PyTorch's default, which the recipes do not change
LARS_EPS = 1e-8  # solo-learn's default, which the recipes do not change
CLIP_EPS = 1e-6  # added to a norm before the division, as in DINO's code
DECAY_EXCLUDE = (r".*(cls_token|mask_token|positions|relative_bias)",)
Mask = Callable[[Any], Any]  # tree -> tree of booleans
Decay = float | Callable[[Any], Any]  # a number, or a function of the step


def schedule(config: ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the function step -> learning rate: a linear warm-up, then config.optimizer.schedule.

    The update number `step`, from 0, uses the rate of `step`: the first update uses warmup_lr, the rate is at its peak
    lr at step = warm-up steps, and a cosine or linear schedule ends with min_lr at `total_steps`. All rates are
    multiplied by batch_size / lr_batch unless lr_batch is 0.

    With config.optimizer.warmup_peak="last" the warm-up's last update has the peak already, and the update after it has
    the peak again, as in solo-learn (LinearWarmupCosineAnnealingLR). There a warm-up of 7.5 steps rises above the peak,
    and the rate stays too high; here a warm-up is a whole number of steps.

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
    asked = options.warmup_epochs * steps_per_epoch + options.warmup_share * total_steps
    warmup = options.warmup_steps or round(min(asked, MAX_WHOLE + 1))  # `asked` may be infinite
    if warmup > total_steps:
        key = "warmup_steps" if options.warmup_steps else "warmup_epochs"
        tenth = total_steps // 10 if options.warmup_steps else float(f"{total_steps / steps_per_epoch / 10:.1g}")
        takes = warmup if warmup <= MAX_WHOLE else f"more than {MAX_WHOLE}"
        raise ConfigError(
            f"config.optimizer.{key}={options[key]}: the warm-up takes {takes} steps, the run has only {total_steps}; "
            f"a tenth of the run is --config.optimizer.{key}={tenth}"
        )
    for key in ("warmup_lr", "min_lr"):
        if options[key] > options.lr:
            raise ConfigError(
                f"config.optimizer.{key}={options[key]}: must not exceed config.optimizer.lr={options.lr}"
            )
    factor = batch_factor(config)
    start, peak, end = (factor * value for value in (options.warmup_lr, options.lr, options.min_lr))
    if options.schedule == "constant":
        end = peak
    rises = warmup - (options.warmup_peak == "last")  # from the first rate to the peak

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        rising = start + (peak - start) * t / max(rises, 1)
        progress = jnp.clip((t - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        remaining = 1 - progress if options.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        falling = end + (peak - end) * remaining
        return jnp.where(t < warmup, rising, falling)

    return learning_rate


def decay_schedule(config: ConfigDict, total_steps: int) -> Decay:
    """Weight decay over the run: config.optimizer.weight_decay, or a cosine from there to weight_decay_end."""
    start, end = config.optimizer.weight_decay, config.optimizer.weight_decay_end
    if not end:
        return start

    def decay(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.minimum(jnp.asarray(step, jnp.float32) / total_steps, 1.0)
        return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return decay


def decayed(config: ConfigDict, params: Any) -> tuple[str, ...]:
    """Returns the names of the parameters under weight decay.

    Raises:
      ConfigError: a pattern of config.optimizer.decay_exclude matches no parameter, and is not the default, which an
        encoder without tokens and tables of positions does not need.
    """
    given = tuple(config.optimizer.decay_exclude)
    needless = given == DECAY_EXCLUDE and not any(re.fullmatch(given[0], name) for name in parameters.names(params))
    excluded = set() if needless else set(parameters.match(params, given, "optimizer.decay_exclude"))
    return tuple(
        name
        for name, leaf in parameters.names(params).items()
        if name not in excluded and (config.optimizer.decay_vectors or parameters.unstacked_ndim(name, leaf) >= 2)
    )


def clip_each_by_norm(largest: float, names: Collection[str]) -> optax.GradientTransformation:
    """Scales each gradient g of the named weights by min(1, largest / (|g| + CLIP_EPS)), one norm per layer: DINO's."""

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(largest / (optax.tree.norm(g) + CLIP_EPS), 1.0)

    def leaf(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
        name = parameters.path_name(path)
        if name not in names:
            return g
        return (jax.vmap(clip) if parameters.is_stacked(name) else clip)(g)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(leaf, updates))


def _by_layer(scale: Callable[[jax.Array, jax.Array], jax.Array], updates: Any, params: Any) -> Any:
    """Applies (update, parameter) -> update to every parameter, and to a stacked one (L, ...) layer by layer.

    Raises:
      ValueError: `params` is None.
    """
    if params is None:
        raise ValueError("the trust ratio needs the parameters: call update(updates, state, params)")

    def leaf(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        stacked = parameters.is_stacked(parameters.path_name(path))
        return (jax.vmap(scale) if stacked else scale)(update, param)

    return jax.tree_util.tree_map_with_path(leaf, updates, params)


def scale_by_layer_trust_ratio(trust_coefficient: float) -> optax.GradientTransformation:
    """optax.scale_by_trust_ratio with one ratio per layer: a stacked parameter (L, ...) has L ratios."""
    one = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        return one.update(update, optax.EmptyState(), param)[0]

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return _by_layer(scale, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def scale_by_decayed_trust_ratio(
    trust_coefficient: float, weight_decay: Decay, clip: optax.Schedule | None
) -> optax.GradientTransformation:
    """Replaces a gradient g by r (g + d w), r = c |w| / (|g| + d |w| + eps) with one r per layer: solo-learn's LARS.

    :func:`scale_by_layer_trust_ratio` after optax.add_decayed_weights is not the same: it divides by |g + d w|, and it
    decays a weight whose gradient is all 0. Here g stays as it is where w or g is all 0.

    Args:
      trust_coefficient: c.
      weight_decay: d.
      clip: the learning rate: r becomes min(r / rate, 1), so that r times the rate, which is applied later, is
        min(r, rate). None: r is not clipped.
    """

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        d = weight_decay(state.count) if callable(weight_decay) else weight_decay

        def scale(g: jax.Array, w: jax.Array) -> jax.Array:
            size, slope = optax.tree.norm(w), optax.tree.norm(g)
            ratio = trust_coefficient * size / (slope + d * size + LARS_EPS)
            if clip is not None:
                ratio = jnp.minimum(ratio / clip(state.count), 1.0)  # a rate of 0 makes it 1
            return jnp.where((size > 0) & (slope > 0), ratio.astype(g.dtype) * (g + d * w), g)

        return _by_layer(scale, updates, params), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def _adamw(
    options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask
) -> optax.GradientTransformation:
    """AdamW as in torch.optim: the decay is decoupled from the gradient and multiplied by the learning rate."""
    return optax.adamw(learning_rate, options.b1, options.b2, eps=ADAM_EPS, weight_decay=decay, mask=mask)


def _adam(options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask) -> optax.GradientTransformation:
    """Adam as in torch.optim: the decay is added to the gradient, and so enters both moments."""
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.adam(learning_rate, options.b1, options.b2, eps=ADAM_EPS),
    )


def _sgd(options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask) -> optax.GradientTransformation:
    """SGD as in torch.optim, without dampening: the decay is added to the gradient, the rate applied after momentum."""
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.sgd(learning_rate, options.momentum or None, options.nesterov),
    )


def _lars(options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask) -> optax.GradientTransformation:
    """LARS (You et al., arXiv 1708.03888) as in optax.lars, but with one trust ratio per layer.

    Parameters outside the mask have neither decay nor trust ratio: for them LARS is SGD with momentum. As in the paper,
    the momentum sums steps that are already multiplied by the learning rate.
    """
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.masked(scale_by_layer_trust_ratio(options.trust_coefficient), mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(options.momentum),
    )


def _lars_torch(
    options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask
) -> optax.GradientTransformation:
    """LARS as in solo-learn's PyTorch code (solo/utils/lars.py), for its joint-embedding recipes.

    Three things differ from :func:`_lars`. The learning rate is applied after the momentum, as in torch.optim.SGD, so
    that a new rate also acts on what the momentum holds; Nesterov's momentum is possible. The trust ratio is that of
    :func:`scale_by_decayed_trust_ratio`, and a weight whose gradient is 0 is not decayed. config.optimizer.clip_lr
    clips the ratio.
    """
    clip = learning_rate if options.clip_lr else None
    ratio = scale_by_decayed_trust_ratio(options.trust_coefficient, decay, clip)
    return optax.chain(optax.masked(ratio, mask), optax.sgd(learning_rate, options.momentum or None, options.nesterov))


def _lion(options: ConfigDict, learning_rate: optax.Schedule, decay: Decay, mask: Mask) -> optax.GradientTransformation:
    """Lion (Chen et al., arXiv 2302.06675)."""
    return optax.lion(learning_rate, options.b1, options.b2, weight_decay=decay, mask=mask)


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


OPTIMIZERS = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "lars": _lars,
    "lars_torch": _lars_torch,
    "lion": _lion,
}


def build(
    config: ConfigDict,
    params: Any,
    total_steps: int,
    steps_per_epoch: float,
    frozen: bool = False,
    held: Iterable[tuple[str, float]] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds gradient clipping, the optimiser and its schedule, as config.optimizer says.

    Args:
      config: the whole configuration.
      params: the parameter tree, or its shapes from jax.eval_shape.
      total_steps: optimiser steps of the run.
      steps_per_epoch: optimiser steps per pass over the data.
      frozen: whether the encoder gets no update.
      held: weights without update, decay and state in the first epochs, as in `Method.held`.

    Returns:
      the transformation, whose state has the parameters' dtype (float32), and the schedule.

    Raises:
      ConfigError: see :func:`schedule`, :func:`decayed`, :func:`groups` and :func:`scale_by_layer`, or a pattern of
        config.optimizer.clip_each_include matches no parameter.
    """
    options = config.optimizer
    learning_rate, decay = schedule(config, total_steps, steps_per_epoch), decay_schedule(config, total_steps)
    peak = batch_factor(config) * options.lr
    selected = frozenset(decayed(config, params))
    of = groups(config, params, steps_per_epoch, held)

    def make(group: Group) -> optax.GradientTransformation:
        rate = (lambda _: jnp.float32(peak)) if group.constant else _later(learning_rate, group.still)
        rate = rate if group.scale == 1 else _times(group.scale, rate)
        mask = lambda tree: parameters.mask(tree, selected)  # noqa: E731
        return OPTIMIZERS[options.name](options, rate, _later(decay, group.still), mask)

    optimizer = by_group(of, make)
    if options.layer_decay < 1 or frozen:
        optimizer = optax.chain(optimizer, scale_by_layer(params, options.layer_decay, frozen))
    if options.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
        if frozen or any(group.still for group in of.values()):
            optimizer = without_held(optimizer, of, frozen)
    if options.clip_each > 0:
        clipped = frozenset(parameters.match(params, options.clip_each_include, "optimizer.clip_each_include"))
        optimizer = optax.chain(clip_each_by_norm(options.clip_each, clipped), optimizer)
    return optimizer, learning_rate


def _times(factor: float, rate: optax.Schedule) -> optax.Schedule:
    return lambda step: factor * rate(step)


def _later(value: Any, steps: int) -> Any:
    """A function of the step, as one that counts its steps from `steps` on sees it; a number stays as it is."""
    return (lambda step: value(step + steps)) if steps and callable(value) else value


def _check_optimizer(c: ConfigDict) -> None:
    if sum(map(bool, (c.optimizer.warmup_steps, c.optimizer.warmup_epochs, c.optimizer.warmup_share))) > 1:
        raise ConfigError("config.optimizer: set only one of warmup_steps, warmup_epochs and warmup_share")
    if c.optimizer.nesterov and c.optimizer.name in NESTEROV and not c.optimizer.momentum:
        raise ConfigError("config.optimizer.nesterov=True: needs config.optimizer.momentum above 0")


BETAS, LARS = ("optimizer.name", "adamw", "adam", "lion"), ("optimizer.name", "lars", "lars_torch")
LARS_TORCH, NESTEROV = ("optimizer.name", "lars_torch"), ("optimizer.name", "sgd", "lars_torch")

OPTIMIZER = Section(
    "optimizer",
    "How the weights are updated, and the learning rate over the run.",
    of_the_run=True,
    resume=RECORDED,
    check=_check_optimizer,
    keys=dict(
        name=Key("adamw", one_of(*OPTIMIZERS), "optimiser", resume=FIXED),
        lr=Key(1.5e-4, positive, "peak learning rate, per `lr_batch` images"),
        lr_batch=Key(
            256, at_least(0), "lr, warmup_lr, min_lr are multiplied by batch_size / lr_batch; 0: not multiplied"
        ),
        warmup_epochs=Key(0.0, at_least(0), "length of the linear warm-up in epochs"),
        warmup_steps=Key(0, at_least(0), "length of the linear warm-up in steps"),
        warmup_share=Key(0.0, within(0, 1), "length of the linear warm-up as a share of the run's steps"),
        warmup_lr=Key(0.0, at_least(0), "rate at the start of the warm-up"),
        min_lr=Key(0.0, at_least(0), "rate at the end of the schedule"),
        warmup_peak=Key("after", one_of("after", "last"), "first update at the peak: after the warm-up, or its last"),
        schedule=Key("cosine", one_of("cosine", "linear", "constant"), "how the rate falls after the warm-up"),
        b1=Key(0.9, within(0, 1, "[)"), "decay of the gradient's mean", read_by=BETAS),
        b2=Key(
            0.95,
            within(0, 1, "[)"),
            "adamw, adam: decay of the squared gradient's mean; lion: of the momentum",
            read_by=BETAS,
        ),
        momentum=Key(0.9, within(0, 1, "[)"), "decay of the sum of updates", read_by=(*LARS, "sgd"), resume=IF_FITS),
        nesterov=Key(False, anything, "the step adds the gradient to momentum times its sum", read_by=NESTEROV),
        trust_coefficient=Key(0.001, positive, "norm of an update over the norm of its weight", read_by=LARS),
        clip_lr=Key(False, anything, "trust ratio divided by the learning rate is at most 1", read_by=LARS_TORCH),
        weight_decay=Key(
            0.05, at_least(0), "share of a weight taken off per update, times the learning rate; adam: in the gradient"
        ),
        weight_decay_end=Key(
            0.0,
            at_least(0),
            "weight_decay of the last update, to which it goes by a cosine; 0: it stays",
            resume=IF_FITS,
        ),
        constant_lr=Key(
            (),
            patterns,
            "names of weights whose rate is always lr: without warm-up, decay of the rate",
            items=str,
            resume=IF_FITS,
        ),
        scaled_lr=Key(
            (), patterns, "names of weights whose rate is multiplied by scaled_lr_by", items=str, resume=IF_FITS
        ),
        scaled_lr_by=Key(0.1, positive, "the factor on the rate of the weights of scaled_lr", resume=IF_FITS),
        layer_decay=Key(
            1.0, within(0, 1, "(]"), "factor on the learning rate per layer below the head", resume=IF_FITS
        ),
        decay_exclude=Key(DECAY_EXCLUDE, patterns, "names of weights without decay; see decay_vectors"),
        decay_vectors=Key(False, anything, "1-D weights have decay too, and with LARS a trust ratio"),
        clip_norm=Key(0.0, at_least(0), "largest norm of the whole gradient; 0: off", resume=IF_FITS),
        clip_each=Key(
            0.0, at_least(0), "largest norm of each weight's gradient, before all else; 0: off", resume=IF_FITS
        ),
        clip_each_include=Key((r".*",), patterns, "names of the weights that clip_each acts on"),
        ema=Key(
            0.0,
            within(0, 1, "[)"),
            "decay of the weights' moving average, which evaluations use; 0: off",
            resume=IF_FITS,
        ),
    ),
)
