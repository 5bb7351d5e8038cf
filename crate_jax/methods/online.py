"""A linear classifier that a run trains beside its encoder, on features through which no gradient flows.

Solo-learn's tables report the accuracy of such a classifier. It has its own optimiser, SGD with momentum and without
decay, so that neither its gradient nor its weights touch the method's clipping, penalty and weight decay.

Shapes: B batch, D width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax.methods.method import Progress, Scalars, batch_factor
from crate_jax.validation import IF_FITS, RECORDED, Key, Section, at_least, one_of, within

State = dict[str, Any]


def init(width: int, classes: int) -> State:
    """The classifier of step 0: zeros."""
    weights = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    return {**weights, "trace": jax.tree.map(jnp.zeros_like, weights), "rate": jnp.ones(())}


def loss(weights: State, features: Sequence[jax.Array], label_B: jax.Array) -> tuple[jax.Array, Scalars]:
    """The cross entropy of the classifier, as a mean over views and labelled images, and the scalars to log.

    Args:
      weights: ``kernel`` (D, C) and ``bias`` (C,).
      features: for each view (B, D) float32.
      label_B: the images' classes; -1: without a label, the image is left out.

    Returns:
      The loss, 0 if no image has a label, and ``online_loss``, ``online_top1``, ``online_top5`` (shares in 0..1).
    """
    known_B = label_B >= 0
    count = jnp.maximum(jnp.sum(known_B), 1)
    losses, hits = [], []  # per view
    for x_BD in features:
        logits_BC = jax.lax.stop_gradient(x_BD) @ weights["kernel"] + weights["bias"]
        own_B = jnp.take_along_axis(logits_BC, jnp.maximum(label_B, 0)[:, None], 1)
        losses.append(jnp.sum(jnp.where(known_B, jax.nn.logsumexp(logits_BC, axis=1) - own_B[:, 0], 0.0)) / count)
        # Of equal scores the first one wins, as in an argmax; a score that is not a number is a miss.
        before_BC = jnp.arange(logits_BC.shape[1]) < label_B[:, None]
        rank_B = jnp.sum((logits_BC > own_B) | ((logits_BC == own_B) & before_BC), axis=1)
        known_B &= jnp.all(jnp.isfinite(logits_BC), axis=1)
        hits.append(jnp.stack([jnp.sum(known_B & (rank_B < k)) / count for k in (1, 5)]))
    value = jnp.mean(jnp.stack(losses))
    top1, top5 = jnp.mean(jnp.stack(hits), axis=0)
    return value, {"online_loss": value, "online_top1": top1, "online_top5": top5}


def step(state: State, features: Sequence[jax.Array], label_B: jax.Array, config: ConfigDict) -> tuple[State, Scalars]:
    """One update of the classifier; arguments as in :func:`loss`, `config` is the whole configuration."""
    options = config.online
    lr = options.lr * batch_factor(config)
    weights = {name: state[name] for name in ("kernel", "bias")}
    grads, scalars = jax.grad(loss, has_aux=True)(weights, features, label_B)
    trace = jax.tree.map(lambda b, g: options.momentum * b + g, state["trace"], grads)
    weights = optax.apply_updates(weights, jax.tree.map(lambda b: -lr * state["rate"] * b, trace))
    return {**weights, "trace": trace, "rate": state["rate"]}, scalars


def after(state: State, options: ConfigDict, progress: Progress) -> State:
    """Sets the rate of the next update, as a share of config.online.lr."""
    if options.schedule == "constant":
        return state
    rate = (1 + jnp.cos(jnp.pi * (progress.done + 1) / progress.total)) / 2
    return {**state, "rate": rate.astype(jnp.float32)}


ONLINE = Section(
    "online",
    "A linear classifier that joint-embedding methods train on features without touching the encoder.",
    of_the_run=True,
    resume=RECORDED,
    keys=dict(
        lr=Key(
            0.1, at_least(0), "learning rate of SGD, per `optimizer.lr_batch` images; 0: no classifier", resume=IF_FITS
        ),
        momentum=Key(0.9, within(0, 1, "[)"), "decay of the sum of its gradients"),
        schedule=Key("cosine", one_of("cosine", "constant"), "how its rate falls over the run"),
    ),
)
