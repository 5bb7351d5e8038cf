"""The method of reconstruction: image -> corruption -> encoder -> decoder -> loss.

With config.loss.guide it is guided by labels: Balestriero & LeCun (ICML 2024, arXiv 2402.11337) add a small multiple of
a classifier's loss, and find encoders of the same reconstruction error whose features say far more about the labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import denormalise, normalise
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods import whitening
from crate_jax.methods.method import Batch, Carried, Method, Params, Scalars, Start
from crate_jax.models import (
    ENCODERS,
    MAX_DEPTH,
    autoencoder,
    batch_norm,
    check_patches,
    corruption as corruptions,
    has_statistics,
    representation,
    widths,
)
from crate_jax.models.adopt import grid_of, init_encoder
from crate_jax.models.corruption import CORRUPTIONS, Corruption, Identity
from crate_jax.models.decoders import DECODERS
from crate_jax.models.patches import patchify, standardise, statistics, unpatchify
from crate_jax.validation import RECORDED, Key, Section, anything, at_least, one_of, positive, within

NORMS = {"l2": jnp.square, "l1": jnp.abs}
GUIDE = "guide"  # the classifier's part of the parameters


def build(config: ConfigDict, source: data.Source | None = None) -> Method:
    """Builds the method of a validated config; only with config.loss.guide it needs `source`, the training images.

    Raises:
      DataError: config.loss.guide is above 0, and the training images have no labels.
      ConfigError: features are guided or whitened, and the encoder has not the token that config.evaluation.pool reads.
    """
    model = autoencoder.build(config)
    apply: Callable[..., jax.Array] = model.apply  # type: ignore[assignment]  # never mutable
    sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))
    weight = config.loss.guide
    whitened = whitening.is_asked(config)
    pooled = representation.pool(config) if weight or whitened else None
    classes = classes_of(config, source) if weight else 0

    def init(key: jax.Array, start: Start) -> tuple[Params, Carried]:
        params = autoencoder.init_params(config, key)
        return batch_norm.carry(start({**params, GUIDE: classifier(config, classes)} if weight else params))

    def loss_of_batch(
        params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        images = normalise(batch["image"], config)
        draw_keys_B, path_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
        corruption = sample(draw_keys_B)
        tree = batch_norm.whole(params, carried)
        (tokens_BMD, predicted_BNP), moved = batch_norm.train(
            model, tree, images, corruption, path_keys_B, method="both"
        )
        x_BNP = patchify(images, config.encoder.patch_size)
        value = loss(predicted_BNP, target(x_BNP, config), corruption, config)
        scalars = {"reconstruction": value}
        if pooled is not None:
            x_BD = pooled(tokens_BMD).astype(jnp.float32)
            if weight:
                guide, scalars["guide_top1"] = guidance(params[GUIDE], x_BD, batch["label"])
                value, scalars["guide_loss"] = value + weight * guide, guide
            if whitened:
                penalty, logged = whitening.penalty([x_BD], config)
                value, scalars = value + penalty, scalars | logged
        return value, (batch_norm.carry(moved)[1], scalars)

    represent = representation.build(config)

    def features(params: Params, images_uint8: jax.Array) -> jax.Array:
        return represent(params, normalise(images_uint8, config))

    def pictures(params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, ...]:
        return reconstruct(config, apply, sample(keys_B), params, normalise(batch["image"], config))

    def judged(params: Params, carried: Carried) -> Params:
        return {name: x for name, x in batch_norm.whole(params, carried).items() if name != GUIDE}

    return Method(
        inputs=("image", *(("label",) if weight else ())),
        init=init,
        adopt=functools.partial(init_encoder, ours=grid_of(config)),
        loss=loss_of_batch,
        features=features,
        judged=judged,
        averaged=batch_norm.carried_statistics,
        mean_over_images=not has_statistics(config) and not whitened,
        columns=COLUMNS,
        pictures=pictures,
    )


def classes_of(config: ConfigDict, source: data.Source | None) -> int:
    """The number of classes of the training images.

    Raises:
      DataError: they have no labels.
    """
    if source is None or source.class_names is None:
        raise DataError(
            f"config.loss.guide={config.loss.guide}: needs labelled training images, but those of "
            f"config.data.source={config.data.source!r} have no labels"
        )
    return len(source.class_names)


def classifier(config: ConfigDict, classes: int) -> Params:
    """The weights of the linear classifier of config.loss.guide at step 0, zeros: kernel (D, C) and bias (C,)."""
    return {"kernel": jnp.zeros((representation.width(config), classes)), "bias": jnp.zeros(classes)}


def guidance(weights: Params, x_BD: jax.Array, label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cross entropy of a linear classifier on the pooled features of the corrupted images, and its accuracy.

    Both are means over all images of a batch, float32 scalars. An image without a label (-1) counts as 0.

    Args:
      weights: the classifier's kernel (D, C) and bias (C,).
      x_BD: features, float32.
      label_B: the images' classes, int32.
    """
    known_B = label_B >= 0
    logits_BC = x_BD @ weights["kernel"] + weights["bias"]
    entropy_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, jnp.maximum(label_B, 0))
    hit_B = known_B & (jnp.argmax(logits_BC, axis=1) == label_B)
    return jnp.mean(jnp.where(known_B, entropy_B, 0.0)), jnp.mean(hit_B.astype(jnp.float32))


