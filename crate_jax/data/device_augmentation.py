"""Changes of colour, grey, blur, solarisation and equalisation of cropped views, on the device.

The order is that of solo-learn's recipes: the four changes of colour in random order, grey, blur, solarisation,
equalisation, then normalisation; crop and flip came before, on the host. The maths is torchvision's on tensors of
floats (ColorJitter), and Pillow's for the blur and the equalisation, without rounding to bytes between them.

`drawn` draws the random numbers, one key per image and view; `augmented` is a function of these numbers.

Shapes: B images, H x W pixels. Colours lie on planes, (B, H, W) for each of red, green and blue, in 0..1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.data.pixels import denormalise, normalise
from crate_jax.data.recipes import LARGE, of_kind

GREY = (0.2989, 0.587, 0.114)  # the weights of torchvision
THRESHOLD = (128 - 1e-2) / 255  # values from here on are inverted by solarisation; rounding must not move a 128
BOXES = 3  # Pillow's Gaussian blur is so many box filters one after the other
LEVELS = 256
BITS = 10  # per colour, between two passes over the images
STEPS = 2**BITS - 1

Planes = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """How one kind of view is changed; see the keys of config.views."""

    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: float
    blur: float
    solarise: float
    equalise: float
    sigma: tuple[float, float]

    @classmethod
    def of(cls, config: ConfigDict, view: int) -> Options:
        """The options of a view: 0 and 1 are the large views, 2 and more are small."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "sigma"]
        return cls(**{name: float(of_kind(config, name, view)) for name in names}, sigma=tuple(config.views.sigma))


class Jitter(NamedTuple):
    """The changes of colour of each image of a batch, each (B,).

    Attributes:
      rank: the places (0..3) of brightness, contrast, saturation and hue in the order of the four.
      brightness, contrast, saturation: factors, 1 for no change.
      hue: the turn as a share of the circle, 0 for no change.
    """

    rank: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array


class Draw(NamedTuple):
    """What happens to each image of a batch, each (B,). None: the operation is not a part of the program.

    Attributes:
      jitter: the changes of colour.
      grey: whether the image loses its colours.
      sigma: deviation of the blur in pixels, 0 for no blur.
      solarise: whether values from 128 on are inverted.
      equalise: whether the histograms are made flat.
    """

    jitter: Jitter | None = None
    grey: jax.Array | None = None
    sigma: jax.Array | None = None
    solarise: jax.Array | None = None
    equalise: jax.Array | None = None


def drawn(keys_B: jax.Array, options: Options) -> Draw:
    """Draws what happens to each image, from one key per image (B,)."""
    u = jax.vmap(lambda key: jax.random.uniform(key, (14,)))(keys_B).T

    def between(low: float, high: float, uniform: jax.Array) -> jax.Array:
        return low + (high - low) * uniform

    def jittered() -> Jitter:
        on = u[4] < options.jitter
        strengths = (options.brightness, options.contrast, options.saturation)
        brightness, contrast, saturation = (
            jnp.where(on, between(max(0.0, 1.0 - x), 1.0 + x, uniform), 1.0)
            for x, uniform in zip(strengths, u[5:8], strict=True)
        )
        ranks = jnp.argsort(jnp.argsort(u[:4], axis=0), axis=0)
        hue = jnp.where(on, between(-options.hue, options.hue, u[8]), 0.0)
        return Jitter((ranks[0], ranks[1], ranks[2], ranks[3]), brightness, contrast, saturation, hue)

    return Draw(
        jittered() if options.jitter else None,
        u[9] < options.grey if options.grey else None,
        jnp.where(u[10] < options.blur, between(*options.sigma, u[11]), 0.0) if options.blur else None,
        u[12] < options.solarise if options.solarise else None,
        u[13] < options.equalise if options.equalise else None,
    )


def augmented(images_BHWC: jax.Array, draw: Draw, largest: float = 2.0) -> Planes:
    """Changes cropped images.

    Args:
      images_BHWC: uint8 (B, H, W, 3).
      draw: what happens to each.
      largest: no deviation of a blur is larger.

    Returns:
      Red, green and blue, float32 (B, H, W) in 0..1.
    """
    planes = planes_of(images_BHWC)
    if draw.jitter is not None:
        # Without the barrier XLA would keep all three planes from before the mean; it is faster to compute them again.
        planes = jitter(planes, planes_of(jax.lax.optimization_barrier(images_BHWC)), draw.jitter)
    if draw.grey is not None:
        grey, on = luminance(planes), each(draw.grey)
        planes = _map(lambda x: jnp.where(on, grey, x), planes)
    if draw.sigma is not None:
        planes = blur(unpacked(packed(planes), 1), draw.sigma, largest)
    if draw.solarise is not None:
        inverted = each(draw.solarise)
        planes = _map(lambda x: jnp.where(inverted & (x >= THRESHOLD), 1.0 - x, x), planes)
    if draw.equalise is not None:
        flat = each(draw.equalise)
        planes = _map(lambda x: jnp.where(flat, equalise(x), x), planes)
    return planes


