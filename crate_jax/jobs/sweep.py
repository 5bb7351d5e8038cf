"""The job ``sweep``: pre-trains once per value of a config key and per seed, and makes a table and a figure.

The runs go one after the other, each in its own folder under the workdir. Each is the run that its config would give
without a sweep. So the same command continues a stopped sweep, and a sweep that gets more values or seeds keeps the
runs that it has. With config.minutes the sweep measures the pace once, and all runs have the same number of steps.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crate_jax import config_files, data
from crate_jax.analysis.records import read as read_records
from crate_jax.config import KEYS, PENALTY_WEIGHTS, base, has_effect, is_read, require_keys, validate
from crate_jax.convert import pretrained
from crate_jax.data.sources import digest
from crate_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UserError, did_you_mean, escaped
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.jobs import evaluate, finetune, report, sweep_table, train
from crate_jax.parallel import distributed, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.training import pace
from crate_jax.training.step import make_recipe
from crate_jax.validation import changed_keys, check_values, flatten, items, place
from crate_jax.workdir import readback
from crate_jax.workdir.folder import lock

log = logging.getLogger(__name__)

PENALTY = "penalty"  # sweeps penalty.name and penalty.weight together; a value is "none" or NAME:WEIGHT
CHECKPOINT = "checkpoint"  # sweeps over runs that exist, which are judged and not trained
TRAINING_JUDGES = (*finetune.PROTOCOLS, *finetune.SEGMENTERS)
JUDGED = "judged"  # a folder in a run's folder: one workdir of evaluations per judge, its config and the encoder
MAX_NAME = 100  # characters of a folder's name that come from a value; a file system takes 255 bytes
MAX_SEEDS = 10_000  # each seed is a run per value; a larger number is surely a typing error


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of a sweep.

    Attributes:
      value: the run's value of the swept key.
      seed: the run's seed.
      name: the name of the run's folder.
      config: the run's whole config.
    """

    value: Any
    seed: int
    name: str
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Judge:
    """A protocol, and the labelled data on which the protocol judges each run's encoder.

    Attributes:
      name: the entry of config.sweep.judge, such as ``logreg@cifar10``.
      protocol: a protocol of configs/evaluate.py, or ``segment_`` and a head of configs/segment.py.
      where: a task of configs/evaluate.py or a source as in config.data.source; "": the images of config.data.source.
      steps: config.sweep.judge_steps.
    """

    name: str
    protocol: str
    where: str
    steps: int

    def config(self, run: ConfigDict, checkpoint: str) -> ConfigDict:
        """The config of the job `evaluate`, `finetune` or `segment` for the encoder of a run, on all images.

        Args:
          run: the run's config.
          checkpoint: its workdir, or a file of weights.

        Raises:
          ConfigError: there is no such task.
        """
        task = f",task={self.where}" if self.where and not data.is_source(self.where) else ""
        head = self.protocol.removeprefix("segment_") if self.protocol in finetune.SEGMENTERS else ""
        c = config_files.named(f"segment:head={head}{task}" if head else f"evaluate:protocol={self.protocol}{task}")
        c.seed, c.checkpoint, c.data.data_dir = run.seed, checkpoint, run.data.data_dir
        if not self.where:
            c.data.train_split, c.data.eval_split = run.data.train_split, run.data.eval_split
        if not task:
            c.data.source = self.where or run.data.source
        if c.job == "evaluate":
            c.evaluation.batch_size = run.evaluation.batch_size
            return c
        c.log.update(run.log.to_dict())
        c.mesh.update(run.mesh.to_dict())
        if self.steps:
            o = c.optimizer
            o.warmup_share = o.warmup_steps / c.steps if c.steps else o.warmup_epochs / c.epochs
            o.warmup_steps, o.warmup_epochs = 0, 0.0
            c.steps, c.epochs = self.steps, 0.0
        return c


