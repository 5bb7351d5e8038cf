"""The job ``evaluate``: a pre-trained encoder in, the numbers of one protocol out.

Features are computed once per encoder, images and transform, and kept in the workdir; every protocol
reads them from there. Each run appends one line to ``results.jsonl``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
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
from crate_jax.errors import ConfigError, DataError
from crate_jax.evals.features import encode_split
from crate_jax.evals.metrics import METRICS
from crate_jax.evals.protocols import PROTOCOLS, Features
from crate_jax.models import representation
from crate_jax.models.adopt import adopt_encoder
from crate_jax.parallel import distributed, sharding
from crate_jax.validation import check_values, flatten
from crate_jax.workdir import metrics
from crate_jax.workdir.checkpoint import params_sha256
from crate_jax.workdir.folder import lock

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
CACHE = "features"  # folder in the workdir
VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "scikit-learn")


def inherit(config: ConfigDict, encoder: pretrained.Pretrained) -> ConfigDict:
    """The config of an evaluation with the encoder, image size and pixel statistics of the checkpoint.

    An image size of (0, 0) stands for that of the checkpoint, a deviation of 0 for both its statistics.

    Raises:
      ConfigError: a key of config.encoder was set to what the checkpoint's encoder is not.
    """
    full = config.copy_and_resolve_references()
    theirs, defaults = encoder.config["encoder"], base().encoder
    for key, value in config.encoder.items():
        if value != defaults[key] and value != theirs.get(key, defaults[key]):
            raise ConfigError(f"config.encoder.{key}={value!r}: the encoder is that of {encoder.name}; leave it unset")
    full.encoder.update(theirs)
    if not any(full.data.image_size):
        full.data.image_size = tuple(encoder.config["data"]["image_size"])
    if not any(full.data.std):
        full.data.std = tuple(encoder.config["data"]["std"])
        if not any(full.data.mean):
            full.data.mean = tuple(encoder.config["data"]["mean"])
    return full


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates `config.checkpoint` by `config.protocol`; returns the record appended to results.jsonl.

    Raises:
      UserError: anything a user can mend, in one line.
    """
    protocol = PROTOCOLS.get(config.protocol.name)
    if protocol is None:
        raise ConfigError(f"config.protocol.name={config.protocol.name!r}: must be one of {', '.join(PROTOCOLS)}")
    require_keys(config)
    check_values(flatten(config), protocol.flat())  # the other values may be the checkpoint's
    if config.protocol.metric not in METRICS:
        raise ConfigError(f"config.protocol.metric={config.protocol.metric!r}: must be one of {', '.join(METRICS)}")
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)
    sharding.all_devices()  # if there are none, that is said here
    encoder = pretrained.load(config.checkpoint, "config.checkpoint")
    full = inherit(config, encoder)
    validate(full)
    encoder = fitted(full, encoder)
    with lock(workdir) as folder:
        features, about = extract_features(full, encoder, folder)
        log.info("%s on %s", protocol.name, ", ".join(f"{k} {v}" for k, v in about.items()))
        result = protocol.run(features, config.protocol, config.seed)
        return append_result(folder, full, encoder, protocol.version, about, result)


SHOWN = ("top1", "top5", "mean_per_class", "miou", "mean_accuracy", "pixel_accuracy")  # shares in 0..1


def show(record: dict[str, Any]) -> None:
    """Prints the numbers of one evaluation for a person."""
    print(f"{record['protocol']} of {record['checkpoint'] or 'a random encoder'} on {record['data']}")
    if "chosen" in record:
        setting = ", ".join(f"{key} {value:g}" for key, value in record["chosen"].items())
        print(f"{setting}" + (f", chosen on {record['selected_on']}" if "selected_on" in record else ""))
    for name, value in record.items():
        if isinstance(value, float) and name in SHOWN:
            print(f"{name:<20}{value:>8.1%}")
    if record.get("report"):  # of a training run
        print(f"report: {record['report']}")


def fitted(config: ConfigDict, encoder: pretrained.Pretrained) -> pretrained.Pretrained:
    """The checkpoint's encoder, or a random one of its shape (a function of config.seed) for config.protocol.scratch.

    Raises:
      CheckpointError: it does not fit the config, as when position tables are for another image size.
    """
    init = jax.jit(functools.partial(representation.init_params, config))
    if not config.protocol.scratch:
        what = f"config.checkpoint={config.checkpoint}"
        return dataclasses.replace(
            encoder, params=adopt_encoder(jax.eval_shape(init, jax.random.key(0)), encoder.params, what)
        )
    params = jax.device_get(init(jax.random.key(config.seed)))
    name = f"a random encoder of the shape of {encoder.name}"
    return dataclasses.replace(encoder, name=name, params=params, sha256=params_sha256(params))