def planes_of(images_BHWC: jax.Array) -> Planes:
    """Bytes (B, H, W, 3) as red, green and blue, float32 (B, H, W) in 0..1."""
    red, green, blue = (images_BHWC[..., c].astype(jnp.float32) * np.float32(1 / 255) for c in range(3))
    return red, green, blue


def _map(function: Callable[[jax.Array], jax.Array], planes: Planes) -> Planes:
    red, green, blue = map(function, planes)
    return red, green, blue


def packed(planes: Planes) -> jax.Array:
    """Three planes (B, H, W) in 0..1 as one plane of words, int32, 10 bits for each colour.

    XLA computes each array of a program by itself. So three planes would mean three times the whole way to them.
    """
    red, green, blue = (jnp.clip(x * STEPS + 0.5, 0.0, STEPS).astype(jnp.int32) for x in planes)
    return jax.lax.optimization_barrier(red | green << BITS | blue << 2 * BITS)


def unpacked(words_BHW: jax.Array, axis: int) -> jax.Array:
    """The colours of :func:`packed`, float32 in 0..1, along a new axis of length 3; wrong by at most 1 / 8 level."""
    shift = np.arange(3, dtype=np.int32) * BITS
    ndim = words_BHW.ndim + 1
    words = jnp.expand_dims(words_BHW, axis) >> shift.reshape([3 if i == axis % ndim else 1 for i in range(ndim)])
    return (words & STEPS).astype(jnp.float32) * np.float32(1 / STEPS)


def each(x_B: jax.Array) -> jax.Array:
    """One number per image, (B, 1, 1)."""
    return x_B[:, None, None]


def luminance(planes: Planes) -> jax.Array:
    """The grey values of images, (B, H, W)."""
    return sum_of(w * x for w, x in zip(GREY, planes, strict=True))


def blend(planes: Planes, other: jax.Array, factor: jax.Array) -> Planes:
    """Moves images from `other` (B, H or 1, W or 1) by a factor (B, 1, 1), within 0..1."""
    shift = (1.0 - factor) * other
    return _map(lambda x: jnp.clip(factor * x + shift, 0.0, 1.0), planes)


def turn_hue(planes: Planes, turn: jax.Array) -> Planes:
    """Turns the hue by a share (B, 1, 1) of the circle; the largest and smallest value of each pixel stay.

    Red is max - (max - min) clip(min(k, 4 - k), 0, 1) with k = 5 + 6 hue mod 6, green has 3 and blue has 1 for 5.
    """
    red, green, blue = planes
    high, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    range_ = high - low
    per = 1.0 / jnp.where(range_ > 0, range_, 1.0)
    # Two of these values agree where two colours are equally large. Not `red == high`: XLA may compute both with
    # different roundings, in two places of the program.
    hue = jnp.where(green >= blue, 2.0 + (blue - red) * per, 4.0 + (red - green) * per)
    hue = jnp.where((red >= green) & (red >= blue), (green - blue) * per, hue)  # in -1..5
    hue = hue + 6.0 * turn

    def channel(start: float) -> jax.Array:
        k = hue + start
        k = k - 6.0 * jnp.floor(k * (1 / 6))
        return high - range_ * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return channel(5.0), channel(3.0), channel(1.0)