def judges(config: ConfigDict) -> list[Judge]:
    """The judges that config.sweep.judge names.

    Raises:
      ConfigError: an entry has no known protocol or task, or is listed twice.
    """
    out: list[Judge] = []
    for name in items(map(str, config.sweep.judge)):
        protocol, _, where = name.strip().partition("@")
        if protocol not in (*PROTOCOLS, *TRAINING_JUDGES):
            raise ConfigError(
                f"config.sweep.judge: {name!r} is not a judge; write PROTOCOL, PROTOCOL@TASK or PROTOCOL@SOURCE, such "
                f"as logreg@cifar10, where PROTOCOL is one of {', '.join((*PROTOCOLS, *TRAINING_JUDGES))}"
            )
        out.append(Judge(name.strip(), protocol, where, config.sweep.judge_steps))
        if out[-1] in out[:-1]:
            raise ConfigError(f"config.sweep.judge: {name} is listed twice")
        try:
            out[-1].config(config, "")
        except ConfigError as e:
            raise ConfigError(f"config.sweep.judge: {name}: {e}") from None
    return out


def expand(config: ConfigDict) -> list[Setting]:
    """The runs of a sweep, ordered by value and then by seed, each checked as far as possible without data.

    Raises:
      ConfigError: the key does not exist or cannot be swept, a value does not fit the key, two values are equal, or
        a run's config is not valid.
    """
    require_keys(config)
    check_values(flatten(config), {name: KEYS[name] for name in ("method", "encoder.name")})  # they say what is read
    key, seeds = config.sweep.key, config.sweep.seeds
    if not 1 <= seeds <= MAX_SEEDS:
        raise ConfigError(f"config.sweep.seeds={seeds}: must lie in [1, {MAX_SEEDS}]")
    _check_key(config, key)
    default = "none" if key == PENALTY else flatten(config)[key]
    given = config.sweep["values"]
    if key == CHECKPOINT and given:
        given = [run for path in report.split(",".join(map(str, given))) for run in report.expand(path)]
    elif any(isinstance(v, str) for v in given) and not isinstance(default, list):
        given = items(given)
    if not judges(config) and key == CHECKPOINT:
        raise ConfigError("config.sweep.judge is empty: say what judges the runs of config.sweep.values")
    values = [_penalty(v) if key == PENALTY else _cast(key, v, default) for v in given]
    labels = [sweep_table.label(v) for v in values]
    if not values:
        raise ConfigError(f"config.sweep.values is empty: give the values of config.{key}, separated by commas")
    for text in labels:
        if labels.count(text) > 1:
            raise ConfigError(f"config.sweep.values: {text} is listed twice (values are compared by four digits)")
    settings = []
    for value, text in zip(values, labels, strict=True):
        for seed in range(config.seed, config.seed + seeds):
            plain = _plain(text.replace(":", "_") if key == PENALTY else text)
            settings.append(Setting(value, seed, f"{key}={plain},seed={seed}", _run_config(config, key, value, seed)))
    for setting in settings:
        _check_setting(setting, validate)
    return settings


def _plain(text: str, *made_by: object) -> str:
    """A folder's name for a text, which may be a path; where the text is changed, a digest tells it from others.

    Args:
      text: what the name is for.
      made_by: if there are any, the name has the digest of these too.

    >>> _plain("0.5"), _plain("a/b"), _plain("a_b"), len(_plain("a" * 101))
    ('0.5', 'a_b-97bcb354', 'a_b', 100)
    """
    plain = re.sub(r"[^-+.\w]", "_", text, flags=re.ASCII)
    if plain == text and len(text) <= MAX_NAME and not made_by:
        return plain
    code = digest(text, *made_by)[:8]
    return f"{plain[: MAX_NAME - len(code) - 1]}-{code}"


