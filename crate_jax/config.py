"""The base config, put together from its sections; the config-string parser; and the checks across keys.

Each key is one line: default, rule, meaning, and which part reads it if not all do. Sections of a part stand with it:
those of methods in :data:`crate_jax.methods.METHODS`, the options of evaluation protocols in
:data:`crate_jax.evals.protocols.PROTOCOLS`. A file in ``configs/`` starts from :func:`base`, changes what its
experiment needs and returns the result; nothing reads a key that is not declared. All keys on one page: docs/config.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from crate_jax.data import DATA
from crate_jax.errors import ConfigError
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.methods import METHODS
from crate_jax.models import ENCODER
from crate_jax.training.optimizer import OPTIMIZER
from crate_jax.training.orthogonality import PENALTY
from crate_jax.validation import (
    Key,
    Rule,
    Section,
    anything,
    at_least,
    check_types,
    check_values,
    defaults,
    flatten,
    must,
    one_of,
    positive,
    within,
)

# Middle of what arXiv 2411.00392 searched for joint-embedding methods. It has no reconstruction: a starting point.
PENALTY_WEIGHTS = {"none": 0.0, "so": 1e-6, "srip": 1e-4}

METHOD_OF_JOB = {"finetune": "classify", "segment": "segment"}  # in place of config.method
WITHOUT_METHOD = ("evaluate", "align", "report")  # jobs that read an encoder only
PRETRAINING = tuple(name for name in METHODS if name not in METHOD_OF_JOB.values())


def _not_patch_sizes(sizes: Sequence[Any]) -> str:
    for size in sizes:
        sides = (size, size) if isinstance(size, int) else size
        if not (isinstance(sides, Sequence) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
            return f"{size!r} must be a side in pixels or (height, width), as in 4,(2,8)"
    return ""


def _check_run(c: ConfigDict) -> None:
    if c.batch_size % c.accumulate:
        raise ConfigError(f"config.batch_size={c.batch_size}: must be a multiple of config.accumulate={c.accumulate}")
    if c.job not in ("evaluate", "align") and bool(c.steps) == bool(c.epochs):
        raise ConfigError(f"config.steps={c.steps}, config.epochs={c.epochs}: set exactly one of the two")


RUN = Section(
    "",
    "What every run has.",
    of_the_run=True,
    check=_check_run,
    keys=dict(
        seed=Key(0, within(0, 2**63 - 1), "initial weights, order of the images, augmentation, corruption", wide=True),
        method=Key("reconstruction", one_of(*PRETRAINING), "what pre-training optimises"),
        steps=Key(0, at_least(0), "optimiser steps; 0: from `epochs`"),
        epochs=Key(0.0, at_least(0), "passes over the training split; 0: from `steps`"),
        batch_size=Key(256, positive, "images per optimiser step, over all devices and micro-batches"),
        accumulate=Key(1, positive, "micro-batches per optimiser step; same update, less memory"),
        init_from=Key("", anything, "workdir or weights file whose encoder starts this run"),
        dtype=Key("float32", one_of("float32", "bfloat16"), "numbers of activations; parameters are always float32"),
        remat=Key(False, anything, "recompute each block in the backward pass: less memory, more time"),
        remat_keep=Key(
            "nothing", one_of("nothing", "weights", "products"),
            "what is not recomputed: weights (products with weights), products (all)", read_by=("remat", True),
        ),
    ),
)  # fmt: skip

JOB = Section(
    "",
    "What is done with the config.",
    of_the_run=False,
    effect=False,
    keys=dict(
        job=Key("pretrain", anything, "what `python -m crate_jax.main` does with the config"),
        checkpoint=Key("", anything, "workdir or weights file of the encoder that is judged; report: several, A,B,C"),
    ),
)


def _check_mesh(c: ConfigDict) -> None:
    if not c.mesh.data and not c.mesh.model:
        raise ConfigError("config.mesh.data=0, config.mesh.model=0: only one of the two can be the rest; set one to 1")


MESH = Section(
    "mesh",
    "Devices along two axes; 0 stands for the rest of them. A batch is split over both.",
    of_the_run=False,
    effect=False,
    check=_check_mesh,
    keys=dict(
        data=Key(0, at_least(0), "copies of the parameters; 1, with model=0: fully sharded"),
        model=Key(1, at_least(0), "devices that hold one copy together"),
    ),
)


def _check_evaluation(c: ConfigDict) -> None:
    if c.evaluation.layer > c.encoder.depth:
        raise ConfigError(
            f"config.evaluation.layer={c.evaluation.layer}: the encoder has {c.encoder.depth} blocks (0: its output)"
        )


EVALUATION = Section(
    "evaluation",
    "Scores of the encoder while it is trained and at the end; which of its tokens any job reads.",
    of_the_run=True,
    check=_check_evaluation,
    keys=dict(
        every=Key(0, at_least(0), "steps between evaluations; 0: only at the end"),
        train_images=Key(10_000, at_least(0), "images the classifiers are fitted on; 0: all"),
        test_images=Key(10_000, at_least(0), "images they are scored on; 0: all"),
        batch_size=Key(256, positive, "images encoded at once"),
        pool=Key("cls", one_of("cls", "mean", "cls_mean"), "mean: over patch tokens; cls_mean: both, side by side"),
        layer=Key(0, at_least(0), "tokens after this block, 1..depth; 0: after the encoder's final norm"),
        knn_k=Key(20, positive, "number of neighbours"),
        knn_temperature=Key(0.07, positive, "temperature of the neighbours' weights"),
        probe_c=Key(1.0, positive, "inverse L2 strength of the logistic regression"),
    ),
)

PROTOCOL = Section(
    "protocol",
    "Jobs evaluate, finetune and segment: how. Each protocol of `evaluate` adds options of its own.",
    of_the_run=True,
    keys=dict(
        name=Key("", anything, "recipe"),
        scratch=Key(False, anything, "a random encoder of the checkpoint's shape"),
        metric=Key("top1", one_of("top1", "mean_per_class", "miou"), "headline"),
    ),
)

SWEEP = Section(
    "sweep",
    "Job sweep: one run per value and seed.",
    of_the_run=False,
    effect=False,
    keys=dict(
        key=Key("", anything, "the key that is varied, such as encoder.lam"),
        # Read as sweep["values"]: a ConfigDict has a method of that name.
        values=Key((), anything, "its values"),
        seeds=Key(1, anything, "runs per value, with the seeds seed, seed + 1 and so on"),
    ),
)

SHARES = must("hold shares between 0 and 1", lambda values: all(0 < v < 1 for v in values))

ALIGN = Section(
    "align",
    "Job align: alignment of reconstruction and labels, in closed form (docs/alignment.md).",
    of_the_run=False,
    effect=False,
    keys=dict(
        width=Key(0, at_least(0), "k at which corruptions are compared; 0: the encoder's width"),
        latents=Key(1024, positive, "curves run from 1 to this k"),
        patch_sizes=Key(
            (1, 2, 4), Rule("must be sides in pixels or (height, width)", _not_patch_sizes),
            "mask: sides of square patches in pixels, or (height, width), as in 1,(2,8)", items=object,
        ),
        mask_ratios=Key((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99), SHARES, "mask: removed shares"),
        rop_ratios=Key(
            (0.05, 0.1, 1 / 7, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75), SHARES, "rop: kept shares, of patches"
        ),
        noise=Key(1e-3, at_least(0), "added to the images, in units of their deviation: no direction is empty"),
        side=Key(32, positive, "larger images are shrunk to this at most, the encoder's grid of tokens kept"),
    ),
)  # fmt: skip

REPORT = Section(
    "report",
    "Job report: a page about runs.",
    of_the_run=False,
    effect=False,
    keys=dict(
        sections=Key(
            (), anything, "sections of the page, names in crate_jax/jobs/report.py; none: all about runs", items=str
        )
    ),
)


def _check_whitebox(c: ConfigDict) -> None:
    if c.whitebox.every and c.job in ("finetune", "segment"):
        raise ConfigError(f"config.whitebox.every={c.whitebox.every}: must be 0, only pre-training logs its layers")


WHITEBOX = Section(
    "whitebox",
    "What each layer does, logged while pre-training as whitebox/..., and in a report.",
    of_the_run=False,
    effect=False,
    check=_check_whitebox,
    keys=dict(
        every=Key(0, at_least(0), "steps between measurements; 0: off"),
        images=Key(16, positive, "images of the evaluation split, always the same ones"),
        measure=Key(
            "paper", one_of("paper", "released", "both"),
            "paper: R^c of Z^{l+1/2}, patch tokens; released: as the authors' script",
        ),
    ),
)  # fmt: skip

NONFINITE = Section(
    "nonfinite",
    "A step whose loss or gradient is NaN or infinite.",
    of_the_run=True,
    keys=dict(skip=Key(0, at_least(0), "so many in a row have no effect before the run stops; 0: it stops at once")),
)

SAVE = Section(
    "save",
    "Checkpoints.",
    of_the_run=False,
    effect=False,
    keys=dict(
        every=Key(1000, positive, "steps between checkpoints; the last step is always saved"),
        keep=Key(3, positive, "newest checkpoints that are kept"),
    ),
)

LOG = Section(
    "log",
    "What a run says and draws.",
    of_the_run=False,
    effect=False,
    keys=dict(
        every=Key(50, positive, "steps between log points"),
        pictures=Key(8, at_least(0), "images in the grid of pictures; 0: no pictures"),
        pictures_every=Key(0, at_least(0), "steps between grids; 0: only at the end"),
        tensorboard=Key(True, anything, "write TensorBoard's files too; needs tensorboardX"),
        wandb=Key("", anything, "project of Weights & Biases; empty: off"),
        report=Key(True, anything, "report.html at the end: curves, scores and pictures"),
    ),
)

SECTIONS = (
    RUN, JOB, MESH, DATA, ENCODER, *(section for row in METHODS.values() for section in row.sections), PENALTY,
    OPTIMIZER, EVALUATION, PROTOCOL, SWEEP, ALIGN, REPORT, WHITEBOX, NONFINITE, SAVE, LOG,
)  # fmt: skip
KEYS: dict[str, Key] = {name: key for section in SECTIONS for name, key in section.flat().items()}
OF_THE_RUN = frozenset(name for section in SECTIONS if section.of_the_run for name in section.flat())
SOME_METHODS_READ = frozenset(part for row in METHODS.values() for part in row.parts)


def base() -> ConfigDict:
    """Returns the full default configuration, locked against unknown keys."""
    return defaults(SECTIONS)


def has_effect(key: str) -> bool:
    """Whether a run's numbers depend on a key, such as ``encoder.width``; options of protocols do."""
    return key not in KEYS or KEYS[key].effect


