"""Batch normalisation over the global batch, and the running statistics that modules keep.

Statistics are leaves of a network's parameters whose names begin with ``running_``, so that evaluations, exports and
``init_from`` read them without a second tree. Gradients do not train them: a method takes them out of its parameters
(:func:`split`), carries them, and puts them back where the network is applied (:func:`merge`).

Shapes: B batch, ... any number of axes over which statistics are taken, C channels, G groups of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

EPS = 1e-5  # as in PyTorch
MOMENTUM = 0.1  # share of the new statistics in the running ones, as in PyTorch
MOVED = "moved"  # the collection in which modules return their new statistics
PREFIX = "running_"

Tree = Mapping[str, Any]


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy, arXiv 1502.03167), with the statistics of PyTorch.

    In training it normalises with the mean and the biased variance of the batch, over all devices and processes, and
    moves the running statistics (with the unbiased variance) by MOMENTUM. Otherwise it normalises with the running
    statistics. Statistics are float32.

    Attributes:
      affine: whether there are a scale and a bias.
      dtype: type of the result.
    """

    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, groups_BG: jax.Array | None = None) -> jax.Array:
        """(B, ..., C) -> (B, ..., C).

        Args:
          x: the activations.
          train: whether the statistics are those of the batch.
          groups_BG: in training, 1.0 where an image belongs to a group, for groups of equal size; each group is
            normalised by itself, and the running statistics move by the mean over groups. None: one group.
        """
        C = x.shape[-1]
        running_mean = self.param("running_mean", nn.initializers.zeros, (C,))
        running_var = self.param("running_var", nn.initializers.ones, (C,))
        wide = x.astype(jnp.float32)
        if train:
            count = x.size // C // (1 if groups_BG is None else groups_BG.shape[1])
            mean = _mean(wide, groups_BG)
            var = _mean(jnp.square(wide - mean), groups_BG)
            unbiased = jnp.mean(var, tuple(range(x.ndim - 1))) * (count / max(count - 1, 1))
            new_mean = jnp.mean(mean, tuple(range(x.ndim - 1)))
            move(self, running_mean=(running_mean, new_mean), running_var=(running_var, unbiased))
        else:
            mean, var = running_mean, running_var
        factor = jax.lax.rsqrt(var + EPS)
        if not self.affine:
            return ((wide - mean) * factor).astype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        return ((wide - mean) * (factor * scale) + bias).astype(self.dtype)


def _mean(x: jax.Array, groups_BG: jax.Array | None) -> jax.Array:
    """Means over all axes but the last, of each image's group: (1 or B, 1, ..., C)."""
    if groups_BG is None:
        return jnp.mean(x, tuple(range(x.ndim - 1)), keepdims=True)
    mean_BC = jnp.mean(x, tuple(range(1, x.ndim - 1)))
    size = x.shape[0] // groups_BG.shape[1]
    mean_BC = groups_BG @ (groups_BG.T @ mean_BC / size)
    return mean_BC.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)


def move(module: nn.Module, **statistics: tuple[jax.Array, jax.Array]) -> None:
    """Returns new running statistics to :func:`train`: (1 - MOMENTUM) of the old and MOMENTUM of the batch's.

    Args:
      module: the module that declares the statistics.
      **statistics: for each name (the running value, the batch's value).
    """
    for name, (old, batch) in statistics.items():
        moved = (1 - MOMENTUM) * old + MOMENTUM * batch
        module.sow(MOVED, name, jax.lax.stop_gradient(moved), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def train(module: nn.Module, tree: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
    """Applies a module and returns its output and `tree` with the statistics that it moved.

    Args:
      module: a module; if it is called in training, it moves its statistics.
      tree: its parameters, with their statistics.
      *args: the arguments of the module.
      **kwargs: the module's keyword arguments.
    """
    output, state = module.apply({"params": tree}, *args, mutable=[MOVED], **kwargs)
    return output, merge(tree, state.get(MOVED, {}))


def split(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (what gradients train, the statistics) of a tree of parameters; the second is {} if there are none.

    >>> split({"norm": {"scale": 1, "running_mean": 0}, "kernel": 2})
    ({'norm': {'scale': 1}, 'kernel': 2}, {'norm': {'running_mean': 0}})
    """
    flat = traverse_util.flatten_dict(dict(tree))
    statistics = {path: x for path, x in flat.items() if path[-1].startswith(PREFIX)}
    weights = {path: x for path, x in flat.items() if path not in statistics}
    return traverse_util.unflatten_dict(weights), traverse_util.unflatten_dict(statistics)


def merge(weights: Tree, statistics: Tree) -> dict[str, Any]:
    """Inverts :func:`split`; where both trees have a leaf, that of `statistics` counts.

    >>> merge({"norm": {"scale": 1}, "kernel": 2}, {"norm": {"running_mean": 0}})
    {'norm': {'scale': 1, 'running_mean': 0}, 'kernel': 2}
    """
    flat = traverse_util.flatten_dict(dict(weights)) | traverse_util.flatten_dict(dict(statistics))
    return traverse_util.unflatten_dict(flat)
