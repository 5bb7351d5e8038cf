"""The base config, composed of its sections, and the checks across keys.

One line declares a key: default, rule, meaning, and which part reads it if not all do. The sections of a part stand
beside its code: those of methods in :data:`crate_jax.methods.METHODS`, the options of evaluation protocols in
:data:`crate_jax.evals.protocols.PROTOCOLS`. A file in ``configs/`` starts from :func:`base`, changes what its
experiment needs and returns the result. No code reads a key that is not declared. docs/config.md lists all keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from crate_jax.data import DATA, VIEWS, write_out
from crate_jax.errors import ConfigError, did_you_mean
from crate_jax.evals import EVALUATION
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.methods import METHODS
from crate_jax.models import ENCODER, ENCODERS
from crate_jax.parallel.sharding import MESH
from crate_jax.training import LOG, SAVE
from crate_jax.training.nonfinite import NONFINITE
from crate_jax.training.optimizer import OPTIMIZER
from crate_jax.training.orthogonality import PENALTY
from crate_jax.validation import (
    FIXED,
    FREE,
    RECORDED,
    Key,
    Rule,
    Section,
    anything,
    at_least,
    check_types,
    check_values,
    defaults,
    flatten,
    items,
    must,
    one_of,
    place,
    positive,
    within,
)

# The middle of the range that arXiv 2411.00392 searched. It studies joint embedding, not reconstruction, so these are
# only starting points; so is the one of whiten, for which it gives no number.
PENALTY_WEIGHTS = {"none": 0.0, "so": 1e-6, "srip": 1e-4, "whiten": 1e-2}

METHOD_OF_JOB = {"finetune": "classify", "segment": "segment"}  # these jobs do not read config.method
WITHOUT_METHOD = ("evaluate", "align", "report")  # these jobs only read an encoder
# The default comes first, also where a user has added a row before it.
PRETRAINING = ("reconstruction", *(m for m in METHODS if m not in ("reconstruction", *METHOD_OF_JOB.values())))


def _not_patch_sizes(sizes: Sequence[Any]) -> str:
    for size in sizes:
        sides = (size, size) if isinstance(size, int) else size
        if not (isinstance(sides, Sequence) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
            return f"{size!r} must be a side in pixels or (height, width), as in 4,(2,8)"
    return ""


def _check_run(c: ConfigDict) -> None:
    if c.batch_size % c.accumulate:
        raise ConfigError(f"config.batch_size={c.batch_size}: must be a multiple of config.accumulate={c.accumulate}")
    if c.job not in ("evaluate", "align") and sum(map(bool, (c.steps, c.epochs, c.minutes))) != 1:
        raise ConfigError(
            f"config.steps={c.steps}, config.epochs={c.epochs}, config.minutes={c.minutes}: set exactly one of the "
            "three, the others to 0"
        )


RUN = Section(
    "",
    "Keys of every run.",
    of_the_run=True,
    check=_check_run,
    keys=dict(
        seed=Key(
            0, within(0, 2**32 - 1), "initial weights, order of the images, augmentation, corruption", wide=True,
            resume=RECORDED,
        ),
        method=Key("reconstruction", one_of(*PRETRAINING), "what pre-training optimises"),
        steps=Key(0, at_least(0), "optimiser steps; 0: `epochs` or `minutes` count", resume=FREE),
        epochs=Key(0.0, at_least(0), "passes over the training split; 0: `steps` or `minutes` count", resume=FREE),
        minutes=Key(
            0.0, at_least(0), "time of training; the first start turns it into steps (pace.json); 0: the others count",
            resume=FREE,
        ),
        batch_size=Key(256, positive, "images per optimiser step, over all devices and micro-batches", resume=RECORDED),
        accumulate=Key(
            1, positive, "micro-batches per optimiser step: the same update with less memory", resume=RECORDED
        ),
        init_from=Key(
            "", anything, "workdir, RUN/checkpoints/STEP, or file or folder of weights, whose encoder starts this run"
        ),
        dtype=Key(
            "float32", one_of("float32", "bfloat16"), "type of activations; parameters are always float32",
            resume=RECORDED,
        ),
        remat=Key(
            False, anything, "recompute each block in the backward pass, which takes less memory and more time",
            resume=FREE,
        ),
        remat_keep=Key(
            "nothing", one_of("nothing", "weights", "products"),
            "what is not recomputed: weights (products with weights), products (all)", read_by=("remat", True),
            resume=FREE,
        ),
    ),
)  # fmt: skip


# Keys and sections that change numbers of a run, but not the time of its steps, or not by much.
SAME_TIME = ("seed", "steps", "epochs", "minutes", "optimizer", "evaluation", "protocol")
OTHER_RUN = "run"  # in config.allow_change, in place of a key: a checkpoint of another run


def _check_job(c: ConfigDict) -> None:
    if c.data.channels != 3 and (c.job in ("segment", "align") or "views" in parts(c)):
        what = f"config.method={c.method!r} changes" if c.job == "pretrain" else f"job {c.job} reads"
        raise ConfigError(f"config.data.channels={c.data.channels}: must be 3, since {what} red, green and blue")
    unknown = [key for key in allowed_changes(c) if key not in KEYS and key != OTHER_RUN]
    if unknown:
        raise ConfigError(f"config.allow_change: there is no key {unknown[0]!r}{did_you_mean(unknown[0], KEYS)}")


JOB = Section(
    "",
    "The job, and the encoder that it judges.",
    of_the_run=False,
    effect=False,
    check=_check_job,
    keys=dict(
        job=Key("pretrain", anything, "what `python -m crate_jax.main` does", resume=FIXED),
        checkpoint=Key(
            "",
            anything,
            "workdir, RUN/checkpoints/STEP, or file or folder of weights, of the judged encoder; job report: several, "
            "as in A,B,C",
            resume=RECORDED,
        ),
        allow_change=Key(
            (),
            anything,
            "keys that this start may change although the run that it continues may not; run: a checkpoint of another "
            "run may be continued",
            items=str,
        ),
    ),
)


PROTOCOL = Section(
    "protocol",
    "The protocol of the jobs evaluate, finetune and segment. Each protocol of `evaluate` adds its own options.",
    of_the_run=True,
    keys=dict(
        name=Key("", anything, "protocol"),
        scratch=Key(False, anything, "judge a random encoder of the checkpoint's shape"),
        metric=Key("top1", one_of("top1", "mean_per_class", "miou"), "main score", resume=FREE),
    ),
)

SWEEP = Section(
    "sweep",
    "Job sweep: one run per value and seed.",
    of_the_run=False,
    effect=False,
    keys=dict(
        key=Key("", anything, "the key that is varied, such as encoder.lam"),
        # Code must read it as sweep["values"], since a ConfigDict has a method `values`.
        values=Key((), anything, "the key's values"),
        seeds=Key(1, anything, "runs per value, with the seeds `seed`, `seed` + 1 and so on"),
        judge=Key((), anything, "PROTOCOL, PROTOCOL@TASK or PROTOCOL@SOURCE: each run's encoder is judged so as well"),
        judge_steps=Key(0, at_least(0), "optimiser steps of a judge that trains; 0: as in its recipe"),
    ),
)

SHARES = must("hold shares between 0 and 1", lambda values: all(0 < v < 1 for v in values))

ALIGN = Section(
    "align",
    "Job align: alignment of reconstruction and labels, in closed form (docs/alignment.md).",
    of_the_run=False,
    effect=False,
    keys=dict(
        width=Key(0, at_least(0), "number of latents k for which corruptions are compared; 0: the encoder's width"),
        latents=Key(1024, positive, "largest k of the curves, which start at 1"),
        patch_sizes=Key(
            (1, 2, 4), Rule("must be sides in pixels or (height, width)", _not_patch_sizes),
            "mask: sides of square patches in pixels, or (height, width) of patches, as in 1,(2,8)", items=object,
        ),
        mask_ratios=Key((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99), SHARES, "mask: removed shares of patches"),
        rop_ratios=Key(
            (0.05, 0.1, 1 / 7, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75), SHARES, "rop: kept shares K'/K of dimensions"
        ),
        noise=Key(
            1e-3, within(0, 1000), "noise added to images, in units of their deviation: no direction is empty"
        ),
        side=Key(32, positive, "larger images are shrunk to this side in pixels, the grid of tokens is kept"),
    ),
)  # fmt: skip

REPORT = Section(
    "report",
    "Job report: one page about one or several runs.",
    of_the_run=False,
    effect=False,
    keys=dict(
        sections=Key(
            (),
            anything,
            "sections of the page, see SECTIONS in crate_jax/jobs/report.py; none: the quick ones, which read what the "
            "runs wrote; all: all that are about runs",
            items=str,
        )
    ),
)


def _check_whitebox(c: ConfigDict) -> None:
    if c.whitebox.every and c.job in ("finetune", "segment"):
        raise ConfigError(
            f"config.whitebox.every={c.whitebox.every}: must be 0, since only pre-training logs its layers"
        )
    if c.whitebox.every and not ENCODERS[c.encoder.name].patches:
        raise ConfigError(
            f"config.whitebox.every={c.whitebox.every}: must be 0, since config.encoder.name={c.encoder.name!r} has no "
            "attention; config.evaluation.every shows RankMe instead"
        )


WHITEBOX = Section(
    "whitebox",
    "Measures of each layer: pre-training logs them as whitebox/..., a report shows them.",
    of_the_run=False,
    effect=False,
    check=_check_whitebox,
    keys=dict(
        every=Key(0, at_least(0), "steps between measurements; 0: off"),
        images=Key(16, positive, "number of images of the evaluation split, the same each time"),
        measure=Key(
            "paper", one_of("paper", "released", "both"),
            "paper: R^c of Z^{l+1/2}, patch tokens; released: as in the authors' script",
        ),
    ),
)  # fmt: skip


def _of_methods() -> Iterator[Section]:
    """The sections that methods declare; keys that rows of METHODS name are read only by the methods of these rows."""
    for section in (section for row in METHODS.values() for section in row.sections):
        keys = dict(section.keys)
        for name, key in keys.items():
            readers = [method for method, row in METHODS.items() if f"{section.name}.{name}" in row.keys]
            keys[name] = dataclasses.replace(key, read_by=("method", *readers)) if readers else key
        yield dataclasses.replace(section, keys=keys)


SECTIONS = (
    RUN, JOB, MESH, DATA, VIEWS, ENCODER, *_of_methods(), PENALTY, OPTIMIZER, EVALUATION, PROTOCOL, SWEEP, ALIGN,
    REPORT, WHITEBOX, NONFINITE, SAVE, LOG,
)  # fmt: skip
KEYS: dict[str, Key] = {name: key for section in SECTIONS for name, key in section.flat().items()}
OF_THE_RUN = frozenset(name for section in SECTIONS if section.of_the_run for name in section.flat())
SOME_METHODS_READ = frozenset(part for row in METHODS.values() for part in row.parts)


def base() -> ConfigDict:
    """Returns the config with every key at its default, locked against unknown keys."""
    return defaults(SECTIONS)


def allowed_changes(config: ConfigDict) -> list[str]:
    """The keys that config.allow_change names."""
    return items(config.allow_change)


def resumed_changes(config: ConfigDict, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any, str]]:
    """The keys that a start changes in the run that it continues, without those that its job does not read.

    Args:
      config: the validated config of the start.
      before: the config of the checkpoint, perhaps of an older version that lacks keys. A key that is newer than the
        run had its default.

    Returns:
      {key: (old value, new value, what a start may do with the key: see Key.resume)}, tuples as lists.
    """
    new, old = flatten(config), flatten(base()) | flatten(before)
    changes = {}
    for name, key in KEYS.items():
        if old[name] != new[name] and acts(config, name):
            changes[name] = (old[name], new[name], key.resume)
    return changes


def has_effect(key: str) -> bool:
    """Whether a run's numbers depend on a key; they depend on every option of a protocol.

    >>> has_effect("encoder.width"), has_effect("log.every")
    (True, False)
    """
    return key not in KEYS or KEYS[key].effect


def keys_of_time(config: ConfigDict) -> dict[str, Any]:
    """The keys on which the time of a train step may depend, with their values, tuples as lists.

    They are those that change the numbers of the config's job, without seed and length, and without optimizer.*,
    whose update is a small part of a step.

    >>> [key in keys_of_time(base()) for key in ("batch_size", "remat", "decoder.depth", "joint.out", "optimizer.lr")]
    [True, True, True, False, False]
    """
    flat = flatten(config)
    found = {}
    for name, key in KEYS.items():
        if acts(config, name) and key.effect and name.partition(".")[0] not in SAME_TIME:
            found[name] = flat[name]
    return found


def method_name(config: ConfigDict) -> str:
    """The name of the method that a training job trains, a key of METHODS."""
    return METHOD_OF_JOB.get(config.job, config.method)


def parts(config: ConfigDict, params: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The names of the sections that a config's job reads, among those that only some methods read.

    Args:
      config: the config, of which only `job` and `method` matter.
      params: the parameters of the model that the job judges; only for jobs that train nothing. Of a model with a
        decoder they also read the corruption and the loss that it was trained with.

    >>> parts(base())
    ('encoder', 'corruption', 'decoder', 'loss')
    """
    if config.job in WITHOUT_METHOD:
        return METHODS["reconstruction"].parts if params and "decoder" in params else ("encoder",)
    return METHODS[method_name(config)].parts


