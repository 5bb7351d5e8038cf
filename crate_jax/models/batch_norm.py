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

from crate_jax.parallel import target

EPS = 1e-5  # as in PyTorch
MOMENTUM = 0.1  # share of the new statistics in the running ones, as in PyTorch
MOVED = "moved"  # the collection in which modules return their new statistics
PREFIX = "running_"
STATISTICS = "statistics"  # the entry of a method's `carried` that holds them
HIGHEST = jax.lax.Precision.HIGHEST  # memberships times means: TF32 would round the means

Tree = Mapping[str, Any]


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy, arXiv 1502.03167), with the statistics of PyTorch.

    In training it normalises with the mean and the biased variance of the batch, over all devices and processes, and
    moves the running statistics (with the unbiased variance) by MOMENTUM. Otherwise it normalises with the running
    statistics. Statistics are float32.

    Attributes:
      affine: whether there are a scale and a bias.
      dtype: type of the result.
      relu: whether the result is rectified.
    """

    affine: bool = True
    dtype: Any = jnp.float32
    relu: bool = False

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
        scale = self.param("scale", nn.initializers.ones, (C,)) if self.affine else jnp.ones((C,), running_mean.dtype)
        bias = self.param("bias", nn.initializers.zeros, (C,)) if self.affine else jnp.zeros((C,), running_mean.dtype)
        if not train:
            factor = jax.lax.rsqrt(running_var + EPS) * scale
            y = ((_wide(x) - running_mean) * factor + bias).astype(self.dtype)
            return nn.relu(y) if self.relu else y
        fused = self.relu and target.is_nvidia()
        normalise = normalise_and_rectify if fused else normalise_batch
        y, mean_GC, var_GC = normalise(x, scale, bias, running_mean, groups_BG)
        count = x.size // (C * len(mean_GC))
        unbiased = jnp.mean(var_GC, 0) * (count / max(count - 1, 1))
        move(self, running_mean=(running_mean, jnp.mean(mean_GC, 0)), running_var=(running_var, unbiased))
        y = y.astype(self.dtype)
        return nn.relu(y) if self.relu and not fused else y


@jax.custom_vjp
def normalise_batch(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, near_C: jax.Array, groups_BG: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises with the statistics of the batch; returns (y (B, ..., C) in x's type, means (G, C), variances (G, C)).

    In bfloat16 both statistics come from one pass over x, in float32, of the numbers minus `near_C`: where that is near
    the mean, the difference of the mean square and the squared mean loses no digits. Otherwise the mean has a pass of
    its own. The backward pass is written by hand: it
    keeps x and 2 G C numbers, where automatic differentiation keeps a float32 array of x's size, and it sums twice
    over the batch, not three times. Gradients do not flow through the returned statistics.

    Args:
      x: the activations (B, ..., C).
      scale_C: factor of each channel.
      bias_C: summand of each channel.
      near_C: a guess of the mean, such as the running mean.
      groups_BG: see :class:`BatchNorm`; None: one group.
    """
    return _normalise_forward(x, scale_C, bias_C, near_C, groups_BG)[0]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_means(x: jax.Array, groups_BG: jax.Array | None) -> jax.Array:
    """The mean over all axes but the last, of each group, (G, C)."""
    if groups_BG is None:
        return jnp.mean(x, tuple(range(x.ndim - 1)))[None]
    mean_BC = jnp.mean(x, tuple(range(1, x.ndim - 1)))
    return jnp.einsum("bg,bc->gc", groups_BG, mean_BC, precision=HIGHEST) * (groups_BG.shape[1] / len(x))


def _of_image(values_GC: jax.Array, groups_BG: jax.Array | None, ndim: int) -> jax.Array:
    """Gives each image the values of its group, (1 or B, 1, ..., C) with `ndim` axes."""
    if groups_BG is not None:
        values_GC = jnp.einsum("bg,gc->bc", groups_BG, values_GC, precision=HIGHEST)
    return values_GC.reshape(len(values_GC), *[1] * (ndim - 2), -1)


def _normalise_forward(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, near_C: jax.Array, groups_BG: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, ...]]:
    wide = _wide(x)
    if x.dtype != jnp.bfloat16:  # in bfloat16 the digits that a second pass keeps were never there
        near_C = jnp.mean(wide, tuple(range(x.ndim - 1)))
    off_GC = _group_means(wide - near_C, groups_BG)
    var_GC = jnp.maximum(_group_means(jnp.square(wide - near_C), groups_BG) - jnp.square(off_GC), 0)
    mean_GC, inverse_GC = off_GC + near_C, jax.lax.rsqrt(var_GC + EPS)
    mean, inverse = (_of_image(v, groups_BG, x.ndim) for v in (mean_GC, inverse_GC))
    y = (wide - mean) * (inverse * scale_C) + bias_C
    return (y.astype(x.dtype), mean_GC, var_GC), (x, mean_GC, inverse_GC, scale_C, groups_BG)


