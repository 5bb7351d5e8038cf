"""What other tasks read from an encoder: the tokens of each layer, one vector per image, or maps of a block's tokens.

All images here are an encoder's input: float32, normalised (:func:`crate_jax.data.pixels.normalise`), of
any size that the encoder takes.

Layers are blocks or, in a ResNet, stages, whose tokens differ in number and width.

Shapes: B batch, H and W pixels, N = h * w patch tokens, M of them that the encoder sees, D width, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.models import ENCODERS, batch_norm, blank_image, build_encoder, grids, prefix_tokens, widths
from crate_jax.models.corruption import CLEAN, Corruption
from crate_jax.models.layers import block_points

__all__ = ["block_maps", "build", "init_params", "layers", "points"]


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


Points = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reader:
    """The function ({"encoder": parameters}, images, keys_B=None) -> what `select` reads from the encoder.

    The images are not corrupted. With `keys_B` the encoder is in training: it has drop path, and batch norm normalises
    with the statistics of the batch.

    Attributes:
      encoder: the module.
      select: the function (output (B, prefix + N, D), named points, (H, W)) -> any tree of arrays.
      points: whether `select` reads the named points; without it they are {}.
    """

    encoder: nn.Module
    select: Callable[[jax.Array, Points, tuple[int, int]], Any]
    points: bool

    def __call__(self, params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array | None = None) -> Any:
        """What `select` reads."""
        return self.train(params, images_BHWC, keys_B)[0]

    def train(
        self, params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        """What `select` reads, and the parameters with the statistics that the encoder has moved."""
        mutable = [batch_norm.MOVED, *(["intermediates"] if self.points else [])]
        tree, (H, W) = params["encoder"], images_BHWC.shape[1:3]
        output, state = self.encoder.apply({"params": tree}, images_BHWC, CLEAN, keys_B, mutable=mutable)
        found = _points(state["intermediates"]) if self.points else {}
        moved = batch_norm.merge(tree, state.get(batch_norm.MOVED, {}))
        return self.select(output, found, (H, W)), {**params, "encoder": moved}


def _points(intermediates: dict[str, Any]) -> Points:
    return block_points(intermediates) if "blocks" in intermediates else dict(intermediates)


def points(config: ConfigDict) -> Callable[..., tuple[jax.Array, Points]]:
    """The function ({"encoder": parameters}, images, corruption=none, keys_B=None) -> (output, named points).

    The output is (B, prefix + M, D). The named points are the blocks' points, name -> (L, B, prefix + M, ...), or in a
    ResNet tuples of L arrays.
    """
    encoder = build_encoder(config)

    def read(
        params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, Points]:
        variables = {"params": params["encoder"]}
        output, state = encoder.apply(variables, images_BHWC, corruption, keys_B, mutable=["intermediates"])
        return output, _points(state["intermediates"])

    return read


def layers(config: ConfigDict) -> Callable[..., tuple[jax.Array, Any]]:
    """The function ({"encoder": parameters}, images, corruption=none, keys_B=None) -> (output, tokens by layer).

    It returns the encoder's output (B, prefix + M, D) and the tokens after each layer: (L, B, prefix + M, D), or for a
    ResNet a tuple of L arrays. The tokens after the last block are the output without the final norm. Drop path only
    with `keys_B`.
    """
    read, name = points(config), ENCODERS[config.encoder.name].output_point

    def tokens(
        params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption = CLEAN, keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        output_BND, found = read(params, images_BHWC, corruption, keys_B)
        return output_BND, found[name]

    return tokens


def build(config: ConfigDict, layer: int | None = None) -> Reader:
    """The function ({"encoder": parameters}, images, keys_B=None) -> one vector per image, (B, D) float32.

    The images are not corrupted.

    Args:
      config: the whole config; ``config.evaluation.pool`` chooses the tokens.
      layer: the number of their layer; 0: the encoder's output; None: ``config.evaluation.layer``.

    Raises:
      ConfigError: the pooling needs a class token, and the encoder has none.
    """
    pooled, name = pool(config), ENCODERS[config.encoder.name].output_point
    layer = config.evaluation.layer if layer is None else layer

    def select(output_BND: jax.Array, found: Points, _: tuple[int, int]) -> jax.Array:
        return pooled(found[name][layer - 1] if layer else output_BND).astype(jnp.float32)

    return Reader(build_encoder(config), select, points=layer > 0)


def width(config: ConfigDict) -> int:
    """The width D of the vectors that :func:`build` reads from the encoder's output."""
    shape = jax.eval_shape(lambda: build(config, layer=0)(init_params(config, jax.random.key(0)), blank_image(config)))
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


def block_maps(config: ConfigDict, layers: Sequence[int]) -> Reader:
    """The function ({"encoder": parameters}, images, keys_B=None) -> one (B, h, w, D) map per layer.

    A map holds the patch tokens after one layer, each where its patch lies. If the encoder has a final norm, the tokens
    after the last block are normalised. The images are not corrupted.

    Args:
      config: the whole config.
      layers: the numbers of the layers (blocks or stages); the first is 1.
    """
    name, prefix, last = ENCODERS[config.encoder.name].output_point, prefix_tokens(config), len(widths(config))

    def select(output_BND: jax.Array, found: Points, image_size: tuple[int, int]) -> tuple[jax.Array, ...]:
        places = grids(config, image_size)
        chosen = ((n, output_BND if n == last else found[name][n - 1]) for n in layers)
        return tuple(x[:, prefix:].reshape(x.shape[0], *places[n - 1], -1) for n, x in chosen)

    return Reader(build_encoder(config), select, points=True)


def tokens_by_layer(config: ConfigDict) -> Callable[..., tuple[jax.Array, ...]]:
    """The function ({"encoder": parameters}, images, corruption) -> tokens (l, B, prefix + M, D), groups of l layers.

    These are the tokens that enter the first layer, a group of their own; the tokens after each layer; and the tokens
    that :func:`build` pools: the encoder's output, or the tokens of layer ``config.evaluation.layer`` if it is not 0.
    Neighbours of one shape are a group: the last L + 1 entries of a transformer are one; in a ResNet only the last
    stage and the output share a shape.
    """
    read, name, layer = points(config), ENCODERS[config.encoder.name].output_point, config.evaluation.layer

    def tokens(params: dict[str, Any], images_BHWC: jax.Array, corruption: Corruption) -> tuple[jax.Array, ...]:
        output_BND, points_of = read(params, images_BHWC, corruption)
        input_1BND, found = points_of["input"][0][None], points_of[name]
        last_BND = found[layer - 1] if layer else output_BND
        if isinstance(found, jax.Array):
            return input_1BND, jnp.concatenate([found, last_BND[None]])
        groups = itertools.groupby([*found, last_BND], key=jnp.shape)
        return input_1BND, *(jnp.stack(list(group)) for _, group in groups)

    return tokens
