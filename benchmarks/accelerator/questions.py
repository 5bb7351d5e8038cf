"""Open questions of the four papers as sweeps on CIFAR-10, small models, three seeds each: see docs/claims.md.

All runs have the same number of steps. A case that is killed has not lost its sweep: the same command goes on with it,
from the last checkpoint of the run that it was in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import montages
from benchmarks.accelerator.cifar import unpack
from benchmarks.accelerator.parts import Cases, Row, Settings
from crate_jax.config_files import named
from crate_jax.data.sources import digest
from crate_jax.evals import seeds
from crate_jax.jobs import sweep, sweep_table

SEEDS, STEPS = 3, 4700  # six epochs of 50,000 images
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
    **{"optimizer.warmup_lr": 0.0, "optimizer.b2": 0.95, "optimizer.decay_vectors": False},
    **{"optimizer.decay_exclude": (".*(cls_token|positions)",), "batch_size": 64, "sweep.values": ("none",)},
}
CNN = {"sweep.key": "corruption.name", "sweep.values": ("mask", "rop")}
VIT = "base=cifar10,encoder=vit"
LINEAR = {"loss.region": "all", "loss.norm": "l2"}  # the loss of the alignment paper's theorem
NOISE = {"corruption.name": "noise", "sweep.key": "corruption.noise_std", "sweep.values": (0.25, 0.5, 1.0)}
WHITE = {"sweep.values": ("none", "so:1e-6", "whiten:1e-2")}
QUESTIONS = {
    "O-MAE, ViT": Question(f"over=penalty,{VIT},corruption=mask"),
    "O-MAE, CRATE": Question("over=penalty,base=cifar10,encoder=crate,corruption=mask"),
    "R-CNN": Question("over=mask_ratio,base=cifar10,encoder=resnet18,corruption=mask", CNN),
    "R-RATIO2": Question(f"over=rop_ratio,{VIT}", judged=True),
    "X-RATIO": Question(f"over=mask_ratio,{VIT},corruption=mask", judged=True),
    # Beside the row `none` of "O-MAE, CRATE": the same encoder, optimiser, images and steps.
    "X-CRATE, MoCo v3": Question("over=penalty,base=joint,method=mocov3,encoder=crate_tiny,scale=thin", SAME),
    "X-CRATE, VIbCReg": Question("over=penalty,base=joint,method=vibcreg,encoder=crate_tiny,scale=thin", SAME),
    # `python -m benchmarks.alignment_predicts` compares the three sweeps with the closed forms.
    "A-PRED, masks": Question(f"over=mask_ratio,{VIT},corruption=mask", LINEAR),
    "A-PRED, projections": Question(f"over=rop_ratio,{VIT}", LINEAR),
    "A-PRED, noise": Question(f"over=mask_ratio,{VIT},corruption=mask", LINEAR | NOISE),
    "R-L1": Question(f"over=rop_ratio,{VIT}", {"sweep.key": "loss.norm", "sweep.values": ("l1", "l2")}),
    "R-COMPL": Question(f"over=rop_ratio,{VIT}", {"sweep.key": "loss.region", "sweep.values": ("complement", "all")}),
    "R-SKETCH": Question(
        f"over=rop_ratio,{VIT}", {"sweep.key": "corruption.rop_buckets", "sweep.values": ("balanced", "independent")}
    ),
    "O-WHITE": Question("over=penalty,base=joint,method=byol,scale=thin", WHITE),
    "O-GAMMA": Question("over=gamma,base=joint,method=byol,scale=thin"),
}


def cases(name: str, settings: Settings) -> Cases:
    """The questions."""
    return {question: functools.partial(measure, question, settings) for question in QUESTIONS}


def measure(name: str, settings: Settings) -> Row:
    """Runs a sweep, or the rest of it; the means over seeds of each value's accuracies, and their intervals."""
    if not settings.data:
        return {"absent": "no --data"}
    out = Path(settings.out) / f"questions_{digest(settings.data, settings.debug)}"
    folder, pairs = Path(settings.data), out / "montages"
    if not folder.is_dir():
        folder = out / "cifar10"
        if not folder.exists():
            unpack(Path(settings.data), out / "unpacking")
            (out / "unpacking").rename(folder)  # whole, or not there
    if QUESTIONS[name].judged and not pairs.exists():
        for split, count in (("train", 2000), ("test", 1000)):
            montages.make(folder, out / "making", split, 32, 24 if settings.debug else count)
        (out / "making").rename(pairs)
    workdir = out / name.replace(", ", "_").replace(" ", "_")
    sweep.run(configured(name, folder, pairs, settings), str(workdir))
    records = json.loads((workdir / "sweep.json").read_text(encoding="utf-8"))
    failed = sum(record["status"] != "done" for record in records)
    return {"values": summary(records), "diverged": failed, "workdir": str(workdir)}


def configured(name: str, folder: Path, pairs: Path, settings: Settings) -> ConfigDict:
    """The sweep's config."""
    question = QUESTIONS[name]
    config = named(f"sweep:{question.words},seeds={1 if settings.debug else SEEDS}")
    config.update_from_flattened_dict(question.keys)
    config.data.source = f"folder:{folder}"
    config.evaluation.every = config.evaluation.lidar_images = 0
    config.epochs, config.steps, config.save.every = 0.0, STEPS, 1000
    config.optimizer.warmup_epochs, config.optimizer.warmup_share = 0.0, 0.1
    config.log.report = False
    if question.judged:
        config.sweep.judge = (f"{JUDGE}@folder:{pairs}",)
        config.sweep.judge_steps = 2 if settings.debug else JUDGE_STEPS
    if settings.debug:
        config.sweep["values"] = tuple(config.sweep["values"])[:2]
        config.steps, config.evaluation.train_images, config.evaluation.test_images = 2, 40, 20
    return config


def summary(records: Sequence[Mapping[str, Any]]) -> Row:
    """For each value the mean accuracies in %, over the seeds whose runs are done, each with its 95 % interval.

    >>> runs = [{"value": "so", "knn_top1": 0.25}, {"value": "so", "knn_top1": 0.26}, {"value": "so"}]
    >>> summary([*runs, {"value": "none", "knn_top1": 0.5, "judge x": None}])
    {'so': {'knn_top1': [25.5, 19.15, 31.85]}, 'none': {'knn_top1': [50.0]}}
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        of_value = found[str(record["value"])]
        for column, score in record.items():
            if score is not None and (column in ("knn_top1", "probe_top1") or column.startswith(sweep_table.JUDGE)):
                of_value[column].append(score)
    return {
        value: {column: _percent(seeds.mean(scores)) for column, scores in columns.items()}
        for value, columns in found.items()
    }


def _percent(mean: seeds.Mean | None) -> list[float]:
    """[mean] of one seed, [mean, low, high] of several."""
    assert mean is not None  # a column has a score
    numbers = (mean.value,) if mean.seeds == 1 else (mean.value, mean.low, mean.high)
    return [round(100 * x, 2) for x in numbers]
