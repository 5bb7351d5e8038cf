"""What other tasks read of an encoder: one vector per image, or maps of a block's tokens.

Shapes: B batch, N = h * w patch tokens, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.models import BLOCK_OUTPUTS, ENCODERS
from crate_jax.models.corruption import Corruption, Identity
from crate_jax.models.patches import grid_shape


def pool(tokens_BND: jax.Array, how: str) -> jax.Array:
    """Tokens, class token first, (B, 1 + N, D) -> (B, D), or (B, 2 D) for ``cls_mean``."""
    cls_BD, mean_BD = tokens_BND[:, 0], jnp.mean(tokens_BND[:, 1:], axis=1)
    return {"cls": cls_BD, "mean": mean_BD, "cls_mean": jnp.concatenate([cls_BD, mean_BD], axis=-1)}[how]


def build(config: ConfigDict) -> Callable[..., jax.Array]:
    """The function ({"encoder": parameters}, patches (B, N, P), keys_B=None) -> (B, D) float32 of a config.

    ``config.evaluation.pool`` and ``layer`` say which tokens; the patches are not corrupted. Drop path
    only with `keys_B`.
    """
    encoder = ENCODERS[config.encoder.name](config)
    layer, how = config.evaluation.layer, config.evaluation.pool

    def represent(params: dict[str, Any], patches_BNP: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        variables = {"params": params["encoder"]}
        if not layer:
            tokens: Any = encoder.apply(variables, patches_BNP, Identity(), keys_B)
        else:
            _, state = encoder.apply(variables, patches_BNP, Identity(), keys_B, mutable=["intermediates"])
            tokens = state["intermediates"]["blocks"][BLOCK_OUTPUTS[config.encoder.name]][0][layer - 1]
        return pool(tokens, how).astype(jnp.float32)

    return represent


def init_params(config: ConfigDict, key: jax.Array) -> dict[str, Any]:
    """Initial parameters of the config's encoder alone, float32, under ``encoder``, without a mask token."""
    h, w = grid_shape(config.data.image_size, config.encoder.patch_size)
    patches_BNP = jnp.zeros((1, h * w, 3 * config.encoder.patch_size**2), jnp.float32)
    return {"encoder": ENCODERS[config.encoder.name](config).init(key, patches_BNP, Identity())["params"]}


def with_head(config: ConfigDict, head: nn.Module, read: Callable[..., Any]) -> Callable[[jax.Array], dict[str, Any]]:
    """The function key -> initial parameters of the config's encoder and of a head on what `read` takes of it.

    Args:
      config: the whole config.
      head: takes what `read` returns.
      read: what :func:`build` or :func:`block_maps` returns.
    """
    h, w = grid_shape(config.data.image_size, config.encoder.patch_size)

    def init(key: jax.Array) -> dict[str, Any]:
        encoder_key, head_key = jax.random.split(key)
        patches_BNP = jnp.zeros((1, h * w, 3 * config.encoder.patch_size**2), jnp.float32)
        params = init_params(config, encoder_key)
        return params | {"head": head.init(head_key, read(params, patches_BNP))["params"]}

    return init


def block_maps(config: ConfigDict, blocks: Sequence[int]) -> Callable[..., tuple[jax.Array, ...]]:
    """The function ({"encoder": parameters}, patches (B, N, P), keys_B=None) -> one (B, h, w, D) map per block.

    Each holds the patch tokens after a block, counted from 1, where the patches lie; after the last block
    also normalised if the encoder has a final norm. The patches are not corrupted. Drop path only with
    `keys_B`.
    """
    encoder = ENCODERS[config.encoder.name](config)
    h, w = grid_shape(config.data.image_size, config.encoder.patch_size)
    last = config.encoder.depth

    def maps(params: dict[str, Any], patches_BNP: jax.Array, keys_B: jax.Array | None = None) -> tuple[jax.Array, ...]:
        variables = {"params": params["encoder"]}
        output, state = encoder.apply(variables, patches_BNP, Identity(), keys_B, mutable=["intermediates"])
        tokens_LBND = state["intermediates"]["blocks"][BLOCK_OUTPUTS[config.encoder.name]][0]
        chosen = (output if block == last else tokens_LBND[block - 1] for block in blocks)
        return tuple(x[:, 1:].reshape(x.shape[0], h, w, -1) for x in chosen)

    return maps


def tokens_by_block(config: ConfigDict) -> Callable[..., jax.Array]:
    """The function ({"encoder": parameters}, patches (B, N, P), corruption) -> tokens (L + 1, B, 1 + M, D).

    After each block, and last those that :func:`build` pools: the encoder's output, or a block's again if
    ``config.evaluation.layer`` names one.
    """
    encoder = ENCODERS[config.encoder.name](config)
    layer = config.evaluation.layer

    def tokens(params: dict[str, Any], patches_BNP: jax.Array, corruption: Corruption) -> jax.Array:
        variables = {"params": params["encoder"]}
        output, state = encoder.apply(variables, patches_BNP, corruption, mutable=["intermediates"])
        tokens_LBND = state["intermediates"]["blocks"][BLOCK_OUTPUTS[config.encoder.name]][0]
        last_BND = tokens_LBND[layer - 1] if layer else output
        return jnp.concatenate([tokens_LBND, last_BND[None]])

    return tokens
