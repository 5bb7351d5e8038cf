"""MSSA's attention as a TPU kernel (Pallas): it reads w = U^T z and writes the result.

Queries, keys and values are one tensor, so the forward pass reads one array where attention reads
three, and the backward pass reads two (w and the gradient) and writes one. In both passes the N x N
weights stay in the chip's scratch memory; the backward pass needs only w from the forward pass.

A head of K = 64 numbers fills half of the 128 lanes that the chip computes with. Two heads are
therefore one block of 128 lanes, and zeros in the lanes of one head, in one operand, choose the
other head: no data moves between lanes, and the matrix unit, 128 or 256 wide, takes no more cycles.

Around the kernel XLA lays (B, N, E) out with the tokens outermost, so that its 8 x 128 tiles hold
images and not 197 tokens, whose last tile would be partly empty. The kernel takes blocks of that
layout, transposes each on the chip so that images are outermost, where the compiler pads 197 tokens
to whole tiles, and transposes the result back: there is no copy and no padding in HBM.

Shapes: B images, N tokens, H heads, K head width, E = H * K, G = 128 lanes, I images per block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK_IMAGES = (16, 8)  # sizes of a block, best first: 16 rows of bfloat16 fill a register


def fits(images: int, heads: int, width: int) -> bool:
    """Whether the kernel takes `images` per device and `heads` over a width E: whole heads in whole blocks of lanes."""
    return images > 0 and images % BLOCK_IMAGES[-1] == 0 and width % LANES == 0 and LANES % (width // heads) == 0


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matrix product in float32 that contracts axis contract[0] of a with contract[1] of b."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    # float32 operands only in tests and debug runs; bfloat16 products are exact in one pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _masks(width: int) -> list[jax.Array]:
    """The lanes of each head in a lane block, (1, G) bool."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane >= start) & (lane < start + width) for start in range(0, LANES, width)]


def _masked(x_NG: jax.Array, mask_1G: jax.Array) -> jax.Array:
    return jnp.where(mask_1G, x_NG, jnp.zeros((), x_NG.dtype))


def _forward_image(width: int, w_NG: jax.Array) -> jax.Array:
    """The attention of all heads in one lane block of one image, (N, G) -> (N, G)."""
    y_NG = jnp.zeros(w_NG.shape, jnp.float32)
    for mask in _masks(width):
        own_NG = _masked(w_NG, mask)
        logits_NM = _product(own_NG * width**-0.5, w_NG, (1, 1))
        weights_NM = jnp.exp(logits_NM - jnp.max(logits_NM, axis=1, keepdims=True))
        total_N1 = jnp.sum(weights_NM, axis=1, keepdims=True)
        y_NG += _product(weights_NM.astype(w_NG.dtype), own_NG, (1, 0)) / total_N1
    return y_NG.astype(w_NG.dtype)


def _backward_image(width: int, w_NG: jax.Array, g_NG: jax.Array) -> jax.Array:
    """The gradient of w from the gradient of the result, (N, G) each."""
    dw_NG = jnp.zeros(w_NG.shape, jnp.float32)
    for mask in _masks(width):
        scaled_NG, own_g_NG = _masked(w_NG * width**-0.5, mask), _masked(g_NG, mask)
        # Keys first, queries along the lanes: the logits are symmetric, so this is the softmax transposed.
        logits_MN = _product(scaled_NG, w_NG, (1, 1))
        at_MN = jnp.exp(logits_MN - jnp.max(logits_MN, axis=0, keepdims=True))
        at_MN = at_MN / jnp.sum(at_MN, axis=0, keepdims=True)
        dat_MN = _product(w_NG, own_g_NG, (1, 1))
        dlogits_MN = at_MN * (dat_MN - jnp.sum(at_MN * dat_MN, axis=0, keepdims=True))
        dlogits_MN = dlogits_MN.astype(w_NG.dtype)
        dw_NG += _product(at_MN.astype(w_NG.dtype), own_g_NG, (1, 0))  # w as value
        dw_NG += _product(dlogits_MN, scaled_NG, (1, 0))  # w as key
        dw_NG += _product(dlogits_MN, scaled_NG, (0, 0))  # w as query
    return dw_NG.astype(w_NG.dtype)


def _kernel(image: Callable[..., jax.Array], arrays: int, *refs: Any) -> None:
    """Runs `image` on each image of a block.

    `refs` are the inputs, as many as `arrays`, and the result, (N, I, G) each, then one scratch (I, N, G) per input.
    """
    inputs, result, scratch = refs[:arrays], refs[arrays], refs[arrays + 1 :]
    for ref, turned in zip(inputs, scratch, strict=True):
        turned[...] = jnp.swapaxes(ref[...], 0, 1)

    @pl.loop(0, result.shape[1])
    def each(i: jax.Array) -> None:
        scratch[0][i] = image(*(turned[i] for turned in scratch))

    result[...] = jnp.swapaxes(scratch[0][...], 0, 1)


def _call(
    image: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], heads: int, products: int, interpret: bool
) -> jax.Array:
    B, N, E = arrays[0].shape
    dtype = arrays[0].dtype
    images = next((n for n in BLOCK_IMAGES if B % n == 0), B)
    block = pl.BlockSpec((N, images, LANES), lambda b, g: (0, b, g))
    result_NBE = pl.pallas_call(
        functools.partial(_kernel, functools.partial(image, E // heads), len(arrays)),
        out_shape=jax.ShapeDtypeStruct((N, B, E), dtype),
        grid=(B // images, E // LANES),
        in_specs=[block] * len(arrays),
        out_specs=block,
        scratch_shapes=[pltpu.VMEM((images, N, LANES), dtype)] * len(arrays),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        # The mathematics' own products, without the zeroed lanes; each array goes through HBM once.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * B * N * N * E,
            transcendentals=B * heads * N * N,
            bytes_accessed=(len(arrays) + 1) * B * N * E * dtype.itemsize,
        ),
        interpret=interpret,
    )(*(x.swapaxes(0, 1) for x in arrays))
    return result_NBE.swapaxes(0, 1)


def forward(w_BNE: jax.Array, heads: int, interpret: bool = False) -> jax.Array:
    """softmax(w w^T / sqrt(K)) w per head, (B, N, E) -> (B, N, E); softmax in float32.

    `interpret` runs the kernel without a TPU, for tests.
    """
    return _call(_forward_image, (w_BNE,), heads, 2, interpret)


def backward(w_BNE: jax.Array, g_BNE: jax.Array, heads: int, interpret: bool = False) -> jax.Array:
    """The gradient of w from the gradient of the result, (B, N, E) each."""
    return _call(_backward_image, (w_BNE, g_BNE), heads, 5, interpret)
