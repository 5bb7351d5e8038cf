"""From images to the encoder's tokens: patches, embedding, corruption, positions, class token.

Shapes: B batch, H and W pixels, h and w patches per side, N = h * w, M patch tokens that the encoder sees, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models.beginning import Beginning
from crate_jax.models.corruption import Corruption
from crate_jax.models.layers import BLOCK_EPS, Dtype, Norm, dense
from crate_jax.models.patches import grid_shape, patchify, resize_table, sincos_positions
from crate_jax.models.projector import Linear


class Embedding(nn.Module):
    """Cuts images into patches, embeds them, corrupts the tokens, adds positions and a class token.

    The corruption acts between the linear embedding and the positions, as in CRATE-MAE's and
    ROPIM's released code, so a corrupted token keeps its position.

    An image may have any size that divides into patches. The sine-cosine table is made for the image's own grid. The
    learned table has one size, `grid`; for an image of another grid it is resized bicubically, as timm's
    ``dynamic_img_size`` does.

    Attributes:
      width: D.
      patch_size: side of a patch in pixels.
      grid: (h, w) patches of the learned table.
      positions: sincos | learned | relative | relative_per_block | none; the last three add nothing here.
      norms: apply layer norms (eps 1e-5) to the patches' pixels and to the embedded tokens, as the code of supervised
        CRATE does (arXiv 2306.01129).
      dtype: the tokens' dtype.
      begin: how the weights begin.
    """

    width: int
    patch_size: int
    grid: tuple[int, int]
    positions: str
    norms: bool
    dtype: Dtype
    begin: Beginning

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, corruption: Corruption) -> jax.Array:
        """Normalised images (B, H, W, 3) -> tokens (B, 1 + M, D), the class token first."""
        D = self.width
        x = corruption.corrupt_pixels(patchify(images_BHWC, self.patch_size))
        if self.norms:
            x = Norm(BLOCK_EPS, name="pixel_norm")(x)
        if self.begin.torch_patches:
            x = Linear(D, dtype=self.dtype, name="patch_embed")(x)
        else:
            x = dense(D, "patch_embed", self.dtype, init=self.begin.kernel)(x.astype(self.dtype))
        if self.norms:
            x = Norm(BLOCK_EPS, name="token_norm")(x)
        fill_D = (
            self.param("mask_token", self.begin.tokens, (1, 1, D), jnp.float32)[0, 0]
            if corruption.fills_encoder
            else None
        )
        x = corruption.corrupt_tokens(x, fill_D)
        cls_11D = self.param("cls_token", self.begin.class_token, (1, 1, D), jnp.float32)
        table_ND = self._table(grid_shape(images_BHWC.shape[1:3], self.patch_size))
        if table_ND is not None:
            x = x + corruption.select(table_ND[1:]).astype(self.dtype)
            cls_11D = cls_11D + table_ND[0]
        cls_B1D = jnp.broadcast_to(cls_11D.astype(self.dtype), (x.shape[0], 1, D))
        return jnp.concatenate([cls_B1D, x], axis=1)

    def _table(self, grid: tuple[int, int]) -> jax.Array | None:
        """Position table (1 + N, D) for a grid of patches; row 0 is the class token's. None if nothing is added."""
        if self.positions == "sincos":
            return jnp.asarray(sincos_positions(grid, self.width))
        if self.positions == "learned":
            shape = (1 + self.grid[0] * self.grid[1], self.width)
            table_ND = self.param("positions", self.begin.tokens, shape, jnp.float32)
            if grid == self.grid:
                return table_ND
            return jnp.concatenate([table_ND[:1], resize_table(table_ND[1:], self.grid, grid)])
        return None