def _check_key(config: ConfigDict, key: str) -> None:
    flat = flatten(config)
    allowed = [k for k in flat if k not in ("job", "seed") and not k.startswith("sweep.")]
    if key in (PENALTY, CHECKPOINT):
        return
    if key == "seed":
        raise ConfigError("config.sweep.key='seed': seeds go into config.sweep.seeds")
    if key not in allowed:
        hint = did_you_mean(key, allowed, "write it as in --config.KEY, such as encoder.lam", most=3)
        raise ConfigError(f"config.sweep.key={key!r}: there is no such key to sweep{hint}")
    if not is_read(config, key):
        raise ConfigError(
            f"config.sweep.key={key!r}: has no effect, config.method={config.method!r} does not read config.{key}"
        )
    if key in KEYS and KEYS[key].read_by:
        chooser, *readers = KEYS[key].read_by
        if flat[chooser] not in readers:
            raise ConfigError(
                f"config.sweep.key={key!r}: has no effect with config.{chooser}={flat[chooser]!r}; it needs "
                f"{' or '.join(map(str, readers))}"
            )


def _cast(key: str, value: Any, default: Any) -> Any:
    """Casts a value to the type of the key's present value; a text may hold a number, also a fraction such as 1/14.

    >>> _cast("encoder.lam", "1/4", 0.1), _cast("encoder.lam", "5e-1", 0.1)
    (0.25, 0.5)
    """
    kind = type(default)
    try:
        if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            # Fraction writes out all digits of 1e999999999, which takes hours.
            number = float(Fraction(value) if isinstance(value, str) and "/" in value else value)
            if math.isfinite(number):
                return number
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is list and isinstance(value, tuple | list) and len(value):
            return tuple(value)
        if type(value) is kind:
            return value
    except (ValueError, ArithmeticError):  # 1/0, 1e999
        pass
    shown = "tuple" if kind is list else kind.__name__
    raise ConfigError(f"config.sweep.values: {value!r} is not a valid {shown}, which config.{key} is (now {default!r})")


def _penalty(value: Any) -> str:
    """Checks a value of PENALTY and returns it with its weight, by default that of PENALTY_WEIGHTS.

    >>> _penalty("so:0.0000010"), _penalty("srip"), _penalty("none")
    ('so:1e-6', 'srip:1e-4', 'none')
    """
    name, _, weight = str(value).strip().partition(":")
    try:
        number = _cast(f"{PENALTY}.weight", weight, 0.0) if weight else PENALTY_WEIGHTS[name]
        if (name == "none") == (number == 0) and name in PENALTY_WEIGHTS:
            short = np.format_float_scientific(number, trim="-", exp_digits=1)
            return name if name == "none" else f"{name}:{short}"
    except (ConfigError, KeyError):
        pass
    raise ConfigError(
        f"config.sweep.values: {value!r} is not a penalty; write none, NAME or NAME:WEIGHT with a weight above 0, "
        f"where NAME is one of {', '.join(sorted(set(PENALTY_WEIGHTS) - {'none'}))}"
    )


def _run_config(config: ConfigDict, key: str, value: Any, seed: int) -> ConfigDict:
    """The config of one run. It does not mention the sweep, so it stays the same when the sweep gets more values."""
    child = config.copy_and_resolve_references()
    child.job, child.seed = "pretrain", seed
    child.sweep.update(base().sweep.to_dict())
    if key == PENALTY:
        name, _, weight = value.partition(":")
        child.penalty.name, child.penalty.weight = name, float(weight or 0)
        return child
    group, leaf = place(child, key)
    group[leaf] = value
    if key == "penalty.weight" and value == 0:
        child.penalty.name = "none"  # a run without a penalty, since a penalty needs a weight above 0
    return child


def _check_setting(setting: Setting, check: Callable[[ConfigDict], None]) -> None:
    """Runs `check` on the setting's config; an error names the setting."""
    try:
        check(setting.config)
    except UserError as e:
        raise ConfigError(f"{setting.name}: {e}") from None


