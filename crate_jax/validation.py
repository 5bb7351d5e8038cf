"""What a config's values may be: checked before anything is built, as far as that goes without data or devices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from crate_jax.config import base, flatten
from crate_jax.errors import ConfigError

CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "remat_keep": ("nothing", "weights", "products"),
    "data.interpolation": ("bicubic", "bilinear"),
    "encoder.positions": ("sincos", "learned", "relative", "relative_per_block", "none"),
    "encoder.dictionary": ("complete", "overcomplete"),
    "encoder.qkv_bias": ("qkv", "qv", "none"),
    "encoder.init": ("xavier", "trunc_normal"),
    "decoder.residual": ("stream", "normalised"),
    "corruption.mask_fill": ("token", "zero", "drop"),
    "corruption.rop_buckets": ("balanced", "independent"),
    "corruption.rop_signs": ("independent", "balanced"),
    "loss.norm": ("l2", "l1"),
    "loss.target": ("pixel", "patch_normalised"),
    "loss.region": ("complement", "all"),
    "penalty.gram": ("smaller", "in", "out"),
    "penalty.power": (1, 2),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "evaluation.pool": ("cls", "mean", "cls_mean"),
    "protocol.metric": ("top1", "mean_per_class", "miou"),
    "finetune.relative_bias": ("shared", "per_block"),
    "segment.head": ("linear", "upernet"),
    "whitebox.measure": ("paper", "released", "both"),
}
POSITIVE = (
    "batch_size accumulate encoder.patch_size encoder.width encoder.depth encoder.heads "
    "encoder.expansion encoder.mlp_ratio encoder.final_eps decoder.heads evaluation.batch_size evaluation.knn_k "
    "evaluation.knn_temperature evaluation.probe_c penalty.iterations save.every save.keep log.every "
    "optimizer.lr align.latents align.side whitebox.images"
).split()
NOT_NEGATIVE = (
    "steps epochs mesh.data mesh.model data.memory_mb data.randaugment_layers decoder.width decoder.depth "
    "encoder.eta encoder.lam encoder.layer_scale corruption.paper_scale corruption.noise_std penalty.weight "
    "optimizer.lr_batch optimizer.warmup_epochs optimizer.warmup_steps optimizer.warmup_lr optimizer.min_lr "
    "optimizer.weight_decay optimizer.clip_norm evaluation.every evaluation.train_images evaluation.test_images "
    "evaluation.layer align.width align.noise finetune.head_init finetune.mixup finetune.cutmix "
    "segment.channels segment.auxiliary segment.classes log.pictures log.pictures_every whitebox.every nonfinite.skip"
).split()
# (key, lowest, highest, lowest allowed?, highest allowed?)
RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("seed", 0, 2**63 - 1, True, True),
    ("data.flip", 0, 1, True, True),
    ("data.workers", 0, 1024, True, True),
    ("data.threads", 1, 1024, True, True),
    ("data.prefetch", 1, 1024, True, True),
    ("data.randaugment_magnitude", 0, 30, True, True),
    ("data.eval_crop", 0, 1, False, True),
    ("data.max_undecodable", 0, 1, True, True),
    ("encoder.drop_path", 0, 1, True, False),
    ("corruption.mask_ratio", 0, 1, False, False),
    ("corruption.rop_ratio", 0, 1, False, False),
    ("optimizer.ema", 0, 1, True, False),
    ("optimizer.layer_decay", 0, 1, False, True),
    ("finetune.drop_path", 0, 1, True, False),
    ("finetune.label_smoothing", 0, 1, True, False),
    ("finetune.erase", 0, 1, True, True),
    ("optimizer.b1", 0, 1, True, False),
    ("optimizer.b2", 0, 1, True, False),
    ("optimizer.momentum", 0, 1, True, False),
)
KINDS: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), list: (list,)}
KIND_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a tuple"}
LARGEST = 2**31 - 1  # of whole numbers but the seed: JAX's own are of 32 bits
MOST_PATCHES = 2**20  # of one image
SOURCES = ("digits", "folder:PATH", "tfds:NAME", "synthetic")


def validate(config: ConfigDict) -> None:
    """Checks everything that can be checked without data or devices.

    Raises:
      ConfigError: names the key, the value received and what would be right.
    """
    require_keys(config)
    flat = flatten(config)
    _check_values(flat)
    _check_tables(config)
    _check_sizes(config)
    _check_combinations(config)


def require_keys(config: Any) -> None:
    """Checks that a config has every key of :func:`base`, each with a value of its type.

    Raises:
      ConfigError: names the first key that is missing or of another type.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"the config is a {type(config).__name__}: get_config must return crate_jax.config.base() with its changes"
        )
    flat = flatten(config)
    for key, default in flatten(base()).items():
        if key not in flat:
            raise ConfigError(f"config.{key}: is missing; a config starts from crate_jax.config.base()")
        kinds = KINDS[type(default)]
        if not isinstance(flat[key], kinds) or (isinstance(flat[key], bool) and bool not in kinds):
            _fail(flat, key, f"must be {KIND_NAMES[type(default)]}")


