"""The config that fits a state dict: everything that names and shapes of tensors say about a model.

They do not say the number of heads, how images were normalised, what the decoder predicts, or CRATE's lambda. Where
no hint says it either, the values are those of the published models of the same width.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.convert.families import family, import_state_dict
from crate_jax.convert.rules import Grid, canonical_name
from crate_jax.data import IMAGENET_MEAN, IMAGENET_STD
from crate_jax.errors import ConfigError
from crate_jax.models.patches import relative_table_rows
from crate_jax.models.resnet import ARCHITECTURES
from crate_jax.parallel.parameters import names

log = logging.getLogger(__name__)

VIT_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
CRATE_HEADS = {384: 6, 576: 12, 768: 12, 1024: 16}
DECODER_HEADS = {512: 16}  # MAE's
CRATE_LAMBDA = {"crate": 0.1, "crate_mae": 0.5, "crate_torch": 0.5}  # as released; CRATE-MAE's figures have 5.0

# Names of position tables: their rows are one per patch, and one for the class token.
TABLES = (
    "pos_embed", "decoder_pos_embed", "pos_embedding", "encoder.pos_embed", "vit.embeddings.position_embeddings",
    "encoder.embedding.positions",
)  # fmt: skip
LEARNED_TABLES = {  # family -> those that are parameters
    "timm_vit": ("pos_embed",), "beit": ("pos_embed",), "crate": ("pos_embedding",),
    "hf_vit": ("vit.embeddings.position_embeddings",),
}  # fmt: skip
RELATIVE_TABLES = (
    "rel_pos_bias.relative_position_bias_table",
    "blocks.0.attn.relative_position_bias_table",
)
PATCH_KERNELS = (
    "patch_embed.proj.weight",
    "encoder.patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
)
LINEAR_PATCH_KERNELS = ("to_patch_embedding.2.weight", "encoder.embedding.patch_embed.weight")  # CRATE's


@dataclasses.dataclass(frozen=True)
class Hints:
    """What is known about a model besides its tensors; None: not known.

    Attributes:
      heads: number of the encoder's attention heads.
      decoder_heads: number of the decoder's attention heads.
      image_size: (height, width) in pixels.
      mean: mean per channel of pixels scaled to [0, 1].
      std: standard deviation per channel of pixels scaled to [0, 1].
      target: the decoder's target, ``pixel`` or ``patch_normalised``.
      mask_ratio: share of the patches that pre-training removes.
      lam: CRATE's sparsity weight.
      stem_padding: padding of a ResNet's 3 x 3 stem.
      architecture: timm's name of the model, which may say what no tensor shows.
      interpolation: how images are resized, ``bicubic`` or ``bilinear``.
      eval_crop: share of the shorter side in the central crop of evaluation.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    target: str | None = None
    mask_ratio: float | None = None
    lam: float | None = None
    stem_padding: int | None = None
    architecture: str | None = None
    interpolation: str | None = None
    eval_crop: float | None = None

    def or_else(self, other: Hints) -> Hints:
        """These hints, and those of `other` where these are None.

        >>> hints = Hints(heads=3).or_else(Hints(heads=6, lam=0.1))
        >>> hints.heads, hints.lam
        (3, 0.1)
        """
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Hints(**{name: getattr(other, name) if value is None else value for name, value in mine.items()})


def describe(name: str, state: Mapping[str, np.ndarray], hints: Hints | None = None) -> ConfigDict:
    """The config of the model whose weights `state` holds.

    Raises:
      ConfigError: the state dict does not fit the family, or a size is not known.
    """
    hints = hints or Hints()
    state = with_class_row(name, state, hints.image_size)
    grid = grid_of(name, state, hints.image_size)
    return config_of(name, import_state_dict(name, state, grid), grid, hints)


