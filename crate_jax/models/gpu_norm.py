"""Layer normalisation as GPU kernels (Pallas and Triton).

XLA for GPUs normalises well forwards, but sums the gradients of scale and bias over the rows in further passes, one of
them over an array in float32. Here a program keeps whole rows in registers: the forward pass reads x and writes the
result; the backward pass reads x, the result's gradient and that of a skip connection around the norm, writes the
gradient of x, and sums the other two over its rows.

Shapes: T rows, D width, G = D rounded up to a power of two, R rows of a block, S programs of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crate_jax.parallel import target

WIDEST = 4096  # wider rows do not fit into registers


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    Attributes:
      rows: R, a power of two.
      warps: the number of warps of a program; a warp has 32 threads.
      programs: S at most; the forward pass has one for each block.
    """

    rows: int
    warps: int
    programs: int = 1584

    def __str__(self) -> str:
        """As a line of a table."""
        return f"{self.rows} rows, {self.warps} warps, {self.programs} programs"


def cut_for(width: int) -> Cut:
    """The cut for rows of D numbers: enough threads that each holds at most 32 numbers of a row.

    Of the cuts timed on an H100 (768 numbers) it is the fastest; all its programs run at once there, twelve on a core.
    """
    return Cut(1, max(1, _lanes(width) // (32 * 32)))


def fits(x: jax.Array) -> bool:
    """Whether the program is for a GPU whose kernels take x (B, ..., D), split by B over the devices."""
    wide = 1 < x.ndim and x.shape[-1] <= WIDEST
    return target.is_nvidia() and target.kernels() and wide and target.images_per_device(x.shape[0]) > 0


def _load(ref: Any, rows: Any, mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[rows, :], mask=mask, other=0.0).astype(jnp.float32)


def _statistics(x_RG: jax.Array, lane_G: jax.Array, width: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """The centred rows, 0 outside, and 1 / deviation, (R, 1)."""
    mean_R1 = jnp.sum(x_RG, axis=1, keepdims=True) / width
    centred_RG = jnp.where(lane_G[None, :], x_RG - mean_R1, 0.0)
    return centred_RG, jax.lax.rsqrt(jnp.sum(jnp.square(centred_RG), axis=1, keepdims=True) / width + eps)


def _forward_kernel(total: int, width: int, eps: float, x_ref: Any, scale_ref: Any, bias_ref: Any, y_ref: Any) -> None:
    rows, lane_G = x_ref.shape[0], jnp.arange(x_ref.shape[1]) < width
    mask_RG = (pl.program_id(0) * rows + jnp.arange(rows) < total)[:, None] & lane_G[None, :]
    centred_RG, inverse_R1 = _statistics(_load(x_ref, slice(None), mask_RG), lane_G, width, eps)
    scale_G, bias_G = (triton.load(ref, mask=lane_G, other=0.0) for ref in (scale_ref, bias_ref))
    y_RG = centred_RG * inverse_R1 * scale_G[None, :] + bias_G[None, :]
    triton.store(y_ref, y_RG.astype(y_ref.dtype), mask=mask_RG)


def _backward_kernel(
    rows: int, total: int, width: int, eps: float, x_ref: Any, g_refs: tuple[Any, ...], skip_ref: Any, scale_ref: Any,
    dx_ref: Any, dscale_ref: Any, dbias_ref: Any,
) -> None:  # fmt: skip
    lane_G = jnp.arange(x_ref.shape[1]) < width
    scale_G = triton.load(scale_ref, mask=lane_G, other=0.0)
    blocks, program = x_ref.shape[0] // rows, pl.program_id(0)

    def step(block: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, here = (program * blocks + block) * rows, pl.ds(block * rows, rows)
        mask_RG = (first + jnp.arange(rows) < total)[:, None] & lane_G[None, :]
        x_RG, *g = (_load(ref, here, mask_RG) for ref in (x_ref, *g_refs))
        g_RG = functools.reduce(operator.add, g)
        centred_RG, inverse_R1 = _statistics(x_RG, lane_G, width, eps)
        unit_RG, h_RG = centred_RG * inverse_R1, g_RG * scale_G[None, :]
        mean_R1 = jnp.sum(h_RG, axis=1, keepdims=True) / width
        along_R1 = jnp.sum(h_RG * unit_RG, axis=1, keepdims=True) / width
        dx_RG = (h_RG - mean_R1 - unit_RG * along_R1) * inverse_R1
        if skip_ref is not None:
            dx_RG += _load(skip_ref, here, mask_RG)
        triton.store(dx_ref.at[here, :], dx_RG.astype(dx_ref.dtype), mask=mask_RG)
        return sums[0] + jnp.sum(g_RG * unit_RG, axis=0), sums[1] + jnp.sum(g_RG, axis=0)

    zeros_G = jnp.zeros(x_ref.shape[1], jnp.float32)
    dscale_G, dbias_G = jax.lax.fori_loop(0, blocks, step, (zeros_G, zeros_G))
    triton.store(dscale_ref, dscale_G, mask=lane_G)
    triton.store(dbias_ref, dbias_G, mask=lane_G)


def _lanes(width: int) -> int:
    return max(16, pl.next_power_of_2(width))


def forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float, interpret: bool = False) -> jax.Array:
    """layer_norm(x), (B, ..., D) -> (B, ..., D); `interpret` runs the kernel without a GPU, for tests."""

    def run(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
        D, x_TD = x.shape[-1], x.reshape(-1, x.shape[-1])
        cut = cut_for(D)
        block = pl.BlockSpec((cut.rows, _lanes(D)), lambda i: (i, 0))
        vector = pl.BlockSpec((_lanes(D),), lambda i: (0,))
        y_TD = pl.pallas_call(
            functools.partial(_forward_kernel, len(x_TD), D, eps),
            grid=(pl.cdiv(len(x_TD), cut.rows),),
            in_specs=[block, vector, vector],
            out_specs=block,
            out_shape=jax.ShapeDtypeStruct(x_TD.shape, x.dtype),
            compiler_params=triton.CompilerParams(num_warps=cut.warps),
            metadata={"flops": "0"},  # no products, as benchmarks/ count
            interpret=interpret,
            name="norm_forward",
        )(x_TD, scale_D, bias_D)
        return y_TD.reshape(x.shape)

    return target.per_device(run, x, shared=(scale_D, bias_D))


def backward(
    x: jax.Array, scale_D: jax.Array, g: tuple[jax.Array, ...], skip: jax.Array | None, eps: float,
    interpret: bool = False, cut: Cut | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradients of x, scale and bias from the gradients of the result and of a skip, (B, ..., D) each.

    The gradient of the result is the sum of all `g`, added in float32. `cut` None: :func:`cut_for` this width.
    """

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        x, *others, scale_D = arrays
        D, (x_TD, *others_TD) = x.shape[-1], (a.reshape(-1, x.shape[-1]) for a in (x, *others))
        chosen = cut or cut_for(D)
        rows = chosen.rows * pl.cdiv(pl.cdiv(len(x_TD), chosen.rows), chosen.programs)
        programs = pl.cdiv(len(x_TD), rows)
        block = pl.BlockSpec((rows, _lanes(D)), lambda i: (i, 0))
        sums = pl.BlockSpec((None, _lanes(D)), lambda i: (i, 0))
        sums_SD = jax.ShapeDtypeStruct((programs, D), jnp.float32)
        dx_TD, dscale_SD, dbias_SD = pl.pallas_call(
            functools.partial(_backward_kernel, chosen.rows, len(x_TD), D, eps),
            grid=(programs,),
            in_specs=[
                block,
                (block,) * len(g),
                None if skip is None else block,
                pl.BlockSpec((_lanes(D),), lambda i: (0,)),
            ],
            out_specs=[block, sums, sums],
            out_shape=[jax.ShapeDtypeStruct(x_TD.shape, x.dtype), sums_SD, sums_SD],
            compiler_params=triton.CompilerParams(num_warps=chosen.warps),
            metadata={"flops": "0"},  # no products, as benchmarks/ count
            interpret=interpret,
            name="norm_backward",
        )(x_TD, tuple(others_TD[: len(g)]), None if skip is None else others_TD[-1], scale_D)
        return dx_TD.reshape(x.shape), dscale_SD, dbias_SD

    split = (x, *g) if skip is None else (x, *g, skip)
    dx, dscale_SD, dbias_SD = target.per_device(run, *split, shared=(scale_D,))
    return dx, jnp.sum(dscale_SD, 0), jnp.sum(dbias_SD, 0)
