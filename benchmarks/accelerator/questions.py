"""Open questions of the four papers as sweeps on CIFAR-10, each with three seeds: the rows of docs/claims.md.

All runs of a sweep have the same number of steps: as many as their share of the time allows, measured once. The same
command continues a sweep that was killed, from the last checkpoint of the run that it was in.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import montages
from benchmarks.accelerator.cifar import unpack
from benchmarks.accelerator.parts import Cases, Row, Settings
from crate_jax.config_files import named
from crate_jax.jobs import sweep
from crate_jax.workdir.metrics import write_json

SEEDS = 3
EVALUATION, SHARE = 15.0, 0.8  # seconds of each run for its evaluations; the share of the rest that training plans with
JUDGE, JUDGE_STEPS = "segment_linear", 600


@dataclasses.dataclass(frozen=True)
class Question:
    """A sweep.

    Attributes:
      words: the config string of configs/sweep.py, without seeds.
      keys: what the sweep has beyond it.
      judged: whether montages with a class per pixel judge the runs, too.
    """

    words: str
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    judged: bool = False


# The encoder of configs/cifar10.py with the optimiser of its runs, under joint embedding.
SAME = {
    **{"encoder.width": 128, "encoder.depth": 4, "encoder.heads": 4, "encoder.lam": 0.1, "evaluation.pool": "mean"},
    **{"optimizer.lr": 1e-3, "optimizer.lr_batch": 0, "optimizer.weight_decay": 0.05, "optimizer.clip_norm": 1.0},
    **{"optimizer.warmup_lr": 0.0, "batch_size": 64, "sweep.values": ("none",)},
}
CNN = {"sweep.key": "corruption.name", "sweep.values": ("mask", "rop")}
QUESTIONS = {
    "O-MAE, ViT": Question("over=penalty,base=cifar10,encoder=vit,corruption=mask"),
    "O-MAE, CRATE": Question("over=penalty,base=cifar10,encoder=crate,corruption=mask"),
    "R-CNN": Question("over=mask_ratio,base=cifar10,encoder=resnet18,corruption=mask", CNN),
    "R-RATIO2": Question("over=rop_ratio,base=cifar10,encoder=vit", judged=True),
    "X-RATIO": Question("over=mask_ratio,base=cifar10,encoder=vit,corruption=mask", judged=True),
    "X-CRATE, MoCo v3": Question("over=penalty,base=joint,method=mocov3,encoder=crate_tiny,scale=thin", SAME),
    "X-CRATE, VIbCReg": Question("over=penalty,base=joint,method=vibcreg,encoder=crate_tiny,scale=thin", SAME),
}


def cases(name: str, settings: Settings) -> Cases:
    """The questions."""
    return {name: functools.partial(measure, name, settings) for name in QUESTIONS}


def measure(name: str, settings: Settings) -> Row:
    """Runs a sweep, or the rest of it; the means over seeds of each value's accuracies."""
    if not settings.data:
        return {"absent": "no --data"}
    out = Path(settings.out)
    folder = Path(settings.data)
    if not folder.is_dir():
        folder = out / "questions_cifar10"
        if not folder.exists():
            unpack(Path(settings.data), folder)
    pairs = out / "questions_montages"
    if QUESTIONS[name].judged and not pairs.exists():
        for split, count in (("train", 2000), ("test", 1000)):
            montages.make(folder, pairs, split, 32, 24 if settings.debug else count)
    workdir = out / f"questions_{name.replace(', ', '_').replace(' ', '_')}"
    config = configured(name, folder, pairs, settings, settings.until - time.time())
    if config.minutes:
        config.minutes = planned(workdir / "minutes.json", config.minutes)
    sweep.run(config, str(workdir))
    with open(workdir / "sweep.csv", encoding="utf-8", newline="") as file:
        found = summary(list(csv.DictReader(file)))
    return {"steps": found.pop("steps"), "values": found, "workdir": str(workdir)}


def configured(name: str, folder: Path, pairs: Path, settings: Settings, seconds: float) -> ConfigDict:
    """The sweep's config; `seconds` are for all of its runs."""
    question = QUESTIONS[name]
    seeds = 1 if settings.debug else SEEDS
    config = named(f"sweep:{question.words},seeds={seeds}")
    config.update_from_flattened_dict(question.keys)
    config.data.source = f"folder:{folder}"
    config.evaluation.every = config.evaluation.lidar_images = 0
    config.optimizer.warmup_epochs, config.optimizer.warmup_share = 0.0, 0.1
    config.log.report = False
    if question.judged:
        config.sweep.judge = (f"{JUDGE}@folder:{pairs}",)
        config.sweep.judge_steps = 2 if settings.debug else JUDGE_STEPS
    runs = seeds * len(config.sweep["values"])
    config.epochs = 0.0
    if settings.debug:
        config.sweep["values"] = tuple(config.sweep["values"])[:2]
        config.steps, config.evaluation.train_images, config.evaluation.test_images = 2, 40, 20
    else:
        config.minutes = max(1.0, SHARE * (seconds / runs - EVALUATION)) / 60
    return config


def planned(path: Path, minutes: float) -> float:
    """The minutes of a run as the first command planned them, so that a later one continues its sweep."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"minutes": minutes})
    return float(json.loads(path.read_text(encoding="utf-8"))["minutes"])


def summary(records: list[dict[str, str]]) -> Row:
    """The number of steps, and for each value the mean accuracies over seeds, in %.

    >>> summary([{"value": "so", "steps": "7", "knn_top1": k, "probe_top1": "0.5"} for k in ("0.25", "0.3")])
    {'steps': 7, 'so': {'knn_top1': 27.5, 'probe_top1': 50.0}}
    """
    by_value: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record in records:
        by_value[record["value"]].append(record)
    columns = [c for c in records[0] if c in ("knn_top1", "probe_top1") or c.startswith("judge ")]

    def mean(value: str, column: str) -> float:
        return round(100 * statistics.fmean(float(r[column]) for r in by_value[value]), 2)

    return {"steps": int(records[0]["steps"])} | {v: {c: mean(v, c) for c in columns} for v in by_value}