def target(patches_BNP: jax.Array, config: ConfigDict) -> jax.Array:
    """What the decoder must predict: normalised pixels, or pixels standardised per patch (config.loss.target).

    Args:
      patches_BNP: patches (B, N, P) of normalised images.
      config: a validated config.

    Returns:
      (B, N, P) float32.
    """
    patches_BNP = patches_BNP.astype(jnp.float32)
    return standardise(patches_BNP) if config.loss.target == "patch_normalised" else patches_BNP


def loss(predicted_BNP: jax.Array, target_BNP: jax.Array, corruption: Corruption, config: ConfigDict) -> jax.Array:
    """The mean over images, patches and pixels of |(I - P)(x^ - x)|^n, n = 1 or 2, float32 scalar.

    With masking the mean runs over the removed patches (He et al. 2022; CRATE-MAE B.1), with projection
    over all patches, since every patch loses something (ROPIM section 3.2). With `loss.region="all"` it is
    the mean of the whole error (CRATE-MAE eq. 2.22).

    Args:
      predicted_BNP: the decoder's output x^ (B, N, P).
      target_BNP: x (B, N, P), see :func:`target`.
      corruption: the batch's P.
      config: a validated config.
    """
    if config.loss.region == "all":
        corruption = Identity()
    error_BNP = corruption.complement(predicted_BNP.astype(jnp.float32) - target_BNP)
    # The mean of each image first, so that rounding does not depend on how the batch is split over devices.
    per_image_B = jnp.mean(NORMS[config.loss.norm](error_BNP), axis=(1, 2))
    return jnp.mean(per_image_B) / corruption.complement_share()


