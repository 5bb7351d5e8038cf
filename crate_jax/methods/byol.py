"""BYOL (Grill et al., arXiv 2006.07733), eq. 2: the student predicts the target's projection of the other view."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """BYOL of a validated config, for features of this width; with small views every view predicts both large ones."""
    o, dtype = config.joint, config.dtype
    heads = {
        "projector": (MLP((o.hidden, o.out), dtype=dtype), width),
        "predictor": (MLP((o.predictor_hidden, o.out), dtype=dtype), o.out),
    }
    return Algorithm(heads, loss, target=("encoder", "projector"), small_views=True)


def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
    """Sum over large views a and all other views b of 2 - 2 cos(p_b, z'_a), a sum of batch means as in the paper."""
    projected = step.student("projector", step.features)
    predicted = step.student("predictor", projected)
    targets = step.target("projector", step.target_features)
    terms = [
        (2 - 2 * joint.cosine(p, z)).mean() for a, z in enumerate(targets) for b, p in enumerate(predicted) if a != b
    ]
    return jnp.sum(jnp.stack(terms)), {}, {"z_std": joint.spread(projected)}
