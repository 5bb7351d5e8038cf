"""Vision transformers as MAE (He et al. 2022) and ROPIM (arXiv 2310.18737) use them.

Shapes: B batch, N tokens (class token included), D width, H heads, K head width, L layers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.beginning import Beginning
from crate_jax.models.corruption import CLEAN, Corruption
from crate_jax.models.embedding import Embedding
from crate_jax.models.layers import Dtype, Norm, attention, attention_kernel, dense, gelu, scan_blocks
from crate_jax.models.patches import grid_shape, relative_position_index, relative_table_rows, resize_relative_table
from crate_jax.parallel import target
from crate_jax.parallel.sharding import keep_split_by_batch

Grids = tuple[tuple[int, int], tuple[int, int]]  # (h, w) of the table of biases, and (h, w) of the image


def drop_path_scales(keys_B: jax.Array, depth: int, rate: float) -> jax.Array:
    """Stochastic-depth factors (L, 2, B): 0 with the layer's rate as probability, else 1 / (1 - rate).

    The rate rises linearly from 0 in the first block to `rate` in the last; attention and MLP of
    a block are dropped independently. Each image has its own key, so micro-batches see the same draws.
    """
    rates_L = jnp.linspace(0.0, rate, depth)
    uniform_BL2 = jax.vmap(lambda k: jax.random.uniform(k, (depth, 2)))(keys_B)
    kept_L2B = uniform_BL2.transpose(1, 2, 0) >= rates_L[:, None, None]
    return kept_L2B / (1.0 - rates_L[:, None, None])


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value kernel."""

    begin: Beginning
    heads: int
    qkv_bias: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_BND: jax.Array,
        bias_BHNN: jax.Array | None,
        factor_D: jax.Array | None = None,
        number: jax.Array | None = None,
    ) -> jax.Array:
        """(B, N, D) -> (B, N, D); `factor_D` multiplies the result; `number` as in :meth:`Beginning.last`."""
        B, N, D = x_BND.shape
        qkv = dense(3 * D, "qkv", self.dtype, bias=self.qkv_bias == "qkv", init=self.begin.qkv)(x_BND)
        if self.qkv_bias == "qv":  # BEiT: a key bias cannot change a softmax over keys
            zeros = nn.initializers.zeros_init()
            q_bias, v_bias = (self.param(name, zeros, (D,), jnp.float32) for name in ("q_bias", "v_bias"))
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)
        qkv = keep_split_by_batch(qkv)
        if attend := attention_kernel(B, N, self.heads, D, 3, qkv.dtype, bias_BHNN):
            y_BND = attend(qkv, None if bias_BHNN is None else bias_BHNN[0], self.heads, 3)
        else:
            q, k, v = (a.reshape(B, N, self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
            y_BND = attention(q, k, v, bias_BHNN).reshape(B, N, D)
        return dense(D, "output", self.dtype, init=self.begin.last(number), factor=factor_D)(y_BND)


class ViTBlock(nn.Module):
    """Pre-norm transformer block with optional layer scale and drop path; scanned over layers."""

    begin: Beginning
    heads: int
    mlp_ratio: float
    qkv_bias: str
    layer_scale: float
    dtype: Dtype
    bias_grids: Grids | None = None  # not None: this block has its own relative bias

    @nn.compact
    def __call__(
        self,
        x_BND: jax.Array,
        bias_BHNN: jax.Array | None,
        scales_2B: jax.Array | None,
        corruption: Corruption | None = None,
        number: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """One layer, (B, N, D) -> (B, N, D); `scales_2B` multiplies the two branches of each image.

        `number` is the block's, as in :meth:`Beginning.last`.
        """
        x_BND = keep_split_by_batch(x_BND)
        D = x_BND.shape[-1]
        if self.bias_grids is not None and corruption is not None:
            bias_BHNN = relative_bias(self, self.bias_grids, self.heads, corruption)

        none: list[jax.Array | None] = [None, None]
        factors = none
        if self.layer_scale:
            constant = nn.initializers.constant(self.layer_scale)
            factors = [self.param(f"layer_scale_{i}", constant, (D,), jnp.float32) for i in (1, 2)]
        # On TPUs at the weights: there the factor's gradient needs no array of the tokens' size.
        at_weights, at_tokens = (factors, none) if target.is_tpu() else (none, factors)

        def branch(y_BND: jax.Array, index: int) -> jax.Array:
            factor = at_tokens[index]
            if factor is not None:
                y_BND = y_BND * factor.astype(y_BND.dtype)
            return y_BND if scales_2B is None else y_BND * scales_2B[index][:, None, None].astype(y_BND.dtype)

        self.sow("intermediates", "input", x_BND)
        x, y = Norm(name="attention_norm").skip(x_BND)
        attention = SelfAttention(self.begin, self.heads, self.qkv_bias, self.dtype, name="attention")
        y = attention(y, bias_BHNN, at_weights[0], number)
        x = x + branch(y, 0)
        self.sow("intermediates", "after_attention", x)
        x, y = Norm(name="mlp_norm").skip(x)
        y = dense(int(D * self.mlp_ratio), "mlp_in", self.dtype, init=self.begin.kernel)(y)
        y = gelu(keep_split_by_batch(y))
        self.sow("intermediates", "mlp_hidden", y)
        y = dense(D, "mlp_out", self.dtype, init=self.begin.last(number), factor=at_weights[1])(y)
        x = x + branch(y, 1)
        self.sow("intermediates", "after_mlp", x)
        return x, None


def relative_bias(module: nn.Module, grids: Grids, heads: int, corruption: Corruption) -> jax.Array:
    """A bias on the logits for each pair of tokens, (B or 1, H, 1 + M, 1 + M), from a table of relative positions.

    Args:
      module: the module that gets the table as its parameter ``relative_bias``.
      grids: (h, w) patches of the table, and of the encoded image. If they differ, the table is resized.
      heads: H.
      corruption: the corruption, which chooses M of the N patches.
    """
    table_grid, grid = grids
    shape = (relative_table_rows(table_grid), heads)
    table = module.param("relative_bias", nn.initializers.zeros_init(), shape, jnp.float32)
    if grid != table_grid:
        table = resize_relative_table(table, table_grid, grid)
    return corruption.select_pairs(table[relative_position_index(grid)].transpose(2, 0, 1))


def scan_vit_blocks(
    x_BND: jax.Array,
    bias_BHNN: jax.Array | None,
    scales_L2B: jax.Array | None,
    corruption: Corruption | None,
    depth: int,
    remat: str,
    begin: Beginning,
    *args: object,
) -> jax.Array:
    """`depth` ViT blocks, (B, N, D) -> (B, N, D); all layers share bias and corruption, each has its drop-path factors.

    `begin` and `args` are the attributes of :class:`ViTBlock`.
    """
    blocks = scan_blocks(ViTBlock, depth, remat, begin, *args, in_axes=(nn.broadcast, 0, nn.broadcast, 0))
    numbers_L = jnp.arange(1, depth + 1) if begin.rescaled else None
    return blocks(x_BND, bias_BHNN, scales_L2B, corruption, numbers_L)[0]


class ViTEncoder(nn.Module):
    """Embedding, L transformer blocks, a final norm."""

    width: int
    depth: int
    heads: int
    patch_size: int
    grid: tuple[int, int]
    positions: str
    mlp_ratio: float
    qkv_bias: str
    layer_scale: float
    drop_path: float
    begin: Beginning
    embed_norm: bool
    final_norm: bool
    final_eps: float
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> jax.Array:
        """Normalised images (B, H, W, 3) -> tokens (B, 1 + M, D), class token first; drop path only with `keys_B`."""
        x = Embedding(
            self.width,
            self.patch_size,
            self.grid,
            self.positions,
            self.embed_norm,
            self.dtype,
            self.begin,
            name="embedding",
        )(images_BHWC, corruption)
        grids = (self.grid, grid_shape(images_BHWC.shape[1:3], self.patch_size))
        bias_BHNN = None
        if self.positions == "relative":  # one table for all layers, as ROPIM pre-trains
            bias_BHNN = relative_bias(self, grids, self.heads, corruption)
        bias_grids = grids if self.positions == "relative_per_block" else None  # as ROPIM fine-tunes
        scales_L2B = None
        if keys_B is not None and self.drop_path:
            scales_L2B = drop_path_scales(keys_B, self.depth, self.drop_path)
        x = scan_vit_blocks(
            x, bias_BHNN, scales_L2B, corruption, self.depth, self.remat, self.begin,
            self.heads, self.mlp_ratio, self.qkv_bias, self.layer_scale, self.dtype, bias_grids,
        )  # fmt: skip
        return Norm(self.final_eps, name="norm")(x) if self.final_norm else x
