"""Attention as TPU kernels (Pallas): no array of N x N numbers per image goes through the chip's HBM.

The kernels read queries, keys and values where the product before them has written them, side by side in one array,
and write the gradient in the same layout. MSSA is the case of one part: one tensor is query, key and value, so that the
forward pass reads one array where attention reads three. In both passes the N x N weights stay in the chip's scratch
memory; the backward pass needs only the input of the forward pass, and computes the weights again.

A head of K = 64 numbers fills half of the 128 lanes that the chip computes with. Two heads are therefore one block of
128 lanes, and zeros in the lanes of one head, in one operand, choose the other head: no data moves between lanes, and
the matrix unit, 128 or 256 wide, takes no more cycles.

Around the kernel XLA lays (B, N, F) out with the tokens outermost, so that its 8 x 128 tiles hold images and not 197
tokens, whose last tile would be partly empty. The kernel takes blocks of that layout, transposes each on the chip so
that images are outermost, where the compiler pads 197 tokens to whole tiles, and transposes the result back: there is
no copy and no padding in HBM.

A relative bias is one array for all images. A chip walks through the blocks of images of one block of lanes in order:
the bias of these heads is read once, and its gradient is summed on the chip and written once.

Shapes: B images, N tokens, P parts (3: queries, keys, values; 1: MSSA), H heads, K head width, E = H * K, F = P * E,
G = 128 lanes, I images per block, S heads in a lane block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crate_jax.parallel import target

LANES = 128
BLOCK_IMAGES = (16, 8)  # sizes of a block, best first: 16 rows of bfloat16 fill a register
UNASKED = 15 * 2**20  # bytes of scratch memory that each kernel may have


def fits(images: int, tokens: int, heads: int, width: int, parts: int, dtype: Any, bias: Any = None) -> bool:
    """Whether the program is for a TPU whose kernels take a batch of `images` and `heads` over a width E.

    Whole heads fill whole blocks of lanes, whole blocks of images fill each device's part of the batch, and a block
    fits into scratch memory. A bias must be one for all images, (1, H, N, N).
    """
    if not (target.is_tpu() and target.kernels()):
        return False
    own = target.images_per_device(images)
    whole = own > 0 and own % BLOCK_IMAGES[-1] == 0 and width % LANES == 0 and LANES % (width // heads) == 0
    if not whole or (bias is not None and bias.shape[0] != 1):
        return False
    item, memory = jnp.dtype(dtype).itemsize, target.kernel_memory()
    sizes = _Sizes(own, tokens, parts, heads, width // heads, item, bias is not None, memory)
    return sizes.takes(BLOCK_IMAGES[-1]) <= memory


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes of a call."""

    images: int
    tokens: int
    parts: int
    heads: int
    width: int  # K
    item: int  # bytes of a number
    biased: bool
    memory: int  # bytes of scratch memory

    @property
    def together(self) -> int:
        """S."""
        return LANES // self.width

    @property
    def lane_blocks(self) -> int:
        return self.heads // self.together

    @property
    def block(self) -> int:
        """I: the largest that fits; all images where there are fewer, which only tests have."""
        whole = [n for n in BLOCK_IMAGES if self.images % n == 0]
        return next((n for n in whole if self.takes(n) <= self.memory), whole[-1] if whole else self.images)

    def takes(self, block: int) -> int:
        """About the scratch memory of the backward pass in bytes, with blocks of `block` images."""
        array = block * self.tokens * LANES * self.item
        square = self.tokens * pl.cdiv(self.tokens, LANES) * LANES * 4
        # Two of each block, for one comes or goes while the other is in use, and turned inputs.
        arrays = 2 * (self.parts + 1) + 2 + (self.parts + 1)
        return arrays * array + (5 + 4 * self.together * self.biased) * square


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


def _forward_image(width: int, parts: list[jax.Array], bias_ref: Any) -> list[jax.Array]:
    """The attention of all heads in one lane block of one image, (N, G) from the P parts of the input, (N, G) each."""
    q_NG, k_NG, v_NG = parts * 3 if len(parts) == 1 else parts
    y_NG = jnp.zeros(q_NG.shape, jnp.float32)
    for head, mask in enumerate(_masks(width)):
        logits_NM = _product(_masked(q_NG, mask) * width**-0.5, k_NG, (1, 1))
        if bias_ref is not None:
            logits_NM += bias_ref[head]
        weights_NM = jnp.exp(logits_NM - jnp.max(logits_NM, axis=1, keepdims=True))
        total_N1 = jnp.sum(weights_NM, axis=1, keepdims=True)
        y_NG += _product(weights_NM.astype(v_NG.dtype), _masked(v_NG, mask), (1, 0)) / total_N1
    return [y_NG.astype(q_NG.dtype)]