def _fail(flat: Mapping[str, Any], key: str, right: str) -> None:
    raise ConfigError(f"config.{key}={flat[key]!r}: {right}")


def _check_values(flat: Mapping[str, Any]) -> None:
    for key, default in flatten(base()).items():
        if isinstance(default, list) and default and key != "align.patch_sizes":
            kind = type(default[0])
            if not all(isinstance(v, (int, float) if kind is float else kind) for v in flat[key]):
                _fail(flat, key, f"must hold {({int: 'whole numbers', float: 'numbers'}).get(kind, 'texts')} only")
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not abs(number) < float("inf"):
                _fail(flat, key, "must be finite" if isinstance(value, list) else "must be a finite number")
            if isinstance(number, int) and abs(number) > LARGEST and key != "seed":
                _fail(flat, key, f"must be at most {LARGEST}")
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            _fail(flat, key, f"must be one of {', '.join(map(str, allowed))}")
    for key in POSITIVE:
        if not flat[key] > 0:
            _fail(flat, key, "must be greater than 0")
    for key in NOT_NEGATIVE:
        if not flat[key] >= 0:
            _fail(flat, key, "must not be negative")
    for key, low, high, low_ok, high_ok in RANGES:
        value = flat[key]
        if not (low <= value <= high) or (value == low and not low_ok) or (value == high and not high_ok):
            _fail(flat, key, f"must lie in {'[' if low_ok else '('}{low}, {high}{']' if high_ok else ')'}")
    for key, low, high in (("data.crop_scale", 0.0, 1.0), ("data.crop_ratio", 0.0, float("inf"))):
        pair = flat[key]
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            _fail(flat, key, f"must be two increasing numbers in ({low}, {high}]")
    for key in ("data.mean", "data.std"):
        if len(flat[key]) != 3 or (key == "data.std" and min(flat[key]) <= 0):
            _fail(flat, key, "must be three numbers, one per channel" + (", all positive" if "std" in key else ""))
    for key in ("align.mask_ratios", "align.rop_ratios"):
        if not all(0 < v < 1 for v in flat[key]):
            _fail(flat, key, "must hold shares between 0 and 1")
    for size in flat["align.patch_sizes"]:
        sides = (size, size) if isinstance(size, int) else size
        if not (isinstance(sides, Sequence) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
            _fail(flat, "align.patch_sizes", f"{size!r} must be a side in pixels or (height, width), as in 4,(2,8)")
    for key in ("penalty.include", "penalty.exclude", "optimizer.decay_exclude"):
        for pattern in flat[key]:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                _fail(flat, key, f"{pattern!r} is not a regular expression ({e})")


def _check_tables(config: ConfigDict) -> None:
    # Imported here: the tables live with the parts they name, which import this module.
    from crate_jax.models import ENCODERS
    from crate_jax.models.corruption import CORRUPTIONS
    from crate_jax.models.decoders import DECODERS
    from crate_jax.training.optimizer import OPTIMIZERS
    from crate_jax.training.orthogonality import PENALTIES

    tables: dict[str, Mapping[str, Any]] = dict(
        encoder=ENCODERS, decoder=DECODERS, corruption=CORRUPTIONS, penalty=PENALTIES, optimizer=OPTIMIZERS
    )
    for kind, table in tables.items():
        if config[kind].name not in table:
            raise ConfigError(f"config.{kind}.name={config[kind].name!r}: must be one of {', '.join(table)}")
    kind, _, rest = config.data.source.partition(":")
    if kind not in ("digits", "synthetic", "folder", "tfds") or (kind in ("folder", "tfds")) != bool(rest):
        raise ConfigError(f"config.data.source={config.data.source!r}: must be one of {', '.join(SOURCES)}")


def _check_sizes(config: ConfigDict) -> None:
    size, patch = config.data.image_size, config.encoder.patch_size
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"config.data.image_size={size!r}: must be (height, width)")
    for side in size:
        if side % patch:
            raise ConfigError(
                f"config.data.image_size={tuple(size)}: both sides must be multiples of "
                f"config.encoder.patch_size={patch}"
            )
    if math.prod(size) // patch**2 > MOST_PATCHES:
        raise ConfigError(
            f"config.data.image_size={tuple(size)}: has more than {MOST_PATCHES} patches of config.encoder.patch_size="
            f"{patch}"
        )
    for part in ("encoder", "decoder"):
        width = config[part].width or config.encoder.width
        if part == "decoder" and config.decoder.name == "linear":
            continue
        if width % config[part].heads:
            raise ConfigError(
                f"config.{part}.width={width}: must be a multiple of config.{part}.heads={config[part].heads}"
            )
        if width % 4 and (config.encoder.positions == "sincos" or part == "decoder"):
            raise ConfigError(f"config.{part}.width={width}: must be a multiple of 4 for sine-cosine positions")
    if config.batch_size % config.accumulate:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: must be a multiple of config.accumulate={config.accumulate}"
        )
    if config.job not in ("evaluate", "align") and bool(config.steps) == bool(config.epochs):
        raise ConfigError(f"config.steps={config.steps}, config.epochs={config.epochs}: set exactly one of the two")
    if not config.mesh.data and not config.mesh.model:
        raise ConfigError("config.mesh.data=0, config.mesh.model=0: only one of the two can be the rest; set one to 1")
    if config.optimizer.warmup_steps and config.optimizer.warmup_epochs:
        raise ConfigError("config.optimizer: set warmup_steps or warmup_epochs, not both")


