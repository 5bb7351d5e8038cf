"""Compares crops and changes of views with torchvision's and Pillow's (tests/golden/README.md, augment.npz)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax import config as configs
from crate_jax.data import device_augmentation as device
from crate_jax.data.device_augmentation import Draw, Jitter
from crate_jax.data.pixels import denormalise
from crate_jax.data.resampling import BatchResizer

File = Mapping[str, np.ndarray]
JITTER = ("brightness", "contrast", "saturation", "hue")
# Grey levels by which ours may differ: from torchvision on floats, beyond the rounding of float16; from the same after
# ten bits per colour; from Pillow's blur, which rounds after each of its six passes (largest, mean); from its
# equalisation; from its crops (largest, mean).
LIMIT = 5e-5  # what tests/parity.py allows; it stands for each of these limits
FLOAT, PACKED, BLUR, BYTES, CROP = 1e-2, 0.2, (4.0, 0.8), 1e-3, (2.0, 0.05)


def draw_of(name: str, file: File) -> Draw | None:
    """What happens to each image in an operation of the file; None for an operation that is not the device's."""
    count = len(file["in/images"])
    order, factors = np.arange(4), np.array([1.0, 1.0, 1.0, 0.0])
    operation, _, number = name.partition("_")
    if operation in JITTER:
        factors[JITTER.index(operation)] = float(number)
    elif operation == "jitter":
        order, factors = file[f"{name}/order"], file[f"{name}/factors"]
    else:
        on = np.ones(count, bool)
        blurred = Draw(sigma=np.full(count, float(number), np.float32)) if operation == "blur" else None
        kinds = {"grayscale": Draw(grey=on), "solarize": Draw(solarise=on), "equalize": Draw(equalise=on)}
        return kinds.get(operation, blurred)
    rank = tuple(np.full(count, place) for place in np.argsort(order))
    return Draw(jitter=Jitter(rank, *(np.full(count, f, np.float32) for f in factors)))


def float16_rounding(theirs: np.ndarray) -> np.ndarray:
    """By how many levels numbers in 0..1 may have moved when they were stored."""
    return 255 * np.spacing(theirs.astype(np.float16)).astype(np.float64) / 2


def views(file: File) -> tuple[dict[str, float], dict[str, float]]:
    """Every operation on its own, jitters in the file's orders, and crops.

    Returns:
      errors: the largest difference of each array over its limit above, times LIMIT; there are no gradients.
    """
    images, errors = jnp.asarray(file["in/images"]), {}
    c = configs.base()
    changed = jax.jit(lambda draw: jnp.stack(device.augmented(images, draw), -1) * 255)
    stepped = jax.jit(lambda draw: denormalise(device.view(images, draw, c), c) * 255)
    for name in file:
        kind, _, operation = name.partition("/")
        draw = draw_of(operation, file) if kind in ("float", "pil", "uint8") else None
        if draw is None:
            continue
        theirs = file[name].astype(np.float64)
        if kind == "float" and draw.sigma is None:  # torchvision's blur is not Pillow's
            noise = float16_rounding(file[name])
            errors[name] = np.max(np.abs(changed(draw) - 255 * theirs) - noise) / FLOAT
            if operation.startswith(("jitter", "gray")):
                errors[f"{name} in a step"] = np.max(np.abs(stepped(draw) - 255 * theirs) - noise) / PACKED
        elif kind == "pil" and draw.sigma is not None:
            off = np.abs(changed(draw) - theirs)
            errors[name] = max(off.max() / BLUR[0], off.mean() / BLUR[1])
        elif operation == "equalize" or (kind == "uint8" and operation.startswith("solarize")):
            errors[name] = np.max(np.abs(changed(draw) - theirs)) / BYTES
    for name in file:
        if found := re.fullmatch(r"crop/pil_(bicubic|bilinear)", name):
            theirs = file[name].astype(np.float64)
            off = np.abs(crops(file, found[1], theirs.shape[2:4]) - theirs)
            errors[name] = max(off.max() / CROP[0], off.mean() / CROP[1])
    return {name: float(error) * LIMIT for name, error in errors.items()}, {}


def crops(file: File, interpolation: str, size: tuple[int, int]) -> np.ndarray:
    """The file's boxes of each of its images for crops, as the pipeline cuts and resizes them."""
    images, boxes = file["crop/images"], file["crop/boxes"]
    resize = BatchResizer(images.shape[1:3], size, interpolation, alone=True)
    each = [resize(np.repeat(x[None].transpose(0, 3, 1, 2), len(boxes), 0), boxes) for x in images]
    return np.stack(each)
