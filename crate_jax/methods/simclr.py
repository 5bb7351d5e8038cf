"""SimCLR (Chen et al., arXiv 2002.05709), NT-Xent: the other views of an image against all views of other images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.methods import contrast, joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SimCLR of a validated config, for features of this width; views of the same image are positives."""
    o = config.joint

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        ids = jnp.tile(step.index, len(projected))
        return contrast.nt_xent(jnp.concatenate(projected), ids, o.temperature), {}, {"z_std": joint.spread(projected)}

    heads = {"projector": (MLP((o.hidden, o.out), norm=False, dtype=config.dtype), width)}
    return Algorithm(heads, loss, small_views=True)
