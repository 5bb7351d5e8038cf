"""What other tasks read from an encoder: the tokens of each layer, one vector per image, or maps of a block's tokens.

All images here are an encoder's input: float32, normalised (:func:`crate_jax.data.pixels.normalise`), of
any size that the encoder takes.

Shapes: B batch, H and W pixels, N = h * w patch tokens, M of them that the encoder sees, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.models import ENCODERS, batch_norm, blank_image, build_encoder, prefix_tokens
from crate_jax.models.corruption import CLEAN, Corruption
from crate_jax.models.layers import block_points
from crate_jax.models.patches import grid_shape


def pool(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """The function of ``config.evaluation.pool``: tokens (B, prefix + N, D) -> (B, D), or (B, 2 D) for ``cls_mean``.

    ``cls`` is the class token, ``mean`` the mean of the patch tokens, ``cls_mean`` both of them, concatenated.

    Raises:
      ConfigError: the pooling needs a class token, and the encoder has none.
    """
    how, prefix = config.evaluation.pool, prefix_tokens(config)
    if how != "mean" and not prefix:
        raise ConfigError(
            f"config.evaluation.pool={how!r}: config.encoder.name={config.encoder.name!r} has no class token; "
            "set it to mean"
        )

    def pooled(tokens_BND: jax.Array) -> jax.Array:
        cls_BD, mean_BD = tokens_BND[:, 0], jnp.mean(tokens_BND[:, prefix:], axis=1)
        return {"cls": cls_BD, "mean": mean_BD, "cls_mean": jnp.concatenate([cls_BD, mean_BD], axis=-1)}[how]

    return pooled


def init_params(config: ConfigDict, key: jax.Array) -> dict[str, Any]:
    """Initial parameters {"encoder": ...}, float32; they depend on the key alone. Call it under jit or eval_shape."""
    return {"encoder": build_encoder(config).init(key, blank_image(config))["params"]}


def points(config: ConfigDict) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The function ({"encoder": parameters}, images, corruption=none, keys_B=None) -> (output, named points).

    The output is (B, prefix + M, D). The named points are the blocks' points, name -> (L, B, prefix + M, ...).
    """
    encoder = build_encoder(config)

    def read(
        params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": params["encoder"]}
        output, state = encoder.apply(variables, images_BHWC, corruption, keys_B, mutable=["intermediates"])
        found = state["intermediates"]
        return output, block_points(found) if "blocks" in found else dict(found)

    return read


def layers(config: ConfigDict) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function ({"encoder": parameters}, images, corruption=none, keys_B=None) -> (output, tokens by layer).

    It returns the encoder's output (B, prefix + M, D) and the tokens after each block (L, B, prefix + M, D). The tokens
    after the last block are the output without the final norm. Drop path only with `keys_B`.
    """
    read, name = points(config), ENCODERS[config.encoder.name].output_point

    def tokens(
        params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        output_BND, found = read(params, images_BHWC, corruption, keys_B)
        return output_BND, found[name]

    return tokens


def build(config: ConfigDict) -> Callable[..., jax.Array]:
    """The function ({"encoder": parameters}, images, keys_B=None) -> one vector per image, (B, D) float32.

    ``config.evaluation.layer`` and ``config.evaluation.pool`` choose the tokens; the images are not corrupted.
    Drop path only with `keys_B`.

    Raises:
      ConfigError: the pooling needs a class token, and the encoder has none.
    """
    encoder, tokens_of = build_encoder(config), layers(config)
    layer, pooled = config.evaluation.layer, pool(config)

    def represent(params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        if layer:
            tokens: Any = tokens_of(params, images_BHWC, CLEAN, keys_B)[1][layer - 1]
        else:
            tokens = encoder.apply({"params": params["encoder"]}, images_BHWC, CLEAN, keys_B)
        return pooled(tokens).astype(jnp.float32)

    return represent


def trained(config: ConfigDict) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]:
    """The function (encoder's parameters, images, keys_B) -> (vectors (B, D), parameters with moved statistics).

    The vectors are those of :func:`build` without ``config.evaluation.layer``, float32, from an encoder in training: it
    has drop path, and batch norm normalises with the statistics of the batch.

    Raises:
      ConfigError: the pooling needs a class token, and the encoder has none.
    """
    encoder, pooled = build_encoder(config), pool(config)

    def represent(tree: Any, images_BHWC: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, Any]:
        tokens_BND, tree = batch_norm.train(encoder, tree, images_BHWC, CLEAN, keys_B)
        return pooled(tokens_BND).astype(jnp.float32), tree

    return represent


def width(config: ConfigDict) -> int:
    """The width D of the vectors that :func:`build` returns."""
    shape = jax.eval_shape(lambda: build(config)(init_params(config, jax.random.key(0)), blank_image(config)))
    return shape.shape[-1]


def with_head(config: ConfigDict, head: nn.Module, read: Callable[..., Any]) -> Callable[[jax.Array], dict[str, Any]]:
    """The function key -> initial parameters {"encoder": ..., "head": ...} of the config's encoder and of a head.

    Args:
      config: the whole config.
      head: the module that takes the result of `read`.
      read: the function that :func:`build` or :func:`block_maps` returns.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        encoder_key, head_key = jax.random.split(key)
        params = init_params(config, encoder_key)
        return params | {"head": head.init(head_key, read(params, blank_image(config)))["params"]}

    return init


def block_maps(config: ConfigDict, blocks: Sequence[int]) -> Callable[..., tuple[jax.Array, ...]]:
    """The function ({"encoder": parameters}, images, keys_B=None) -> one (B, h, w, D) map per block.

    A map holds the patch tokens after one block, each where its patch lies. If the encoder has a final norm, the tokens
    after the last block are normalised. The images are not corrupted. Drop path only with `keys_B`.

    Args:
      config: the whole config.
      blocks: the numbers of the blocks; the first block is 1.
    """
    tokens_of, prefix = layers(config), prefix_tokens(config)
    last = config.encoder.depth

    def maps(params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h, w = grid_shape(images_BHWC.shape[1:3], config.encoder.patch_size)
        output_BND, tokens_LBND = tokens_of(params, images_BHWC, CLEAN, keys_B)
        chosen = (output_BND if block == last else tokens_LBND[block - 1] for block in blocks)
        return tuple(x[:, prefix:].reshape(x.shape[0], h, w, -1) for x in chosen)

    return maps


def tokens_by_block(config: ConfigDict) -> Callable[..., jax.Array]:
    """The function ({"encoder": parameters}, images, corruption) -> tokens (L + 1, B, prefix + M, D).

    These are the tokens after each block, and then the tokens that :func:`build` pools: the encoder's output, or the
    tokens of block ``config.evaluation.layer`` if it is not 0.
    """
    tokens_of, layer = layers(config), config.evaluation.layer

    def tokens(params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption) -> jax.Array:
        output_BND, tokens_LBND = tokens_of(params, images_BHWC, corruption)
        last_BND = tokens_LBND[layer - 1] if layer else output_BND
        return jnp.concatenate([tokens_LBND, last_BND[None]])

    return tokens
