"""Pictures of what a model does with images: reconstructions, class-token attention, principal components.

The pictures follow arXiv 2404.02446, Figures 6-11 and appendix B.3, for CRATE and for a ViT.

Shapes: B images, h x w = N patches, H heads, K head width, E = H * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.data.pixels import normalise
from crate_jax.errors import ConfigError
from crate_jax.methods.reconstruction import reconstruct
from crate_jax.models import autoencoder, corruption as corruptions, prefix_tokens, representation
from crate_jax.models.layers import BLOCK_EPS, FINAL_EPS, layer_norm
from crate_jax.models.patches import grid_shape, relative_position_index
from crate_jax.workdir.pictures import reconstruction_grid

# corruption -> its key for the strength, and the caption of a value of that key
RATIOS = {
    "mask": ("mask_ratio", "{:.0%} removed"),
    "rop": ("rop_ratio", "{:.0%} kept"),
    "noise": ("noise_std", "{:g} of noise"),
}


def reconstructions(
    config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray, ratios: Sequence[float]
) -> np.ndarray:
    """Originals, and for each ratio the input and the completed image; one row per image.

    Args:
      config: a valid config of a model with a decoder.
      params: the parameters ``encoder`` and ``decoder``.
      images_uint8: images (B, height, width, 3).
      ratios: values of the key that RATIOS names; a corruption without such a key ignores them.

    Returns:
      uint8 (H, W, 3).
    """
    name = config.corruption.name
    apply: Any = autoencoder.build(config).apply
    images = normalise(jnp.asarray(images_uint8), config)
    keys = jax.random.split(jax.random.key(config.seed), len(images_uint8))
    columns: dict[str, np.ndarray] = {}
    for ratio in ratios if name in RATIOS else (0.0,):
        changed, caption = config.copy_and_resolve_references(), "input"
        if name in RATIOS:
            key, text = RATIOS[name]
            caption = text.format(ratio)
            changed.corruption[key] = ratio
        corruption = corruptions.sampler(changed, *autoencoder.patch_numbers(changed))(keys)
        original, seen, _, combined = jax.device_get(
            jax.jit(lambda p, x, c: reconstruct(config, apply, c, p, x))(params, images, corruption)
        )
        columns |= {"original": original, caption: seen, f"{caption.split()[0]}: completed": combined}
    return reconstruction_grid(columns)


def penultimate(config: ConfigDict) -> int:
    """The block that the paper's pictures show (B.3.2), counted from 0."""
    return max(config.encoder.depth - 2, 0)


