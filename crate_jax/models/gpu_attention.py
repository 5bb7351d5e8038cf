"""Attention as GPU kernels (Pallas and Triton): no array of N x N numbers per image goes through the GPU's memory.

The kernels read queries, keys and values where the product before them has written them, side by side in one array,
and write the gradient in the same layout, so that nothing is split, transposed or padded around them. MSSA is the case
of one part: one tensor is query, key and value. Its logits are symmetric, so its backward pass needs five products per
tile where attention needs seven.

A program computes a block of R rows of one head of one image, and goes through the other tokens in blocks of R: the
softmax over blocks is that of FlashAttention (Dao et al., arXiv 2205.14135). The last block of 197 tokens is masked.
The forward pass keeps the largest logit and the sum of each row. The backward pass recomputes the weights from them in
two kernels: the first computes delta, the sum over keys of weight times its gradient; the second computes the
gradients. Delta is not taken from the result (as g . y), whose rounding leaves noise where the softmax saturates. No
kernel adds to memory that another one adds to, so results do not depend on an order.

A relative bias is one array for all images. Its gradient, a sum over images, has a kernel of its own, which goes
through some of the images for each tile: so it is written a few times, not once per image.

Shapes: B images, N tokens, P parts (3: queries, keys, values; 1: MSSA), H heads, K head width, E = H * K, R rows of a
block, G = K rounded up to a power of two, M = N rounded up to whole blocks, S sums over parts of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crate_jax.parallel import target

SUMS = 8  # parts of the batch over which a bias's gradient is summed by different programs
NARROWEST, WIDEST = 16, 128  # a side of Triton's products is at least 16; more than 128 do not fit into registers


def fits(images: int, heads: int, width: int, dtype: Any, bias: Any = None) -> bool:
    """Whether the program is for a GPU whose kernels take a batch of `images` and `heads` over a width E.

    A bias must be one for all images, (1, H, N, N). The type must be bfloat16: exact products of float32 have no tensor
    cores, and blocks of 64 x 64 numbers of three parts take more shared memory than an A100 has.
    """
    narrow, one = NARROWEST // 2 < width // heads <= WIDEST, bias is None or bias.shape[0] == 1
    small = narrow and one and jnp.dtype(dtype) == jnp.bfloat16
    return target.is_nvidia() and target.kernels() and target.images_per_device(images) > 0 and small


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes of a call, and what its kernels share."""

    images: int
    tokens: int
    parts: int
    heads: int
    width: int  # K

    @property
    def rows(self) -> int:
        """R; 64 rows of 128 lanes need more shared memory than an A100 has."""
        return 64 if self.lanes <= 64 else 32

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tokens, self.rows)

    @property
    def lanes(self) -> int:
        """G."""
        return max(NARROWEST, pl.next_power_of_2(self.width))

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def part(self, role: int) -> int:
        """The part that is the query (role 0), the key (1) or the value (2)."""
        return min(role, self.parts - 1)

    def inside(self, block: Any) -> jax.Array:
        """Which rows of a block are tokens, bool (R,)."""
        return block * self.rows + jnp.arange(self.rows) < self.tokens

    def span(self, block: Any) -> Any:
        """The rows of a block, an index."""
        return pl.ds(block * self.rows, self.rows)

    def mask(self, block: Any) -> jax.Array:
        """Which numbers of a block (R, G) exist."""
        return self.inside(block)[:, None] & (jnp.arange(self.lanes) < self.width)[None, :]

    def load(self, ref: Any, block: Any, *part: int, image: Any = 0) -> jax.Array:
        """A block (R, G) of an array (images, M, G), or of a part of an array (images, M, P, G); zeros outside."""
        at = (_place(image), self.span(block), *map(_place, part))
        return triton.load(ref.at[at], mask=self.mask(block), other=0.0)

    def numbers(self, ref: Any, block: Any, image: Any = 0) -> jax.Array:
        """One number per token of a block from an array (images, M), float32 (R,), zeros outside."""
        return triton.load(ref.at[_place(image), self.span(block)], mask=self.inside(block), other=0.0)

    def tile(self, ref: Any, rows: Any, columns: Any) -> jax.Array:
        """A tile (R, R) of a bias (M, M), zeros outside."""
        mask = self.inside(rows)[:, None] & self.inside(columns)[None, :]
        return triton.load(ref.at[self.span(rows), self.span(columns)], mask=mask, other=0.0)


