"""The layers that both encoders and all decoders use.

Shapes: B batch, N tokens, D width, H heads, K head width, E = H * K.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.models import gpu_attention, gpu_norm, tpu_attention
from crate_jax.parallel import target

Dtype = Any

BLOCK_EPS = 1e-5  # CRATE's block norms (torch's default)
FINAL_EPS = 1e-6  # all other norms: CRATE's final ones, and every norm of the ViTs


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation over the last axis, (B, N, D) -> (B, N, D), in the input's dtype; statistics in float32.

    The backward pass is written by hand: it keeps the input and two numbers per token, where automatic
    differentiation keeps three arrays of the input's size in float32. GPUs have kernels (:mod:`gpu_norm`), which need
    the input only.
    """
    return layer_norm_forward(x_BND, scale_D, bias_D, eps)[0]


def layer_norm_forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The result of layer_norm, and the arrays that the backward pass needs: (x, scale, mean, 1 / deviation).

    The last two are missing where kernels compute them again.
    """
    if gpu_norm.fits(x_BND):
        return gpu_norm.forward(x_BND, scale_D, bias_D, eps), (x_BND, scale_D)
    wide = x_BND.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    if target.is_tpu() and x_BND.dtype == jnp.bfloat16:
        # Both sums in the pass that writes x. This loses digits that bfloat16 never had.
        variance = jnp.maximum(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    saved = (x_BND, scale_D, mean, jax.lax.rsqrt(variance + eps))
    return recompute_norm(saved, bias_D, eps), saved


def recompute_norm(saved: tuple[jax.Array, ...], bias_D: jax.Array, eps: float) -> jax.Array:
    """The result of layer_norm from the arrays that its forward pass saves."""
    x_BND, scale_D, *statistics = saved
    if not statistics:
        return gpu_norm.forward(x_BND, scale_D, bias_D, eps)
    mean, inverse = statistics
    y = (x_BND.astype(jnp.float32) - mean) * inverse * scale_D + bias_D
    return y.astype(x_BND.dtype)


def layer_norm_backward(
    eps: float, saved: tuple[jax.Array, ...], *g_BND: jax.Array, skip_BND: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of x, scale and bias from the gradient of the result, the sum of `g_BND`.

    `skip_BND` is a gradient that x has from elsewhere, and is added. GPUs add all in the pass that computes.
    """
    x_BND, scale_D, *statistics = saved
    if not statistics:
        return gpu_norm.backward(x_BND, scale_D, g_BND, skip_BND, eps)
    mean, inverse = statistics
    g = functools.reduce(operator.add, g_BND).astype(jnp.float32)
    unit = (x_BND.astype(jnp.float32) - mean) * inverse
    h = g * scale_D
    dx = (h - jnp.mean(h, -1, keepdims=True) - unit * jnp.mean(h * unit, -1, keepdims=True)) * inverse
    rows = tuple(range(x_BND.ndim - 1))
    dx_BND = dx.astype(x_BND.dtype)
    dx_BND = dx_BND if skip_BND is None else skip_BND + dx_BND
    return dx_BND, jnp.sum(g * unit, rows), jnp.sum(g, rows)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def skip_norm(x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """X for a skip connection, and :func:`layer_norm` of x.

    The backward pass adds both gradients of x in the pass that computes the norm's.
    """
    return x_BND, layer_norm(x_BND, scale_D, bias_D, eps)


def _skip_norm_forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    y_BND, saved = layer_norm_forward(x_BND, scale_D, bias_D, eps)
    return (x_BND, y_BND), saved


def _skip_norm_backward(eps: float, saved: tuple[jax.Array, ...], g: tuple[jax.Array, jax.Array]) -> Any:
    skip_BND, g_BND = g
    return layer_norm_backward(eps, saved, g_BND, skip_BND=skip_BND)


skip_norm.defvjp(_skip_norm_forward, _skip_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def norm_product(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, kernel_DE: jax.Array, eps: float
) -> jax.Array:
    """layer_norm(x) @ kernel, (B, N, E), in the dtype of x.

    The backward pass normalises x again: the product's own backward pass would keep a second array of that size.
    """
    return _norm_product_forward(x_BND, scale_D, bias_D, kernel_DE, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def skip_norm_product(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, kernel_DE: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """X for a skip connection, as in :func:`skip_norm`, and :func:`norm_product` of x."""
    return x_BND, norm_product(x_BND, scale_D, bias_D, kernel_DE, eps)


def _product(x_BND: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    return x_BND @ kernel_DE.astype(x_BND.dtype)


def _norm_product_forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, kernel_DE: jax.Array, eps: float
) -> tuple[jax.Array, tuple[Any, ...]]:
    y_BND, saved = layer_norm_forward(x_BND, scale_D, bias_D, eps)
    return _product(y_BND, kernel_DE), (saved, bias_D, kernel_DE)


def _norm_product_backward(
    eps: float, saved: tuple[Any, ...], g_BNE: jax.Array, skip_BND: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    normed, bias_D, kernel_DE = saved
    _, pull = jax.vjp(_product, recompute_norm(normed, bias_D, eps), kernel_DE)
    dy_BND, dkernel_DE = pull(g_BNE)
    return *layer_norm_backward(eps, normed, dy_BND, skip_BND=skip_BND), dkernel_DE


norm_product.defvjp(_norm_product_forward, _norm_product_backward)


def _skip_norm_product_forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, kernel_DE: jax.Array, eps: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    y_BNE, saved = _norm_product_forward(x_BND, scale_D, bias_D, kernel_DE, eps)
    return (x_BND, y_BNE), saved


def _skip_norm_product_backward(eps: float, saved: tuple[Any, ...], g: tuple[jax.Array, jax.Array]) -> Any:
    skip_BND, g_BNE = g
    return _norm_product_backward(eps, saved, g_BNE, skip_BND)


skip_norm_product.defvjp(_skip_norm_product_forward, _skip_norm_product_backward)


def gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function; on GPUs and TPUs its backward pass keeps x only, and computes the rest again."""
    if target.is_nvidia() and x.dtype == jnp.bfloat16:
        return _narrow_gelu(x)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    if not (target.is_nvidia() or target.is_tpu()):
        return exact(x)
    return jax.checkpoint(exact, prevent_cse=target.is_nvidia())(x)


@jax.custom_vjp
def _narrow_gelu(x: jax.Array) -> jax.Array:
    """GELU of bfloat16, computed in float32 within 4e-7.

    XLA's complementary error function is right to the last digit of float32 everywhere, by three formulas of which it
    computes all; so the time of a pass was that of its instructions, not that of its bytes.
    """
    wide, tail, _ = _normal_tail(x)
    return (jnp.maximum(wide, 0) - jnp.abs(wide) * tail).astype(x.dtype)


def _normal_tail(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, the normal distribution's probability above |x|, and exp(-x^2 / 2), all in float32.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; in float32 within 4e-7.
    """
    wide = x.astype(jnp.float32)
    bell = jnp.exp(-0.5 * jnp.square(wide))
    t = jnp.square(jax.lax.rsqrt(1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(wide)))  # a division takes longer
    series = functools.reduce(
        lambda total, a: total * t + a, (1.421413741, -0.284496736, 0.254829592), 1.061405429 * t - 1.453152027
    )
    return wide, 0.5 * bell * t * series, bell


def _narrow_gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)  # else XLA keeps what it has computed in the forward pass, in float32
    wide, tail, bell = _normal_tail(x)
    below = jnp.where(wide > 0, 1 - tail, tail)
    slope = below + wide * bell * (1 / math.sqrt(2 * math.pi))
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


_narrow_gelu.defvjp(lambda x: (_narrow_gelu(x), x), _narrow_gelu_backward)


def attention(q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, bias_BHNM: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v, (B, N, H, K); softmax in float32."""
    # Heads before tokens: both einsums are then plain batched products, which run two to six times
    # faster on a CPU, and not slower elsewhere, because XLA chooses the layout.
    q_BHNK, k_BHMK, v_BHMK = (x.transpose(0, 2, 1, 3) for x in (q_BNHK, k_BMHK, v_BMHK))
    weights_BHNM = attention_weights(q_BHNK, k_BHMK, bias_BHNM).astype(v_BHMK.dtype)
    return jnp.einsum("bhnm,bhmk->bhnk", weights_BHNM, v_BHMK).transpose(0, 2, 1, 3)


def attention_kernel(
    images: int, tokens: int, heads: int, width: int, parts: int, dtype: Dtype, bias_BHNN: Any = None
) -> Callable[..., jax.Array] | None:
    """What computes attention in the program that is being traced, if it is a kernel.

    Args:
      images: B, of all devices.
      tokens: N.
      heads: H.
      width: E.
      parts: 3, or 1 for MSSA.
      dtype: the type of the tokens.
      bias_BHNN: a bias on the logits, (B or 1, H, N, N), or its shape, or None.

    Returns:
      :func:`gpu_attention.attend`, :func:`tpu_attention.attend`, or None: no kernel fits, XLA computes.
    """
    name, kernel = "XLA", None
    if gpu_attention.fits(images, heads, width, dtype, bias_BHNN):
        name, kernel = "Triton kernels", gpu_attention.attend
    elif tpu_attention.fits(images, tokens, heads, width, parts, dtype, bias_BHNN):
        name, kernel = "Pallas kernels", tpu_attention.attend
    if (noted := _noted.get()) is not None:
        noted[f"{name} ({tokens} tokens, {heads} heads of {width // heads})"] = None
    return kernel


_noted: contextvars.ContextVar[dict[str, None] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def attention_noted() -> Iterator[dict[str, None]]:
    """Gives a dictionary whose keys say, once programs are traced in this context, what computes their attention."""
    mine: dict[str, None] = {}
    token = _noted.set(mine)
    try:
        yield mine
    finally:
        _noted.reset(token)


def attention_weights(q_BHNK: jax.Array, k_BHMK: jax.Array, bias_BHNM: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias), (B, H, N, M) float32."""
    scale = q_BHNK.shape[-1] ** -0.5
    logits_BHNM = jnp.einsum("bhnk,bhmk->bhnm", q_BHNK * scale, k_BHMK, preferred_element_type=jnp.float32)
    if bias_BHNM is not None:
        logits_BHNM = logits_BHNM + bias_BHNM
    return jax.nn.softmax(logits_BHNM, axis=-1)


class Norm(nn.Module):
    """Layer normalisation with learned scale and bias, both (D,)."""

    eps: float = FINAL_EPS

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """Normalises over the last axis."""
        return layer_norm(x_BND, *self.scale_and_bias(x_BND.shape[-1]), self.eps)

    def skip(self, x_BND: jax.Array) -> tuple[jax.Array, jax.Array]:
        """X for a skip connection, and the normalised x."""
        return skip_norm(x_BND, *self.scale_and_bias(x_BND.shape[-1]), self.eps)

    @nn.compact
    def scale_and_bias(self, D: int) -> tuple[jax.Array, jax.Array]:
        """The parameters, (D,) each, for functions that contain the normalisation."""
        scale = self.param("scale", nn.initializers.ones_init(), (D,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros_init(), (D,), jnp.float32)


def dense(features: int, name: str, dtype: Dtype, bias: bool = True, init: Any = None, factor: Any = None) -> nn.Dense:
    """A dense layer with float32 parameters that computes in `dtype`; its kernel is Xavier-uniform by default.

    A `factor`, a number or one per feature, multiplies kernel and bias; with -1 the result is negative to the bit.
    """
    return nn.Dense(
        features,
        use_bias=bias,
        name=name,
        dtype=dtype,
        kernel_init=init or nn.initializers.xavier_uniform(),
        promote_dtype=nn.dtypes.promote_dtype if factor is None else functools.partial(_scaled, factor),
    )


def _scaled(
    factor: Any, x: jax.Array, *weights: jax.Array | None, dtype: Any = None, inexact: bool = True
) -> list[jax.Array | None]:
    """Flax's promotion of the input, the kernel and the bias to a common type; `factor` multiplies the latter two."""
    scaled = (None if w is None else factor * w for w in weights)
    return nn.dtypes.promote_dtype(x, *scaled, dtype=dtype, inexact=inexact)


# What a recomputed block keeps from the forward pass.
REMAT: dict[str, Any] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
}


def remat_rule(config: ConfigDict) -> str:
    """The row of REMAT that a config asks for; empty: its blocks are not recomputed."""
    return config.remat_keep if config.remat else ""


def scan_blocks(block: type[nn.Module], depth: int, remat: str, *args: object, in_axes: object = 0) -> nn.Module:
    """`depth` copies of a block as one scan, parameters stacked under the name ``blocks``.

    Args:
      block: a module whose call takes (tokens, *inputs) and returns (tokens, None).
      depth: number of copies.
      remat: a row of REMAT: the backward pass recomputes each block, except for what the row keeps; empty: it
        recomputes nothing.
      *args: the block's attributes.
      in_axes: for each of the call's further inputs, 0 (one slice per layer) or nn.broadcast.
    """
    unrolled = target.is_nvidia()
    # Without a loop XLA would find the forward pass in the backward pass again, and keep all that should be computed.
    cls = nn.remat(block, prevent_cse=unrolled, policy=REMAT[remat]) if remat else block
    return nn.scan(
        cls,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=depth,
        # As a loop it copies each array that the backward pass needs into a stack, and out again.
        unroll=depth if unrolled else 1,
    )(*args, name="blocks")


def block_points(intermediates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The named points of all blocks that :func:`scan_blocks` made, name -> (L, B, ...).

    Args:
      intermediates: the part of Flax's collection ``intermediates`` that belongs to the module of the blocks.
    """
    return {name: values[0] for name, values in intermediates["blocks"].items()}