def predict(
    config: ConfigDict, apply: Callable, corruption: corruptions.Corruption, params: Params, images_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Patches x of images and the decoder's prediction x^ of them, both as normalised pixels whatever the target is.

    Args:
      config: a validated config.
      apply: the autoencoder's `apply`.
      corruption: the batch's corruption P.
      params: the autoencoder's parameters.
      images_BHWC: normalised images (B, H, W, 3).

    Returns:
      x and x^, each (B, N, P) float32.
    """
    x_BNP = patchify(images_BHWC, config.encoder.patch_size)
    predicted_BNP = apply({"params": params}, images_BHWC, corruption).astype(jnp.float32)
    if config.loss.target == "patch_normalised":  # back to pixels with each patch's own statistics
        mean_BN1, variance_BN1 = statistics(x_BNP)
        predicted_BNP = predicted_BNP * jnp.sqrt(variance_BN1) + mean_BN1
    return x_BNP, predicted_BNP


def silent(config: ConfigDict, x_BNP: jax.Array) -> jax.Array:
    """What :func:`predict` makes of a decoder whose output is 0 everywhere: (B, N, 1).

    It is 0, the mean colour, for pixels; where the target is normalised by patch it is each patch's own mean, which the
    prediction is given.
    """
    return statistics(x_BNP)[0] if config.loss.target == "patch_normalised" else jnp.zeros_like(x_BNP[..., :1])


COLUMNS = ("original", "the encoder gets P x", "the decoder adds (I - P) x^", "both together")


def reconstruct(
    config: ConfigDict, apply: Callable, corruption: corruptions.Corruption, params: Params, images_BHWC: jax.Array
) -> tuple[jax.Array, ...]:
    """Draws the four COLUMNS of the grid of pictures; arguments as in :func:`predict`.

    The third column has only that part of the prediction which the loss compares by default, since nothing trains the
    rest: where a mask left a patch it has the colour 0, the data's mean. Under a mask or a
    projection the last column is the sum of the second and the third; with a perfect decoder it is the image.

    Returns:
      for each column images (B, H, W, 3) in 0..1.
    """
    x_BNP, predicted_BNP = predict(config, apply, corruption, params, images_BHWC)
    added_BNP = corruption.complement(predicted_BNP)
    combined_BNP = x_BNP - corruption.complement(x_BNP - predicted_BNP)

    def image(v_BNP: jax.Array) -> jax.Array:
        pixels = unpatchify(v_BNP, config.data.image_size, config.encoder.patch_size)
        return jnp.clip(denormalise(pixels, config), 0.0, 1.0)

    return tuple(image(v) for v in (x_BNP, corruption.view(x_BNP), added_BNP, combined_BNP))


def _check_corruption(c: ConfigDict) -> None:
    check_patches(c)
    if c.corruption.name == "mask" and c.corruption.mask_fill == "drop" and not ENCODERS[c.encoder.name].patches:
        raise ConfigError(
            f"config.corruption.mask_fill='drop': config.encoder.name={c.encoder.name!r} reads whole images; use token "
            "or zero"
        )
    tokens, ratio = autoencoder.patch_numbers(c)[0], c.corruption.mask_ratio
    if c.corruption.name == "mask" and not 0 < int(tokens * (1 - ratio)) < tokens:
        raise ConfigError(
            f"config.corruption.mask_ratio={ratio}: of {tokens} patches at least one must be kept and one removed"
        )
    kept = corruptions.bucket_count(tokens, c.corruption.rop_ratio)
    if c.corruption.name == "rop" and kept == tokens:
        raise ConfigError(
            f"config.corruption.rop_ratio={c.corruption.rop_ratio}: keeps all of the {tokens} dimensions, and at least "
            "one must be removed"
        )


def _check_loss(c: ConfigDict) -> None:
    if c.loss.target == "patch_normalised" and c.data.channels * c.encoder.patch_size**2 == 1:
        raise ConfigError(
            "config.loss.target='patch_normalised': a patch of one number has no deviation; take larger ones, or pixel"
        )


MASK, ROP = ("corruption.name", "mask"), ("corruption.name", "rop")

CORRUPTION = Section(
    "corruption",
    "What is hidden from the encoder.",
    of_the_run=True,
    check=_check_corruption,
    keys=dict(
        name=Key("mask", one_of(*CORRUPTIONS), "corruption"),
        mask_ratio=Key(0.75, within(0, 1, "()"), "share of the patches removed", read_by=MASK, resume=RECORDED),
        mask_fill=Key(
            "token",
            one_of("token", "zero", "drop"),
            "what replaces removed patches; token: a learned token; drop: the encoder skips them",
            read_by=MASK,
        ),
        rop_ratio=Key(1 / 7, within(0, 1, "()"), "share of the dimensions kept, K'/K", read_by=ROP, resume=RECORDED),
        rop_buckets=Key(
            "balanced",
            one_of("balanced", "independent"),
            "balanced: as in the released code; job align reads it too",
            read_by=ROP,
            resume=RECORDED,
        ),
        rop_signs=Key(
            "independent",
            one_of("independent", "balanced"),
            "balanced: as in the released code",
            read_by=ROP,
            resume=RECORDED,
        ),
        paper_scale=Key(
            0.0, at_least(0), "0: exact projector; 0.14: the released code's scale; job align reads it too", read_by=ROP
        ),
        noise_std=Key(
            0.5,
            at_least(0),
            "standard deviation, in units of normalised pixels",
            read_by=("corruption.name", "noise"),
            resume=RECORDED,
        ),
    ),
)


def _check_decoder(c: ConfigDict) -> None:
    decoder, corruption = c.decoder, c.corruption
    encoder_width = widths(c)[-1]
    width = decoder.width or encoder_width
    dropped = corruption.name == "mask" and corruption.mask_fill == "drop"
    if decoder.name != "linear" and width % decoder.heads:
        raise ConfigError(f"config.decoder.width={width}: must be a multiple of config.decoder.heads={decoder.heads}")
    if decoder.name != "linear" and width % 4:
        raise ConfigError(f"config.decoder.width={width}: must be a multiple of 4 for sine-cosine positions")
    if dropped and decoder.name == "linear":
        raise ConfigError(
            "config.decoder.name='linear': cannot fill the patches that config.corruption.mask_fill='drop' removes; "
            "use decoder.name=transformer, or mask_fill=token"
        )
    if dropped and decoder.name == "crate" and not decoder.positions:
        raise ConfigError(
            "config.decoder.positions=False: with config.corruption.mask_fill='drop' a CRATE decoder needs positions "
            "to distinguish the filled patches; set it to True"
        )
    if decoder.name == "crate" and decoder.width not in (0, encoder_width):
        raise ConfigError(
            f"config.decoder.width={decoder.width}: must be 0 or the encoder's width {encoder_width} "
            "for a CRATE decoder"
        )


CRATE, DEEP = ("decoder.name", "crate"), ("decoder.name", "crate", "transformer")

DECODER = Section(
    "decoder",
    "The network from tokens back to patches.",
    of_the_run=True,
    check=_check_decoder,
    keys=dict(
        name=Key("crate", one_of(*DECODERS), "architecture"),
        width=Key(0, at_least(0), "numbers per token; 0: as in the encoder", read_by=DEEP),
        depth=Key(12, within(0, MAX_DEPTH), "number of blocks", read_by=DEEP),
        heads=Key(12, positive, "number of attention heads", read_by=DEEP),
        positions=Key(False, anything, "add the position table again to the decoder's input", read_by=CRATE),
        residual=Key(
            "stream",
            one_of("stream", "normalised"),
            "stream: g - MSSA(LN(g)); normalised: as in Listing 3",
            read_by=CRATE,
        ),
    ),
)

LOSS = Section(
    "loss",
    "What the decoder must predict, and how its error is measured.",
    of_the_run=True,
    check=_check_loss,
    keys=dict(
        norm=Key("l2", one_of(*NORMS), "norm of the error", resume=RECORDED),
        target=Key("pixel", one_of("pixel", "patch_normalised"), "what the decoder must predict"),
        region=Key("complement", one_of("complement", "all"), "complement: (I - P)(x - x^); all: x - x^"),
        guide=Key(0.0, at_least(0), "weight of a linear classifier's loss on the encoder's output; 0: no labels"),
    ),
)

SECTIONS = (CORRUPTION, DECODER, LOSS)