def method_name(config: ConfigDict) -> str:
    """The method that a training job trains, a name of METHODS."""
    return METHOD_OF_JOB.get(config.job, config.method)


def parts(config: ConfigDict, params: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The sections that mean something to a config, among those that only some methods read.

    Args:
      config: its job says it.
      params: the parameters of a model that is looked at. Jobs that train nothing read its encoder only, but a model
        that has a decoder also has the corruption and the loss that it was trained with.
    """
    if config.job in WITHOUT_METHOD:
        return METHODS["reconstruction"].parts if params and "decoder" in params else ("encoder",)
    return METHODS[method_name(config)].parts


def is_read(config: ConfigDict, key: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether a config reads the section of a key such as ``corruption.mask_ratio``; see :func:`parts`."""
    section = key.partition(".")[0]
    return section not in SOME_METHODS_READ or section in parts(config, params)


def validate(config: ConfigDict, read: Sequence[str] | None = None) -> None:
    """Checks everything that can be checked without data or devices.

    Every value must keep to its key's rule. Whether keys go together is checked where their section is read.

    Args:
      config: as :func:`base` returns it, with changes.
      read: the sections that are read among those that only some methods read; None: :func:`parts`.

    Raises:
      ConfigError: names the key, the value received and what would be right.
    """
    require_keys(config)
    check_values(flatten(config), keys_of(config))
    read = parts(config) if read is None else read
    for section in SECTIONS:
        if section.name not in SOME_METHODS_READ or section.name in read:
            section.check(config)


def require_keys(config: Any) -> None:
    """Checks that a config has every key, each with a value of its type.

    Raises:
      ConfigError: names the first key that is missing or of another type.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"the config is a {type(config).__name__}: get_config must return crate_jax.config.base() with its changes"
        )
    check_types(flatten(config), KEYS)  # what follows reads some of them
    check_types(flatten(config), keys_of(config))


def keys_of(config: ConfigDict) -> dict[str, Key]:
    """All keys of a config by their whole names: those of :func:`base` and the options of its protocol.

    Raises:
      ConfigError: the options of the protocol are missing.
    """
    if config.job != "evaluate" or config.protocol.name not in PROTOCOLS:
        return KEYS
    protocol = PROTOCOLS[config.protocol.name]
    missing = sorted(set(protocol.keys) - set(config.protocol))
    if missing:
        raise ConfigError(
            f"config.protocol.name={protocol.name!r}: lacks its options {', '.join(missing)}; name the protocol in the "
            f"config string instead, --config=configs/evaluate.py:protocol={protocol.name}"
        )
    return KEYS | protocol.flat()


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses a config string such as ``"variant=S,penalty=so,debug"``.

    Args:
      arg: comma-separated ``key=value`` pairs; a bare ``key`` means ``key=True``.
      **defaults: every key that is allowed, with its default. A tuple lists the allowed values,
        the first being the default. Values are cast to the default's type.

    Returns:
      A locked ConfigDict with one entry per key of `defaults`.

    Raises:
      ConfigError: an unknown key, or a value that is not allowed or cannot be cast.
    """
    out = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            valid = f"valid keys: {', '.join(sorted(defaults))}" if defaults else "this config takes none"
            raise ConfigError(f"config string: unknown key '{key}'; {valid}")
        allowed = defaults[key]
        kind = type(out[key])
        if kind is bool:
            text = text or "True"
            if text.lower() not in ("true", "false", "1", "0"):
                raise ConfigError(f"config string: {key}={text} is not a boolean (true or false)")
            value: Any = text.lower() in ("true", "1")
        else:
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"config string: {key}={text!r} is not a valid {kind.__name__}") from None
        if isinstance(allowed, tuple) and value not in allowed:
            raise ConfigError(
                f"config string: {key}={value} is not one of {', '.join(map(str, filter(None, allowed)))}"
            )
        out[key] = value
    return ConfigDict(out).lock()
