"""Convolutions for CPUs: what XLA's own are slow at, as products of matrices.

XLA for CPUs convolves at the speed of its products of matrices, with two exceptions, in which a thin ResNet of small
images, as a CPU can train it, spends most of its time (jax 0.10, an EPYC without AVX-512):

* a result, or a gradient, of 2 x 2 places takes 10 to 20 times as long as one product, which is the whole convolution
  of so small a map (:func:`_by_one_product`);
* images of 3 channels, above all the gradient of the kernel. Blocks of 2 x 2 pixels are 12 channels of a convolution of
  stride 1, which takes a third of the time forwards; the gradient is one product for each tap (:func:`_unit_stride`).

Shapes: B batch, H x W places of the input, h x w of the result, k x k taps, C and D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.parallel import target

MOST_INPUTS, MOST_OUTPUTS = 16, 4  # places, up to which one product was faster, forwards and backwards together
FEW_CHANNELS = 4
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    x_BHWC: jax.Array, w_kkCD: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **others: Any
) -> jax.Array:
    """As :func:`jax.lax.conv_general_dilated`, for the argument of this name of :class:`flax.linen.Conv`.

    Args:
      x_BHWC: maps (B, H, W, C).
      w_kkCD: the kernel (k, k, C, D).
      strides: that of rows, and that of columns.
      padding: zeros before and after the rows, and the columns.
      **others: layout, dilation, groups and precision, for JAX. It convolves if there is dilation or there are groups.

    Returns:
      maps (B, h, w, D).
    """
    (H, W, C), k = x_BHWC.shape[1:], w_kkCD.shape[0]
    size = [(n + sum(p) - k) // s + 1 for n, p, s in zip((H, W), padding, strides, strict=True)]
    dilated = any(set(others.get(name) or (1,)) != {1} for name in ("lhs_dilation", "rhs_dilation"))
    if target.is_cpu() and k > 1 and not dilated and w_kkCD.shape[2] == C:
        if H * W <= MOST_INPUTS and math.prod(size) <= MOST_OUTPUTS:
            return _by_one_product(x_BHWC, w_kkCD, strides, padding)
        if C <= FEW_CHANNELS and tuple(strides) in ((1, 1), (2, 2)):
            return _by_blocks(x_BHWC, w_kkCD, strides[0], padding, size)
    return jax.lax.conv_general_dilated(x_BHWC, w_kkCD, strides, padding, **others)


def _by_one_product(
    x_BHWC: jax.Array, w_kkCD: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """One product with a matrix (H W C, h w D), which holds each tap at the places that it joins."""
    H, W, C = x_BHWC.shape[1:]
    k, _, _, D = w_kkCD.shape
    rows, columns = (_joined(n, k, s, p) for n, s, p in zip((H, W), strides, padding, strict=True))
    h, w = rows.shape[1], columns.shape[1]
    joined = np.einsum("Hhk,Wwl->HWhwkl", rows, columns).reshape(H * W * h * w, k * k)
    matrix = jnp.asarray(joined, w_kkCD.dtype) @ w_kkCD.reshape(k * k, C * D)
    matrix = matrix.reshape(H * W, h * w, C, D).swapaxes(1, 2).reshape(H * W * C, h * w * D)
    return (x_BHWC.reshape(-1, H * W * C) @ matrix).reshape(-1, h, w, D)


def _joined(inputs: int, taps: int, stride: int, padding: tuple[int, int]) -> np.ndarray:
    """Which tap joins which places of one axis: 0 or 1, (inputs, outputs, taps)."""
    outputs = (inputs + sum(padding) - taps) // stride + 1
    place_1nk = np.arange(outputs)[None, :, None] * stride - padding[0] + np.arange(taps)
    return (place_1nk == np.arange(inputs)[:, None, None]).astype(np.float32)


def _by_blocks(
    x_BHWC: jax.Array, w_kkCD: jax.Array, stride: int, padding: Sequence[tuple[int, int]], size: Sequence[int]
) -> jax.Array:
    """The convolution of images to maps of `size`, on blocks of stride x stride pixels."""
    k = w_kkCD.shape[0]
    blocks = -(-k // stride)  # that a kernel with zeros behind it covers
    behind = [stride * (n + blocks - 1) - m - p[0] for n, m, p in zip(size, x_BHWC.shape[1:3], padding, strict=True)]
    zeros = [(0, 0, 0), *((p[0], n, 0) for p, n in zip(padding, behind, strict=True)), (0, 0, 0)]
    x = jax.lax.pad(x_BHWC, jnp.zeros((), x_BHWC.dtype), zeros)  # a negative number of zeros takes pixels away
    w = jnp.pad(w_kkCD, [(0, stride * blocks - k)] * 2 + [(0, 0)] * 2)
    return _unit_stride(_blocks(x, stride), _taps_of_blocks(w, stride))


def _blocks(x_BHWC: jax.Array, s: int) -> jax.Array:
    """Blocks of s x s places as channels: (B, H, W, C) -> (B, H / s, W / s, s s C)."""
    B, H, W, C = x_BHWC.shape
    return x_BHWC.reshape(B, H // s, s, W // s, s, C).swapaxes(2, 3).reshape(B, H // s, W // s, s * s * C)


def _taps_of_blocks(w_kkCD: jax.Array, s: int) -> jax.Array:
    """The kernel for :func:`_blocks`: (k, k, C, D) -> (k / s, k / s, s s C, D)."""
    k, _, C, D = w_kkCD.shape
    return w_kkCD.reshape(k // s, s, k // s, s, C, D).swapaxes(1, 2).reshape(k // s, k // s, s * s * C, D)


def _xla_unit_stride(x_BHWC: jax.Array, w_kkCD: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x_BHWC, w_kkCD, (1, 1), "VALID", dimension_numbers=LAYOUT)


@jax.custom_vjp
def _unit_stride(x_BHWC: jax.Array, w_kkCD: jax.Array) -> jax.Array:
    """XLA's convolution of stride 1 without padding, with another gradient of the kernel."""
    return _xla_unit_stride(x_BHWC, w_kkCD)


def _unit_stride_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _xla_unit_stride(x, w), (x, w)


def _unit_stride_backward(saved: tuple[jax.Array, jax.Array], g_BhwD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BHWC, w_kkCD = saved
    (B, H, W, C), (_, h, w, D), k = x_BHWC.shape, g_BhwD.shape, w_kkCD.shape[0]
    (dx,) = jax.linear_transpose(lambda x: _xla_unit_stride(x, w_kkCD), x_BHWC)(g_BhwD)  # images need none
    # With rows of one length, all places that a tap meets lie one behind the other. A loop, since XLA would compute the
    # images again for each tap.
    places = (h - 1) * W + w
    x = x_BHWC.reshape(B, H * W, C)
    g = jnp.pad(g_BhwD, ((0, 0), (0, 0), (0, W - w), (0, 0))).reshape(B, h * W, D)[:, :places]

    def of_tap(start: jax.Array) -> jax.Array:
        met = jax.lax.dynamic_slice_in_dim(x, start, places, axis=1)
        return jnp.einsum("bnc,bnd->cd", met, g, preferred_element_type=jnp.float32)

    dw = jax.lax.map(of_tap, jnp.asarray([i * W + j for i, j in np.ndindex(k, k)]))
    return dx, dw.reshape(w_kkCD.shape).astype(w_kkCD.dtype)


_unit_stride.defvjp(_unit_stride_forward, _unit_stride_backward)
