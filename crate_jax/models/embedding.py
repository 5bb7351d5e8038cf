"""From corrupted patches to the encoder's tokens: embedding, corruption, positions, class token."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.corruption import Corruption
from crate_jax.models.layers import BLOCK_EPS, Dtype, Norm, dense
from crate_jax.models.patches import sincos_positions

TOKEN_INIT = nn.initializers.normal(0.02)


class Embedding(nn.Module):
    """Embeds patches, corrupts the tokens, adds positions and a class token.

    The corruption acts between the linear embedding and the positions, as in CRATE-MAE's and
    ROPIM's released code, so a corrupted token still knows where it stands.

    Attributes:
      width: D.
      grid: (h, w) patches.
      positions: sincos | learned | relative | relative_per_block | none; the last three add nothing here.
      norms: layer norms (eps 1e-5) of the patches' pixels and of the embedded tokens, as in the code of supervised
        CRATE (arXiv 2306.01129).
      dtype: of the tokens.
      initializer: kernel initialiser.
    """

    width: int
    grid: tuple[int, int]
    positions: str
    norms: bool
    dtype: Dtype
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, patches_BNP: jax.Array, corruption: Corruption) -> jax.Array:
        """(B, N, P) patches -> (B, 1 + M, D) tokens, the class token first."""
        D = self.width
        x = corruption.corrupt_pixels(patches_BNP)
        if self.norms:
            x = Norm(BLOCK_EPS, name="pixel_norm")(x)
        x = dense(D, "patch_embed", self.dtype, init=self.initializer)(x.astype(self.dtype))
        if self.norms:
            x = Norm(BLOCK_EPS, name="token_norm")(x)
        fill_D = (
            self.param("mask_token", TOKEN_INIT, (1, 1, D), jnp.float32)[0, 0] if corruption.fills_encoder else None
        )
        x = corruption.corrupt_tokens(x, fill_D)
        cls_11D = self.param("cls_token", TOKEN_INIT, (1, 1, D), jnp.float32)
        table_ND = self._table()
        if table_ND is not None:
            x = x + corruption.select(table_ND[1:]).astype(self.dtype)
            cls_11D = cls_11D + table_ND[0]
        cls_B1D = jnp.broadcast_to(cls_11D.astype(self.dtype), (x.shape[0], 1, D))
        return jnp.concatenate([cls_B1D, x], axis=1)

    def _table(self) -> jax.Array | None:
        """Position table (1 + N, D), row 0 for the class token."""
        if self.positions == "sincos":
            return jnp.asarray(sincos_positions(self.grid, self.width))
        if self.positions == "learned":
            shape = (1 + self.grid[0] * self.grid[1], self.width)
            return self.param("positions", TOKEN_INIT, shape, jnp.float32)
        return None
