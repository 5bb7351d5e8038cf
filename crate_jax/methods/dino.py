"""DINO (Caron et al., arXiv 2104.14294), eq. 1 to 4: the student predicts the teacher's distribution over prototypes.

With s the student's and t the teacher's dot products of unit projections with K prototypes, c the centre:

    loss = mean over large views a and all other views b of - sum_k q_a log softmax(s_b / T_s)
    q_a = softmax((t_a - c) / T_t),   then c <- m c + (1 - m) mean of t over both views and the global batch

T_t rises with the epoch from warm_temperature to temperature. The last layer is held in the first epochs. With small
views every view predicts both large ones, as in the paper; solo-learn takes two views only. The loss is log K while
all distributions are uniform: then the teacher is not sharp enough, or the rate too high. What the paper's recipe
needs besides: optimizer.weight_decay_end, clip_each with clip_each_include=("encoder/.*",) for solo-learn's clipping.

Shapes: B batch, P width of the projections, K prototypes.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Params, Progress, Scalars
from crate_jax.models.projector import MLP
from crate_jax.models.prototypes import Prototypes
from crate_jax.validation import IF_FITS, RECORDED, Key, Section, anything, at_least, positive, within


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """DINO of a validated config, for features of this width."""
    o, options = config.joint, config.dino
    mlp = MLP(
        (o.hidden, o.hidden, o.out),
        norm=options.batch_norm,
        activation=functools.partial(nn.gelu, approximate=False),
        dtype=config.dtype,
        kernel_init=nn.initializers.normal(0.02),  # torch's trunc_normal_(std=0.02) cuts at a hundred deviations
    )
    last = Prototypes(options.prototypes, lengths=not options.norm_last_layer)

    def state(key: jax.Array) -> Own:
        return {"centre": jnp.zeros(options.prototypes), "temperature": teacher_temperature(options, jnp.int32(0))}

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        students = step.student("prototypes", list(map(joint.unit, projected)))
        teachers = step.target("prototypes", list(map(joint.unit, step.target("projector", step.target_features))))
        centre_K, T = step.own["centre"], step.own["temperature"]
        targets = [jax.nn.softmax((t - centre_K) / T) for t in teachers]
        logs = [jax.nn.log_softmax(s / options.student_temperature) for s in students]
        terms = [-jnp.mean(jnp.sum(q * log, -1)) for a, q in enumerate(targets) for b, log in enumerate(logs) if a != b]
        mean_K = jnp.mean(jnp.stack([jnp.mean(t, 0) for t in teachers]), 0)
        own = {**step.own, "centre": options.centre * centre_K + (1 - options.centre) * mean_K}
        entropy = jnp.mean(jnp.stack([jnp.mean(jnp.sum(jax.scipy.special.entr(q), -1)) for q in targets]))
        return jnp.mean(jnp.stack(terms)), own, {"teacher_entropy": entropy, "z_std": joint.spread(projected)}

    def after(params: Params, own: Own, progress: Progress) -> tuple[Params, Own]:
        return params, {**own, "temperature": teacher_temperature(options, progress.epochs(progress.done + 1))}

    return Algorithm(
        {"projector": (mlp, width), "prototypes": (last, o.out)},
        loss,
        target=("encoder", "projector", "prototypes"),
        state=state,
        after=after,
        held=((r"prototypes/.*", options.hold_epochs),) if options.hold_epochs else (),
        small_views=True,
    )


def teacher_temperature(options: ConfigDict, epoch: jax.Array) -> jax.Array:
    """T_t of an epoch, float32: from warm_temperature in the first epoch to temperature in the last warm one."""
    share = jnp.minimum(epoch / max(options.warm_epochs - 1, 1), 1.0)
    warm = options.warm_temperature + (options.temperature - options.warm_temperature) * share
    return jnp.where(epoch < options.warm_epochs, warm, options.temperature).astype(jnp.float32)


DINO = Section(
    "dino",
    "Method dino.",
    of_the_run=True,
    keys=dict(
        prototypes=Key(4096, positive, "width of the last layer; 65536 in the paper"),
        student_temperature=Key(0.1, positive, "what the student's dot products are divided by", resume=RECORDED),
        temperature=Key(0.07, positive, "what the teacher's dot products are divided by", resume=RECORDED),
        warm_temperature=Key(0.04, positive, "the same in the first epoch, if there are warm epochs", resume=RECORDED),
        warm_epochs=Key(
            0, at_least(0), "epochs in which the teacher's temperature goes from the one to the other", resume=RECORDED
        ),
        centre=Key(0.9, within(0, 1), "share of the centre that an update keeps", resume=RECORDED),
        norm_last_layer=Key(True, anything, "the prototypes' lengths are 1; else they are trained too"),
        batch_norm=Key(False, anything, "batch norm in the projector"),
        hold_epochs=Key(1.0, at_least(0), "epochs at the start in which the last layer gets no update", resume=IF_FITS),
    ),
)
