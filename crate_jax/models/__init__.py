"""Encoders: modules ``(patches_BNP, corruption, keys_B) -> tokens_B(1+M)D``, class token first."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.models.corruption import fills
from crate_jax.models.crate import CrateEncoder
from crate_jax.models.layers import remat_rule
from crate_jax.models.patches import grid_shape
from crate_jax.models.vit import ViTEncoder


def _crate(config: ConfigDict) -> nn.Module:
    e = config.encoder
    return CrateEncoder(
        **_shared(config),
        eta=e.eta,
        lam=e.lam,
        expansion=e.expansion if e.dictionary == "overcomplete" else 0,
        tied_output=e.tied_output,
    )


def _vit(config: ConfigDict) -> nn.Module:
    e = config.encoder
    return ViTEncoder(
        **_shared(config),
        mlp_ratio=e.mlp_ratio,
        qkv_bias=e.qkv_bias,
        layer_scale=e.layer_scale,
        drop_path=e.drop_path,
        initializer=e.init,
    )


def _shared(config: ConfigDict) -> dict:
    e = config.encoder
    return dict(
        width=e.width,
        depth=e.depth,
        heads=e.heads,
        grid=grid_shape(config.data.image_size, e.patch_size),
        positions=e.positions,
        fill=fills(config)["encoder"],
        embed_norm=e.embed_norm,
        final_norm=e.final_norm,
        final_eps=e.final_eps,
        remat=remat_rule(config),
        dtype=jnp.dtype(config.dtype),
    )


ENCODERS: dict[str, Callable[[ConfigDict], nn.Module]] = {"crate": _crate, "vit": _vit}

# The named point where a block's tokens can be read, under encoder/blocks, (L, B, 1 + M, D).
BLOCK_OUTPUTS = {"crate": "after_ista", "vit": "after_mlp"}