def _place(index: Any) -> jax.Array:
    return jnp.asarray(index, jnp.int32)  # interpret mode takes no number of Python


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """A matrix product in float32 that contracts axis contract[0] of a with contract[1] of b."""
    # float32 operands only in tests and debug runs; bfloat16 products are exact in one pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    b = b.T if contract[1] == 1 else b
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _weights(logits: jax.Array, peak: jax.Array, total: jax.Array, exists: jax.Array) -> jax.Array:
    """exp(logit - peak) / total where `exists`, else 0; rows outside have a total of 0."""
    return jnp.where(exists, jnp.exp(logits - peak) / jnp.where(total > 0, total, 1.0), 0.0)


def _forward_kernel(s: _Shape, x_ref: Any, bias_ref: Any, y_ref: Any, peak_ref: Any, total_ref: Any) -> None:
    block = pl.program_id(0)
    query_RG = s.load(x_ref, block, s.part(0))

    def step(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y_RG, peak_R, total_R = carry
        key_RG, value_RG = s.load(x_ref, other, s.part(1)), s.load(x_ref, other, s.part(2))
        logits_RR = _product(query_RG, key_RG, (1, 1)) * s.scale
        if bias_ref is not None:
            logits_RR += s.tile(bias_ref, block, other)
        logits_RR = jnp.where(s.inside(other)[None, :], logits_RR, -jnp.inf)
        new_R = jnp.maximum(peak_R, jnp.max(logits_RR, axis=1))
        weights_RR, shrink_R = jnp.exp(logits_RR - new_R[:, None]), jnp.exp(peak_R - new_R)
        y_RG = y_RG * shrink_R[:, None] + _product(weights_RR.astype(value_RG.dtype), value_RG)
        return y_RG, new_R, total_R * shrink_R + jnp.sum(weights_RR, axis=1)

    start = jnp.zeros((s.rows, s.lanes), jnp.float32), jnp.full((s.rows,), -jnp.inf), jnp.zeros((s.rows,))
    y_RG, peak_R, total_R = jax.lax.fori_loop(0, s.blocks, step, start)
    triton.store(y_ref, (y_RG / total_R[:, None]).astype(y_ref.dtype), mask=s.mask(block))
    triton.store(peak_ref, peak_R, mask=s.inside(block))
    triton.store(total_ref, total_R, mask=s.inside(block))


def _delta_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, total_ref: Any, delta_ref: Any
) -> None:
    block = pl.program_id(0)
    query_RG, g_RG = s.load(x_ref, block, s.part(0)), s.load(g_ref, block)
    peak_R1, total_R1 = s.numbers(peak_ref, block)[:, None], s.numbers(total_ref, block)[:, None]

    def step(other: jax.Array, delta_R: jax.Array) -> jax.Array:
        key_RG, value_RG = s.load(x_ref, other, s.part(1)), s.load(x_ref, other, s.part(2))
        logits_RR = _product(query_RG, key_RG, (1, 1)) * s.scale
        if bias_ref is not None:
            logits_RR += s.tile(bias_ref, block, other)
        weights_RR = _weights(logits_RR, peak_R1, total_R1, s.inside(other)[None, :])
        return delta_R + jnp.sum(weights_RR * _product(g_RG, value_RG, (1, 1)), axis=1)

    delta_R = jax.lax.fori_loop(0, s.blocks, step, jnp.zeros((s.rows,)))
    triton.store(delta_ref, delta_R, mask=s.inside(block))