def _check_combinations(config: ConfigDict) -> None:
    encoder, decoder, corruption = config.encoder, config.decoder, config.corruption
    grid = [s // encoder.patch_size for s in config.data.image_size]
    tokens = grid[0] * grid[1]
    dropped = corruption.name == "mask" and corruption.mask_fill == "drop"
    if corruption.name == "mask" and not 0 < int(tokens * (1 - corruption.mask_ratio)) < tokens:
        raise ConfigError(
            f"config.corruption.mask_ratio={corruption.mask_ratio}: of {tokens} patches at least one must be kept and "
            "one removed"
        )
    if encoder.name == "crate" and encoder.positions.startswith("relative"):
        raise ConfigError(
            f"config.encoder.positions={encoder.positions!r}: only encoder.name='vit' has a relative bias"
        )
    if encoder.name == "crate" and encoder.drop_path:
        raise ConfigError(f"config.encoder.drop_path={encoder.drop_path}: only encoder.name='vit' has drop path")
    if dropped and decoder.name == "linear":
        raise ConfigError(
            "config.decoder.name='linear': cannot fill patches that config.corruption.mask_fill='drop' removed; use "
            "decoder.name=transformer, or mask_fill=token"
        )
    if dropped and decoder.name == "crate" and not decoder.positions:
        raise ConfigError(
            "config.decoder.positions=False: with config.corruption.mask_fill='drop' a CRATE decoder needs positions "
            "to tell the filled patches apart; set it to True"
        )
    if decoder.name == "crate" and decoder.width not in (0, encoder.width):
        raise ConfigError(
            f"config.decoder.width={decoder.width}: a CRATE decoder has the encoder's width {encoder.width}"
        )
    if config.evaluation.layer > encoder.depth:
        raise ConfigError(
            f"config.evaluation.layer={config.evaluation.layer}: the encoder has {encoder.depth} blocks (0: its output)"
        )
    if config.whitebox.every and config.job in ("finetune", "segment"):
        raise ConfigError(
            f"config.whitebox.every={config.whitebox.every}: must be 0, only pre-training logs its layers"
        )
    if config.penalty.name != "none" and not config.penalty.weight:
        raise ConfigError(
            f"config.penalty.weight=0: config.penalty.name={config.penalty.name!r} needs a weight above 0"
        )
