"""Encoders: modules ``(images_BHWC, corruption, keys_B) -> tokens (B, prefix + M, D)``, and the table of them.

Shapes: B batch, H and W pixels, M patch tokens that the encoder sees, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.models.beginning import BEGINNINGS
from crate_jax.models.crate import CrateEncoder
from crate_jax.models.layers import remat_rule
from crate_jax.models.patches import grid_shape
from crate_jax.models.resnet import ARCHITECTURES, STEMS, ResNetEncoder, map_sizes
from crate_jax.models.vit import ViTEncoder
from crate_jax.validation import MAX_WHOLE, RECORDED, Key, Section, anything, at_least, one_of, positive, within

__all__ = ["build_encoder"]


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
        begin=BEGINNINGS[e.init],
    )


def _resnet(config: ConfigDict) -> nn.Module:
    e = config.encoder
    return ResNetEncoder(
        architecture=ARCHITECTURES[e.name],
        width=e.stage_width,
        stem=e.stem,
        stem_padding=e.stem_padding,
        patch_size=e.patch_size,
        norm_groups=e.norm_groups,
        remat=remat_rule(config),
        dtype=jnp.dtype(config.dtype),
    )


def _shared(config: ConfigDict) -> dict:
    e = config.encoder
    return dict(
        width=e.width,
        depth=e.depth,
        heads=e.heads,
        patch_size=e.patch_size,
        grid=grid_shape(config.data.image_size, e.patch_size),
        positions=e.positions,
        embed_norm=e.embed_norm,
        final_norm=e.final_norm,
        final_eps=e.final_eps,
        remat=remat_rule(config),
        dtype=jnp.dtype(config.dtype),
    )


def _same_widths(config: ConfigDict) -> tuple[int, ...]:
    return (config.encoder.width,) * config.encoder.depth


def _same_grids(config: ConfigDict, image_size: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return (grid_shape(image_size, config.encoder.patch_size),) * config.encoder.depth


def _stage_widths(config: ConfigDict) -> tuple[int, ...]:
    return ARCHITECTURES[config.encoder.name].widths(config.encoder.stage_width)


def _stage_grids(config: ConfigDict, image_size: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return map_sizes(image_size, config.encoder.stem, config.encoder.stem_padding)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A row of ENCODERS.

    The module that `build` returns is called with images (B, H, W, 3), float32 and normalised
    (:mod:`crate_jax.data.pixels`), a corruption (none: the identity) and one key per image (none: no drop path, and
    batch norm with the running statistics). It returns the tokens (B, prefix + M, D). The images may have another size
    than the config's.

    Attributes:
      build: the function whole config -> module.
      prefix: number of tokens before the patch tokens; the first of them is the class token.
      output_point: the named point that holds the tokens after each layer.
      layer: what its layers are called, "block" or "stage".
      widths: whole config -> the width of the tokens after each layer; the output has the last of them.
      grids: (whole config, (height, width) of images in pixels) -> (h, w), the places of the patch tokens after each
        layer.
      patches: whether it cuts every image into patches of encoder.patch_size; otherwise only corruptions do.
      statistics: whether it keeps running statistics, which methods must carry (:mod:`crate_jax.models.batch_norm`).
    """

    build: Callable[[ConfigDict], nn.Module]
    prefix: int
    output_point: str
    layer: str = "block"
    widths: Callable[[ConfigDict], tuple[int, ...]] = _same_widths
    grids: Callable[[ConfigDict, Sequence[int]], tuple[tuple[int, int], ...]] = _same_grids
    patches: bool = True
    statistics: bool = False


_RESNET = Encoder(_resnet, 0, "after_stage", "stage", _stage_widths, _stage_grids, patches=False, statistics=True)

ENCODERS: dict[str, Encoder] = {
    "crate": Encoder(_crate, prefix=1, output_point="after_ista"),
    "vit": Encoder(_vit, prefix=1, output_point="after_mlp"),
    **dict.fromkeys(ARCHITECTURES, _RESNET),
}


def build_encoder(config: ConfigDict) -> nn.Module:
    """The encoder that a validated config describes: (images, corruption, keys) -> tokens (B, prefix + M, D)."""
    return ENCODERS[config.encoder.name].build(config)


def prefix_tokens(config: ConfigDict) -> int:
    """Number of tokens before the patch tokens in the output of the config's encoder."""
    return ENCODERS[config.encoder.name].prefix


def has_statistics(config: ConfigDict) -> bool:
    """Whether the config's encoder keeps running statistics."""
    return ENCODERS[config.encoder.name].statistics


def widths(config: ConfigDict) -> tuple[int, ...]:
    """The width of the tokens after each layer of the config's encoder; the output has the last of them."""
    return ENCODERS[config.encoder.name].widths(config)


def grids(config: ConfigDict, image_size: Sequence[int] | None = None) -> tuple[tuple[int, int], ...]:
    """(h, w), the places of the patch tokens after each layer of the config's encoder.

    Args:
      config: the whole config.
      image_size: (height, width) of the images in pixels; None: ``config.data.image_size``.
    """
    size = config.data.image_size if image_size is None else image_size
    return ENCODERS[config.encoder.name].grids(config, size)


def blank_image(config: ConfigDict) -> jax.Array:
    """One image of zeros (1, H, W, C) of the config's size, the input with which parameters are initialised."""
    return jnp.zeros((1, *config.data.image_size, config.data.channels), jnp.float32)


MAX_PATCHES = 2**20  # per image
MAX_DEPTH = 10_000  # blocks; the numbers of a thousand million blocks alone fill the memory


