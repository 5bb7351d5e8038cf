"""The method of segmentation: a head predicts a class for every pixel from an encoder's patch tokens.

The encoder is trained too, or frozen. ROPIM (arXiv 2310.18737) and MAE (2111.06377) report results on ADE20K with
UPerNet, by BEiT's recipe (2106.08254).

Shapes: B batch, H and W pixels, h and w patches per side, C classes.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.errors import ConfigError
from crate_jax.methods.method import Batch, Carried, Method, Params, Scalars, Start
from crate_jax.models import ENCODERS, batch_norm, has_statistics, representation, widths
from crate_jax.models.adopt import adopt_encoder, grid_of
from crate_jax.models.heads import HEADS, resize
from crate_jax.validation import RECORDED, Key, Section, anything, at_least, one_of

# Depths of UPerNet's four maps as shares of the encoder's depth; in BEiT's code blocks 4, 6, 8, 12 of 12 and
# 8, 12, 16, 24 of 24.
BEIT_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)
COLUMNS = ("image", "truth", "prediction")


def blocks(config: ConfigDict) -> tuple[int, ...]:
    """The numbers of the blocks (in a ResNet: the stages) whose tokens the head reads, from 1.

    Raises:
      ConfigError: the encoder does not have one of the blocks, or the head cannot read so many.

    >>> encoder = {"name": "vit", "depth": 12, "width": 8}
    >>> blocks(ConfigDict({"encoder": encoder, "segment": {"head": "upernet", "blocks": ()}}))
    (4, 6, 8, 12)
    """
    depth, chosen = len(widths(config)), tuple(int(block) for block in config.segment.blocks)
    if not chosen and config.segment.head == "upernet" and not ENCODERS[config.encoder.name].patches:
        return tuple(range(1, depth + 1))
    if not chosen:
        upernet = tuple(max(1, round(depth * share)) for share in BEIT_DEPTHS)
        return upernet if config.segment.head == "upernet" else (depth,)
    if config.segment.head == "upernet" and len(chosen) != len(BEIT_DEPTHS):
        raise ConfigError(f"config.segment.blocks={chosen}: must be four blocks for head=upernet, the lowest first")
    if min(chosen) < 1 or max(chosen) > depth:
        what = ENCODERS[config.encoder.name].layer
        raise ConfigError(f"config.segment.blocks={chosen}: the encoder has the {what}s 1..{depth}")
    return chosen


def check(config: ConfigDict) -> None:
    """Checks that options are off which segmentation would ignore, or which would move an image but not its mask.

    Raises:
      ConfigError: one of these options is on; the error names its key.
    """
    for section, key in (
        ("data", "randaugment_layers"),
        *(("finetune", key) for key in ("label_smoothing", "mixup", "cutmix", "erase")),
    ):
        if config[section][key]:
            raise ConfigError(f"config.{section}.{key}={config[section][key]}: must be 0 for segmentation")


def predictor(config: ConfigDict, classes: int) -> Callable[[Params, jax.Array], jax.Array]:
    """The function (params, images uint8 (B, H, W, C)) -> the class of each pixel, int32 (B, H, W)."""
    head, maps_of = HEADS[config.segment.head](config, classes), representation.block_maps(config, blocks(config))
    size = tuple(config.data.image_size)

    def predict(params: Params, images_uint8: jax.Array) -> jax.Array:
        maps = maps_of(params, normalise(images_uint8, config))
        scores_BHWC = resize(head.apply({"params": params["head"]}, maps)[0], size)
        return jnp.argmax(scores_BHWC, axis=-1).astype(jnp.int32)

    return predict


def build(config: ConfigDict, source: data.Source) -> Method:
    """Builds the method of a validated config, for the classes of `source`, a set of pairs of image and mask.

    Raises:
      ConfigError: see :func:`blocks` and :func:`check`.
      TypeError: `source` is not a PairSource.
    """
    check(config)
    if not isinstance(source, data.PairSource):
        raise TypeError(f"segmentation needs a PairSource, got {type(source).__name__}")
    classes, size = source.classes, tuple(config.data.image_size)
    head = HEADS[config.segment.head](config, classes)
    maps_of = representation.block_maps(config, blocks(config))
    init_params = representation.with_head(config, head, maps_of)

    def init(key: jax.Array, start: Start) -> tuple[Params, Carried]:
        return batch_norm.carry(start(init_params(key)))

    def scores(params: Params, images_uint8: jax.Array, keys_B: jax.Array) -> tuple[tuple[jax.Array, ...], Params]:
        """The head's class scores (B, H, W, C), float32, and its auxiliary scores if it has any; moved statistics."""
        still = config.finetune.freeze and has_statistics(config)
        maps, params = maps_of.train(params, normalise(images_uint8, config), None if still else keys_B)
        if config.finetune.freeze:
            maps = jax.lax.stop_gradient(maps)
        return tuple(resize(x, size) for x in head.apply({"params": params["head"]}, maps)), params

    def loss(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        found, moved = scores(batch_norm.whole(params, carried), batch["image"], keys_B)
        values = [cross_entropy(x, batch["mask"]) for x in found]
        scalars = dict(zip(("cross_entropy", "auxiliary"), values, strict=False))
        return values[0] + config.segment.auxiliary * sum(values[1:]), (batch_norm.carry(moved)[1], scalars)

    predict = predictor(config, classes)

    def draw(params: Params, batch: Batch, _: jax.Array) -> tuple[jax.Array, ...]:
        colours = jnp.asarray(np.concatenate([class_colours(classes), np.zeros((1, 3), np.float32)]))
        shown = batch["image"].astype(jnp.float32) / 255.0
        return shown, colours[batch["mask"]], colours[predict(params, batch["image"])]  # the last row is IGNORED's

    return Method(
        inputs=("image", "mask"),
        init=init,
        adopt=functools.partial(adopt_encoder, ours=grid_of(config), resize=True),
        loss=loss,
        features=predict,
        judged=batch_norm.whole,
        averaged=batch_norm.carried_statistics,
        mean_over_images=config.finetune.freeze or not has_statistics(config),
        frozen=config.finetune.freeze,
        columns=COLUMNS,
        pictures=draw,
        pictures_name="segmentation",
    )


def class_colours(classes: int) -> np.ndarray:
    """Returns a colour per class, float32 (classes, 3) in 0..1.

    Hues of neighbouring classes are a golden angle apart, so that the first few always differ clearly.
    """
    numbers = range(classes)
    rows = [colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.5)[k // 8 % 2], (0.95, 0.65)[k // 4 % 2]) for k in numbers]
    return np.array(rows, np.float32).reshape(classes, 3)


def cross_entropy(scores_BHWC: jax.Array, mask_BHW: jax.Array) -> jax.Array:
    """The sum of the labelled pixels' cross-entropies, divided by the number of all pixels; float32 scalar.

    Since all pixels count in the divisor, each labelled pixel has the same weight in every micro-batch, and the mean
    over micro-batches is the loss of the whole batch.

    Args:
      scores_BHWC: class scores (B, H, W, C).
      mask_BHW: the classes (B, H, W), or data.IGNORED where there is no label.

    >>> mask = jnp.array([[[0, data.IGNORED]]])
    >>> round(float(cross_entropy(jnp.zeros((1, 1, 2, 2)), mask)), 3)  # log(2) / 2
    0.347
    """
    labelled = mask_BHW != data.IGNORED
    classes_BHW = jnp.where(labelled, mask_BHW, 0).astype(jnp.int32)
    values = optax.softmax_cross_entropy_with_integer_labels(scores_BHWC, classes_BHW)
    return jnp.mean(jnp.where(labelled, values, 0.0))


UPERNET = ("segment.head", "upernet")

SEGMENT = Section(
    "segment",
    "Job segment: a head that predicts the class of each pixel.",
    of_the_run=True,
    check=check,
    keys=dict(
        head=Key("linear", one_of(*HEADS), "network from the encoder's tokens to classes"),
        blocks=Key(
            (),
            anything,
            "blocks or stages, from 1, that the head reads; none: the last (linear), BEiT's four or all (upernet)",
            items=int,
        ),
        channels=Key(0, at_least(0), "width of the head; 0: as in the encoder", read_by=UPERNET),
        auxiliary=Key(
            0.0,
            at_least(0),
            "weight of the loss of a second, small head, which reads the third of the blocks",
            read_by=UPERNET,
            resume=RECORDED,
        ),
        classes=Key(0, at_least(0), "number of classes; 0: the highest class of the training masks, plus 1"),
        ignore_index=Key(255, anything, "value in the masks that is not a class; -1: there is no such value"),
        reduce_zero_label=Key(False, anything, "the classes in the masks start at 1, and 0 is not a class (ADE20K)"),
    ),
)

SECTIONS = (SEGMENT,)
