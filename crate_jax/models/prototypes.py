"""Prototypes: vectors with which projections are compared, the last layer of DINO and SwAV.

Shapes: B batch, P width of the projections, K prototypes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.projector import KERNEL_INIT

SMALLEST = 1e-24  # square of a length below which a vector is not scaled to length 1


def unit_columns(kernel_PK: jax.Array) -> jax.Array:
    """The columns of a kernel (P, K) scaled to length 1."""
    return kernel_PK * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(kernel_PK), 0, keepdims=True), SMALLEST))


def unit_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Random columns of length 1."""
    return unit_columns(KERNEL_INIT(key, shape, dtype))


class Prototypes(nn.Module):
    """The dot products of projections with prototypes.

    With weight norm (Salimans and Kingma, arXiv 1602.07868) only the direction of a column of the kernel counts. All is
    float32 on every kind of device, since the products are divided by small temperatures: an error of 0.004, as of
    bfloat16, becomes 0.1 at 0.04.

    Attributes:
      count: K.
      weight_norm: whether the prototypes are the directions of the kernel's columns, not the columns themselves.
      lengths: whether each prototype has a length that is trained too, 1 at first.
    """

    count: int
    weight_norm: bool = True
    lengths: bool = False

    @nn.compact
    def __call__(self, z_BP: jax.Array, train: bool) -> jax.Array:
        """(B, P) -> (B, K), float32; `train` changes nothing."""
        kernel_PK = self.param("kernel", KERNEL_INIT if self.weight_norm else unit_init, (z_BP.shape[-1], self.count))
        if self.weight_norm:
            kernel_PK = unit_columns(kernel_PK)
        if self.lengths:
            # A matrix of one row, as in PyTorch, so that optimisers that treat vectors otherwise do not here.
            kernel_PK = kernel_PK * self.param("lengths", nn.initializers.ones, (1, self.count))
        return jnp.matmul(z_BP.astype(jnp.float32), kernel_PK, precision="highest")