def _normalise_backward(saved: tuple[Any, ...], cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    x, mean_GC, inverse_GC, scale_C, groups_BG = saved
    mean, inverse = (_of_image(v, groups_BG, x.ndim) for v in (mean_GC, inverse_GC))
    g, unit = _wide(cotangents[0]), (_wide(x) - mean) * inverse
    bias_GC, scale_GC = _group_means(g, groups_BG), _group_means(g * unit, groups_BG)
    return _gradients(x, g, unit, inverse, scale_C, bias_GC, scale_GC, groups_BG)


def _gradients(
    x: jax.Array, g: jax.Array, unit: jax.Array, inverse: jax.Array, scale_C: jax.Array, bias_GC: jax.Array,
    scale_GC: jax.Array, groups_BG: jax.Array | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of the arguments from the means of g and of g times unit over each group."""
    taken, tilted = (_of_image(v, groups_BG, x.ndim) for v in (bias_GC, scale_GC))
    dx = (g - taken - unit * tilted) * (inverse * scale_C)
    count = x.size // (x.shape[-1] * len(scale_GC))
    return dx.astype(x.dtype), count * jnp.sum(scale_GC, 0), count * jnp.sum(bias_GC, 0), None, None


normalise_batch.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def normalise_and_rectify(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, near_C: jax.Array, groups_BG: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`normalise_batch` with the ReLU of its first result, for GPUs.

    The backward pass rectifies twice: for the sums, and for the gradient of x. XLA would find that both are the same,
    write the rectified gradient once and read it twice: 8 passes over arrays of x's size, where now there are 5. It
    pays where the gradient of the result is an array anyway, such as a convolution's.
    """
    return _rectify_forward(x, scale_C, bias_C, near_C, groups_BG)[0]


def _rectify_forward(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, near_C: jax.Array, groups_BG: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, ...]]:
    (y, mean_GC, var_GC), saved = _normalise_forward(x, scale_C, bias_C, near_C, groups_BG)
    return (nn.relu(y), mean_GC, var_GC), (*saved, bias_C)


def _rectify_backward(saved: tuple[Any, ...], cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    x, mean_GC, inverse_GC, scale_C, groups_BG, bias_C = saved
    mean, inverse = (_of_image(v, groups_BG, x.ndim) for v in (mean_GC, inverse_GC))

    def unit_and_gradient(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        unit = (_wide(x) - mean) * inverse
        # 1 or 0. As truth values, they would be written and read: XLA takes a small array for cheaper than this line.
        return unit, _wide(g) * jnp.clip((unit * scale_C + bias_C) * 1e38, 0.0, 1.0)

    # Barriers keep XLA from finding the forward pass, or the first of these two, again.
    x, rectified_g = jax.lax.optimization_barrier((x, cotangents[0]))
    unit, g = unit_and_gradient(x, rectified_g)
    sums = _group_means(g, groups_BG), _group_means(g * unit, groups_BG)
    x, rectified_g, (bias_GC, scale_GC) = jax.lax.optimization_barrier((x, rectified_g, sums))
    unit, g = unit_and_gradient(x, rectified_g)
    return _gradients(x, g, unit, inverse, scale_C, bias_GC, scale_GC, groups_BG)


normalise_and_rectify.defvjp(_rectify_forward, _rectify_backward)


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


def carry(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into (what gradients train, what a method carries), the latter {} if there are no statistics."""
    weights, statistics = split(tree)
    return weights, {STATISTICS: statistics} if statistics else {}


def carried_statistics(carried: Tree) -> dict[str, Any]:
    """The entry of `carried` that holds the statistics; {} if there are none.

    >>> carried_statistics({"statistics": {"running_mean": 0}, "queue": 1}), carried_statistics({"queue": 1})
    ({'statistics': {'running_mean': 0}}, {})
    """
    return {name: x for name, x in carried.items() if name == STATISTICS}


def whole(weights: Tree, carried: Tree) -> dict[str, Any]:
    """Inverts :func:`carry`; `carried` may hold other entries too."""
    return merge(weights, carried.get(STATISTICS, {}))


def merge(weights: Tree, statistics: Tree) -> dict[str, Any]:
    """Inverts :func:`split`; where both trees have a leaf, that of `statistics` counts.

    >>> merge({"norm": {"scale": 1}, "kernel": 2}, {"norm": {"running_mean": 0}})
    {'norm': {'scale': 1, 'running_mean': 0}, 'kernel': 2}
    """
    flat = traverse_util.flatten_dict(dict(weights)) | traverse_util.flatten_dict(dict(statistics))
    return traverse_util.unflatten_dict(flat)