def queries_and_keys(
    config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray | jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of a block's attention for clean images uint8, (B, H, prefix + N, K) each.

    In CRATE both are U_k^T LN(Z), one projection for queries, keys and values.
    """
    _, points = representation.points(config)(params, normalise(jnp.asarray(images_uint8), config))
    x_BND, heads = points["input"][block], config.encoder.heads
    weights = jax.tree.map(lambda x: x[block], params["encoder"]["blocks"])

    def split(x_BNE: jax.Array) -> jax.Array:
        B, N, E = x_BNE.shape
        return x_BNE.reshape(B, N, heads, E // heads).transpose(0, 2, 1, 3).astype(jnp.float32)

    if "mssa" in weights:
        norm = weights["mssa_norm"]
        w = split(layer_norm(x_BND, norm["scale"], norm["bias"], BLOCK_EPS) @ weights["mssa"]["subspaces"]["kernel"])
        return w, w
    norm, attention = weights["attention_norm"], weights["attention"]
    qkv = layer_norm(x_BND, norm["scale"], norm["bias"], FINAL_EPS) @ attention["qkv"]["kernel"]
    query, key, _ = jnp.split(qkv + attention["qkv"].get("bias", 0.0), 3, axis=-1)
    return split(query + attention.get("q_bias", 0.0)), split(key)


def class_attention(
    config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray | jax.Array, block: int | None = None
) -> jax.Array:
    """The attention of a block's class token to the patches (eqs. B.4, B.5), (B, H, h, w); each map sums to 1.

    It has the model's scale 1 / sqrt(K) and relative bias, which the equations leave out.

    Args:
      config: a valid config.
      params: the parameters ``encoder``.
      images_uint8: images (B, height, width, 3).
      block: the block, counted from 0; None: the penultimate block.

    Raises:
      ConfigError: the encoder has no class token.
    """
    if not prefix_tokens(config):
        raise ConfigError(f"config.encoder.name={config.encoder.name!r}: has no class token for attention maps")
    block = penultimate(config) if block is None else block
    grid = grid_shape(config.data.image_size, config.encoder.patch_size)
    query, key = queries_and_keys(config, params, images_uint8, block)
    key = key[:, :, prefix_tokens(config) :]
    logits_BHN = jnp.einsum("bhk,bhnk->bhn", query[:, :, 0], key) / np.sqrt(query.shape[-1])
    table = params["encoder"].get("relative_bias")  # one for all blocks, or one for each
    if "relative_bias" in params["encoder"]["blocks"]:
        table = params["encoder"]["blocks"]["relative_bias"][block]
    if table is not None:
        logits_BHN = logits_BHN + table[relative_position_index(grid)[0, 1:]].T
    weights_BHN = jax.nn.softmax(logits_BHN, axis=-1)
    return weights_BHN.reshape(*weights_BHN.shape[:2], *grid)


def attention_maps(config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray) -> np.ndarray:
    """Originals beside the maps of :func:`class_attention`, one column per head; bright patches have large weights.

    The colours of each map span its smallest to its largest weight.

    Returns:
      uint8 (H, W, 3).
    """
    import matplotlib  # here: the maps themselves do not need it

    maps_BHhw = np.asarray(class_attention(config, params, images_uint8))
    low, high = maps_BHhw.min((2, 3), keepdims=True), maps_BHhw.max((2, 3), keepdims=True)
    stretched = (maps_BHhw - low) / np.maximum(high - low, 1e-12)
    coloured = matplotlib.colormaps["viridis"](stretched)[..., :3]
    heads = {f"head {k + 1}": _enlarge(coloured[:, k], config) for k in range(coloured.shape[1])}
    return reconstruction_grid({"original": images_uint8 / 255.0, **heads})


def token_components(
    tokens_BhwD: np.ndarray, threshold: float | None = None, centred: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Three principal components of the object's tokens as colours (B.3.1).

    The first component of all tokens of all images separates the object from the background. The first three components
    of the object's tokens are red, green and blue; each colour spans its values over all images.

    Args:
      tokens_BhwD: patch tokens of images of one class, on their grid.
      threshold: a token belongs to the object if its part along the first component is at least this share of the
        largest part (the paper's lambda, whose value is not stated). None: the tokens are split where the two groups
        differ most (Otsu 1979), and the group that touches the border less is the object.
      centred: whether to subtract the mean first, as the released code does; the paper's matrices are not centred.

    Returns:
      colours float32 (B, h, w, 3) in 0..1, black outside the object; and the mask of the object's tokens (B, h, w).
    """
    x_BhwD = tokens_BhwD.astype(np.float64)
    if centred:
        x_BhwD = x_BhwD - x_BhwD.mean((0, 1, 2))
    part_Bhw = x_BhwD @ _components(x_BhwD.reshape(-1, x_BhwD.shape[-1]), 1)[:, 0]
    if part_Bhw.sum() < 0:  # the sign of a component is arbitrary
        part_Bhw = -part_Bhw
    if threshold is not None:
        object_Bhw = part_Bhw >= threshold * part_Bhw.max()
    else:
        object_Bhw = part_Bhw > _otsu(part_Bhw.reshape(-1))
        border_hw = np.ones(object_Bhw.shape[1:], bool)
        border_hw[1:-1, 1:-1] = False
        if object_Bhw[:, border_hw].mean() > object_Bhw.mean():
            object_Bhw = ~object_Bhw
    colours = np.zeros((*object_Bhw.shape, 3), np.float32)
    kept_MD = x_BhwD[object_Bhw]
    if len(kept_MD):
        kept_MD = kept_MD - kept_MD.mean(0) if centred else kept_MD
        parts_M3 = kept_MD @ _components(kept_MD, 3)
        parts_M3 = parts_M3 * np.where(parts_M3.sum(0) >= 0, 1, -1)
        # Over the full range, a few outliers would make all other tokens one colour.
        low, high = np.percentile(parts_M3, (1, 99), axis=0)
        colours[object_Bhw] = np.clip((parts_M3 - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours, object_Bhw


def components(
    config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray, all_classes_uint8: np.ndarray
) -> np.ndarray:
    """Originals beside the colours of :func:`token_components`, for images of one class.

    The tokens are U_k^T LN(Z) of all heads in the penultimate block, or the keys of a ViT. In the last column, the mean
    over images of all classes at each place is subtracted: it encodes position, which may dominate the components.

    Args:
      config: a valid config.
      params: the parameters ``encoder``.
      images_uint8: images (B, height, width, 3) of one class.
      all_classes_uint8: images of all classes, for the mean at each place.

    Returns:
      uint8 (H, W, 3).
    """
    tokens, everything = (_key_tokens(config, params, images) for images in (images_uint8, all_classes_uint8))
    columns = {"original": images_uint8 / 255.0}
    for caption, tokens_BhwE in (("components", tokens), ("less position", tokens - everything.mean(0))):
        columns[caption] = _enlarge(token_components(tokens_BhwE)[0], config)
    return reconstruction_grid(columns)


def _key_tokens(config: ConfigDict, params: dict[str, Any], images_uint8: np.ndarray) -> np.ndarray:
    """Keys of the penultimate block's patch tokens, (B, h, w, E)."""
    key_BHNK = np.asarray(queries_and_keys(config, params, images_uint8, penultimate(config))[1])
    key_BHNK = key_BHNK[:, :, prefix_tokens(config) :]
    B = len(key_BHNK)
    return key_BHNK.transpose(0, 2, 1, 3).reshape(B, *grid_shape(config.data.image_size, config.encoder.patch_size), -1)


def _enlarge(cells_Bhw3: np.ndarray, config: ConfigDict) -> np.ndarray:
    """One colour per patch, enlarged to images of the size of the originals."""
    size = config.encoder.patch_size
    return cells_Bhw3.repeat(size, axis=1).repeat(size, axis=2)


def _components(x_TD: np.ndarray, count: int) -> np.ndarray:
    """The first eigenvectors of X^T X as columns, (D, count)."""
    return np.linalg.eigh(x_TD.T @ x_TD)[1][:, ::-1][:, :count]


def _otsu(values: np.ndarray) -> float:
    """The threshold that splits numbers so that the variance between both groups is largest (Otsu 1979).

    The threshold is the largest number of the lower group. One number is in the lower group.

    >>> _otsu(np.array([0.0, 1.0, 8.0, 9.0]))
    1.0
    """
    x = np.sort(values)
    if len(x) == 1:
        return float(x[0])
    below = np.arange(1, len(x))
    sums = np.cumsum(x)[:-1]
    difference = sums / below - (x.sum() - sums) / (len(x) - below)
    return float(x[np.argmax(below * (len(x) - below) * np.square(difference))])
