"""The job ``evaluate``: scores a pre-trained encoder by one protocol.

The job computes features once per encoder, images and transform, and keeps them in the workdir, where every protocol
reads them. Each run appends one line to ``results.jsonl``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import platform
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from crate_jax import __version__, data
from crate_jax.config import base, require_keys, validate
from crate_jax.convert import pretrained
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.data.sources import digest
from crate_jax.errors import ConfigError, DataError, escaped
from crate_jax.evals.features import encode_split
from crate_jax.evals.metrics import METRICS, guessing, reading
from crate_jax.evals.protocols import PROTOCOLS, Features
from crate_jax.models import ENCODERS, representation
from crate_jax.models.adopt import adopt_encoder, grid_of
from crate_jax.parallel import distributed, sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.validation import check_values, flatten
from crate_jax.workdir import metrics, mirror
from crate_jax.workdir.checkpoint import params_sha256
from crate_jax.workdir.folder import lock, require_no_run
from crate_jax.workdir.whole import remove_left, save_arrays

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
CACHE = "features"  # a folder in the workdir
VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "scikit-learn")


def inherit(config: ConfigDict, encoder: pretrained.Pretrained) -> ConfigDict:
    """The config of an evaluation, with the checkpoint's encoder, image size, central crop and pixel statistics.

    An empty pooling, an image size of (0, 0) and a crop of 0 are replaced by the checkpoint's, a standard deviation of
    0 by the checkpoint's mean and standard deviation.

    Raises:
      ConfigError: a key of config.encoder has a value that is neither the default nor the checkpoint's.
    """
    full = config.copy_and_resolve_references()
    theirs, defaults = encoder.config["encoder"], base().encoder
    for key, value in config.encoder.items():
        if value != defaults[key] and value != theirs.get(key, defaults[key]):
            raise ConfigError(f"config.encoder.{key}={value!r}: the encoder is that of {encoder.name}; leave it unset")
    full.encoder.update(theirs)
    full.data.channels = encoder.config["data"].get("channels", 3)
    full.encoder.norm_groups = 1  # of the run's batches
    full.evaluation.pool = _pool(config, encoder)
    if not any(full.data.image_size):
        full.data.image_size = tuple(encoder.config["data"]["image_size"])
    if not full.data.eval_crop:
        full.data.eval_crop = encoder.config["data"].get("eval_crop", base().data.eval_crop)
        log.info("images are cropped to the central %g, as in the run of %s", full.data.eval_crop, encoder.name)
    if not any(full.data.std):
        full.data.std = tuple(encoder.config["data"]["std"])
        if not any(full.data.mean):
            full.data.mean = tuple(encoder.config["data"]["mean"])
    return full


def _pool(config: ConfigDict, encoder: pretrained.Pretrained) -> str:
    """The pooling: config.evaluation.pool or, if that is empty, that of the checkpoint's run.

    A file of weights has the default pooling, an encoder without a class token the mean.
    """
    asked, theirs = config.evaluation.pool, encoder.config
    if asked:
        return asked
    pool = theirs["evaluation"]["pool"] if ENCODERS[theirs["encoder"]["name"]].prefix else "mean"
    log.info("features are pooled by %s, as in the run of %s", pool, encoder.name)
    return pool


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates `config.checkpoint` by `config.protocol`; returns the record that it appends to results.jsonl.

    Raises:
      UserError: the config, the data or the workdir cannot be used; one line says why.
    """
    protocol = PROTOCOLS.get(config.protocol.name)
    if protocol is None:
        raise ConfigError(f"config.protocol.name={config.protocol.name!r}: must be one of {', '.join(PROTOCOLS)}")
    require_keys(config)
    check_values(flatten(config), protocol.flat())  # the checkpoint may replace other values
    if config.protocol.metric not in METRICS:
        raise ConfigError(f"config.protocol.metric={config.protocol.metric!r}: must be one of {', '.join(METRICS)}")
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)
    sharding.all_devices()  # raises if there are no devices
    encoder = pretrained.load(config.checkpoint, "config.checkpoint")
    full = inherit(config, encoder)
    validate(full)
    encoder = encoder_to_judge(full, encoder)
    with lock(workdir) as folder:
        require_no_run(folder, "an evaluation")
        features, description = extract_features(full, encoder, folder)
        log.info("%s on %s", protocol.name, ", ".join(f"{k} {v}" for k, v in description.items()))
        result = protocol.run(features, config.protocol, config.seed)
        record = append_result(folder, full, encoder, protocol.version, description, result)
        if distributed.first():
            metrics.write_json(folder / "config.json", full.to_dict())
        return record