def jitter(planes: Planes, again: Planes, draw: Jitter) -> Planes:
    """Changes brightness, contrast, saturation and hue of each image in the order of its ranks.

    Only the contrast needs the whole image, its mean grey value. So the program is: what comes before the contrast, the
    mean, once more what comes before the contrast, the contrast, what comes after it; what an image does not do there
    has the factor 1 or the turn 0.

    Args:
      planes: red, green and blue in 0..1, for the mean.
      again: the same, for the result.
      draw: orders and strengths.
    """
    brightness, contrast, saturation, hue = draw.rank
    first_is_b = brightness < saturation
    earlier = jnp.where(first_is_b, draw.brightness, draw.saturation), ~first_is_b, jnp.minimum(brightness, saturation)
    later = jnp.where(first_is_b, draw.saturation, draw.brightness), first_is_b, jnp.maximum(brightness, saturation)

    def blends(planes: Planes, here: Callable[[jax.Array], jax.Array]) -> Planes:
        for factor, towards_grey, rank in (earlier, later):
            other = each(towards_grey) * luminance(planes)
            planes = blend(planes, other, each(jnp.where(here(rank), factor, 1.0)))
        return planes

    def some(planes: Planes, part: Callable[[jax.Array], jax.Array]) -> Planes:
        """Those of brightness, saturation and hue whose ranks lie in a part, in their order."""
        planes = blends(planes, lambda rank: part(rank) & (rank < hue))
        planes = turn_hue(planes, each(jnp.where(part(hue), draw.hue, 0.0)))
        return blends(planes, lambda rank: part(rank) & (rank > hue))

    mean = image_mean(luminance(some(planes, lambda rank: rank < contrast)))
    planes = some(again, lambda rank: rank < contrast)
    planes = blend(planes, each(mean), each(draw.contrast))
    return some(planes, lambda rank: rank > contrast)


def image_mean(x_BHW: jax.Array) -> jax.Array:
    """The mean of each image of values in 0..1, (B,).

    Rows are summed as whole numbers, exactly in any order, so that XLA can sum them while it computes the values.
    """
    scale = 2.0 ** (30 - x_BHW.shape[2].bit_length())
    rows = jnp.sum((x_BHW * scale).astype(jnp.int32), 2)
    return jnp.mean(rows.astype(jnp.float32) * np.float32(1 / scale / x_BHW.shape[2]), 1)


def blur_weights(sigma_B: jax.Array, side: int, largest: float) -> jax.Array:
    """The weights of Pillow's Gaussian blur along an axis: pixel i gets weight (., R + d, i) of pixel i + d.

    Each of the three box filters has the width 2 r + 1 = sqrt(12 sigma^2 / 3 + 1), with a share of a pixel at both ends
    that makes its variance sigma^2 / 3 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended
    box filtering", 2011). Each filter repeats the pixels at the edges of what the one before has made.

    Args:
      sigma_B: deviations in pixels, up to `largest`; 0: no change.
      side: pixels along the axis.
      largest: it decides how many weights there are, 2 R + 1.

    Returns:
      float32 (B, 2 R + 1, side).
    """
    variance = jnp.square(sigma_B) / BOXES
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - jnp.square(whole + 1)))
    radius = (whole + share)[:, None, None]
    reach = math.floor((math.sqrt(12.0 * largest**2 / BOXES + 1.0) - 1.0) / 2.0) + 1
    pixel = np.arange(side)[None, :]
    neighbour = pixel + np.arange(-reach, reach + 1)[:, None]

    def left_of(last: np.ndarray) -> jax.Array:
        """What lies up to a pixel `last`; all that lies beyond an edge belongs to the edge's pixel."""
        inside = jnp.clip((last - pixel + radius + 1.0) / (2.0 * radius + 1.0), 0.0, 1.0)
        return jnp.where(last < 0, 0.0, jnp.where(last >= side - 1, 1.0, inside))

    box = left_of(neighbour) - left_of(neighbour - 1)
    weights = box
    for _ in range(BOXES - 1):
        before = jnp.pad(weights, ((0, 0), (0, 0), (reach, reach)))
        weights = sum_of(
            jnp.pad(box[:, d : d + 1] * before[..., d : d + side], ((0, 0), (d, 2 * reach - d), (0, 0)))
            for d in range(2 * reach + 1)
        )
    return weights