def is_read(config: ConfigDict, key: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether a config's job reads the section of a key such as ``corruption.mask_ratio``; see :func:`parts`.

    >>> is_read(base(), "corruption.mask_ratio"), is_read(base(), "segment.head")
    (True, False)
    """
    section = key.partition(".")[0]
    return section not in SOME_METHODS_READ or section in parts(config, params)


def acts(config: ConfigDict, key: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether a run reads a key: its section, as :func:`is_read` says, and in it the key, by the other keys' values.

    >>> c = base()
    >>> acts(c, "encoder.width"), acts(c, "corruption.rop_ratio"), acts(c, "encoder.stem")
    (True, False, False)
    """
    chooser, *values = (KEYS[key].read_by if key in KEYS else ()) or ("",)
    if chooser:
        group, leaf = place(config, chooser)
        if group[leaf] not in values:
            return False
    return is_read(config, key, params)


def validate(config: ConfigDict, read: Sequence[str] | None = None) -> None:
    """Writes short forms of values out, and checks all that can be checked without data and devices.

    Every value must keep to its key's rule. The keys of a section must also go together, if the section is read.

    Args:
      config: the config of :func:`base`, with changes; :func:`crate_jax.data.write_out` changes it.
      read: the names of the sections that are read, among those that only some methods read; None: :func:`parts`.

    Raises:
      ConfigError: a value is wrong; the error names the key, the value and what would be right.
    """
    require_keys(config)
    write_out(config.data)
    check_values(flatten(config), keys_of(config))
    read = parts(config) if read is None else read
    for section in SECTIONS:
        if section.name not in SOME_METHODS_READ or section.name in read:
            section.check(config)


def require_keys(config: Any) -> None:
    """Checks that a config has every key, each with a value of its type.

    Raises:
      ConfigError: `config` is not a ConfigDict, or a key is missing or has a value of another type; the error names
        the first such key.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"the config is a {type(config).__name__}: get_config must return crate_jax.config.base(), with changes"
        )
    check_types(flatten(config), KEYS)  # keys_of reads some of them
    check_types(flatten(config), keys_of(config))


def keys_of(config: ConfigDict) -> dict[str, Key]:
    """All keys of a config by their whole names: the keys of :func:`base` and the options of the config's protocol.

    Raises:
      ConfigError: options of the protocol are missing.
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