SHOWN = ("top1", "top5", "mean_per_class", "miou", "mean_accuracy", "pixel_accuracy")  # shares in 0..1


def show(record: dict[str, Any]) -> None:
    """Prints the scores of one evaluation for people."""
    print(escaped(f"{record['protocol']} of {record['checkpoint'] or 'a random encoder'} on {record['data']}"))
    if "chosen" in record:
        setting = ", ".join(f"{key} {value:g}" for key, value in record["chosen"].items())
        print(f"{setting}" + (f", chosen on {record['selected_on']}" if "selected_on" in record else ""))
    if record.get("converged") is False:
        print("not converged: the accuracy is not that of the setting")
    for shot in record.get("fewshot", ())[:-1]:
        print(f"{'top1':<20}{shot['top1']:>8.1%}, {shot['shots']} training images per class")
    of = f", {record['fewshot'][-1]['shots']} training images per class" if record.get("fewshot") else ""
    for name, value in record.items():
        if isinstance(value, float) and name in SHOWN:
            print(f"{name:<20}{value:>8.1%}{of}")
    for line in reading(record):
        print(line)
    if record.get("report"):  # after a training run
        print(escaped(f"report: {mirror.shown(record['report'])}"))


def encoder_to_judge(config: ConfigDict, encoder: pretrained.Pretrained) -> pretrained.Pretrained:
    """The checkpoint's encoder; with config.protocol.scratch a random one of its shape, a function of config.seed.

    Raises:
      CheckpointError: the encoder does not fit the config; its position table may be for another image size.
    """
    init = jax.jit(functools.partial(representation.init_params, config))
    if not config.protocol.scratch:
        what = f"config.checkpoint={config.checkpoint}"
        return dataclasses.replace(
            encoder,
            params=adopt_encoder(
                jax.eval_shape(init, jax.random.key(0)), encoder.params, what, encoder.grid, ours=grid_of(config)
            ),
        )
    params = jax.device_get(init(jax.random.key(config.seed)))
    name = f"a random encoder of the shape of {encoder.name}"
    return dataclasses.replace(encoder, name=name, params=params, sha256=params_sha256(params))


