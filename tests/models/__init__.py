"""Tests of models, and parameters for those that do not look at how a model is initialised."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.training import step as train_step


def drawn(init: Callable[[], dict]) -> dict:
    """Parameters with the names and shapes of `init()`; NumPy draws them: compiling the draws of JAX takes longer.

    Scales and variances are near one, all others near zero.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple[jax.tree_util.DictKey, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        around = 1.0 if path[-1].key in ("scale", "running_var") else 0.0
        return jnp.asarray(rng.normal(around, 0.1, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def drawn_on(config, method, recipe, mesh) -> Callable[..., tuple[dict, dict]]:
    """For `train_step.make_init`: parameters and what a method carries from `drawn`, laid out on the mesh."""
    shapes = train_step.state_shapes(config, method, recipe, mesh)
    place = jax.tree.map(lambda x: x.sharding, (shapes.params, shapes.carried))
    return lambda: jax.device_put(drawn(recipe.draw), place)
