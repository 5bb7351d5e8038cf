"""What the config.json of timm or transformers in the folder of a file of weights says about the model.

Such a file comes with the weights and may hold anything: each value is compared with what it must be before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crate_jax.convert.describe import Hints
from crate_jax.errors import ConfigError, some

log = logging.getLogger(__name__)

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # interpolations here -> Pillow's numbers, which transformers writes
MAX_BYTES = 2**20  # of a file; those of models with names for 21,000 classes have half of that
ACTIVATIONS = ("gelu", "gelu_python")  # transformers' names of the exact one
MAX_EPS = 1e-5  # added to variances by norms; here it is 1e-6
MAX_SIZE = 2**14  # pixels of an image's side, and heads


@dataclasses.dataclass(frozen=True)
class _Entries:
    """The entries of an object in a JSON file; `name` says which, for messages."""

    name: str
    of: Mapping[str, Any]

    def take(self, key: str, fits: Callable[[Any], bool], right: str) -> Any:
        """The value of a key; None if there is none.

        Raises:
          ConfigError: the value does not fit.
        """
        value = self.of.get(key)
        if value is None or fits(value):
            return value
        raise ConfigError(f"{self.name} beside it has {key}={some([json.dumps(value)], '')}: must be {right}")

    def size(self, key: str) -> int | None:
        return self.take(key, _is_size, f"a whole number from 1 to {MAX_SIZE}")

    def section(self, key: str) -> _Entries:
        return _Entries(self.name, self.take(key, lambda value: isinstance(value, dict), "an object") or {})

    def triple(self, key: str, least: float) -> tuple[float, ...] | None:
        """Three numbers that are larger than `least`."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 3 and all(_is_number(x) and x > least for x in value)

        right = "three numbers" if least < 0 else f"three numbers above {least:g}"
        value = self.take(key, fits, right)
        return None if value is None else tuple(map(float, value))


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def hints(folder: Path) -> Hints:
    """Hints from the folder's config.json; none if there is no such file, or another program's.

    Raises:
      ConfigError: a value of it is of another type or size than such a value can have.
    """
    about = _Entries(CONFIG, read_object(folder / CONFIG))
    if about.of.get("model_type") in ("vit", "vit_mae"):
        return _of_transformers(about, _Entries(IMAGES, read_object(folder / IMAGES)))
    if "architecture" in about.of:
        return _of_timm(about)
    if "model_type" in about.of and "num_attention_heads" in about.of:  # a relative of ViT, such as vit_msn
        return _of_transformers(about, _Entries(IMAGES, read_object(folder / IMAGES)))
    return Hints()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file, or it holds something else or too much."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_timm(about: _Entries) -> Hints:
    image = about.section("pretrained_cfg") if "pretrained_cfg" in about.of else about
    shape = image.take(
        "input_size",
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_size, value)),
        "[channels, height, width]",
    )
    return Hints(
        heads=about.section("model_args").size("num_heads"),
        architecture=about.take("architecture", _is_text, "a text"),
        image_size=(shape[1], shape[2]) if shape else None,
        mean=image.triple("mean", -math.inf),
        std=image.triple("std", 0),
        interpolation=_interpolation(image, "interpolation", image.take("interpolation", _is_text, "a text")),
        eval_crop=image.take("crop_pct", lambda value: _is_number(value) and 0 < value <= 1, "above 0, at most 1"),
    )


def _interpolation(about: _Entries, key: str, name: str | None) -> str | None:
    """The name of an interpolation, if it is one that images can be resized with here; another one is logged."""
    if name is None or name in RESAMPLING:
        return name
    told, known = some([json.dumps(about.of[key])], ""), ", ".join(RESAMPLING)
    log.warning(
        "%s beside it has %s=%s, which is not supported (%s are): bicubic is used", about.name, key, told, known
    )
    return None


def _of_transformers(about: _Entries, images: _Entries) -> Hints:
    size = about.take(
        "image_size",
        lambda value: _is_size(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))),
        "a number of pixels, or [height, width]",
    )
    # Two things that an encoder here has one of, and that no tensor shows.
    about.take("hidden_act", lambda value: value in ACTIVATIONS, "gelu, which an encoder here computes")
    about.take(
        "layer_norm_eps", lambda value: _is_number(value) and 0 < value <= MAX_EPS, f"above 0, at most {MAX_EPS:g}"
    )
    number = images.take(
        "resample", lambda value: type(value) is int and 0 <= value <= 5, "one of Pillow's numbers, 0..5"
    )
    names = {n: name for name, n in RESAMPLING.items()}
    normalised = about.take("norm_pix_loss", lambda value: isinstance(value, bool), "true or false")
    return Hints(
        heads=about.size("num_attention_heads"),
        decoder_heads=about.size("decoder_num_attention_heads"),
        image_size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        mean=images.triple("image_mean", -math.inf),
        std=images.triple("image_std", 0),
        interpolation=_interpolation(images, "resample", None if number is None else names.get(number, "")),
        target="patch_normalised" if normalised else "pixel",
        mask_ratio=about.take("mask_ratio", lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),
    )