def append_result(
    folder: Path,
    config: ConfigDict,
    encoder: pretrained.Pretrained | None,
    version: int,
    description: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """Appends one line to results.jsonl: the scores, and all that is needed to compute them again.

    The line holds every config key whose value is not the default, since flags can change a recipe that keeps its name.

    Args:
      folder: the workdir.
      config: the evaluation's config.
      encoder: the judged encoder; None: it started with random parameters.
      version: the protocol's version.
      description: the data and how features were read.
      result: the scores; after a training run, its summary, which says what the run started from.

    Returns:
      the line as a dictionary.

    Raises:
      UserError: the file cannot be written.
    """
    defaults = flatten(base())
    record = {
        "protocol": config.protocol.name,
        "version": version,
        "checkpoint": encoder.name if encoder else None,
        "checkpoint_sha256": encoder.sha256 if encoder else None,
        "options": {k: v for k, v in config.protocol.to_dict().items() if k != "name"},
        "seed": config.seed,
        **description,
        **result,
        "config": {k: v for k, v in flatten(config).items() if v != defaults.get(k)},
        "versions": {"crate-jax": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS_OF},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if distributed.first():
        metrics.append_line(folder / RESULTS, record)
    return record


def extract_features(
    config: ConfigDict, encoder: pretrained.Pretrained, folder: Path
) -> tuple[Features, dict[str, Any]]:
    """The features of the training split and of the evaluation split, from the cache if they are in it.

    Returns:
      the features, and their description for the record: data, number of images, tokens read.

    Raises:
      DataError: a split or its labels are missing, or the splits have different classes.
    """
    sources = [data.open_split(config, split, labels_required=True) for split in ("train", "eval")]
    train, test = sources
    if train is None or test is None:
        missing, key = ("training", "train_split") if train is None else ("evaluation", "eval_split")
        raise DataError(
            f"config.data.source={config.data.source!r}: has no {missing} split; config.data.{key} names it"
        )
    data.require_same_classes(train, test)
    mesh = sharding.make_mesh(jax.device_count(), 1)
    represent = representation.build(config)

    @functools.partial(jax.jit, out_shardings=sharding.split(mesh))
    def encode(params: dict[str, Any], images_uint8: jax.Array) -> jax.Array:
        return represent(params, normalise(images_uint8, config))

    # The weights are an argument, since weights inside the program would make each checkpoint compile it again.
    apply = functools.partial(encode, jax.device_put(encoder.params, sharding.replicated(mesh)))
    limits = (config.evaluation.train_images, config.evaluation.test_images)
    parts = []
    for source, limit in zip((train, test), limits, strict=True):
        if signum := distributed.max_over_processes(Interrupt.came() or 0):  # of a sweep, which keeps it
            raise Interrupted(signum, f"before the features of {source.split!r}")
        indices = np.sort(sample(len(source), limit, config.seed))
        parts.append(_cached(config, encoder, source, indices, apply, mesh, folder))
    (train_x, train_y), (test_x, test_y) = parts
    classes = len(train.class_names or ())
    description = {
        "data": config.data.source,
        "train_split": train.split,
        "eval_split": test.split,
        "train_images": len(train_x),
        **guessing(test_y),
        "classes": classes,
        "image_size": list(config.data.image_size),
        "eval_crop": config.data.eval_crop,
        "pool": config.evaluation.pool,
        "layer": config.evaluation.layer,
        "width": train_x.shape[1],
    }
    return Features(train_x, train_y, test_x, test_y, classes), description


def cache_key(config: ConfigDict, encoder: pretrained.Pretrained, source: data.Source, indices: np.ndarray) -> str:
    """The digest of all that features depend on: weights, network, tokens, precision, transform and images."""
    transform = {k: config.data[k] for k in ("image_size", "mean", "std", "eval_crop", "interpolation", "max_pixels")}
    # With another number of heads or another lambda, the same weights are another encoder.
    network = sorted(config.encoder.to_dict().items())
    tokens = (config.evaluation.pool, config.evaluation.layer, config.dtype, __version__)
    images = (sorted(transform.items()), source.fingerprint(), indices.astype(np.int64))
    return digest(encoder.sha256, network, tokens, *images)


def _cached(
    config: ConfigDict,
    encoder: pretrained.Pretrained,
    source: data.Source,
    indices: np.ndarray,
    apply: Any,
    mesh: jax.sharding.Mesh,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, D) and labels (n,) of the images at `indices`, from the workdir if they were computed before.

    The workdir keeps them only if no image was left out: a disk may give an image next time that it did not give now.
    A workdir that cannot keep them, for example because the disk is full, is not an error.
    """
    path = folder / CACHE / f"{cache_key(config, encoder, source, indices)}.npz"
    stored: tuple[np.ndarray, np.ndarray] | None = None
    try:
        with np.load(path) as file:
            stored = file["features"], file["labels"]
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as e:
        log.warning("%s cannot be read (%s); computing the features again", path, e)
    any_lacks = distributed.max_over_processes(int(stored is None))  # all processes must encode together
    if stored is not None and not any_lacks:
        log.info("features from %s", path)
        return stored
    out = encode_split(apply, config, source, indices, mesh)
    if len(out[0]) < len(indices):
        log.warning("features are not kept, since %d images could not be decoded", len(indices) - len(out[0]))
    elif distributed.first():
        try:
            remove_left(path.parent)
            save_arrays(path, {"features": out[0], "labels": out[1]})
        except OSError as e:
            log.warning("features are not kept, since %s cannot be written (%s)", path, e.strerror or e)
    return out
