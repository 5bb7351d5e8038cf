"""Changes of colour, grey, blur, solarisation and equalisation of cropped views, on the device.

The order is that of solo-learn's recipes: the four changes of colour in random order, grey, blur, solarisation,
equalisation, then normalisation; crop and flip came before, on the host. The maths is torchvision's on tensors of
floats (ColorJitter), and Pillow's for the blur and the equalisation, without rounding to bytes between them.

`drawn` draws the random numbers, one key per image and view; `augmented` is a function of these numbers.

Shapes: B images, H x W pixels. Colours lie on planes, (B, H, W) for each of red, green and blue, in 0..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from crate_jax.data.recipes import LARGE, of_kind

GREY = (0.2989, 0.587, 0.114)  # the weights of torchvision
THRESHOLD = 128 / 255  # values from here on are inverted by solarisation
BOXES = 3  # Pillow's Gaussian blur is so many box filters one after the other
LEVELS = 256

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


@struct.dataclass
class Draw:
    """What happens to each image of a batch, each (B,). None: the operation is not a part of the program.

    Attributes:
      rank: the places (0..3) of brightness, contrast, saturation and hue in the order of the four, each int32.
      brightness, contrast, saturation: factors, 1 for no change.
      hue: the turn as a share of the circle, 0 for no change.
      grey: whether the image loses its colours.
      sigma: deviation of the blur in pixels, 0 for no blur.
      solarise: whether values from 128 on are inverted.
      equalise: whether the histograms are made flat.
    """

    rank: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None
    brightness: jax.Array | None = None
    contrast: jax.Array | None = None
    saturation: jax.Array | None = None
    hue: jax.Array | None = None
    grey: jax.Array | None = None
    sigma: jax.Array | None = None
    solarise: jax.Array | None = None
    equalise: jax.Array | None = None


def drawn(keys_B: jax.Array, options: Options) -> Draw:
    """Draws what happens to each image, from one key per image (B,)."""
    u = jax.vmap(lambda key: jax.random.uniform(key, (14,)))(keys_B).T
    o = options
    out: dict[str, object] = {}

    def between(low: float, high: float, uniform: jax.Array) -> jax.Array:
        return low + (high - low) * uniform

    if o.jitter:
        place = u[:4]
        ties = [sum((place[j] < place[i]) | ((place[j] == place[i]) & (j < i)) for j in range(4)) for i in range(4)]
        out["rank"] = tuple(jnp.asarray(r, jnp.int32) for r in ties)
        on = u[4] < o.jitter
        for name, uniform in zip(("brightness", "contrast", "saturation"), u[5:8], strict=True):
            strength = getattr(o, name)
            out[name] = jnp.where(on, between(max(0.0, 1.0 - strength), 1.0 + strength, uniform), 1.0)
        out["hue"] = jnp.where(on, between(-o.hue, o.hue, u[8]), 0.0)
    if o.grey:
        out["grey"] = u[9] < o.grey
    if o.blur:
        out["sigma"] = jnp.where(u[10] < o.blur, between(*o.sigma, u[11]), 0.0)
    if o.solarise:
        out["solarise"] = u[12] < o.solarise
    if o.equalise:
        out["equalise"] = u[13] < o.equalise
    return Draw(**out)


def augmented(images_BHWC: jax.Array, draw: Draw) -> Planes:
    """Changes cropped images.

    Args:
      images_BHWC: uint8 (B, H, W, 3).
      draw: what happens to each.

    Returns:
      Red, green and blue, float32 (B, H, W) in 0..1.
    """
    planes = planes_of(images_BHWC)
    if draw.rank is not None:
        planes = jitter(planes, draw)
    if draw.grey is not None:
        grey, on = luminance(planes), each(draw.grey)
        planes = tuple(jnp.where(on, grey, x) for x in planes)
    if draw.sigma is not None:
        planes = blur(planes, draw.sigma)
    if draw.solarise is not None:
        on = each(draw.solarise)
        planes = tuple(jnp.where(on & (x >= THRESHOLD), 1.0 - x, x) for x in planes)
    if draw.equalise is not None:
        on = each(draw.equalise)
        planes = tuple(jnp.where(on, equalise(x), x) for x in planes)
    return planes


def planes_of(images_BHWC: jax.Array) -> Planes:
    """Bytes (B, H, W, 3) as red, green and blue, float32 (B, H, W) in 0..1."""
    red, green, blue = (images_BHWC[..., c].astype(jnp.float32) / 255.0 for c in range(3))
    return red, green, blue


def each(x_B: jax.Array) -> jax.Array:
    """One number per image, (B, 1, 1)."""
    return x_B[:, None, None]


def luminance(planes: Planes) -> jax.Array:
    """The grey values of images, (B, H, W)."""
    return sum(w * x for w, x in zip(GREY, planes, strict=True))


def blend(planes: Planes, other: jax.Array, factor: jax.Array) -> Planes:
    """Moves images from `other` (B, H or 1, W or 1) by a factor (B, 1, 1), within 0..1."""
    shift = (1.0 - factor) * other
    red, green, blue = (jnp.clip(factor * x + shift, 0.0, 1.0) for x in planes)
    return red, green, blue


def turn_hue(planes: Planes, turn: jax.Array) -> Planes:
    """Turns the hue by a share (B, 1, 1) of the circle; the largest and smallest value of each pixel stay.

    Red is max - (max - min) clip(min(k, 4 - k), 0, 1) with k = 5 + 6 hue mod 6, green has 3 and blue has 1 for 5.
    """
    red, green, blue = planes
    high, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    range_ = high - low
    per = 1.0 / jnp.where(range_ > 0, range_, 1.0)
    hue = jnp.where(
        red == high, (green - blue) * per, jnp.where(green == high, 2.0 + (blue - red) * per, 4.0 + (red - green) * per)
    )  # in -1..5
    hue = hue + 6.0 * turn

    def channel(start: float) -> jax.Array:
        k = hue + start
        k = k - 6.0 * jnp.floor(k / 6.0)
        return high - range_ * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return channel(5.0), channel(3.0), channel(1.0)


def jitter(planes: Planes, draw: Draw) -> Planes:
    """Changes brightness, contrast, saturation and hue of each image in the order of its ranks."""
    assert draw.rank is not None
    b, c, s, h = draw.rank
    first_is_b = b < s
    first = jnp.where(first_is_b, draw.brightness, draw.saturation), ~first_is_b, jnp.minimum(b, s)
    second = jnp.where(first_is_b, draw.saturation, draw.brightness), first_is_b, jnp.maximum(b, s)

    def some(planes: Planes, part: Callable[[jax.Array], jax.Array]) -> Planes:
        """Those of brightness, saturation and hue whose ranks lie in a part, in their order."""

        def blends(planes: Planes, here: Callable[[jax.Array], jax.Array]) -> Planes:
            for factor, towards_grey, rank in (first, second):
                f = each(jnp.where(part(rank) & here(rank), factor, 1.0))
                planes = blend(planes, each(towards_grey) * luminance(planes), f)
            return planes

        planes = blends(planes, lambda rank: rank < h)
        planes = turn_hue(planes, each(jnp.where(part(h), draw.hue, 0.0)))
        return blends(planes, lambda rank: rank > h)

    planes = some(planes, lambda rank: rank < c)
    mean = luminance(planes).mean((1, 2), keepdims=True)
    planes = blend(planes, mean, each(draw.contrast))
    return some(planes, lambda rank: rank > c)


def box_matrix(sigma_B: jax.Array, side: int) -> jax.Array:
    """The weights of Pillow's Gaussian blur along an axis of `side` pixels, float32 (B, side, side).

    Each of the three box filters has the width 2 R + 1 = sqrt(12 sigma^2 / 3 + 1), with a share of the pixels at both
    ends that makes its variance sigma^2 / 3; beyond the image the pixels at its edge are repeated (Gwosdek et al.,
    "Theoretical foundations of Gaussian convolution by extended box filtering", 2011). sigma = 0: no change.
    """
    variance = jnp.square(sigma_B) / BOXES
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - jnp.square(whole + 1)))
    radius = (whole + share)[:, None, None]
    # What lies left of pixel j + 1/2 of a filter at pixel i; all that lies beyond an edge belongs to the edge's pixel.
    distance = np.arange(side - 1)[None, :] - np.arange(side)[:, None]
    left = jnp.clip((distance + radius + 1.0) / (2.0 * radius + 1.0), 0.0, 1.0)
    box = jnp.diff(left, axis=-1, prepend=0.0, append=1.0)
    return jnp.einsum("bij,bjk,bkl->bil", box, box, box, precision=jax.lax.Precision.HIGHEST)


def blur(planes: Planes, sigma_B: jax.Array) -> Planes:
    """Pillow's Gaussian blur of a deviation (B,) in pixels, without its rounding."""
    across, down = (box_matrix(sigma_B, side) for side in planes[0].shape[:0:-1])
    x = jnp.stack(planes, 1)
    x = jnp.einsum("bchw,bxw->bchx", x, across, precision=jax.lax.Precision.HIGH)
    x = jnp.einsum("bchw,byh->bcyw", x, down, precision=jax.lax.Precision.HIGH)
    return x[:, 0], x[:, 1], x[:, 2]


