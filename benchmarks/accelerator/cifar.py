"""BYOL with a ResNet18 on CIFAR-10 by configs/joint.py, with SO of weight 1e-6 and without, for the rest of the time.

Both runs have the same number of steps: the first measures how many fit into its half of the time, and trains so many
with the recipe's schedule. The weights of few epochs are not those of the recipe's 1000; the accuracies are to be
compared with each other.

An .npz holds ``images`` (n, 32, 32, 3) uint8 and ``labels`` (n,), and ``test_images`` and ``test_labels``; without the
last two a sixth of the images, drawn at random, is for evaluation.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import step
from benchmarks.accelerator.feed import fed_rate
from benchmarks.accelerator.parts import Cases, Row, Settings
from benchmarks.accelerator.steps import Stepper
from configs import joint
from crate_jax import data
from crate_jax.errors import DataError
from crate_jax.jobs import train

PENALTIES = {"so": 1e-6, "none": 0.0}
OVERHEAD, SHARE = 45.0, 0.8  # seconds for evaluations and the report; the share of the rest that training may plan with


def cases(name: str, settings: Settings) -> Cases:
    """Both runs."""
    return {penalty: functools.partial(measure, penalty, settings) for penalty in PENALTIES}


def measure(penalty: str, settings: Settings) -> Row:
    """Trains and evaluates."""
    if not settings.data:
        return {"absent": "no --data"}
    out = Path(settings.out)
    folder = Path(settings.data) if Path(settings.data).is_dir() else unpack(Path(settings.data), out / "cifar10")
    config = configured(penalty, folder, settings)
    known = earlier(out / "cifar10.json", settings)
    if known:
        config.steps, rate = known
    else:
        rate = measured_rate(configured(penalty, folder, settings), 0.2 if settings.debug else 4.0)
        config.steps = 4 if settings.debug else steps_for(settings.until - time.time(), rate / config.batch_size)
    config.epochs = 0.0
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 0.1 * epochs(config))
    workdir = out / f"run_{penalty}"
    shutil.rmtree(workdir, ignore_errors=True)
    summary = train.run(config, str(workdir))
    scores = ("knn_top1", "probe_top1", "knn_top1_untrained", "probe_top1_untrained", "rankme")
    kept = ("steps", "loss", "images_per_sec", *scores)
    return {
        "batch": config.batch_size,
        "dtype": config.dtype,
        "epochs": epochs(config),
        "planned_rate": rate,
        **{name: summary[name] for name in kept if name in summary},
        "workdir": str(workdir),
    }


def epochs(config: ConfigDict) -> float:
    """The epochs of config.steps."""
    return config.steps * config.batch_size / len(data.open_split(config, "train"))


def configured(penalty: str, folder: Path, settings: Settings) -> ConfigDict:
    """The recipe on a folder of images."""
    config = joint.get_config(
        f"method=byol,encoder=resnet18,data=cifar10,penalty={penalty}" + ",debug" * settings.debug
    )
    config.penalty.weight = PENALTIES[penalty]
    config.data.source = f"folder:{folder}"
    if not settings.debug:
        config.dtype = "bfloat16"
    return config


def earlier(path: Path, settings: Settings) -> tuple[int, float] | None:
    """Steps and rate of the run that is there already with these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if found["settings"].get("data") != settings.data or found["settings"].get("debug") != settings.debug:
        return None
    return next(((row["steps"], row["planned_rate"]) for row in found["rows"].values() if "steps" in row), None)


def measured_rate(config: ConfigDict, seconds: float) -> float:
    """Images per second of the step fed by the pipeline."""
    source = data.open_split(config, "train")
    prepared = step.prepare(config, source)
    return statistics.median(fed_rate(prepared, Stepper(prepared.step, prepared), source, seconds))


def steps_for(seconds: float, steps_per_second: float) -> int:
    """How many steps a run of `seconds` can do, at least 4.

    >>> steps_for(145.0, 10.0)
    800
    """
    return max(4, int(SHARE * (seconds - OVERHEAD) * steps_per_second))


def unpack(path: Path, folder: Path) -> Path:
    """Writes the images of an .npz into folder/train and folder/test, as the library reads folders.

    Raises:
      DataError: an array is missing or has another shape.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    pairs = [("images", "labels"), *[("test_images", "test_labels")] * ("test_images" in arrays)]
    for images, labels in pairs:
        found = [f"{arrays[n].dtype} {arrays[n].shape}" if n in arrays else "missing" for n in (images, labels)]
        x, y = (arrays.get(name, np.zeros(())) for name in (images, labels))
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or y.shape != x.shape[:1]:
            raise DataError(
                f"{path}: {images} is {found[0]} and {labels} is {found[1]}; they must be uint8 (n, H, W, 3) and (n,)"
            )
    splits = {split: [arrays[n] for n in names] for split, names in zip(("train", "test"), pairs, strict=False)}
    if len(splits) == 1:
        held = np.random.default_rng(0).permutation(len(arrays["images"])) % 6 == 5
        splits = {split: [x[kept] for x in splits["train"]] for split, kept in (("train", ~held), ("test", held))}
    shutil.rmtree(folder, ignore_errors=True)
    for split, (x, y) in splits.items():
        for label in np.unique(y):
            (folder / split / str(label)).mkdir(parents=True)
        for k, (image, label) in enumerate(zip(x, y, strict=True)):
            Image.fromarray(image).save(folder / split / str(label) / f"{k:06d}.bmp")
    return folder