def _backward_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, total_ref: Any, delta_ref: Any, dx_ref: Any
) -> None:
    block = pl.program_id(0)
    own_query_RG, own_key_RG, own_value_RG = (s.load(x_ref, block, s.part(role)) for role in range(3))
    own_g_RG, dtype = s.load(g_ref, block), x_ref.dtype
    peak_R, total_R, delta_R = (s.numbers(ref, block) for ref in (peak_ref, total_ref, delta_ref))

    def step(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query_RG, key_RG, value_RG = (s.load(x_ref, other, s.part(role)) for role in range(3))
        g_RG, exists_RR = s.load(g_ref, other), s.inside(other)[None, :]
        other_peak_R, other_total_R, other_delta_R = (s.numbers(r, other) for r in (peak_ref, total_ref, delta_ref))
        # The block's tokens as queries, the other tokens as keys.
        logits_RR = _product(own_query_RG, key_RG, (1, 1)) * s.scale
        # The block's tokens as keys, along the rows, and the other tokens as queries.
        turned_RR = logits_RR if s.parts == 1 else _product(own_key_RG, query_RG, (1, 1)) * s.scale
        if bias_ref is not None:
            logits_RR += s.tile(bias_ref, block, other)
            turned_RR += s.tile(bias_ref, other, block).T
        weights_RR = _weights(logits_RR, peak_R[:, None], total_R[:, None], exists_RR)
        turned_RR = _weights(turned_RR, other_peak_R[None, :], other_total_R[None, :], exists_RR)
        slope_RR = weights_RR * (_product(own_g_RG, value_RG, (1, 1)) - delta_R[:, None])
        turned_slope_RR = turned_RR * (_product(own_value_RG, g_RG, (1, 1)) - other_delta_R[None, :])
        as_value_RG = _product(turned_RR.astype(dtype), g_RG)
        if s.parts == 1:
            return (carry[0] + _product((slope_RR + turned_slope_RR).astype(dtype), key_RG) * s.scale + as_value_RG,)
        as_query_RG = _product(slope_RR.astype(dtype), key_RG) * s.scale
        as_key_RG = _product(turned_slope_RR.astype(dtype), query_RG) * s.scale
        return tuple(a + b for a, b in zip(carry, (as_query_RG, as_key_RG, as_value_RG), strict=True))

    start = (jnp.zeros((s.rows, s.lanes), jnp.float32),) * s.parts
    for part, gradient_RG in enumerate(jax.lax.fori_loop(0, s.blocks, step, start)):
        triton.store(dx_ref.at[:, _place(part), :], gradient_RG.astype(dtype), mask=s.mask(block))


def _bias_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, total_ref: Any, delta_ref: Any, dbias_ref: Any
) -> None:
    rows, columns = pl.program_id(0), pl.program_id(1)
    bias_RR = s.tile(bias_ref, rows, columns)
    exists_RR = s.inside(columns)[None, :]

    def step(image: jax.Array, sum_RR: jax.Array) -> jax.Array:
        query_RG, key_RG = (
            s.load(x_ref, place, s.part(role), image=image) for place, role in ((rows, 0), (columns, 1))
        )
        g_RG, value_RG = s.load(g_ref, rows, image=image), s.load(x_ref, columns, s.part(2), image=image)
        peak_R1, total_R1, delta_R1 = (s.numbers(r, rows, image)[:, None] for r in (peak_ref, total_ref, delta_ref))
        logits_RR = _product(query_RG, key_RG, (1, 1)) * s.scale + bias_RR
        weights_RR = _weights(logits_RR, peak_R1, total_R1, exists_RR)
        return sum_RR + weights_RR * (_product(g_RG, value_RG, (1, 1)) - delta_R1)

    sum_RR = jax.lax.fori_loop(0, x_ref.shape[0], step, jnp.zeros((s.rows, s.rows), jnp.float32))
    triton.store(dbias_ref, sum_RR, mask=s.inside(rows)[:, None] & exists_RR)


