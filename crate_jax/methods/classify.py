"""The method of fine-tuning: a linear classifier on an encoder; both are trained, or the classifier alone.

The recipes of CRATE-MAE (arXiv 2404.02446, appendix B.1), MAE (2111.06377, Table 9) and ROPIM (2310.18737)
differ in the keys of ``config.finetune``. The host decodes, crops and applies RandAugment; the device erases,
mixes and smooths labels.

Shapes: B batch, C classes, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods.method import Batch, Carried, Method, Params, Scalars, Start
from crate_jax.models import batch_norm, has_statistics, representation
from crate_jax.models.adopt import adopt_encoder, grid_of
from crate_jax.models.layers import Norm, dense
from crate_jax.validation import RECORDED, Key, Section, anything, at_least, one_of, within

# As in timm's RandomErasing: least and greatest share of the image, least and greatest height / width.
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 10 / 3)


class Head(nn.Module):
    """Optional layer norm, then a linear map to class scores."""

    classes: int
    norm: bool
    init_scale: float

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """(B, D) -> (B, C) float32."""
        if self.norm:
            x_BD = Norm(name="norm")(x_BD)
        init = nn.initializers.normal(0.02 * self.init_scale)
        return dense(self.classes, "linear", jnp.float32, init=init)(x_BD)


def scorer(config: ConfigDict, classes: int) -> Callable[[Params, jax.Array], jax.Array]:
    """The function (params, images uint8 (B, H, W, C)) -> scores (B, classes), float32, of a trained classifier."""
    head, represent = Head(classes, config.finetune.norm, config.finetune.head_init), representation.build(config)

    def scores(params: Params, images_uint8: jax.Array) -> jax.Array:
        features_BD = represent(params, normalise(images_uint8, config))
        return head.apply({"params": params["head"]}, features_BD)  # type: ignore[return-value]  # never mutable

    return scores


def build(config: ConfigDict, source: data.Source) -> Method:
    """Builds the method of a validated config, for the classes of the training set `source`.

    Raises:
      DataError: the training set has no labels, or only one class.
    """
    if source.class_names is None:
        raise DataError(
            f"config.data.source={config.data.source!r}: fine-tuning needs labels, but the training split has none"
        )
    classes = len(source.class_names)
    if classes < 2:
        raise DataError(
            f"config.data.source={config.data.source!r}: has only one class; a classifier needs two or more"
        )
    options, represent = config.finetune, representation.build(config)
    head = Head(classes, options.norm, options.head_init)
    init_params = representation.with_head(config, head, represent)

    def init(key: jax.Array, start: Start) -> tuple[Params, Carried]:
        return batch_norm.carry(start(init_params(key)))

    def logits(params: Params, images: jax.Array, keys_B: jax.Array | None = None) -> tuple[jax.Array, Params]:
        """Class scores, and the parameters with moved statistics; a frozen encoder's statistics do not move."""
        still = options.freeze and has_statistics(config)
        x_BD, params = represent.train(params, images, None if still else keys_B)
        if options.freeze:
            x_BD = jax.lax.stop_gradient(x_BD)
        return head.apply({"params": params["head"]}, x_BD), params  # type: ignore[return-value]  # never mutable

    def loss(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        erase_B, mix_B, path_B = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys_B), 1, 0)
        images = normalise(batch["image"], config)
        target_BC = optax.smooth_labels(jax.nn.one_hot(batch["label"], classes), options.label_smoothing)
        if options.erase:
            images = jax.vmap(lambda k, x: erase(k, x, options.erase))(erase_B, images)
        if options.mixup or options.cutmix:
            images, target_BC = mix(mix_B, images, target_BC, options.mixup, options.cutmix)
        scores_BC, moved = logits(batch_norm.whole(params, carried), images, path_B)
        value = jnp.mean(optax.softmax_cross_entropy(scores_BC, target_BC))
        return value, (batch_norm.carry(moved)[1], {"cross_entropy": value})

    return Method(
        inputs=("image", "label"),
        init=init,
        adopt=functools.partial(adopt_encoder, ours=grid_of(config)),
        loss=loss,
        features=scorer(config, classes),
        judged=batch_norm.whole,
        averaged=batch_norm.carried_statistics,
        mean_over_images=options.freeze or not has_statistics(config),
        frozen=options.freeze,
    )


def erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Random erasing (arXiv 1708.04896): a random box of the image becomes normal noise, drawn per pixel.

    Args:
      key: the image's key.
      image: (H, W, 3), normalised.
      probability: the probability that a box is erased.

    Returns:
      (H, W, 3).
    """
    H, W, _ = image.shape
    chance, area, aspect, top, left, noise = jax.random.split(key, 6)
    share = jax.random.uniform(area, minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    ratio = jnp.exp(jax.random.uniform(aspect, minval=np.log(ERASED_ASPECT[0]), maxval=np.log(ERASED_ASPECT[1])))
    h = jnp.minimum(jnp.sqrt(share * H * W * ratio), H)
    w = jnp.minimum(jnp.sqrt(share * H * W / ratio), W)
    inside = _box(H, W, jax.random.uniform(top) * (H - h), jax.random.uniform(left) * (W - w), h, w)
    hit = inside & (jax.random.uniform(chance) < probability)
    return jnp.where(hit[..., None], jax.random.normal(noise, image.shape, image.dtype), image)


def mix(
    keys_B: jax.Array, images: jax.Array, target_BC: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup (arXiv 1710.09412) and CutMix (1905.04899): image i is mixed with image i + B // 2, mod B.

    Each image has its own random weight. If both alphas are positive, each image gets mixup or CutMix with
    probability 1/2 each. Micro-batches of even size hold every A-th image of the batch, so both of a pair, and
    mix as the whole batch does.

    Args:
      keys_B: one key per image.
      images: (B, H, W, 3).
      target_BC: class probabilities (B, C).
      mixup: alpha of mixup's weight, which follows Beta(alpha, alpha); 0: no mixup.
      cutmix: alpha of CutMix's share, which follows Beta(alpha, alpha); 0: no CutMix.

    Returns:
      mixed images (B, H, W, 3) and class probabilities (B, C).

    >>> images = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 4, 4, 3))
    >>> mixed, target = mix(jax.random.split(jax.random.key(0), 2), images, jnp.eye(2), mixup=0.8, cutmix=0.0)
    >>> bool(jnp.allclose(mixed.mean((1, 2, 3)), target[:, 1], atol=1e-5))
    True
    """
    H, W = images.shape[1:3]

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The other image's share at each pixel (H, W), and the mean of these shares."""
        choice, weight, place = jax.random.split(key, 3)
        cut = jax.random.uniform(choice) < (0.5 if mixup and cutmix else float(bool(cutmix)))
        alpha = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
        other = 1.0 - jax.random.beta(weight, alpha, alpha)
        centre_y, centre_x = jax.random.uniform(place, (2,)) * jnp.array([H, W])
        h, w = H * jnp.sqrt(other), W * jnp.sqrt(other)
        box = _box(H, W, centre_y - h / 2, centre_x - w / 2, h, w)  # may reach beyond the edge
        map_HW = jnp.where(cut, box.astype(jnp.float32), other)
        return map_HW, jnp.mean(map_HW)

    def partners(x: jax.Array) -> jax.Array:
        return jnp.roll(x, -(len(x) // 2), axis=0)

    map_BHW, share_B = jax.vmap(draw)(keys_B)
    images = images + map_BHW[..., None] * (partners(images) - images)
    return images, target_BC + share_B[:, None] * (partners(target_BC) - target_BC)


def _check_mixing(c: ConfigDict) -> None:
    """Checks that the images of each micro-batch make pairs."""
    micro = c.batch_size // c.accumulate
    for name in ("mixup", "cutmix"):
        if not c.finetune[name]:
            continue
        if micro < 2:
            raise ConfigError(
                f"config.finetune.{name}={c.finetune[name]}: must be 0, since an image is mixed with another one, and "
                f"config.batch_size={c.batch_size} with config.accumulate={c.accumulate} gives micro-batches of one"
            )
        if c.accumulate > 1 and micro % 2:
            raise ConfigError(
                f"config.finetune.{name}={c.finetune[name]}: config.batch_size={c.batch_size} / "
                f"config.accumulate={c.accumulate} must be even, so that micro-batches mix the pairs of the whole batch"
            )


def _box(H: int, W: int, top: Any, left: Any, h: Any, w: Any) -> jax.Array:
    """Booleans (H, W), true where the pixel's centre lies inside the box; all lengths in pixels."""
    y, x = jnp.arange(H)[:, None] + 0.5, jnp.arange(W)[None, :] + 0.5
    return (y >= top) & (y < top + h) & (x >= left) & (x < left + w)


VIT = ("encoder.name", "vit")

FINETUNE = Section(
    "finetune",
    "A classifier on the encoder; both are trained. Segmentation reads freeze, final_norm, drop_path, relative_bias.",
    of_the_run=True,
    check=_check_mixing,
    keys=dict(
        norm=Key(True, anything, "layer norm between the pooled tokens and the linear head"),
        final_norm=Key(True, anything, "keep the encoder's last norm"),
        head_init=Key(1.0, at_least(0), "factor on the head's initial weights"),
        drop_path=Key(0.0, within(0, 1, "[)"), "value that replaces encoder.drop_path", read_by=VIT, resume=RECORDED),
        relative_bias=Key(
            "shared", one_of("shared", "per_block"), "per_block: each block gets its own copy of the bias", read_by=VIT
        ),
        freeze=Key(False, anything, "train the head only"),
        label_smoothing=Key(
            0.0, within(0, 1, "[)"), "share of the target probability that is spread over all classes", resume=RECORDED
        ),
        mixup=Key(0.0, at_least(0), "alpha of mixup's weight, drawn from Beta(alpha, alpha); 0: off", resume=RECORDED),
        cutmix=Key(
            0.0,
            at_least(0),
            "alpha of CutMix's share, drawn likewise; 0: off; with mixup, each gets half of the images",
            resume=RECORDED,
        ),
        erase=Key(0.0, within(0, 1), "probability that a random box of an image becomes noise", resume=RECORDED),
    ),
)

SECTIONS = (FINETUNE,)