def _check_parts(config: ConfigDict, sources: dict[str, data.Source]) -> None:
    """Checks what else a run would check only at its start: devices, images, schedule, patterns, micro-batches.

    `sources` holds the training sets that were opened so far, by their settings. A run of minutes is checked as a long
    one; `_with_steps` checks it again.
    """
    config = pace.trial(config) if config.minutes else config
    sharding.make_mesh(config.batch_size, config.accumulate, data=config.mesh.data, model=config.mesh.model)
    key = config.data.to_json_best_effort(sort_keys=True)
    if key not in sources:
        sources[key] = train.training_images(config)
    make_recipe(config, train.method_of(config, sources[key]), images=len(sources[key]))


def _with_steps(
    settings: Sequence[Setting], folder: Path, interrupt: Interrupt, sources: dict[str, data.Source]
) -> list[Setting]:
    """The settings with a number of steps in place of config.minutes, by the pace of the first setting.

    So all runs that are compared have the same number of steps, and runs that are added later too: the sweep's workdir
    holds the pace. Before the first run has begun, the pace of another config or of other devices is measured again.

    Raises:
      ConfigError: the schedule of a setting does not fit its steps.
    """
    first = settings[0].config
    if not first.minutes:
        return list(settings)
    mesh = sharding.make_mesh(first.batch_size, first.accumulate, data=first.mesh.data, model=first.mesh.model)
    source = train.training_images(first)
    method = train.method_of(first, source)
    begun = next(folder.glob("*/config.json"), None) is not None
    depends_on = None if begun else train.time_depends_on(first, mesh)
    found = []
    for setting in settings:
        config = pace.decided(setting.config, method, source, mesh, folder, interrupt, depends_on)
        depends_on = None  # only the first one is measured
        found.append(dataclasses.replace(setting, config=config))
        _check_setting(found[-1], functools.partial(_check_parts, sources=sources))
    gc.collect()  # as in _run_one
    return found