def equalise(x_BHW: jax.Array) -> jax.Array:
    """Makes the histogram of each image of a channel flat, as Pillow does; rounds to bytes."""
    levels = jnp.clip(jnp.round(x_BHW * 255.0), 0, 255).astype(jnp.int32).reshape(len(x_BHW), -1)
    pixels = levels.shape[1]
    below = jax.vmap(lambda t: jnp.sum(levels < t, -1), out_axes=1)(jnp.arange(LEVELS))  # (B, LEVELS)
    top = levels.max(-1)
    step = (jnp.take_along_axis(below, top[:, None], 1)[:, 0]) // 255  # all pixels but those of the highest value
    table = jnp.minimum((step[:, None] // 2 + below) // jnp.maximum(step, 1)[:, None], 255)
    table = jnp.where(step[:, None] > 0, table, jnp.arange(LEVELS))
    assert pixels < 2**31
    return (jnp.take_along_axis(table, levels, 1) / 255.0).reshape(x_BHW.shape).astype(jnp.float32)


def normalised(planes: Planes, config: ConfigDict) -> jax.Array:
    """Subtracts config.data.mean and divides by config.data.std: the encoder's input (B, H, W, 3) of config.dtype."""
    mean, std = np.float32(config.data.mean), np.float32(config.data.std)
    return jnp.stack([(x - m) / s for x, m, s in zip(planes, mean, std, strict=True)], -1).astype(config.dtype)


def views_of(config: ConfigDict) -> Callable[[Mapping[str, jax.Array], jax.Array], Sequence[jax.Array]]:
    """Returns the function (batch, keys (B,)) -> views (B, H, W, 3), normalised, of config.dtype, the large ones first.

    A batch holds `views`, uint8 (B, 2, H, W, 3), and, if config.views.small is above 0, `small_views`, uint8
    (B, small, h, w, 3). View v of an image has the key that is folded from the image's key and v.

    Args:
      config: a validated config; reads config.views, config.data and config.dtype.
    """

    def run(images_BHWC: jax.Array, keys_B: jax.Array, view: int) -> jax.Array:
        return normalised(augmented(images_BHWC, drawn(keys_B, Options.of(config, view))), config)

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