def append_result(
    folder: Path,
    config: ConfigDict,
    encoder: pretrained.Pretrained | None,
    version: int,
    about: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """Appends one line to results.jsonl: the numbers, and all that is needed to get them again.

    Of the config that is every key whose value is not the default: a recipe can be changed by flags and keeps
    its name. A training run's `result` says itself what it started from, when it did.
    """
    defaults = flatten(base())
    record = {
        "protocol": config.protocol.name,
        "version": version,
        "checkpoint": encoder.name if encoder else None,
        "checkpoint_sha256": encoder.sha256 if encoder else None,
        "options": {k: v for k, v in config.protocol.to_dict().items() if k != "name"},
        "seed": config.seed,
        **about,
        **result,
        "config": {k: v for k, v in flatten(config).items() if v != defaults.get(k)},
        "versions": {"crate-jax": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS_OF},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if jax.process_index() == 0:
        with open(folder / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        metrics.write_json(folder / "config.json", config.to_dict())
    return record


def extract_features(
    config: ConfigDict, encoder: pretrained.Pretrained, folder: Path
) -> tuple[Features, dict[str, Any]]:
    """Features of the training and the evaluation split, from the cache where they are there.

    Returns:
      the features, and what they are of, for the record.

    Raises:
      DataError: no evaluation split, no labels, or other classes in the two.
    """
    sources = [data.open_split(config, split, labels_required=True) for split in ("train", "eval")]
    train, test = sources
    if train is None or test is None:
        missing, key = ("training", "train_split") if train is None else ("evaluation", "eval_split")
        raise DataError(
            f"config.data.source={config.data.source!r}: has no {missing} split; config.data.{key} names it"
        )
    mesh = sharding.make_mesh(jax.device_count(), 1)
    represent = representation.build(config)

    @functools.partial(jax.jit, out_shardings=sharding.split(mesh))
    def encode(params: dict[str, Any], images_uint8: jax.Array) -> jax.Array:
        return represent(params, normalise(images_uint8, config))

    # Handed over, not closed over: weights inside a compiled program are compiled anew with each checkpoint.
    apply = functools.partial(encode, jax.device_put(encoder.params, sharding.replicated(mesh)))
    limits = (config.evaluation.train_images, config.evaluation.test_images)
    parts = []
    for source, limit in zip((train, test), limits, strict=True):
        indices = np.sort(sample(len(source), limit, config.seed))
        parts.append(_cached(config, encoder, source, indices, apply, mesh, folder))
    (train_x, train_y), (test_x, test_y) = parts
    classes = len(train.class_names or ())
    about = {
        "data": config.data.source,
        "train_split": config.data.train_split,
        "eval_split": config.data.eval_split,
        "train_images": len(train_x),
        "test_images": len(test_x),
        "classes": classes,
        "image_size": list(config.data.image_size),
        "pool": config.evaluation.pool,
        "layer": config.evaluation.layer,
        "width": train_x.shape[1],
    }
    return Features(train_x, train_y, test_x, test_y, classes), about


def cache_key(config: ConfigDict, encoder: pretrained.Pretrained, source: data.Source, indices: np.ndarray) -> str:
    """A digest of all that features depend on: weights, network, tokens, precision, transform and images."""
    transform = {k: config.data[k] for k in ("image_size", "mean", "std", "eval_crop", "interpolation")}
    # The same weights are another encoder with other heads or another lambda.
    network = sorted(config.encoder.to_dict().items())
    what = (config.evaluation.pool, config.evaluation.layer, config.dtype, __version__)
    images = (sorted(transform.items()), source.fingerprint(), indices.astype(np.int64))
    return digest(encoder.sha256, network, what, *images)


def _cached(
    config: ConfigDict,
    encoder: pretrained.Pretrained,
    source: data.Source,
    indices: np.ndarray,
    apply: Any,
    mesh: jax.sharding.Mesh,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the images at `indices`, from the workdir if they were computed before."""
    path = folder / CACHE / f"{cache_key(config, encoder, source, indices)}.npz"
    stored: tuple[np.ndarray, np.ndarray] | None = None
    try:
        with np.load(path) as file:
            stored = file["features"], file["labels"]
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as e:
        log.warning("%s cannot be read (%s); computing the features again", path, e)
    lacking = distributed.max_over_processes(int(stored is None))  # of any process: encoding is for all
    if stored is not None and not lacking:
        log.info("features from %s", path)
        return stored
    out = encode_split(apply, config, source, indices, mesh)
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, features=out[0], labels=out[1])
        partial.rename(path)  # whole or not at all
    return out
