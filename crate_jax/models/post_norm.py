"""A small transformer whose norms follow the residual sums, as torch.nn.TransformerEncoderLayer: the head of All4One.

Shapes: B batch, N tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.beginning import XAVIER
from crate_jax.models.projector import Linear

EPS = 1e-5  # of the layer norms, as in PyTorch


class PostNorm(nn.Module):
    """Blocks of attention and a two-layer MLP with relu; returns the first token.

    Attributes:
      depth: number of blocks.
      heads: H.
      hidden: width of the MLP's hidden layer.
      dropout: share of entries that are set to 0, in training: attention, both sums' addends and the hidden layer.
      dtype: type of the activations; softmax and norms are float32.
    """

    depth: int = 3
    heads: int = 8
    hidden: int = 512
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BND: jax.Array, train: bool, keys_B: jax.Array | None = None) -> jax.Array:
        """(B, N, D) -> (B, D), float32; no dropout without `keys_B`, one key per image."""
        B, N, D = x_BND.shape
        places = iter(range(4 * self.depth))

        def dropped(x: jax.Array) -> jax.Array:
            place = next(places)
            if not train or keys_B is None or not self.dropout:
                return x
            keep = lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.dropout, x.shape[1:])  # noqa: E731
            return jnp.where(jax.vmap(keep)(keys_B), x / (1 - self.dropout), 0).astype(x.dtype)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(EPS, use_fast_variance=False, name=name)(x.astype(jnp.float32))

        for i in range(self.depth):
            qkv_BN3D = Linear(3 * D, dtype=self.dtype, kernel_init=XAVIER, name=f"qkv{i}")(x_BND)
            q, k, v = (x.reshape(B, N, self.heads, -1) for x in jnp.split(qkv_BN3D, 3, -1))
            scores_BHNN = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
            weights_BHNN = dropped(jax.nn.softmax(scores_BHNN * (D // self.heads) ** -0.5).astype(self.dtype))
            mixed_BND = jnp.einsum("bhnm,bmhk->bnhk", weights_BHNN, v).reshape(B, N, D)
            out = Linear(D, dtype=self.dtype, zero_bias=True, name=f"out{i}")  # as MultiheadAttention's `out_proj`
            x_BND = norm(x_BND + dropped(out(mixed_BND)), f"norm{i}_0")
            wide = dropped(nn.relu(Linear(self.hidden, dtype=self.dtype, name=f"hidden{i}")(x_BND)))
            x_BND = norm(x_BND + dropped(Linear(D, dtype=self.dtype, name=f"back{i}")(wide)), f"norm{i}_1")
        return x_BND[:, 0].astype(jnp.float32)
