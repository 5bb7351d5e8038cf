"""What the flags of ``convert`` change in a config that a file brings with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from crate_jax.convert.describe import Hints
from crate_jax.errors import ConfigError
from crate_jax.models.resnet import ARCHITECTURES

KEYS = {  # hint -> section and key of the config
    "heads": ("encoder", "heads"),
    "decoder_heads": ("decoder", "heads"),
    "image_size": ("data", "image_size"),
    "mean": ("data", "mean"),
    "std": ("data", "std"),
    "target": ("loss", "target"),
    "mask_ratio": ("corruption", "mask_ratio"),
    "lam": ("encoder", "lam"),
    "stem_padding": ("encoder", "stem_padding"),
}


def given(hints: Hints) -> dict[str, Any]:
    """The hints that are known, by the flags of ``convert`` that give them.

    >>> given(Hints(decoder_heads=2, lam=0.1))
    {'--decoder-heads': 2, '--lam': 0.1}
    """
    found = {f.name: getattr(hints, f.name) for f in dataclasses.fields(hints)}
    return {f"--{name.replace('_', '-')}": value for name, value in found.items() if value is not None}


def applied(config: dict[str, Any], model: ConfigDict, params: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    """A file's config with the hints in place of its own values.

    Args:
      config: the file's whole config, perhaps of an older version that lacks keys.
      model: that config, with a value for every key that describes a model.
      params: the model's parameters.
      hints: what the flags say; they come before what the file says.

    Raises:
      ConfigError: a hint is about something that the model does not have.
    """
    encoder, decoder = model.encoder, model.decoder.name if "decoder" in params else ""
    is_resnet = encoder.name in ARCHITECTURES
    lacks = {
        "--heads": is_resnet and "heads: its encoder is a ResNet",
        "--decoder-heads": decoder not in ("transformer", "crate") and "decoder with heads",
        "--target": not decoder and "decoder",
        "--mask-ratio": not decoder and "decoder",
        "--lam": encoder.name != "crate" and f"lambda: its encoder is {encoder['name']}, not crate",
        "--stem-padding": not (is_resnet and encoder.stem == "cifar") and "3 x 3 stem of a ResNet",
    }
    for flag, value in given(hints).items():
        if lacks.get(flag):
            raise ConfigError(f"{flag}={value}: its model has no {lacks[flag]}; leave the flag out")
    if hints.heads is not None and hints.decoder_heads is None and decoder == "crate":
        hints = dataclasses.replace(hints, decoder_heads=hints.heads)  # a decoder of CRATE has the encoder's heads
    out = copy.deepcopy(config)
    for name, (section, key) in KEYS.items():
        if (value := getattr(hints, name)) is not None:
            out[section][key] = value
    return out
