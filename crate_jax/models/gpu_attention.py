"""Attention as GPU kernels (Pallas and Triton): no array of N x N numbers per image goes through the GPU's memory.

The kernels read queries, keys and values where the product before them has written them, side by side in one array,
and write the gradient in the same layout, so that nothing is split, transposed or padded around them. MSSA is the case
of one part: one tensor is query, key and value. Its logits are symmetric: its backward pass needs seven products per
tile where attention needs eight.

A program computes a block of R rows of one head of one image, and goes through the other tokens in blocks of C: the
softmax over blocks is that of FlashAttention (Dao et al., arXiv 2205.14135). The last block of 197 tokens is masked.
The forward pass keeps the largest logit, as a binary logarithm, and the inverse of the sum of each row. The backward
pass recomputes the weights from them in two kernels. The first computes delta, the sum over keys of weight times its
gradient, and the gradient of queries; the second goes through the queries for the gradients of keys and values. For
MSSA the second computes the whole gradient. Delta is not just taken from the result (as g . y), whose rounding leaves
noise where the softmax saturates. No kernel adds to memory that another one adds to, so results do not depend on an
order.

What limits the kernels is the number of instructions, the threads that a core's registers and shared memory hold, and
the bytes read from the L2 cache. So there is one multiply-add and one exponential per number where XLA's Triton makes
two and four instructions, and no division; a kernel has at most two sums in registers.

A relative bias is one array for all images. Its gradient, a sum over images, has a kernel of its own, which goes
through some of the images for each tile: so it is written a few times, not once per image.

Shapes: B images, N tokens, P parts (3: queries, keys, values; 1: MSSA), H heads, K head width, E = H * K, R rows and C
columns of a tile, G = K rounded up to a power of two, M = N rounded up to whole tiles, S sums over parts of the batch.
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

LOG2E = math.log2(math.e)
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
class Tile:
    """How a kernel is cut.

    Attributes:
      rows: R, the tokens of a program; a power of two, at least 16.
      columns: C, the tokens that it goes through at a time; the same.
      warps: the number of warps of a program; a warp has 32 threads.
      stages: the tiles that are loaded ahead of their use, and the one in use.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How all kernels are cut.

    Attributes:
      forward: the forward pass.
      first: the first kernel of the backward pass: delta, and of attention the gradient of queries.
      second: its second kernel, which computes the other gradients.
      bias: the gradient of a bias.
      sums: sums over parts of the batch that this one writes.
    """

    forward: Tile
    first: Tile
    second: Tile
    bias: Tile
    sums: int = 8


def tiles_for(width: int, parts: int) -> Tiles:
    """The tiles for heads of `width` and P parts: the fastest of those that were timed on an H100 (docs/results.md)."""
    small, ahead = Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)
    if width > 64:  # not timed; a program has twice as many numbers of each token
        return Tiles(small, small, small, small)
    return Tiles(ahead, ahead, Tile(128, 32, 4, 2) if parts == 1 else ahead, Tile(64, 64, 4, 3))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes of a call, and what its kernels share."""

    images: int
    tokens: int
    parts: int
    heads: int
    width: int  # K
    tiles: Tiles
    interpret: bool
    tile: Tile  # of the kernel

    @property
    def rows(self) -> int:
        return self.tile.rows

    @property
    def columns(self) -> int:
        return self.tile.columns

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tokens, self.rows)

    @property
    def steps(self) -> int:
        """The tiles that a program goes through."""
        return pl.cdiv(self.tokens, self.columns)

    @property
    def padded(self) -> int:
        """M."""
        all_ = (self.tiles.forward, self.tiles.first, self.tiles.second, self.tiles.bias)
        return max(pl.cdiv(self.tokens, n) * n for tile in all_ for n in (tile.rows, tile.columns))

    @property
    def lanes(self) -> int:
        """G."""
        return max(NARROWEST, pl.next_power_of_2(self.width))

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def cut(self, tile: Tile) -> _Shape:
        """The same with another kernel's tile."""
        return dataclasses.replace(self, tile=tile)

    def part(self, role: int) -> int:
        """The part that is the query (role 0), the key (1) or the value (2)."""
        return min(role, self.parts - 1)

    def inside(self, block: Any, size: int) -> jax.Array:
        """Which places of a block are tokens, bool (size,)."""
        return block * size + jnp.arange(size) < self.tokens

    def mask(self, block: Any, size: int) -> jax.Array:
        """Which numbers of a block (size, G) exist."""
        inside = self.inside(block, size)[:, None]
        if self.width == self.lanes:
            return jnp.broadcast_to(inside, (size, self.lanes))
        return inside & (jnp.arange(self.lanes) < self.width)[None, :]

    def load(self, ref: Any, block: Any, size: int, *part: int, image: Any = 0) -> jax.Array:
        """A block (size, G) of an array (images, M, G), or of a part of an array (images, M, P, G); zeros outside."""
        at = (_place(image), pl.ds(block * size, size), *map(_place, part))
        return triton.load(ref.at[at], mask=self.mask(block, size), other=0.0)

    def numbers(self, ref: Any, block: Any, size: int, image: Any = 0) -> jax.Array:
        """One number per token of a block from an array (images, M), float32 (size,), zeros outside."""
        at = _place(image), pl.ds(block * size, size)
        return triton.load(ref.at[at], mask=self.inside(block, size), other=0.0)

    def bias(self, ref: Any, block: Any, other: Any) -> jax.Array:
        """A tile (R, C) of a bias that :func:`_prepared` has made, in float32."""
        at = pl.ds(block * self.rows, self.rows), pl.ds(other * self.columns, self.columns)
        return triton.load(ref.at[at]).astype(jnp.float32)

    def logits(self, product_RC: jax.Array, bias_RC: jax.Array | None, other: Any) -> tuple[jax.Array, float]:
        """The logits of a tile, -inf in columns that are not tokens, and the factor that makes them binary logarithms.

        Without a bias the factor is left to the exponential, where it costs nothing.
        """
        unit = self.scale * LOG2E
        if bias_RC is not None:
            return self.fused(product_RC, unit, bias_RC), 1.0
        return jnp.where(self.inside(other, self.columns)[None, :], product_RC, -jnp.inf), unit

    def power(self, logits: jax.Array, unit: float, peak: jax.Array) -> jax.Array:
        """The exponential of logit minus peak; `unit` times logits, and the peaks, are binary logarithms."""
        return self.exp2(logits - peak if unit == 1 else self.fused(logits, unit, -peak))

    def fused(self, a: jax.Array, b: jax.Array | float, c: jax.Array) -> jax.Array:
        """A * b + c, float32, as one instruction: XLA for GPUs makes two."""
        a, b, c = jnp.broadcast_arrays(a, b, c)
        return a * b + c if self.interpret else self._instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def exp2(self, x: jax.Array) -> jax.Array:
        """2^x as one instruction; XLA's own adds three for results below 2^-126, which are 0 here."""
        return jnp.exp2(x) if self.interpret else self._instruction("ex2.approx.ftz.f32 $0, $1;", x)

    def _instruction(self, text: str, *arrays: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
        registers = ",".join(["=f", *["f"] * len(arrays)])
        (y,) = triton.elementwise_inline_asm(
            text, args=arrays, constraints=registers, pack=1, result_shape_dtypes=[like]
        )
        return y


def _place(index: Any) -> jax.Array:
    return jnp.asarray(index, jnp.int32)  # interpret mode takes no number of Python


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """A matrix product in float32 that contracts axis contract[0] of a with contract[1] of b."""
    # float32 operands only in tests and debug runs; bfloat16 products are exact in one pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    b = b.T if contract[1] == 1 else b
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(s: _Shape, x_ref: Any, bias_ref: Any, y_ref: Any, peak_ref: Any, inverse_ref: Any) -> None:
    block = pl.program_id(0)
    query_RG = s.load(x_ref, block, s.rows, s.part(0))

    def step(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y_RG, peak_R, total_R = carry
        key_CG, value_CG = (s.load(x_ref, other, s.columns, s.part(role)) for role in (1, 2))
        bias_RC = None if bias_ref is None else s.bias(bias_ref, block, other)
        logits_RC, unit = s.logits(_product(query_RG, key_CG, (1, 1)), bias_RC, other)
        new_R = jnp.maximum(peak_R, jnp.max(logits_RC, axis=1) * unit)
        weights_RC, shrink_R = s.power(logits_RC, unit, new_R[:, None]), s.exp2(peak_R - new_R)
        y_RG = y_RG * shrink_R[:, None] + _product(weights_RC.astype(value_CG.dtype), value_CG)
        return y_RG, new_R, total_R * shrink_R + jnp.sum(weights_RC, axis=1)

    start = jnp.zeros((s.rows, s.lanes), jnp.float32), jnp.full((s.rows,), -jnp.inf), jnp.zeros((s.rows,))
    y_RG, peak_R, total_R = jax.lax.fori_loop(0, s.steps, step, start)
    inverse_R = 1 / total_R
    triton.store(y_ref, (y_RG * inverse_R[:, None]).astype(y_ref.dtype), mask=s.mask(block, s.rows))
    triton.store(peak_ref, peak_R, mask=s.inside(block, s.rows))
    triton.store(inverse_ref, inverse_R, mask=s.inside(block, s.rows))


class _Queries:
    """A block of tokens as queries, and the gradients of their results.

    Attributes:
      block: its number.
      query_RG, g_RG: the arrays.
      peak_R, inverse_R: what the forward pass keeps of the rows.
    """

    def __init__(self, s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, inverse_ref: Any):
        self._s, self._x_ref, self._bias_ref, self.block = s, x_ref, bias_ref, pl.program_id(0)
        self.query_RG, self.g_RG = s.load(x_ref, self.block, s.rows, s.part(0)), s.load(g_ref, self.block, s.rows)
        self.peak_R, self.inverse_R = (s.numbers(ref, self.block, s.rows) for ref in (peak_ref, inverse_ref))

    def tile(self, other: jax.Array) -> tuple[jax.Array, ...]:
        """The keys of other tokens, the weights without their inverse, and the gradients of the weights."""
        s = self._s
        key_CG, value_CG = (s.load(self._x_ref, other, s.columns, s.part(role)) for role in (1, 2))
        bias_RC = None if self._bias_ref is None else s.bias(self._bias_ref, self.block, other)
        logits = s.logits(_product(self.query_RG, key_CG, (1, 1)), bias_RC, other)
        return key_CG, s.power(*logits, self.peak_R[:, None]), _product(self.g_RG, value_CG, (1, 1))


def _delta_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, inverse_ref: Any, delta_ref: Any
) -> None:
    own = _Queries(s, x_ref, bias_ref, g_ref, peak_ref, inverse_ref)

    def step(other: jax.Array, sum_R: jax.Array) -> jax.Array:
        _, weights_RC, dweights_RC = own.tile(other)
        return sum_R + jnp.sum(weights_RC * dweights_RC, axis=1)

    delta_R = jax.lax.fori_loop(0, s.steps, step, jnp.zeros((s.rows,))) * own.inverse_R
    triton.store(delta_ref, delta_R, mask=s.inside(own.block, s.rows))


def _query_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, inverse_ref: Any, _: None, __: None, y_ref: Any,
    delta_ref: Any, dx_ref: Any,
) -> None:  # fmt: skip
    """Writes delta and the gradient of queries in one pass over the tiles.

    With near = g . y in place of delta, slope = w (dw - near) and missing = sum slope, delta is near + missing, and the
    gradient, the sum of w (dw - delta) k, is the sum of slope k less missing times the sum of w k.
    """
    own = _Queries(s, x_ref, bias_ref, g_ref, peak_ref, inverse_ref)
    near_R = jnp.sum(own.g_RG.astype(jnp.float32) * s.load(y_ref, own.block, s.rows).astype(jnp.float32), axis=1)

    def step(other: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        key_CG, weights_RC, dweights_RC = own.tile(other)
        slope_RC = weights_RC * (dweights_RC - near_R[:, None])
        return (
            sums[0] + _product(slope_RC.astype(key_CG.dtype), key_CG),
            sums[1] + _product(weights_RC.astype(key_CG.dtype), key_CG),
            sums[2] + jnp.sum(slope_RC, axis=1),
        )

    zeros_RG = jnp.zeros((s.rows, s.lanes), jnp.float32)
    sums = jax.lax.fori_loop(0, s.steps, step, (zeros_RG, zeros_RG, jnp.zeros((s.rows,))))
    missing_R = sums[2] * own.inverse_R
    dquery_RG = (sums[0] - sums[1] * missing_R[:, None]) * (own.inverse_R * s.scale)[:, None]
    triton.store(delta_ref, near_R + missing_R, mask=s.inside(own.block, s.rows))
    triton.store(dx_ref, dquery_RG.astype(x_ref.dtype), mask=s.mask(own.block, s.rows))


class _Others:
    """A tile of other tokens as queries, of which the block's own tokens are the keys: rows are keys here.

    Places that are not tokens have an inverse of 0, and so no weight.
    """

    def __init__(
        self, s: _Shape, x_ref: Any, g_ref: Any, peak_ref: Any, inverse_ref: Any, delta_ref: Any, other: jax.Array
    ):
        self._s = s
        self.query_CG, self.g_CG = s.load(x_ref, other, s.columns, s.part(0)), s.load(g_ref, other, s.columns)
        self._peak_C, self._inverse_C, self._delta_C = (
            s.numbers(ref, other, s.columns) for ref in (peak_ref, inverse_ref, delta_ref)
        )

    def weights(self, product_RC: jax.Array, bias_RC: jax.Array | None) -> jax.Array:
        """The weights from keys times queries."""
        unit, peak_1C = self._s.scale * LOG2E, self._peak_C[None, :]
        if bias_RC is None:
            weights_RC = self._s.power(product_RC, unit, peak_1C)
        else:
            weights_RC = self._s.power(self._s.fused(product_RC, unit, bias_RC), 1.0, peak_1C)
        return weights_RC * self._inverse_C[None, :]

    def slopes(self, weights_RC: jax.Array, value_RG: jax.Array) -> jax.Array:
        """The gradients of keys times queries."""
        dweights_RC, scale = _product(value_RG, self.g_CG, (1, 1)), self._s.scale
        return weights_RC * self._s.fused(dweights_RC, scale, -(self._delta_C * scale)[None, :])


def _mssa_kernel(
    s: _Shape, x_ref: Any, _: None, g_ref: Any, peak_ref: Any, inverse_ref: Any, delta_ref: Any, dx_ref: Any
) -> None:
    """Writes the gradient of w, which is query, key and value; the logits of a tile are those of the turned one."""
    block = pl.program_id(0)
    own_RG, own_g_RG, dtype = s.load(x_ref, block, s.rows, 0), s.load(g_ref, block, s.rows), x_ref.dtype
    peak_R, inverse_R, delta_R = (s.numbers(ref, block, s.rows) for ref in (peak_ref, inverse_ref, delta_ref))
    factor_R = inverse_R * s.scale
    shift_R = -delta_R * factor_R

    def step(other: jax.Array, sum_RG: jax.Array) -> jax.Array:
        others = _Others(s, x_ref, g_ref, peak_ref, inverse_ref, delta_ref, other)
        w_CG = others.query_CG
        product_RC = _product(own_RG, w_CG, (1, 1))
        weights_RC = s.power(*s.logits(product_RC, None, other), peak_R[:, None])
        dweights_RC = _product(own_g_RG, w_CG, (1, 1))
        slope_RC = weights_RC * s.fused(dweights_RC, factor_R[:, None], shift_R[:, None])
        turned_RC = others.weights(product_RC, None)
        slope_RC += others.slopes(turned_RC, own_RG)
        sum_RG += _product(slope_RC.astype(dtype), w_CG)
        return sum_RG + _product(turned_RC.astype(dtype), others.g_CG)

    dw_RG = jax.lax.fori_loop(0, s.steps, step, jnp.zeros((s.rows, s.lanes), jnp.float32))
    triton.store(dx_ref.at[:, _place(0), :], dw_RG.astype(dtype), mask=s.mask(block, s.rows))


def _key_value_kernel(
    s: _Shape, x_ref: Any, _: None, g_ref: Any, peak_ref: Any, inverse_ref: Any, delta_ref: Any, turned_ref: Any,
    __: Any, dx_ref: Any,
) -> None:  # fmt: skip
    """Writes the gradients of keys and values, beside the one of queries that is there."""
    block = pl.program_id(0)
    key_RG, value_RG = (s.load(x_ref, block, s.rows, s.part(role)) for role in (1, 2))
    dtype = x_ref.dtype

    def step(other: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        others = _Others(s, x_ref, g_ref, peak_ref, inverse_ref, delta_ref, other)
        bias_RC = None if turned_ref is None else s.bias(turned_ref, block, other)
        weights_RC = others.weights(_product(key_RG, others.query_CG, (1, 1)), bias_RC)
        slope_RC = others.slopes(weights_RC, value_RG)
        return (
            sums[0] + _product(slope_RC.astype(dtype), others.query_CG),
            sums[1] + _product(weights_RC.astype(dtype), others.g_CG),
        )

    zeros_RG = jnp.zeros((s.rows, s.lanes), jnp.float32)
    for part, gradient_RG in enumerate(jax.lax.fori_loop(0, s.steps, step, (zeros_RG, zeros_RG)), 1):
        triton.store(dx_ref.at[:, _place(part), :], gradient_RG.astype(dtype), mask=s.mask(block, s.rows))


def _bias_kernel(
    s: _Shape, x_ref: Any, bias_ref: Any, g_ref: Any, peak_ref: Any, inverse_ref: Any, delta_ref: Any, dbias_ref: Any
) -> None:
    rows, columns = pl.program_id(0), pl.program_id(1)
    bias_RC = s.bias(bias_ref, rows, columns)

    def step(image: jax.Array, sum_RC: jax.Array) -> jax.Array:
        query_RG, g_RG = s.load(x_ref, rows, s.rows, s.part(0), image=image), s.load(g_ref, rows, s.rows, image=image)
        key_CG, value_CG = (s.load(x_ref, columns, s.columns, s.part(role), image=image) for role in (1, 2))
        peak_R, inverse_R, delta_R = (s.numbers(r, rows, s.rows, image) for r in (peak_ref, inverse_ref, delta_ref))
        weights_RC = s.power(*s.logits(_product(query_RG, key_CG, (1, 1)), bias_RC, columns), peak_R[:, None])
        shift_R = -delta_R * inverse_R
        dweights_RC = s.fused(_product(g_RG, value_CG, (1, 1)), inverse_R[:, None], shift_R[:, None])
        return s.fused(weights_RC, dweights_RC, sum_RC)

    sum_RC = jax.lax.fori_loop(0, x_ref.shape[0], step, jnp.zeros((s.rows, s.columns), jnp.float32))
    triton.store(dbias_ref, sum_RC, mask=s.inside(rows, s.rows)[:, None] & s.inside(columns, s.columns)[None, :])


def _prepared(s: _Shape, bias_HNN: jax.Array | None, dtype: Any, turned: bool = False) -> jax.Array | None:
    """A bias as the kernels read it: binary logarithms, (H, M, M); columns, or when `turned` rows, are the keys.

    Places of keys that are not tokens hold -inf. Rows of whole tiles let a thread read 16 bytes at once; rows of 197
    numbers would be read one number at a time. Beside bfloat16 it is float16, three bits more exact than queries and
    keys: each image reads it, and half the bytes take half the time. Float16 holds no more than 65504.
    """
    if bias_HNN is None:
        return None
    wide, exact = (0, s.padded - s.tokens), dtype == jnp.float32
    bias_HNN = bias_HNN * LOG2E if exact else jnp.clip(bias_HNN * LOG2E, -6e4, 6e4).astype(jnp.float16)
    bias_HMM = jnp.pad(bias_HNN, ((0, 0), wide, (0, 0)))
    bias_HMM = jnp.pad(bias_HMM, ((0, 0), (0, 0), wide), constant_values=-jnp.inf)
    return bias_HMM.swapaxes(1, 2) if turned else bias_HMM


@dataclasses.dataclass(frozen=True)
class _Output:
    """An array that a kernel writes, its blocks, and the part of its numbers that this kernel writes."""

    shape: tuple[int, ...]
    dtype: Any
    blocks: pl.BlockSpec
    written: float = 1.0


def _call(
    kernel: Callable[..., None],
    s: _Shape,
    arrays: Sequence[jax.Array | None],
    outputs: Sequence[_Output],
    products: int,
    sums: int = 0,
    into: jax.Array | None = None,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
      kernel: called with the sizes and references of inputs and outputs.
      s: the sizes.
      arrays: x (B, N, P, H, K), a bias (H, M, M) or None; then, as far as the kernel needs them, g (B, N, H, K), three
        numbers of each row, float32 (B, H, N), the turned bias (H, M, M) and y (B, N, H, K); None for what it skips.
      outputs: their blocks are functions of (block, head, image), or with `sums` of (row of tiles, column of tiles,
        head and part of the batch).
      products: the number of products of N x N x K per image and head, for counting.
      sums: 0: a program reads one image; else B / sums images.
      into: the array in whose place the first output is written; what the kernel does not write stays.
    """
    M, images = s.padded, s.images // sums if sums else 1
    head = (lambda i, j, ph: ph % s.heads) if sums else (lambda i, h, b: h)
    part = (lambda i, j, ph: ph // s.heads) if sums else (lambda i, h, b: b)
    bias = pl.BlockSpec((None, M, M), lambda *at: (head(*at), 0, 0))
    result = pl.BlockSpec((images, M, None, s.lanes), lambda *at: (part(*at), 0, head(*at), 0))
    inputs = (
        pl.BlockSpec((images, M, s.parts, None, s.lanes), lambda *at: (part(*at), 0, 0, head(*at), 0)),
        bias,
        result,
        *[pl.BlockSpec((images, None, M), lambda *at: (part(*at), head(*at), 0))] * 3,
        bias,
        result,
    )
    read = [a for a in arrays if a is not None]
    specs = [None if a is None else spec for a, spec in zip(arrays, inputs, strict=False)]
    shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs]
    flops = 2 * products * s.images * s.heads * s.tokens**2 * s.width
    moved = sum(a.size * a.dtype.itemsize for a in read)
    moved += sum(int(o.written * math.prod(o.shape)) * jnp.dtype(o.dtype).itemsize for o in outputs)
    if into is not None:
        arrays, specs = (*arrays, into), [*specs, outputs[0].blocks]
    return pl.pallas_call(
        functools.partial(kernel, s),
        grid=(s.blocks, s.steps, s.heads * sums) if sums else (s.blocks, s.heads, s.images),
        in_specs=specs,
        out_specs=[o.blocks for o in outputs],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=s.tile.warps, num_stages=s.tile.stages),
        metadata={"flops": str(flops), "bytes_accessed": str(moved)},  # as benchmarks/ count
        input_output_aliases={} if into is None else {len(read): 0},
        interpret=s.interpret,
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",  # as a profile shows it
    )(*arrays)


def _forward(s: _Shape, x: jax.Array, bias: jax.Array | None) -> list[jax.Array]:
    s = s.cut(s.tiles.forward)
    y = pl.BlockSpec((None, s.rows, None, s.lanes), lambda i, h, b: (b, i, h, 0))
    outputs = [_Output((s.images, s.tokens, s.heads, s.width), x.dtype, y), *[_numbers(s)] * 2]
    return _call(_forward_kernel, s, (x, _prepared(s, bias, x.dtype)), outputs, 2)


def _numbers(s: _Shape) -> _Output:
    blocks = pl.BlockSpec((None, None, s.rows), lambda i, h, b: (b, h, i))
    return _Output((s.images, s.heads, s.tokens), jnp.float32, blocks)


def _backward(
    s: _Shape, x: jax.Array, bias: jax.Array | None, g: jax.Array, peak: jax.Array, inverse: jax.Array,
    y: jax.Array | None,
) -> list[jax.Array]:  # fmt: skip
    known = [x, _prepared(s, bias, x.dtype), g, peak, inverse]

    def output(axis: int | None, written: float = 1.0) -> _Output:
        blocks = pl.BlockSpec((None, s.rows, axis, None, s.lanes), lambda i, h, b: (b, i, 0, h, 0))
        return _Output(x.shape, x.dtype, blocks, written)

    s = s.cut(s.tiles.first)
    if s.parts == 1:
        known += _call(_delta_kernel, s, known, [_numbers(s)], 2)
        s = s.cut(s.tiles.second)
        found = _call(_mssa_kernel, s, known, [output(1)], 5)
    else:
        delta, dx = _call(_query_kernel, s, [*known, None, None, y], [_numbers(s), output(None, 1 / 3)], 4)
        known.append(delta)
        s = s.cut(s.tiles.second)
        arrays = [x, None, *known[2:], _prepared(s, bias, x.dtype, turned=True)]
        found = _call(_key_value_kernel, s, arrays, [output(s.parts, 2 / 3)], 4, into=dx)
    if bias is not None:
        s = s.cut(s.tiles.bias)
        sums = math.gcd(s.images, s.tiles.sums)
        tiles = pl.BlockSpec((None, None, s.rows, s.columns), lambda i, j, ph: (ph // s.heads, ph % s.heads, i, j))
        shape = (sums, s.heads, s.tokens, s.tokens)
        found += _call(_bias_kernel, s, known, [_Output(shape, jnp.float32, tiles)], 2, sums)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def attend(
    x_BNF: jax.Array,
    bias_HNN: jax.Array | None,
    heads: int,
    parts: int,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v per head; softmax in float32.

    Args:
      x_BNF: queries, keys and values side by side, (B, N, P * E), or with one part w, which is all three.
      bias_HNN: a bias on the logits of all images, float32 (H, N, N), or None.
      heads: H.
      parts: P, 3 or 1; with one part there is no bias.
      interpret: runs the kernels without a GPU, for tests.
      tiles: how the kernels are cut; None: :func:`tiles_for` these sizes.

    Returns:
      (B, N, E).
    """
    return _attend_forward(x_BNF, bias_HNN, heads, parts, interpret, tiles)[0]


def _shaped(x_BNF: jax.Array, heads: int, parts: int, interpret: bool, tiles: Tiles | None) -> tuple[_Shape, jax.Array]:
    B, N, F = x_BNF.shape
    K = F // parts // heads
    tiles = tiles or tiles_for(K, parts)
    return _Shape(B, N, parts, heads, K, tiles, interpret, tiles.forward), x_BNF.reshape(B, N, parts, heads, K)


def _attend_forward(
    x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, interpret: bool, tiles: Tiles | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    def run(x_BNF: jax.Array, *bias: jax.Array) -> tuple[jax.Array, ...]:
        s, x = _shaped(x_BNF, heads, parts, interpret, tiles)
        y, peak, inverse = _forward(s, x, bias[0] if bias else None)
        return y.reshape(*x_BNF.shape[:2], -1), peak, inverse

    shared = () if bias_HNN is None else (bias_HNN,)
    y_BNE, peak_BHN, inverse_BHN = target.per_device(run, x_BNF, shared=shared)
    results = () if parts == 1 else (y_BNE,)  # the product after it keeps y too
    return y_BNE, (x_BNF, bias_HNN, peak_BHN, inverse_BHN, *results)


def _attend_backward(
    heads: int, parts: int, interpret: bool, tiles: Tiles | None, saved: tuple[Any, ...], g_BNE: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x_BNF, bias_HNN, peak_BHN, inverse_BHN, *results = saved

    def run(
        x_BNF: jax.Array, g_BNE: jax.Array, peak: jax.Array, inverse: jax.Array, *others: jax.Array
    ) -> tuple[jax.Array, ...]:
        y_BNE, bias = others[: len(results)], others[len(results) :]
        s, x = _shaped(x_BNF, heads, parts, interpret, tiles)
        g, *y = (a.reshape(s.images, s.tokens, heads, s.width) for a in (g_BNE, *y_BNE))
        dx, *dbias = _backward(s, x, bias[0] if bias else None, g, peak, inverse, y[0] if y else None)
        return dx.reshape(x_BNF.shape), *dbias

    shared = () if bias_HNN is None else (bias_HNN,)
    dx_BNF, *dbias = target.per_device(run, x_BNF, g_BNE, peak_BHN, inverse_BHN, *results, shared=shared)
    return dx_BNF, jnp.sum(dbias[0], 0) if dbias else None


attend.defvjp(_attend_forward, _attend_backward)
