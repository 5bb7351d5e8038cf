"""Measures the changes that a step makes to cropped views, beside Pillow on one core.

    python -m benchmarks.views [--sizes=32,224] [--seconds=2] [--dtype=float32]

For each side of the views in pixels, for recipe `symmetric` with and without its blur: images/s of the compiled
function on this machine's devices, images/s of Pillow on one core with the same operations, both in turns, and the
compiled program's bytes and FLOPs per view (:mod:`benchmarks.hlo_cost`). Prints one JSON object per line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks import hlo_cost
from crate_jax import config as configs, data
from crate_jax.data import device_augmentation

PIXELS = 2**20  # of a batch of the compiled function
TURNS = 5

SIZES = flags.DEFINE_list("sizes", ["32", "224"], "sides of the views in pixels")
SECONDS = flags.DEFINE_float("seconds", 2.0, "time per measurement")
DTYPE = flags.DEFINE_string("dtype", "float32", "type of the result")


def pillow(image: Image.Image, options: device_augmentation.Options, rng: np.random.Generator) -> np.ndarray:
    """The operations of a recipe on one image, as torchvision calls Pillow for them; normalised."""
    if rng.random() < options.jitter:
        factors = [1 + rng.uniform(-s, s) for s in (options.brightness, options.contrast, options.saturation)]
        enhance = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for i in rng.permutation(4):
            if i < 3:
                image = enhance[i](image).enhance(factors[i])
            else:
                h, s, v = image.convert("HSV").split()
                turned = np.asarray(h) + np.uint8(int(rng.uniform(-options.hue, options.hue) * 255) % 256)
                image = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
    if rng.random() < options.grey:
        image = image.convert("L").convert("RGB")
    if rng.random() < options.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*options.sigma)))
    if rng.random() < options.solarise:
        image = ImageOps.solarize(image, 128)
    return (np.asarray(image, np.float32) / 255 - 0.5) / 0.25


def rate(call: Callable[[], Any], images: int, seconds: float) -> float:
    """Images per second of a function that makes `images`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        done += images
    return done / (time.perf_counter() - start)


def measure(side: int, blur: bool) -> dict[str, Any]:
    """Both speeds and the compiled program's cost for views of one size."""
    config = configs.base()
    data.preset(config, "symmetric")
    config.dtype = DTYPE.value
    config.views.update(solarise=(0.2,), **({} if blur else {"blur": (0.0,)}))
    options = device_augmentation.Options.of(config, 0)
    count = max(PIXELS // side**2, 1)
    low = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in low])

    def view(images: jax.Array, keys: jax.Array) -> jax.Array:
        return device_augmentation.view(images, device_augmentation.drawn(keys, options), config)

    keys = jax.random.split(jax.random.key(0), count)
    compiled = jax.jit(view).lower(images, keys).compile()
    placed = jax.device_put(images)
    jax.block_until_ready(compiled(placed, keys))
    whole = [Image.fromarray(x) for x in images]
    rng = np.random.default_rng(0)
    turns = [
        (
            rate(lambda: jax.block_until_ready(compiled(placed, keys)), count, SECONDS.value / TURNS),
            rate(lambda: pillow(whole[rng.integers(count)], options, rng), 1, SECONDS.value / TURNS),
        )
        for _ in range(TURNS)
    ]
    ours, theirs = np.median(turns, 0)
    cost = hlo_cost.Program(compiled.as_text()).cost()
    return {
        "side": side,
        "blur": blur,
        "images_per_sec": round(ours),
        "pillow_images_per_sec": round(theirs),
        "ratio": round(float(np.median([a / b for a, b in turns])), 2),
        "mb_per_view": round(cost.bytes / count / 1e6, 3),
        "mflop_per_view": round(cost.flops / count / 1e6, 2),
    }


def main(_: list[str]) -> None:
    """Prints one line per size, with and without blur."""
    for side in SIZES.value:
        for blur in (False, True):
            print(json.dumps(measure(int(side), blur)), flush=True)


if __name__ == "__main__":
    app.run(main)