def _call(
    kernel: Callable[..., None],
    s: _Shape,
    arrays: Sequence[jax.Array | None],
    outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    products: int,
    interpret: bool,
    sums: int = 0,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
      kernel: called with the sizes and references of inputs and outputs.
      s: the sizes.
      arrays: x (B, N, P, H, K), a bias (H, N, N) or None; then, if the kernel needs them, g (B, N, H, K) and numbers of
        each row, float32 (B, H, N).
      outputs: of each output its shape, type and blocks, as a function of (block, head, image), or with `sums` of (row
        of tiles, column of tiles, head times part of the batch).
      products: the number of products of N x N x K per image and head, for counting.
      interpret: whether to run without a GPU.
      sums: 0: a program reads one image; else B / sums images.
    """
    M, images = s.blocks * s.rows, s.images // sums if sums else 1
    head = (lambda i, j, hs: hs // sums) if sums else (lambda i, h, b: h)
    part = (lambda i, j, hs: hs % sums) if sums else (lambda i, h, b: b)
    inputs = (
        pl.BlockSpec((images, M, s.parts, None, s.lanes), lambda *at: (part(*at), 0, 0, head(*at), 0)),
        pl.BlockSpec((None, M, M), lambda *at: (head(*at), 0, 0)),
        pl.BlockSpec((images, M, None, s.lanes), lambda *at: (part(*at), 0, head(*at), 0)),
        *[pl.BlockSpec((images, None, M), lambda *at: (part(*at), head(*at), 0))] * 3,
    )
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    return pl.pallas_call(
        functools.partial(kernel, s),
        grid=(s.blocks, s.blocks, s.heads * sums) if sums else (s.blocks, s.heads, s.images),
        in_specs=[None if a is None else spec for a, spec in zip(arrays, inputs, strict=False)],
        out_specs=[spec for *_, spec in outputs],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4 if s.lanes <= 64 else 8, num_stages=2),
        metadata={"flops": str(2 * products * s.images * s.heads * s.tokens**2 * s.width)},  # as benchmarks/ count
        interpret=interpret,
    )(*arrays)


def _forward(s: _Shape, x: jax.Array, bias: jax.Array | None, interpret: bool) -> list[jax.Array]:
    y = pl.BlockSpec((None, s.rows, None, s.lanes), lambda i, h, b: (b, i, h, 0))
    outputs = [((s.images, s.tokens, s.heads, s.width), x.dtype, y), *[_numbers(s)] * 2]
    return _call(_forward_kernel, s, (x, bias), outputs, 2, interpret)


def _numbers(s: _Shape) -> tuple[tuple[int, ...], Any, pl.BlockSpec]:
    return (s.images, s.heads, s.tokens), jnp.float32, pl.BlockSpec((None, None, s.rows), lambda i, h, b: (b, h, i))


def _backward(
    s: _Shape, x: jax.Array, bias: jax.Array | None, g: jax.Array, peak: jax.Array, total: jax.Array, interpret: bool
) -> list[jax.Array]:
    known = [x, bias, g, peak, total]
    known += _call(_delta_kernel, s, known, [_numbers(s)], 2, interpret)
    dx = pl.BlockSpec((None, s.rows, s.parts, None, s.lanes), lambda i, h, b: (b, i, 0, h, 0))
    found = _call(_backward_kernel, s, known, [(x.shape, x.dtype, dx)], 5 if s.parts == 1 else 7, interpret)
    if bias is not None:
        sums = math.gcd(s.images, SUMS)
        tiles = pl.BlockSpec((None, None, s.rows, s.rows), lambda i, j, hs: (hs % sums, hs // sums, i, j))
        shape = (sums, s.heads, s.tokens, s.tokens)
        found += _call(_bias_kernel, s, known, [(shape, jnp.float32, tiles)], 2, interpret, sums)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attend(x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v per head; softmax in float32.

    Args:
      x_BNF: queries, keys and values side by side, (B, N, P * E), or with one part w, which is all three.
      bias_HNN: a bias on the logits of all images, float32 (H, N, N), or None.
      heads: H.
      parts: P, 3 or 1; with one part there is no bias.
      interpret: runs the kernels without a GPU, for tests.

    Returns:
      (B, N, E).
    """
    return _attend_forward(x_BNF, bias_HNN, heads, parts, interpret)[0]


def _shaped(x_BNF: jax.Array, heads: int, parts: int) -> tuple[_Shape, jax.Array]:
    B, N, F = x_BNF.shape
    s = _Shape(B, N, parts, heads, F // parts // heads)
    return s, x_BNF.reshape(B, N, parts, heads, s.width)


def _attend_forward(
    x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    def run(x_BNF: jax.Array, *bias: jax.Array) -> tuple[jax.Array, ...]:
        s, x = _shaped(x_BNF, heads, parts)
        y, peak, total = _forward(s, x, bias[0] if bias else None, interpret)
        return y.reshape(*x_BNF.shape[:2], -1), peak, total

    shared = () if bias_HNN is None else (bias_HNN,)
    y_BNE, peak_BHN, total_BHN = target.per_device(run, x_BNF, shared=shared)
    return y_BNE, (x_BNF, bias_HNN, peak_BHN, total_BHN)


def _attend_backward(
    heads: int, parts: int, interpret: bool, saved: tuple[Any, ...], g_BNE: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x_BNF, bias_HNN, peak_BHN, total_BHN = saved

    def run(
        x_BNF: jax.Array, g_BNE: jax.Array, peak: jax.Array, total: jax.Array, *bias: jax.Array
    ) -> tuple[jax.Array, ...]:
        s, x = _shaped(x_BNF, heads, parts)
        g = g_BNE.reshape(s.images, s.tokens, heads, s.width)
        dx, *dbias = _backward(s, x, bias[0] if bias else None, g, peak, total, interpret)
        return dx.reshape(x_BNF.shape), *dbias

    shared = () if bias_HNN is None else (bias_HNN,)
    dx_BNF, *dbias = target.per_device(run, x_BNF, g_BNE, peak_BHN, total_BHN, shared=shared)
    return dx_BNF, jnp.sum(dbias[0], 0) if dbias else None


attend.defvjp(_attend_forward, _attend_backward)
