"""Which views of an image a joint-embedding method gets: the keys of the section `views`, and recipes by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from crate_jax.data.augmentation import Augmentation
from crate_jax.errors import ConfigError
from crate_jax.validation import RECORDED, Key, Rule, Section, at_least, increasing_pair, must, within

LARGE = 2  # views of data.image_size


def _of_kinds(rule: Rule) -> Rule:
    """The rule for tuples of 1 to 3 values, one per kind of view, whose items all keep to `rule`."""
    text = f"must hold one to three values (large view 0, large view 1, small views); each {rule.text}"
    return Rule(text, lambda items: text if not 1 <= len(items) <= 3 or any(map(rule.problem, items)) else "")


PROBABILITY, STRENGTH = _of_kinds(within(0, 1)), _of_kinds(at_least(0))
SIZE = must("be height, width in pixels", lambda size: len(size) == 2 and min(size) > 0)


def _check_views(c: ConfigDict) -> None:
    for name in VIEWS.keys:
        values = c.views[name]
        if name not in ("small", "small_size", "sigma") and c.views.small and len(values) == LARGE:
            raise ConfigError(
                f"config.views.{name}={list(values)!r}: must hold one value or three, since config.views.small="
                f"{c.views.small} asks for small views"
            )
    for view in range(LARGE + 1):
        low, high = of_kind(c, "scale_min", view), of_kind(c, "scale_max", view)
        if low > high:
            raise ConfigError(f"config.views.scale_min={low}: must not be above config.views.scale_max={high}")
    if c.data.randaugment_layers:
        raise ConfigError(
            f"config.data.randaugment_layers={c.data.randaugment_layers}: must be 0, since config.views says how the "
            f"views of method {c.method!r} are changed"
        )


VIEWS = Section(
    "views",
    "The views of an image: two large ones of data.image_size and small ones. A tuple holds one value for all views, "
    "or one each for large view 0, large view 1 and the small views.",
    of_the_run=True,
    resume=RECORDED,
    check=_check_views,
    keys=dict(
        small=Key(0, within(0, 64), "number of small views"),
        small_size=Key((96, 96), SIZE, "height, width of the small views in pixels"),
        scale_min=Key((0.08,), _of_kinds(within(0, 1, "(]")), "smallest share of the area that a crop covers"),
        scale_max=Key((1.0,), _of_kinds(within(0, 1, "(]")), "largest share of the area that a crop covers"),
        flip=Key((0.5,), PROBABILITY, "probability of a horizontal flip"),
        jitter=Key((0.8,), PROBABILITY, "probability of the four changes of colour, in random order"),
        brightness=Key((0.4,), STRENGTH, "b: the factor lies in [max(0, 1 - b), 1 + b]"),
        contrast=Key((0.4,), STRENGTH, "likewise"),
        saturation=Key((0.2,), STRENGTH, "likewise"),
        hue=Key((0.1,), _of_kinds(within(0, 0.5)), "h: the hue turns by a share of the circle in [-h, h]"),
        grey=Key((0.2,), PROBABILITY, "probability that the view loses its colours"),
        blur=Key((0.0,), PROBABILITY, "probability of a Gaussian blur"),
        sigma=Key((0.1, 2.0), increasing_pair(0.0, 16.0), "range of the blur's deviation in pixels"),
        solarise=Key((0.0, 0.2), PROBABILITY, "probability that values from 128 on are inverted"),
        equalise=Key((0.0,), PROBABILITY, "probability that the histograms of the channels are made flat"),
    ),
)


def of_kind(config: ConfigDict, name: str, view: int) -> Any:
    """The value of a key of config.views for a view: 0 and 1 are the large views, 2 and more are small."""
    values = config.views[name]
    return values[min(view, len(values) - 1)]


def layout(config: ConfigDict) -> dict[str, tuple[Augmentation, ...]]:
    """The crops of each image in a training batch: for each entry of the batch how each of its views is cropped."""
    whole = Augmentation.from_config(config)
    size = (int(config.views.small_size[0]), int(config.views.small_size[1]))

    def crop(view: int) -> Augmentation:
        return dataclasses.replace(
            whole,
            size=whole.size if view < LARGE else size,
            scale=(float(of_kind(config, "scale_min", view)), float(of_kind(config, "scale_max", view))),
            flip=float(of_kind(config, "flip", view)),
            layers=0,
            alone=True,
        )

    small = {"small_views": (crop(LARGE),) * config.views.small} if config.views.small else {}
    return {"views": (crop(0), crop(1)), **small}


def recolour(config: ConfigDict, **values: float) -> None:
    """Sets keys of config.views in place for all views but weak ones, whose colours never change (jitter 0).

    ReSSL's target sees such a view; with other colours it would be another method.

    >>> views = ConfigDict({"views": {"jitter": (0.8, 0.0), "grey": (0.2, 0.0)}})
    >>> recolour(views, grey=0.4)
    >>> views.views.grey
    (0.4, 0.0)
    """
    for name, value in values.items():
        kinds = range(max(len(config.views.jitter), len(config.views[name])))
        new = tuple(value if of_kind(config, "jitter", k) else of_kind(config, name, k) for k in kinds)
        config.views[name] = new if len(set(new)) > 1 else new[:1]


_JITTER = ("brightness", "contrast", "saturation", "hue")
_MILD, _STRONG, _EQUAL = (0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)


def _colours(*strengths: tuple[float, float, float, float]) -> dict[str, tuple[float, ...]]:
    return dict(zip(_JITTER, zip(*strengths, strict=True), strict=True))


def _recipe(**keys: Any) -> dict[str, Any]:
    plain = dict(small=0, small_size=(96, 96), scale_min=(0.08,), scale_max=(1.0,), flip=(0.5,), jitter=(0.8,))
    return plain | dict(grey=(0.2,), blur=(0.0,), solarise=(0.0,), equalise=(0.0,)) | keys


_SIX = dict(small=6, small_size=(96, 96))

# The recipes of solo-learn's config files (commit 9187ea3).
PRESETS: dict[str, dict[str, Any]] = {
    "asymmetric_cifar": _recipe(**_colours(_MILD), solarise=(0.0, 0.2)),
    "asymmetric_imagenet": _recipe(**_colours(_MILD), blur=(1.0, 0.1), solarise=(0.0, 0.2)),
    "symmetric": _recipe(**_colours(_STRONG), blur=(0.5,)),
    "weak": _recipe(**_colours(_EQUAL), blur=(0.5,)),
    "vicreg_cifar": _recipe(**_colours(_MILD), scale_min=(0.2,), solarise=(0.1,)),
    "vicreg_imagenet100": _recipe(**_colours(_MILD), scale_min=(0.2,), blur=(0.5,), solarise=(0.1,)),
    "wmse_cifar": _recipe(**_colours(_STRONG), scale_min=(0.2,)),
    "wmse_imagenet100": _recipe(**_colours(_STRONG), scale_min=(0.2,), blur=(0.2,)),
    "ressl": _recipe(**_colours(_MILD), jitter=(0.8, 0.0), grey=(0.2, 0.0), blur=(0.5, 0.0)),
    "multicrop_cifar": _recipe(
        **_colours((0.6, 0.6, 0.6, 0.2), (0.6, 0.6, 0.6, 0.2), _STRONG),
        small=6, small_size=(18, 18), scale_min=(0.2, 0.2, 0.08), scale_max=(1.0, 1.0, 0.5),
        blur=(0.0, 0.0, 0.1), solarise=(0.0, 0.2, 0.1),
    ),
    "multicrop_asymmetric": _recipe(
        **_colours(_MILD), **_SIX, blur=(1.0, 0.1, 0.0), solarise=(0.0, 0.2, 0.0)
    ),
    "multicrop_symmetric": _recipe(**_colours(_STRONG), **_SIX, blur=(0.5, 0.5, 0.0)),
}  # fmt: skip


def preset(config: ConfigDict, name: str) -> None:
    """Sets the keys of config.views to a recipe's; `config.data.image_size` stays.

    Args:
      config: the config, which is changed.
      name: the recipe, a key of PRESETS.

    Raises:
      ConfigError: there is no such recipe.
    """
    if name not in PRESETS:
        raise ConfigError(f"recipe of views {name!r}: must be one of {', '.join(PRESETS)}")
    config.views.update(PRESETS[name])
