"""The small networks that joint-embedding methods put on an encoder: projectors and predictors.

Shapes: B batch, D width of the input, P width of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.batch_norm import BatchNorm

# As torch.nn.Linear: uniform in +- 1 / sqrt(fan_in), biases too.
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nn.Module):
    """A dense layer that begins like torch.nn.Linear.

    Attributes:
      width: P.
      bias: whether there are biases.
      dtype: type of the result.
      kernel_init: another start of the kernel; the biases then start at 0.
      zero_bias: the biases start at 0 in any case.
    """

    width: int
    bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None
    zero_bias: bool = False

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """(B, D) -> (B, P) in `dtype`."""
        bound = x_BD.shape[-1] ** -0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        bias_init = nn.initializers.zeros if self.kernel_init or self.zero_bias else uniform
        kernel = self.param("kernel", self.kernel_init or KERNEL_INIT, (x_BD.shape[-1], self.width))
        y_BP = x_BD.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.bias:
            y_BP = y_BP + self.param("bias", bias_init, (self.width,)).astype(self.dtype)
        return y_BP


class MLP(nn.Module):
    """Linear layers, with batch norm and an activation after each but the last.

    Layer i and its norm are named ``layer{i}`` and ``norm{i}``.

    Attributes:
      widths: the width of each layer.
      norm: whether there is batch norm after each layer but the last.
      last: batch norm after the last layer: "none", "affine", or "plain" (without scale and bias).
      bias: whether the linear layers have biases.
      hidden_bias: whether those before the last have them too.
      activation: what follows each layer but the last.
      dtype: type of the activations.
      kernel_init: the initial kernels of all layers; see :class:`Linear`.
    """

    widths: tuple[int, ...]
    norm: bool = True
    last: str = "none"
    bias: bool = True
    hidden_bias: bool = True
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x_BD: jax.Array, train: bool) -> jax.Array:
        """(B, D) -> (B, P), float32; `train`: batch norm uses the statistics of the batch."""
        for i, width in enumerate(self.widths):
            hidden = i < len(self.widths) - 1
            bias = self.bias and (self.hidden_bias or not hidden)
            x_BD = Linear(width, bias, self.dtype, self.kernel_init, name=f"layer{i}")(x_BD)
            if self.norm if hidden else self.last != "none":
                x_BD = BatchNorm(hidden or self.last == "affine", self.dtype, name=f"norm{i}")(x_BD, train)
            if hidden:
                x_BD = self.activation(x_BD)
        return x_BD.astype(jnp.float32)