def _backward_image(width: int, arrays: list[jax.Array], bias_ref: Any, dbias_ref: Any = None) -> list[jax.Array]:
    """The gradients of the P parts from the parts and the gradient of the result, (N, G) each.

    Keys come first and queries lie along the lanes, also in the bias and in its gradient, (S, N, N) each. Then only one
    of the last three products, not two, contracts over leading axes.
    """
    *parts, g_NG = arrays
    q_NG, k_NG, v_NG = parts * 3 if len(parts) == 1 else parts
    sums = [jnp.zeros(g_NG.shape, jnp.float32) for _ in parts]
    for head, mask in enumerate(_masks(width)):
        scaled_k_NG, own_g_NG = _masked(k_NG * width**-0.5, mask), _masked(g_NG, mask)
        scaled_q_NG = scaled_k_NG if len(parts) == 1 else _masked(q_NG * width**-0.5, mask)
        logits_MN = _product(scaled_k_NG, q_NG, (1, 1))
        if bias_ref is not None:
            logits_MN += bias_ref[head]
        at_MN = jnp.exp(logits_MN - jnp.max(logits_MN, axis=0, keepdims=True))
        at_MN = at_MN / jnp.sum(at_MN, axis=0, keepdims=True)
        dat_MN = _product(v_NG, own_g_NG, (1, 1))
        dlogits_MN = at_MN * (dat_MN - jnp.sum(at_MN * dat_MN, axis=0, keepdims=True))
        if dbias_ref is not None:
            dbias_ref[head] += dlogits_MN
        dlogits_MN = dlogits_MN.astype(g_NG.dtype)
        sums[-1] += _product(at_MN.astype(g_NG.dtype), own_g_NG, (1, 0))  # the value's
        sums[len(parts) // 2] += _product(dlogits_MN, scaled_q_NG, (1, 0))  # the key's
        sums[0] += _product(dlogits_MN, scaled_k_NG, (0, 0))  # the query's
    return [x.astype(g_NG.dtype) for x in sums]


def _kernel(image: Callable[..., list[jax.Array]], count: int, *refs: Any) -> None:
    """Runs `image` on each image of a block, and writes one part of the result per step of the grid's last axis.

    Args:
      image: computes the parts of the result of one image, (N, G) each, and adds to the gradient of the bias.
      count: number of inputs.
      *refs: the inputs, (N, I, G) each; the bias, (S, N, N), or None; one part of the result, (N, I, G); the gradient
        of the bias, (S, N, N), if there is one; scratch, (inputs, I, N, G): first the inputs, then the result.
    """
    inputs, (bias_ref, result_ref, *dbias_refs, turned_ref) = refs[:count], refs[count:]
    block, part = pl.program_id(1), pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        for place, ref in enumerate(inputs):
            turned_ref[place] = jnp.swapaxes(ref[...], 0, 1)

        @pl.when(block == 0)
        def _() -> None:
            for ref in dbias_refs:
                ref[...] = jnp.zeros_like(ref)

        @pl.loop(0, result_ref.shape[1])
        def each(i: jax.Array) -> None:
            found = image([turned_ref[place, i] for place in range(count)], bias_ref, *dbias_refs)
            for place, x_NG in enumerate(found):
                turned_ref[place, i] = x_NG

    result_ref[...] = jnp.swapaxes(turned_ref[part], 0, 1)


def _call(
    s: _Sizes,
    image: Callable[..., list[jax.Array]],
    x_BNF: jax.Array,
    g_BNE: jax.Array | None,
    bias_HNN: jax.Array | None,
    products: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel: [y] without a gradient g of y, else [dx], or with a bias [dx, dbias]."""
    (B, N, _), E, dtype = x_BNF.shape, s.heads * s.width, x_BNF.dtype
    results, summed = (1, 0) if g_BNE is None else (s.parts, int(s.biased))

    def lanes(part: Any) -> Callable[..., tuple[Any, ...]]:
        return lambda g, b, p: (0, b, (p if part is None else part) * s.lane_blocks + g)

    shape = (N, s.block, LANES)
    arrays, specs = [x_BNF.swapaxes(0, 1)] * s.parts, [pl.BlockSpec(shape, lanes(part)) for part in range(s.parts)]
    if g_BNE is not None:
        arrays, specs = [*arrays, g_BNE.swapaxes(0, 1)], [*specs, pl.BlockSpec(shape, lanes(0))]
    heads = pl.BlockSpec((s.together, N, N), lambda g, b, p: (g, 0, 0))
    biases = jax.ShapeDtypeStruct((s.heads, N, N), jnp.float32)
    result_NBF, *dbias = pl.pallas_call(
        functools.partial(_kernel, functools.partial(image, s.width), len(arrays)),
        out_shape=[jax.ShapeDtypeStruct((N, B, results * E), dtype), *[biases] * summed],
        grid=(s.lane_blocks, B // s.block, results),
        in_specs=[*specs, heads if s.biased else None],
        out_specs=[pl.BlockSpec(shape, lanes(None)), *[heads] * summed],
        scratch_shapes=[pltpu.VMEM((len(arrays), s.block, N, LANES), dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if summed else "parallel", "arbitrary"),
            vmem_limit_bytes=s.memory if s.takes(s.block) > UNASKED else None,
        ),
        # The mathematics' own products, without the zeroed lanes. Each array goes through HBM once: where an index of
        # the grid does not change a block's place, the block stays on the chip.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * B * N * N * E,
            transcendentals=B * s.heads * N * N,
            bytes_accessed=(len(arrays) + results) * B * N * E * dtype.itemsize
            + (s.biased + summed) * s.heads * N * N * 4,
        ),
        interpret=interpret,
    )(*arrays, bias_HNN)
    return [result_NBF.swapaxes(0, 1), *dbias]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attend(x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v per head; softmax in float32.

    Args:
      x_BNF: queries, keys and values side by side, (..., B, N, P * E), or with one part w, which is all three. Leading
        axes have length one.
      bias_HNN: a bias on the logits of all images, float32 (H, N, N), or None.
      heads: H.
      parts: P, 3 or 1.
      interpret: runs the kernels without a TPU, for tests.

    Returns:
      (..., B, N, E).
    """
    return _attend_forward(x_BNF, bias_HNN, heads, parts, interpret)[0]


def _attend_forward(
    x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    memory = target.kernel_memory()

    def run(x_BNF: jax.Array, *bias: jax.Array) -> jax.Array:
        (B, N, F), item = x_BNF.shape, x_BNF.dtype.itemsize
        s = _Sizes(B, N, parts, heads, F // parts // heads, item, bool(bias), memory)
        return _call(s, _forward_image, x_BNF, None, bias[0] if bias else None, 2, interpret)[0]

    shared = () if bias_HNN is None else (bias_HNN,)
    y_BNE = target.per_device(run, x_BNF.reshape(-1, *x_BNF.shape[-2:]), shared=shared)
    return y_BNE.reshape(*x_BNF.shape[:-1], -1), (x_BNF, bias_HNN)  # in the shape that a loop keeps


def _attend_backward(
    heads: int, parts: int, interpret: bool, saved: tuple[Any, ...], g_BNE: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    (x_BNF, bias_HNN), memory = saved, target.kernel_memory()

    def run(x_BNF: jax.Array, g_BNE: jax.Array, *bias: jax.Array) -> tuple[jax.Array, ...]:
        (B, N, F), item = x_BNF.shape, x_BNF.dtype.itemsize
        s = _Sizes(B, N, parts, heads, F // parts // heads, item, bool(bias), memory)
        keys_first = bias[0].swapaxes(1, 2) if bias else None
        dx, *dbias = _call(s, _backward_image, x_BNF, g_BNE, keys_first, 5, interpret)
        return dx, *(d[None].swapaxes(2, 3) for d in dbias)

    shared = () if bias_HNN is None else (bias_HNN,)
    arrays = (a.reshape(-1, *a.shape[-2:]) for a in (x_BNF, g_BNE))
    dx_BNF, *dbias = target.per_device(run, *arrays, shared=shared)
    return dx_BNF.reshape(x_BNF.shape), jnp.sum(dbias[0], 0) if dbias else None


attend.defvjp(_attend_forward, _attend_backward)