def patch_size(name: str, state: Mapping[str, np.ndarray]) -> int:
    """Side of a patch in pixels.

    Raises:
      ConfigError: there is no patch embedding, or its patches are not square or do not have three channels.
    """
    found = {canonical_name(family(name), n): a for n, a in state.items()}
    for kernel in PATCH_KERNELS:
        shape = np.shape(found[kernel]) if kernel in found else None
        if shape and len(shape) == 4:
            if shape[1] != 3 or shape[2] != shape[3]:
                raise ConfigError(f"'{kernel}' has the shape {list(shape)}; expected square patches of 3 channels")
            return int(shape[2])
    for kernel in LINEAR_PATCH_KERNELS:
        if kernel in found:
            return math.isqrt(np.shape(found[kernel])[-1] // 3)
    raise ConfigError(f"{name} weights do not fit: missing a patch embedding such as '{PATCH_KERNELS[0]}'")


def with_class_row(
    name: str, state: Mapping[str, np.ndarray], image_size: tuple[int, int] | None
) -> Mapping[str, np.ndarray]:
    """The tensors, where a learned position table has a row for the class token.

    The table of DeiT III and of timm's models with ``no_embed_class`` has rows for the patches only, and is added to
    them before the class token is put in front. It gets a first row of zeros, which computes the same.

    Args:
      name: the family.
      state: tensors by name.
      image_size: (height, width) in pixels; None: a table whose number of rows is a square has no row too many.
    """
    out = dict(state)
    for tensor, a in state.items():
        if canonical_name(family(name), tensor) not in LEARNED_TABLES.get(name, ()) or np.ndim(a) != 3:
            continue
        rows = a.shape[1]
        if image_size is None:
            lacks = math.isqrt(rows) ** 2 == rows
        else:
            lacks = rows == math.prod(pixels // patch_size(name, state) for pixels in image_size)
        if lacks:
            log.info("'%s' has no row for the class token and gets one of zeros", tensor)
            out[tensor] = np.concatenate([np.zeros_like(a[:, :1]), a], 1)
    return out


def grid_of(name: str, state: Mapping[str, np.ndarray], image_size: tuple[int, int] | None) -> Grid:
    """(h, w) patches of images of `image_size` pixels; if it is None, of the square that the position table covers.

    A ResNet has no patches, and its result is (0, 0).

    Raises:
      ConfigError: there is neither a size nor a table, the table is not one of a square, or the two do not agree.
    """
    if name == "resnet":
        return 0, 0
    side = patch_size(name, state)
    found = {canonical_name(family(name), n): np.shape(a) for n, a in state.items()}
    for table in TABLES:
        if table in found and len(found[table]) != 3:
            shape = list(found[table])
            raise ConfigError(f"'{table}' has the shape {shape}; expected a table of positions (1, rows, width)")
    patches = next((found[t][1] - 1 for t in TABLES if t in found), None)
    rows = next((found[p + t][0] for t in RELATIVE_TABLES for p in ("", "encoder.") if p + t in found), None)
    if image_size is not None:
        if any(pixels % side for pixels in image_size):
            raise ConfigError(f"an image size of {list(image_size)} is not a multiple of the patch size {side}")
        grid = (image_size[0] // side, image_size[1] // side)
        if patches not in (None, grid[0] * grid[1]) or rows not in (None, relative_table_rows(grid)):
            raise ConfigError(
                f"the position table has {patches or rows} rows and does not fit images of {list(image_size)}"
            )
        return grid
    if patches is not None:
        edge = math.isqrt(patches)
    elif rows is not None:
        edge = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    else:
        raise ConfigError("the image size is unknown: there is no position table; give the size (--image-size)")
    if patches not in (None, edge * edge) or rows not in (None, relative_table_rows((edge, edge))):
        raise ConfigError(
            f"a position table of {patches or rows} rows is not that of a square; give the image size (--image-size)"
        )
    return edge, edge


def config_of(name: str, params: Mapping[str, Any], grid: Grid, hints: Hints) -> ConfigDict:
    """The config of a model with these parameters.

    Raises:
      ConfigError: the number of heads is unknown or does not divide the width; there are two kinds of positions; no
        ResNet has these shapes; or it is a model of timm's that computes something else than its tensors show.
    """
    ours = {n: np.shape(a) for n, a in names(params).items()}
    c = base()
    if hints.architecture and re.search(TIMM_HIDDEN, hints.architecture):
        raise ConfigError(
            f"the config.json beside the file names timm's {hints.architecture}, whose rotary positions or order of "
            "norms no tensor shows, and which an encoder here does not have"
        )
    if name == "resnet":
        _resnet(c, ours, hints)
        return c
    crate = "encoder/blocks/dictionary/kernel" in ours
    kernel = ours["encoder/embedding/patch_embed/kernel"]
    c.encoder.name = "crate" if crate else "vit"
    c.encoder.patch_size, c.encoder.width = math.isqrt(kernel[0] // 3), kernel[1]
    c.encoder.depth = next(shape[0] for n, shape in ours.items() if n.startswith("encoder/blocks/"))
    c.encoder.positions = _positions(name, ours)
    c.encoder.embed_norm = "encoder/embedding/pixel_norm/scale" in ours
    c.encoder.final_norm = "encoder/norm/scale" in ours
    c.data.image_size = (grid[0] * c.encoder.patch_size, grid[1] * c.encoder.patch_size)
    _preprocessing(c, hints)
    c.loss.target = hints.target or "pixel"
    if crate:
        c.encoder.lam = CRATE_LAMBDA[name] if hints.lam is None else hints.lam
        c.encoder.final_eps = 1e-5 if name == "crate" else 1e-6
        c.encoder.tied_output = "encoder/blocks/mssa/output/kernel" not in ours
        if "encoder/blocks/back/kernel" in ours:
            c.encoder.dictionary = "overcomplete"
            c.encoder.expansion = ours["encoder/blocks/back/kernel"][1] // c.encoder.width
    else:
        c.encoder.mlp_ratio = ours["encoder/blocks/mlp_in/kernel"][2] / c.encoder.width
        c.encoder.layer_scale = 0.1 if "encoder/blocks/layer_scale_1" in ours else 0.0  # a new one's initial value
        c.encoder.qkv_bias = next(
            (k for k, n in (("qkv", "qkv/bias"), ("qv", "q_bias")) if f"encoder/blocks/attention/{n}" in ours), "none"
        )
        c.encoder.init = "trunc_normal" if name in ("beit", "ropim", "simmim") else "xavier"
    table = ours.get("encoder/relative_bias", ours.get("encoder/blocks/relative_bias"))
    published = (CRATE_HEADS if crate else VIT_HEADS).get(c.encoder.width)
    heads = table[-1] if table else published if hints.heads is None else hints.heads
    c.encoder.heads = _check_heads("encoder", c.encoder.width, heads, "--heads")
    _corruption(c, name, ours, hints)
    _decoder(c, ours, hints)
    return c


def _preprocessing(c: ConfigDict, hints: Hints) -> None:
    c.data.mean, c.data.std = hints.mean or IMAGENET_MEAN, hints.std or IMAGENET_STD
    c.data.interpolation = hints.interpolation or c.data.interpolation
    c.data.eval_crop = hints.eval_crop or c.data.eval_crop


# timm's ViTs with a ViT's tensors: rotary positions are computed, and EVA-02-E has its norms after attention and MLP.
TIMM_HIDDEN = "_rope_|^eva02_"
IMAGENET_SIZE, CIFAR_SIZE = (224, 224), (32, 32)  # pixels
TIMM_RESNETS = (*ARCHITECTURES, "tv_resnet34", "tv_resnet50")


def _resnet(c: ConfigDict, ours: Mapping[str, Any], hints: Hints) -> None:
    """Sets the architecture, width and stem of a ResNet, from its shapes (kh, kw, in, out) of kernels."""
    e, stem = c.encoder, ours["encoder/stem/conv/kernel"]
    e.name, e.stage_width, side = _architecture(ours), stem[3], stem[0]
    if hints.architecture and hints.architecture not in TIMM_RESNETS:
        raise ConfigError(
            f"the config.json beside the file names timm's {hints.architecture}, which computes something else than "
            f"its tensors show; known: {', '.join(TIMM_RESNETS)}"
        )
    if side not in (3, 7) or stem[:3] != (side, side, 3):
        raise ConfigError(
            f"'conv1.weight' has {stem[0]} x {stem[1]} pixels and {stem[2]} channels; expected 7 x 7 or 3 x 3 and 3"
        )
    e.stem = "imagenet" if side == 7 else "cifar"
    if e.stem == "cifar":
        if hints.stem_padding not in (1, 2):
            raise ConfigError(
                "the padding of a 3 x 3 stem is not in the weights (solo-learn: 2, most others: 1); give it to "
                "`python -m crate_jax.convert import` (--stem-padding)"
            )
        e.stem_padding = hints.stem_padding
    c.data.image_size = hints.image_size or (IMAGENET_SIZE if side == 7 else CIFAR_SIZE)
    _preprocessing(c, hints)


def _architecture(ours: Mapping[str, Any]) -> str:
    """The name of the ResNet with these arrays."""
    blocks = tuple(
        sum(n.startswith(f"encoder/stage{k}/") and n.endswith("/conv1/kernel") for n in ours) for k in (1, 2, 3, 4)
    )
    first = "encoder/stage1/block0"
    bottleneck = f"{first}/conv3/kernel" in ours
    inner, second = ours[f"{first}/conv1/kernel"][3], ours[f"{first}/conv2/kernel"]
    if second[2] != inner:
        raise ConfigError(f"'layer1.0.conv2.weight' has {inner // second[2]} groups (ResNeXt), which is not supported")
    factor = inner / ours["encoder/stem/conv/kernel"][3]
    for name, known in ARCHITECTURES.items():
        if (known.blocks, known.bottleneck, known.inner) == (blocks, bottleneck, factor):
            return name
    kind = "bottleneck" if bottleneck else "basic"
    raise ConfigError(
        f"not a known ResNet: {blocks} {kind} blocks with {factor:g} times the stem's width; known: "
        f"{', '.join(ARCHITECTURES)}"
    )


def _positions(name: str, ours: Mapping[str, Any]) -> str:
    kinds = {
        "learned": "encoder/embedding/positions",
        "relative": "encoder/relative_bias",
        "relative_per_block": "encoder/blocks/relative_bias",
    }
    found = [kind for kind, array in kinds.items() if array in ours]
    if len(found) > 1:
        raise ConfigError(f"{name} weights: both {' and '.join(found)} positions; an encoder here has one kind")
    if not found:
        return "sincos" if name in ("vit_mae", "crate_mae", "hf_vit_mae", "crate_torch") else "none"
    return found[0]


def _check_heads(part: str, width: int, heads: int | None, flag: str) -> int:
    if heads is None:
        raise ConfigError(
            f"the number of heads is not in the weights, and no published {part} has the width {width}; give it to "
            f"`python -m crate_jax.convert import` ({flag})"
        )
    if heads < 1 or width % heads:
        raise ConfigError(f"{heads} heads do not divide the {part}'s width {width}")
    return heads


def _corruption(c: ConfigDict, name: str, ours: Mapping[str, Any], hints: Hints) -> None:
    """Sets the corruption that the model was pre-trained with; :func:`base`'s name stays if no array shows it."""
    if "encoder/embedding/mask_token" in ours:
        c.corruption.name, c.corruption.mask_fill = "mask", "token"
    elif "decoder/mask_token" in ours:
        c.corruption.name, c.corruption.mask_fill = "mask", "drop"
    elif "decoder/head/kernel" in ours:
        c.corruption.name = "rop"
    c.corruption.mask_ratio = hints.mask_ratio or (0.6 if name == "simmim" else 0.75)
    if name in ("ropim", "simmim"):
        c.loss.norm = "l1"


def _decoder(c: ConfigDict, ours: Mapping[str, Any], hints: Hints) -> None:
    if "decoder/blocks/linear/kernel" in ours:
        c.decoder.name, c.decoder.heads = "crate", c.encoder.heads
        c.decoder.depth = ours["decoder/blocks/linear/kernel"][0]
    elif "decoder/blocks/mlp_in/kernel" in ours:
        c.decoder.name = "transformer"
        c.decoder.depth, c.decoder.width = ours["decoder/blocks/mlp_in/kernel"][:2]
        published = DECODER_HEADS.get(c.decoder.width)
        heads = published if hints.decoder_heads is None else hints.decoder_heads
        c.decoder.heads = _check_heads("decoder", c.decoder.width, heads, "--decoder-heads")
    elif "decoder/head/kernel" in ours:
        c.decoder.name = "linear"