def sum_of(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum of one array or more."""
    return functools.reduce(jnp.add, parts)


def blur(x_BCHW: jax.Array, sigma_B: jax.Array, largest: float) -> Planes:
    """Pillow's Gaussian blur of a deviation (B,) in pixels up to `largest`, without its rounding."""
    _, _, H, W = x_BCHW.shape
    across, down = blur_weights(sigma_B, W, largest), blur_weights(sigma_B, H, largest)
    taps, reach = range(across.shape[1]), across.shape[1] // 2
    # Along the rows a matrix product: it does not shift pixels within a row, and XLA computes what it reads only once.
    distance = np.arange(W)[None, :] - np.arange(W)[:, None]
    matrix = sum_of(jnp.where(distance == d - reach, across[:, d, :, None], 0.0) for d in taps)
    x = jnp.einsum("bchw,bxw->bchx", x_BCHW, matrix, precision=jax.lax.Precision.HIGH)
    x = jnp.pad(x, ((0, 0), (0, 0), (reach, reach), (0, 0)))
    x = sum_of(down[:, None, d, :, None] * x[:, :, d : d + H] for d in taps)
    return x[:, 0], x[:, 1], x[:, 2]


def equalise(x_BHW: jax.Array) -> jax.Array:
    """Makes the histogram of each image of a channel flat, as Pillow does; rounds to bytes."""
    levels = jnp.clip(jnp.round(x_BHW * 255.0), 0, 255).astype(jnp.int32).reshape(len(x_BHW), -1)
    below = jax.vmap(lambda t: jnp.sum(levels < t, -1), out_axes=1)(jnp.arange(LEVELS))  # (B, LEVELS)
    top = levels.max(-1)
    step = (jnp.take_along_axis(below, top[:, None], 1)[:, 0]) // 255  # all pixels but those of the highest value
    table = jnp.minimum((step[:, None] // 2 + below) // jnp.maximum(step, 1)[:, None], 255)
    table = jnp.where(step[:, None] > 0, table, jnp.arange(LEVELS))
    return (jnp.take_along_axis(table, levels, 1) / 255.0).reshape(x_BHW.shape).astype(jnp.float32)


def view(images_BHWC: jax.Array, draw: Draw, config: ConfigDict) -> jax.Array:
    """Changes cropped images, uint8 (B, H, W, 3), and normalises them, of config.dtype, by config.data.mean and std."""
    if all(part is None for part in draw):
        return normalise(images_BHWC, config).astype(config.dtype)
    mean, std = np.float32(config.data.mean), np.float32(config.data.std)
    planes = augmented(images_BHWC, draw, config.views.sigma[1])
    x_BHWC = unpacked(packed(planes), -1)
    return (x_BHWC * (1.0 / std) - mean / std).astype(config.dtype)


def views_of(config: ConfigDict) -> Callable[[Mapping[str, jax.Array], jax.Array], Sequence[jax.Array]]:
    """Returns the function (batch, keys (B,)) -> views (B, H, W, 3), normalised, of config.dtype, the large ones first.

    A batch holds `views`, uint8 (B, 2, H, W, 3), and, if config.views.small is above 0, `small_views`, uint8
    (B, small, h, w, 3). View v of an image has the key that is folded from the image's key and v.

    Args:
      config: a validated config; reads config.views, config.data and config.dtype.
    """

    def run(images_BHWC: jax.Array, keys_B: jax.Array, number: int) -> jax.Array:
        return view(images_BHWC, drawn(keys_B, Options.of(config, number)), config)

    def views(batch: Mapping[str, jax.Array], keys_B: jax.Array) -> list[jax.Array]:
        large = [run(batch["views"][:, v], jax.vmap(jax.random.fold_in, (0, None))(keys_B, v), v) for v in range(LARGE)]
        if not config.views.small:
            return large
        small = batch["small_views"]
        numbers = jnp.arange(LARGE, LARGE + config.views.small)
        keys_BV = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, numbers)
        out = run(small.reshape(-1, *small.shape[2:]), keys_BV.reshape(-1), LARGE)
        out = out.reshape(*small.shape[:2], *out.shape[1:])
        return large + [out[:, v] for v in range(config.views.small)]

    return views


def pictures_of(
    config: ConfigDict,
) -> tuple[tuple[str, ...], Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, ...]]]:
    """Pictures of an image and of its views, for people.

    Args:
      config: a validated config; see :func:`views_of`.

    Returns:
      The captions, and the function (anything, batch, keys (B,)) -> for each caption pixels (B, H, W, 3) in 0..1. The
      batch holds `image`, uint8 (B, H, W, 3), besides what :func:`views_of` reads. Small views are enlarged.
    """
    views = views_of(config)
    small = tuple(f"small view {v}" for v in range(config.views.small))

    def pictures(judged: Any, batch: Mapping[str, jax.Array], keys_B: jax.Array) -> tuple[jax.Array, ...]:
        image = batch["image"].astype(jnp.float32) / 255.0
        pixels = [denormalise(x.astype(jnp.float32), config) for x in views(batch, keys_B)]
        return image, *(x if x.shape == image.shape else jax.image.resize(x, image.shape, "nearest") for x in pixels)

    return ("image", "view 0", "view 1", *small), pictures
