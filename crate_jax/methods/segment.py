"""The segmentation objective: a class for every pixel from an encoder's patch tokens, tuned or frozen.

ROPIM (arXiv 2310.18737) and MAE (2111.06377) report ADE20K by UPerNet after BEiT's recipe (2106.08254).

Shapes: B batch, H and W pixels, h and w patches per side, C classes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods.method import Batch, Carried, Method, Params, Scalars, Start
from crate_jax.models import representation
from crate_jax.models.adopt import adopt_encoder
from crate_jax.models.heads import HEADS, resize
from crate_jax.models.patches import grid_shape
from crate_jax.validation import Key, Section, anything, at_least, one_of
from crate_jax.workdir import pictures

# Depths that UPerNet's four maps come from, as shares: blocks 4, 6, 8, 12 of 12 and 8, 12, 16, 24 of 24 in BEiT's code.
BEIT_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)
COLUMNS = ("image", "truth", "prediction")


def blocks(config: ConfigDict) -> tuple[int, ...]:
    """The blocks whose tokens the head reads, from 1.

    Raises:
      ConfigError: a block that the encoder does not have, or a number of blocks that the head cannot take.
    """
    depth, chosen = config.encoder.depth, tuple(int(b) for b in config.segment.blocks)
    if not chosen:
        upernet = tuple(max(1, round(depth * share)) for share in BEIT_DEPTHS)
        return upernet if config.segment.head == "upernet" else (depth,)
    if config.segment.head == "upernet" and len(chosen) != len(BEIT_DEPTHS):
        raise ConfigError(f"config.segment.blocks={chosen}: head=upernet reads four blocks, the shallowest first")
    if min(chosen) < 1 or max(chosen) > depth:
        raise ConfigError(f"config.segment.blocks={chosen}: the encoder has the blocks 1..{depth}")
    return chosen


def check(config: ConfigDict) -> None:
    """Refuses options that would be ignored, or that would move an image but not its mask.

    Raises:
      ConfigError: names the key.
    """
    for section, key in (
        ("data", "randaugment_layers"),
        *(("finetune", key) for key in ("label_smoothing", "mixup", "cutmix", "erase")),
    ):
        if config[section][key]:
            raise ConfigError(f"config.{section}.{key}={config[section][key]}: must be 0 for segmentation")


def build(config: ConfigDict, source: data.Source) -> Method:
    """The segmenter of a validated config, for the classes of a set of pairs.

    Raises:
      ConfigError: options that segmentation does not have; see `blocks` and `check`.
      DataError: the set has a single class.
    """
    check(config)
    if not isinstance(source, data.PairSource):
        raise TypeError(f"segmentation is learnt from a PairSource, got {type(source).__name__}")
    if source.classes < 2:
        raise DataError(
            f"config.data.source={config.data.source!r}: the training masks hold a single class; segmentation needs "
            f"two (the value {config.segment.ignore_index}, config.segment.ignore_index, counts as none)"
        )
    classes, size = source.classes, tuple(config.data.image_size)
    head = HEADS[config.segment.head](config, classes)
    maps_of = representation.block_maps(config, blocks(config))
    init_params = representation.with_head(config, head, maps_of)

    def init(key: jax.Array, start: Start) -> tuple[Params, Carried]:
        return start(init_params(key)), {}

    def scores(params: Params, images_uint8: jax.Array, keys_B: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Class scores (B, H, W, C), float32: the head's, and its auxiliary ones if it has any."""
        maps = maps_of(params, normalise(images_uint8, config), keys_B)
        if config.finetune.freeze:
            maps = jax.lax.stop_gradient(maps)
        return tuple(resize(x, size) for x in head.apply({"params": params["head"]}, maps))

    def loss(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        values = [cross_entropy(x, batch["mask"]) for x in scores(params, batch["image"], keys_B)]
        scalars = dict(zip(("cross_entropy", "auxiliary"), values, strict=False))
        return values[0] + config.segment.auxiliary * sum(values[1:]), (carried, scalars)

    def predict(params: Params, images_uint8: jax.Array) -> jax.Array:
        """The class of each pixel, int32 (B, H, W)."""
        return jnp.argmax(scores(params, images_uint8)[0], axis=-1).astype(jnp.int32)

    def draw(params: Params, batch: Batch, _: jax.Array) -> tuple[jax.Array, ...]:
        colours = jnp.asarray(np.concatenate([pictures.class_colours(classes), np.zeros((1, 3), np.float32)]))
        shown = batch["image"].astype(jnp.float32) / 255.0
        return shown, colours[batch["mask"]], colours[predict(params, batch["image"])]  # the last row is IGNORED's

    return Method(
        inputs=("image", "mask"),
        init=init,
        adopt=functools.partial(adopt_encoder, grid=grid_shape(size, config.encoder.patch_size)),
        loss=loss,
        features=predict,
        columns=COLUMNS,
        pictures=draw,
        pictures_name="segmentation",
    )


def cross_entropy(scores_BHWC: jax.Array, mask_BHW: jax.Array) -> jax.Array:
    """Cross-entropy of the labelled pixels, over the number of all pixels.

    Dividing by all pixels gives each labelled one the same weight wherever it is, so that micro-batches
    add up to the loss of the whole batch.
    """
    labelled = mask_BHW != data.IGNORED
    classes_BHW = jnp.where(labelled, mask_BHW, 0).astype(jnp.int32)
    values = optax.softmax_cross_entropy_with_integer_labels(scores_BHWC, classes_BHW)
    return jnp.mean(jnp.where(labelled, values, 0.0))


UPERNET = ("segment.head", "upernet")

SEGMENT = Section(
    "segment",
    "A class for each pixel.",
    of_the_run=True,
    check=check,
    keys=dict(
        head=Key("linear", one_of(*HEADS), "what reads the encoder's tokens"),
        blocks=Key(
            (), anything, "whose tokens it reads, from 1; none: linear: the last, upernet: BEiT's four", items=int
        ),
        channels=Key(0, at_least(0), "width of the head; 0: the encoder's", read_by=UPERNET),
        auxiliary=Key(
            0.0, at_least(0), "weight of the loss of a second, small head on the third of the blocks", read_by=UPERNET
        ),
        classes=Key(0, at_least(0), "0: the highest class of the training masks, plus 1"),
        ignore_index=Key(255, anything, "value in the masks that is not a class; -1: none"),
        reduce_zero_label=Key(False, anything, "0 in the masks is not a class, the classes start at 1 (ADE20K)"),
    ),
)

SECTIONS = (SEGMENT,)