def check_patches(c: ConfigDict) -> None:
    """Checks that images can be cut into patches of encoder.patch_size.

    Raises:
      ConfigError: they cannot, or there are too many patches.
    """
    size, patch = tuple(c.data.image_size), c.encoder.patch_size
    if any(side % patch for side in size):
        raise ConfigError(
            f"config.data.image_size={size}: both sides must be multiples of config.encoder.patch_size={patch}"
        )
    if math.prod(size) // patch**2 > MAX_PATCHES:
        raise ConfigError(
            f"config.data.image_size={size}: has more than {MAX_PATCHES} patches of config.encoder.patch_size={patch}"
        )


def _check_encoder(c: ConfigDict) -> None:
    e, size = c.encoder, tuple(c.data.image_size)
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"config.data.image_size={size!r}: must be (height, width)")
    if not ENCODERS[e.name].patches:
        if min(map_sizes(size, e.stem, e.stem_padding)[0]) < 1:
            raise ConfigError(
                f"config.data.image_size={size}: config.encoder.stem='cifar' without padding needs sides of at least 3 "
                "pixels; set config.encoder.stem_padding=1"
            )
        return
    check_patches(c)
    if e.width % e.heads:
        raise ConfigError(f"config.encoder.width={e.width}: must be a multiple of config.encoder.heads={e.heads}")
    if e.width % 4 and e.positions == "sincos":
        raise ConfigError(f"config.encoder.width={e.width}: must be a multiple of 4 for sine-cosine positions")
    if e.name == "vit" and not 1 <= e.width * e.mlp_ratio <= MAX_WHOLE:
        raise ConfigError(
            f"config.encoder.mlp_ratio={e.mlp_ratio}: times config.encoder.width={e.width} it must lie in "
            f"[1, {MAX_WHOLE}]; 4.0 is usual"
        )
    if e.name == "crate" and e.positions.startswith("relative"):
        raise ConfigError(f"config.encoder.positions={e.positions!r}: only encoder.name='vit' has a relative bias")
    if e.name == "crate" and e.drop_path:
        raise ConfigError(f"config.encoder.drop_path={e.drop_path}: only encoder.name='vit' has drop path")


CRATE, VIT = ("encoder.name", "crate"), ("encoder.name", "vit")
TOKENS = ("encoder.name", "crate", "vit")
RESNET = ("encoder.name", *ARCHITECTURES)

ENCODER = Section(
    "encoder",
    "Images to tokens.",
    of_the_run=True,
    check=_check_encoder,
    keys=dict(
        name=Key("crate", one_of(*ENCODERS), "architecture"),
        patch_size=Key(16, positive, "side of a square patch in pixels; in a resnet only corruptions act on patches"),
        width=Key(768, positive, "numbers per token", read_by=TOKENS),
        depth=Key(12, within(1, MAX_DEPTH), "blocks", read_by=TOKENS),
        heads=Key(12, positive, "attention heads; the width must be a multiple of them", read_by=TOKENS),
        positions=Key(
            "sincos",
            one_of("sincos", "learned", "relative", "relative_per_block", "none"),
            "sincos: a fixed table; relative: one bias for all blocks (vit); relative_per_block: one per block (vit)",
            read_by=TOKENS,
        ),
        eta=Key(0.1, at_least(0), "step size of ISTA", read_by=CRATE),
        lam=Key(0.5, at_least(0), "sparsity weight lambda of ISTA", read_by=CRATE),
        dictionary=Key(
            "complete", one_of("complete", "overcomplete"), "complete: d x d; overcomplete: CRATE-alpha", read_by=CRATE
        ),
        expansion=Key(
            4, positive, "atoms per dimension of the dictionary", read_by=("encoder.dictionary", "overcomplete")
        ),
        tied_output=Key(False, anything, "tie MSSA's output to [U_1..U_K] (eq. 2.8), in encoder and decoder"),
        mlp_ratio=Key(4.0, positive, "the MLP's width divided by the tokens' width", read_by=VIT),
        qkv_bias=Key("qkv", one_of("qkv", "qv", "none"), "qkv: like MAE; qv: like BEiT, ROPIM", read_by=VIT),
        layer_scale=Key(0.0, at_least(0), "initial value of the factor on each branch; 0: no factor", read_by=VIT),
        drop_path=Key(
            0.0, within(0, 1, "[)"), "the last block's rate; it rises linearly from 0", read_by=VIT, resume=RECORDED
        ),
        embed_norm=Key(
            False, anything, "layer norms before and after the patch projection, like supervised CRATE", read_by=TOKENS
        ),
        final_norm=Key(True, anything, "normalise the last block's tokens", read_by=TOKENS),
        final_eps=Key(
            1e-6, positive, "added to the variance in the final norm; supervised CRATE: 1e-5", read_by=TOKENS
        ),
        init=Key(
            "xavier", one_of(*BEGINNINGS),
            "initial weights of vit; xavier: like MAE; trunc_normal: like BEiT, SimMIM, ROPIM, a linear decoder too",
        ),
        stem=Key(
            "imagenet", one_of(*STEMS),
            "imagenet: 7 x 7 convolution and max-pool, 1/4 of the side; cifar: 3 x 3 convolution", read_by=RESNET,
        ),
        stem_padding=Key(
            2, at_least(0), "padding of the 3 x 3 convolution: 2 in solo-learn (32 px become 34), else 1",
            read_by=("encoder.stem", "cifar"),
        ),
        stage_width=Key(64, positive, "channels of the first stage, before a bottleneck's factor of 4", read_by=RESNET),
        norm_groups=Key(
            1, positive, "random groups of a batch whose batch norms have statistics of their own", read_by=RESNET,
            resume=RECORDED,
        ),
    ),
)  # fmt: skip
