"""The CRATE encoder (arXiv 2404.02446, eqs. 2.6-2.14): each block compresses, then sparsifies.

The maths stands in plain functions (:func:`norm_mssa`, :func:`norm_ista`, :func:`ista_overcomplete`); the
modules only create and name parameters. Intermediate tokens pass through named points, ``input``
(Z^l), ``after_mssa`` (Z^{l+1/2}) and ``after_ista`` (Z^{l+1}), and ``code`` where the dictionary is
over-complete. They cost nothing unless they are requested with ``mutable=["intermediates"]``.

Shapes: B batch, N tokens (class token included), D width, H heads, K head width, E = H * K,
A dictionary atoms, L layers.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.beginning import BEGINNINGS, XAVIER
from crate_jax.models.corruption import CLEAN, Corruption
from crate_jax.models.embedding import Embedding
from crate_jax.models.layers import (
    BLOCK_EPS,
    Dtype,
    Norm,
    attention_kernel,
    dense,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    recompute_norm,
    scan_blocks,
    skip_norm_product,
)
from crate_jax.parallel.sharding import keep_split_by_batch

__all__ = ["ista", "ista_overcomplete", "norm_mssa"]

# torch's kaiming_uniform_(a=0) on a square matrix; of an over-complete one the D columns count, as where CRATE-alpha
# was trained (in JAX; its PyTorch code, which only infers, counts the atoms).
DICTIONARY_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "uniform")


def norm_mssa(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, subspaces_DE: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array]:
    """MSSA of z = layer_norm(x), before the output projection (eq. 2.8 of arXiv 2404.02446).

    Queries, keys and values are one projection U_k^T z. Like the released code, this function scales
    the logits by 1 / sqrt(K); the equation does not.

    Args:
      x_BND: tokens, (B, N, D).
      scale_D: the norm's scale.
      bias_D: the norm's bias.
      subspaces_DE: [U_1 .. U_H], each D x K.
      heads: H.

    Returns:
      x for a skip connection, and (B, N, E): for each head, the tokens' coordinates in its subspace, averaged by
      attention.
    """
    x_BND, w_BNE = skip_norm_product(x_BND, scale_D, bias_D, subspaces_DE, BLOCK_EPS)
    B, N, E = w_BNE.shape[-3:]
    kernel = attention_kernel(B, N, heads, E, 1, w_BNE.dtype)
    return x_BND, kernel(w_BNE, None, heads, 1) if kernel else attend(w_BNE, heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(w_BNE: jax.Array, heads: int) -> jax.Array:
    """softmax(w w^T / sqrt(K)) w per head, (B, N, E) -> (B, N, E); softmax in float32.

    The backward pass computes the N x N weights again, and uses that query, key and value are one
    tensor: the forward pass saves only w and two numbers per token and head. TPUs and GPUs have
    kernels (:mod:`tpu_attention`, :mod:`gpu_attention`).
    """
    return _attend_forward(w_BNE, heads)[0]


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _attend_forward(w_BNE: jax.Array, heads: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    saved = w_BNE
    w_BNE = w_BNE.reshape(-1, *w_BNE.shape[-2:])  # on TPUs the decoder's w has a leading axis of length one
    w_BHNK = _heads_first(w_BNE, heads)
    logits_BHNN = _einsum("bhnk,bhmk->bhnm", w_BHNK * w_BHNK.shape[-1] ** -0.5, w_BHNK)
    peak_BHN1 = jnp.max(logits_BHNN, axis=-1, keepdims=True)
    weights_BHNN = jnp.exp(logits_BHNN - peak_BHN1)
    total_BHN1 = jnp.sum(weights_BHNN, axis=-1, keepdims=True)
    # The sum divides the N x K result, not the N x N weights.
    y_BHNK = _einsum("bhnm,bhmk->bhnk", weights_BHNN.astype(w_BNE.dtype), w_BHNK) / total_BHN1
    # Two numbers and not their log-sum: exp(logit - logsum) loses digits where logits are large.
    return _heads_last(y_BHNK.astype(w_BNE.dtype)).reshape(saved.shape), (saved, peak_BHN1, total_BHN1)


def _attend_backward(heads: int, saved: tuple[jax.Array, ...], g_BNE: jax.Array) -> tuple[jax.Array]:
    shape, (w_BNE, g_BNE) = g_BNE.shape, (x.reshape(-1, *x.shape[-2:]) for x in (saved[0], g_BNE))
    peak_BHN1, total_BHN1 = saved[1:]
    w_BHNK, g_BHNK = _heads_first(w_BNE, heads), _heads_first(g_BNE, heads)
    scaled_BHNK = w_BHNK * w_BHNK.shape[-1] ** -0.5
    # Everything is transposed, keys first. This costs nothing because the logits are symmetric, and only
    # one of the last three products, not two, contracts over leading axes (half as fast on a CPU).
    peak_BH1N, total_BH1N = peak_BHN1.swapaxes(-1, -2), total_BHN1.swapaxes(-1, -2)
    at_BHMN = jnp.exp(_einsum("bhmk,bhnk->bhmn", w_BHNK, scaled_BHNK) - peak_BH1N) / total_BH1N
    dat_BHMN = _einsum("bhmk,bhnk->bhmn", w_BHNK, g_BHNK)
    # Not g . y: it is equal, but its rounding leaves noise where the softmax saturates.
    dlogits_BHMN = (at_BHMN * (dat_BHMN - jnp.sum(at_BHMN * dat_BHMN, axis=-2, keepdims=True))).astype(w_BNE.dtype)
    dw_BHNK = (
        _einsum("bhmn,bhnk->bhmk", at_BHMN.astype(w_BNE.dtype), g_BHNK)  # w as value
        + _einsum("bhmn,bhnk->bhmk", dlogits_BHMN, scaled_BHNK)  # w as key
        + _einsum("bhmn,bhmk->bhnk", dlogits_BHMN, scaled_BHNK)  # w as query
    )
    return (_heads_last(dw_BHNK.astype(w_BNE.dtype)).reshape(shape),)


attend.defvjp(_attend_forward, _attend_backward)


def _heads_first(x_BNE: jax.Array, heads: int) -> jax.Array:
    B, N, E = x_BNE.shape
    return x_BNE.reshape(B, N, heads, E // heads).transpose(0, 2, 1, 3)


def _heads_last(x_BHNK: jax.Array) -> jax.Array:
    B, H, N, K = x_BHNK.shape
    return x_BHNK.transpose(0, 2, 1, 3).reshape(B, N, H * K)


def ista(x_BND: jax.Array, dictionary_DD: jax.Array, eta: float, lam: float) -> tuple[jax.Array, jax.Array]:
    """One proximal-gradient step on 0.5 |x - D z|^2 + lam |z|_1, z >= 0, from z = x (eq. 2.9 of arXiv 2404.02446).

    ReLU(x + eta D^T (x - D x) - eta lam), two products where the released code takes three. `dictionary_DD` is D^T:
    ``x @ dictionary_DD`` is D x.

    >>> ista(jnp.array([[1.0, -1.0]]), jnp.eye(2), eta=0.5, lam=0.5)[0].tolist()
    [[0.75, 0.0]]

    Returns:
      (the step's result, the residual x - D x, which the gradient needs too), (B, N, D) each.
    """
    kernel_DD = dictionary_DD.astype(x_BND.dtype)
    residual_BND = x_BND + x_BND @ -kernel_DD
    step_BND = x_BND + eta * (residual_BND @ kernel_DD.T) - eta * lam
    # This is ReLU with a scalar zero: one of all layers' shape would be stored, and read by each layer, on a GPU.
    return jax.lax.clamp(jnp.zeros((), step_BND.dtype), step_BND, jnp.full((), jnp.inf, step_BND.dtype)), residual_BND


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm_ista(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, dictionary_DD: jax.Array, eta: float, lam: float
) -> jax.Array:
    """:func:`ista` of layer_norm(x), (B, N, D) -> (B, N, D); both passes take six products, not nine.

    Like :func:`layers.norm_product` it does not keep the normalised tokens; it keeps the residual and a mask of the
    result's positive numbers.
    """
    return _norm_ista_forward(x_BND, scale_D, bias_D, dictionary_DD, eta, lam)[0]


def _norm_ista_forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, dictionary_DD: jax.Array, eta: float, lam: float
) -> tuple[jax.Array, tuple[Any, ...]]:
    normed_BND, saved = layer_norm_forward(x_BND, scale_D, bias_D, BLOCK_EPS)
    y_BND, residual_BND = ista(normed_BND, dictionary_DD, eta, lam)
    return y_BND, (saved, bias_D, residual_BND, dictionary_DD, y_BND > 0)


def _norm_ista_backward(eta: float, lam: float, saved: tuple[Any, ...], g_BND: jax.Array) -> tuple[jax.Array, ...]:
    norm_saved, bias_D, residual_BND, dictionary_DD, active_BND = saved
    normed_BND = recompute_norm(norm_saved, bias_D, BLOCK_EPS)
    kernel_DD = dictionary_DD.astype(normed_BND.dtype)
    g_BND = jnp.where(active_BND, g_BND, jnp.zeros((), g_BND.dtype))
    dresidual_BND = g_BND @ (eta * kernel_DD)
    rows = tuple(range(g_BND.ndim - 1))
    over_tokens = functools.partial(jnp.tensordot, axes=(rows, rows), preferred_element_type=jnp.float32)
    ddictionary_DD = eta * over_tokens(g_BND, residual_BND) - over_tokens(normed_BND, dresidual_BND)
    dnormed = g_BND, dresidual_BND, dresidual_BND @ -kernel_DD.T
    return *layer_norm_backward(BLOCK_EPS, norm_saved, *dnormed), ddictionary_DD.astype(dictionary_DD.dtype)


norm_ista.defvjp(_norm_ista_forward, _norm_ista_backward)


def ista_overcomplete(x_BND: jax.Array, dictionary_AD: jax.Array, eta: float, lam: float) -> jax.Array:
    """Two ISTA steps from z = 0 in an over-complete dictionary (CRATE-alpha).

    Args:
      x_BND: tokens, (B, N, D).
      dictionary_AD: atoms as rows; ``z @ dictionary_AD`` is D z.
      eta: step size.
      lam: sparsity weight.

    Returns:
      the code (B, N, A), which a second dictionary maps back to the residual stream.
    """
    atoms = dictionary_AD.astype(x_BND.dtype)
    z_BNA = jax.nn.relu(eta * (x_BND @ atoms.T) - eta * lam)
    return jax.nn.relu(z_BNA + eta * ((x_BND - z_BNA @ atoms) @ atoms.T) - eta * lam)


class Kernel(nn.Module):
    """A bare matrix named ``kernel``, float32."""

    shape: tuple[int, int]
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the matrix."""
        return self.param("kernel", self.initializer, self.shape, jnp.float32)


class MSSA(nn.Module):
    """A norm, MSSA and its output projection: free with a bias, as released, or tied to U (eq. 2.8).

    Attributes:
      negative: the projection has its sign turned. A sum with it can be the product's own last step on a GPU, where a
        difference is a pass over three arrays.
    """

    heads: int
    tied_output: bool
    dtype: Dtype
    negative: bool = False

    @nn.compact
    def __call__(self, x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, N, D) twice: x for a skip connection, and MSSA of layer_norm(x) with this scale and bias."""
        D = x_BND.shape[-1]
        subspaces_DE = Kernel((D, D), XAVIER, name="subspaces")()
        x_BND, y_BNE = norm_mssa(x_BND, scale_D, bias_D, subspaces_DE, self.heads)
        if self.tied_output:
            output_ED = subspaces_DE.T.astype(y_BNE.dtype)
            return x_BND, y_BNE @ (-output_ED if self.negative else output_ED)
        return x_BND, dense(D, "output", self.dtype, factor=-1 if self.negative else None)(y_BNE)


class CrateBlock(nn.Module):
    """z + MSSA(LN(z)), then ISTA(LN(.)) without a residual (eq. 2.14); scanned over layers."""

    heads: int
    eta: float
    lam: float
    expansion: int  # 0: complete dictionary
    tied_output: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BND: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer, (B, N, D) -> (B, N, D); `nn.scan` demands the second argument and result."""
        x_BND = keep_split_by_batch(x_BND)
        self.sow("intermediates", "input", x_BND)
        D = x_BND.shape[-1]
        norm = Norm(BLOCK_EPS, name="mssa_norm").scale_and_bias(D)
        x, y = MSSA(self.heads, self.tied_output, self.dtype, name="mssa")(x_BND, *norm)
        x = x + y
        self.sow("intermediates", "after_mssa", x)
        norm = Norm(BLOCK_EPS, name="ista_norm").scale_and_bias(D)
        if self.expansion:
            shape = (self.expansion * D, D)
            dictionary = Kernel(shape, DICTIONARY_INIT, name="dictionary")()
            back = Kernel(shape, DICTIONARY_INIT, name="back")()
            code = ista_overcomplete(layer_norm(x, *norm, BLOCK_EPS), dictionary, self.eta, self.lam)
            self.sow("intermediates", "code", code)
            x = x + code @ back.astype(code.dtype)
        else:
            dictionary = Kernel((D, D), DICTIONARY_INIT, name="dictionary")()
            x = norm_ista(x, *norm, dictionary, self.eta, self.lam)
        self.sow("intermediates", "after_ista", x)
        return x, None


class CrateEncoder(nn.Module):
    """Embedding, L CRATE blocks, a final norm."""

    width: int
    depth: int
    heads: int
    patch_size: int
    grid: tuple[int, int]
    positions: str
    eta: float
    lam: float
    expansion: int
    tied_output: bool
    embed_norm: bool
    final_norm: bool
    final_eps: float
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> jax.Array:
        """Normalised images (B, H, W, 3) -> tokens (B, 1 + M, D), the class token first. `keys_B` is not used."""
        x = Embedding(
            self.width,
            self.patch_size,
            self.grid,
            self.positions,
            self.embed_norm,
            self.dtype,
            BEGINNINGS["xavier"],
            name="embedding",
        )(images_BHWC, corruption)
        x = scan_blocks(
            CrateBlock,
            self.depth,
            self.remat,
            self.heads,
            self.eta,
            self.lam,
            self.expansion,
            self.tied_output,
            self.dtype,
        )(x, None)[0]
        return Norm(self.final_eps, name="norm")(x) if self.final_norm else x