def _is_finished(folder: Path, setting: Setting) -> bool:
    """Whether the setting's folder holds a finished run of its config.

    Raises:
      ConfigError: the folder holds a run of another config.
      CheckpointError: the folder's config.json cannot be read.
    """
    try:
        stored = readback.parse((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return False
    if stored is None:
        raise CheckpointError(f"{folder / 'config.json'}: is not a JSON object; delete {folder} to run it again")
    stored = flatten(base()) | flatten(stored)  # a key that is newer than the run had its default
    # Keys without effect on the numbers may differ: the run can still continue, or is finished.
    changed = [c for c in changed_keys(stored, setting.config.to_dict()) if has_effect(c.partition(":")[0])]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of another config ({'; '.join(changed)}); choose another --workdir, or delete it"
        )
    try:  # a run writes its summary once more, with `report`, when the report is made
        return "report" in (readback.parse((folder / "summary.json").read_text(encoding="utf-8")) or {})
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Does the runs of the sweep that are not finished, and writes the table and the figure after each.

    A run whose loss becomes NaN or infinite is recorded as failed, and the sweep continues with the others. The same
    command tries the failed run again, from its last checkpoint. The same goes for a judge that trains.

    Returns:
      ``{"table": the table's text, "folder": the workdir, "failed": names of the failed runs and judges}``.

    Raises:
      UserError: the config, the data or a workdir cannot be used; for a wrong config, before the first run starts.
      Interrupted: one of `interrupt.SIGNALS` came; the same command continues the sweep.
    """
    settings = expand(config)
    # All runs use the same number of devices, since JAX cannot change it once it was used.
    model = 1 if all(s.config.mesh.model == 1 for s in settings) else 0
    judging = [judge.config(config, "") for judge in judges(config)]
    sharding.use_cpu_cores(_common_batch(config, settings, judging), 1, model)
    encoders: dict[str, str] = {}
    sources: dict[str, data.Source] = {}
    if config.sweep.key == CHECKPOINT:
        encoders = {path: _encoder(path, "config.sweep.values") for path in dict.fromkeys(s.value for s in settings)}
    else:
        for setting in settings:
            _check_setting(setting, functools.partial(_check_parts, sources=sources))
    for judge in judges(config):
        for split in ("train", "eval"):
            labelled = judge.config(settings[0].config, "")
            if data.open_split(labelled, split, labels_required=True) is None:
                raise DataError(f"config.sweep.judge: {labelled.data.source!r} has no {split} split, which judges need")
    with lock(workdir) as folder, Interrupt() as interrupt:
        if config.sweep.key != CHECKPOINT:
            settings = _with_steps(settings, folder, interrupt, sources)
        finished = [bool(distributed.max_over_processes(int(_is_finished(folder / s.name, s)))) for s in settings]
        records = {
            i: _judged(config, folder, s, _record(folder, s), encoders, interrupt)
            for i, s in enumerate(settings)
            if finished[i]
        }
        if records:
            log.info("%d of %d runs are finished already", len(records), len(settings))
        table = _report(config, folder, settings, records)
        for i, setting in enumerate(settings):
            if finished[i]:
                continue
            signum = distributed.max_over_processes(interrupt.signal or 0)
            if signum:
                raise Interrupted(signum, f"with {len(records)} of {len(settings)} runs done")
            log.info("run %d of %d: %s", i + 1, len(settings), setting.name)
            record = _as_it_is(setting) if config.sweep.key == CHECKPOINT else _run_one(folder, setting)
            records[i] = _judged(config, folder, setting, record, encoders, interrupt)
            table = _report(config, folder, settings, records)
        failed = [name for record in records.values() for name in _failed(record)]
        return {"table": table, "folder": str(folder), "failed": failed}


def _failed(record: Mapping[str, Any]) -> list[str]:
    """The names of what diverged: the run, or judges of it.

    >>> _failed({"status": "done", "folder": "F", "judge knn": 0.5, "judge finetune_mae": None})
    ['F, judged by finetune_mae']
    """
    if record["status"] == "failed":
        return [record["folder"]]
    return [f"{record['folder']}, judged by {name}" for column, name in sweep_table.judged([record]).items()
            if record[column] is None]  # fmt: skip


def _common_batch(config: ConfigDict, settings: Sequence[Setting], judging: Sequence[ConfigDict]) -> int:
    """The greatest common divisor of the micro-batches of all that trains; if nothing does, of the evaluations'."""
    training = [c for c in judging if c.job != "evaluate"]
    if config.sweep.key != CHECKPOINT:
        training += [s.config for s in settings]
    return math.gcd(*(c.batch_size // c.accumulate for c in training)) or math.gcd(
        *(c.evaluation.batch_size for c in judging)
    )


def show(result: dict[str, Any]) -> None:
    """Prints the table of a sweep.

    Raises:
      NonFiniteError: some of its runs, or judges of them, failed.
    """
    print(result["table"])
    print(escaped(f"table, figure and runs: {result['folder']}"))
    if result["failed"]:
        names = ", ".join(result["failed"])
        raise NonFiniteError(f"the loss became NaN or infinite in {names}; all other runs are finished")


def _as_it_is(setting: Setting) -> dict[str, Any]:
    """The record of a run that is only judged."""
    return {"value": setting.value, "seed": setting.seed, "folder": setting.name, "status": "done"}


def _run_one(folder: Path, setting: Setting) -> dict[str, Any]:
    """Trains one setting, or continues to; returns its record."""
    try:
        train.run(setting.config, str(folder / setting.name))
    except NonFiniteError as e:
        log.error("%s failed: %s", setting.name, e)
        return _record(folder, setting, error=str(e))
    except UserError as e:
        raise UserError(f"{setting.name}: {e}") from e
    except Interrupted as e:
        raise Interrupted(e.signum, f"{e.where}, in {setting.name}") from None
    finally:
        # A run's objects refer to each other, so only the collector frees its arrays and compiled programs before the
        # next run needs memory. jax.clear_caches would also free the programs that all runs share, which costs time.
        gc.collect()
    return _record(folder, setting)


def _of_effect(config: Mapping[str, Any] | ConfigDict) -> list[tuple[str, Any]]:
    """The keys of a config on which numbers depend and whose values are not the default, with these values."""
    defaults = flatten(base())
    return sorted((k, v) for k, v in flatten(config).items() if has_effect(k) and v != defaults.get(k))


def _encoder(checkpoint: str, key: str) -> str:
    """The digest of what a judge reads of a checkpoint, wherever it lies: parameters and the config of the run.

    Raises:
      CheckpointError: the checkpoint cannot be read; the message names `key`.
    """
    encoder = pretrained.load(checkpoint, key)
    return digest(encoder.sha256, _of_effect(encoder.config))


def _judged(
    config: ConfigDict,
    folder: Path,
    setting: Setting,
    record: dict[str, Any],
    encoders: dict[str, str],
    interrupt: Interrupt,
) -> dict[str, Any]:
    """The record with each judge's main score, under ``judge NAME``; None: its loss became NaN or infinite.

    A judge with the same config and the same encoder as before does not run again: the name of its folder has the
    digest of both, since a training run cannot continue with others.

    Args:
      config: the sweep's config.
      folder: the sweep's workdir.
      setting: the run.
      record: the run's record.
      encoders: checkpoint -> the digest of its encoder, of those that were read so far; it gets this run's.
      interrupt: what keeps a signal; it is asked before each judge.

    Raises:
      UserError: a judge cannot do its work.
      Interrupted: a signal came.
    """
    if record["status"] == "done":
        checkpoint = setting.value if config.sweep.key == CHECKPOINT else str(folder / setting.name)
        for judge in judges(config):
            if checkpoint not in encoders:
                encoders[checkpoint] = _encoder(checkpoint, setting.name)
            c = judge.config(setting.config, "")
            home = folder / setting.name / JUDGED / _plain(judge.name, _of_effect(c), encoders[checkpoint])
            c.checkpoint = checkpoint
            try:
                lines = (home / evaluate.RESULTS).read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                lines = []
            score = (readback.parse(lines[-1]) or {}).get(c.protocol.metric) if lines else None
            if distributed.max_over_processes(int(not isinstance(score, float))):
                if signum := distributed.max_over_processes(interrupt.signal or 0):
                    raise Interrupted(signum, f"before {judge.name} judged {setting.name}")
                try:
                    job = evaluate if c.job == "evaluate" else finetune
                    score = job.run(c, str(home))[c.protocol.metric]
                except NonFiniteError as e:
                    log.error("%s, judged by %s, failed: %s", setting.name, judge.name, e)
                    score = None
                except UserError as e:
                    raise UserError(f"{setting.name}, judged by {judge.name}: {e}") from e
                finally:
                    gc.collect()  # as in _run_one
            record[f"{sweep_table.JUDGE}{judge.name}"] = score
    return record


def _record(folder: Path, setting: Setting, error: str = "") -> dict[str, Any]:
    """The record in sweep.json of a finished run or, with an `error`, of a failed run."""
    path = folder / setting.name / "summary.json"
    record = _as_it_is(setting)
    if error:
        return {**record, "status": "failed", "error": error}
    summary = readback.parse(path.read_text(encoding="utf-8", errors="replace"))
    if summary is None or readback.wrong(summary, dict.fromkeys(sweep_table.NUMBERS, readback.is_number)):
        what = "is not a JSON object" if summary is None else "holds something else where a number belongs"
        raise CheckpointError(f"{path}: {what}; delete it and repeat the command to write it again")
    term = sweep_table.RECONSTRUCTION
    found = [line[term] for line in read_records(path.parent).metrics if term in line]
    return {**record, **summary, **({term: found[-1]} if found else {})}


def _report(config: ConfigDict, folder: Path, settings: Sequence[Setting], records: dict[int, dict[str, Any]]) -> str:
    ordered = [records[i] for i in sorted(records)]
    return sweep_table.write(folder, config, ordered, len(settings))
