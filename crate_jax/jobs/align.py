"""The job ``align``: labelled images in; which corruption can teach an encoder of this width anything about the labels.

Writes ``alignment.json``, ``table.md`` and the figures ``curves``, ``gain_by_ratio``, ``gain_by_width`` as SVG and PNG.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.analysis.alignment import grid, moments, plots
from crate_jax.analysis.alignment.answer import Answer
from crate_jax.analysis.alignment.closed_form import Aligner
from crate_jax.convert import pretrained
from crate_jax.data.evaluation import eval_batches
from crate_jax.errors import ConfigError, DataError
from crate_jax.evals.frozen import sample
from crate_jax.parallel import sharding
from crate_jax.validation import validate
from crate_jax.workdir import metrics
from crate_jax.workdir.folder import lock

log = logging.getLogger(__name__)

FIGURES = {"curves": plots.curves, "gain_by_ratio": plots.gain_by_ratio, "gain_by_width": plots.gain_by_width}


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Analyses the training split of `config.data`; returns what is written to alignment.json.

    Raises:
      UserError: anything a user can mend, in one line.
    """
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)  # before checksums start JAX
    sharding.all_devices()  # if there are none, that is said here
    config = resolve(config)
    validate(config)
    with lock(workdir) as folder:
        start = time.perf_counter()
        answer = analyse(config, sharding.make_mesh(jax.device_count(), 1))
        record = {**answer.record(), "seconds": round(time.perf_counter() - start, 1)}
        if jax.process_index() == 0:
            _write(folder, config, answer, record)
    return {**record, "summary": answer.summary(), "folder": str(folder)}


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the encoder of `config.checkpoint`, if one is named, and images shrunk to `config.align.side`.

    Shrunk images keep the encoder's grid of tokens: 224 px in patches of 16 become 28 px in patches of 2.
    """
    full = config.copy_and_resolve_references()
    if config.checkpoint:
        encoder = pretrained.load(config.checkpoint, "config.checkpoint")
        full.encoder.update(encoder.config["encoder"])
        full.data.image_size = tuple(encoder.config["data"]["image_size"])
    shrink_to_side(full)
    full.corruption.name, full.decoder.name = "none", "linear"  # neither is built; these fit every encoder
    full.align.width = full.align.width or full.encoder.width
    return full


def shrink_to_side(config: ConfigDict) -> None:
    """Sets image and patch size so that no side exceeds `config.align.side`, the token grid staying what it is."""
    size, patch = config.data.image_size, config.encoder.patch_size
    if max(size) > config.align.side:
        rows_columns = [-(-side // patch) for side in size]
        shrunk = min(patch, max(1, config.align.side // max(rows_columns)))
        config.data.image_size = tuple(n * shrunk for n in rows_columns)
        config.encoder.patch_size = shrunk


def analyse(config: ConfigDict, mesh: jax.sharding.Mesh, source: data.Source | None = None) -> Answer:
    """All curves of a resolved config.

    Args:
      config: reads data, encoder.patch_size, corruption, evaluation.train_images and align.
      mesh: devices that sum the moments.
      source: labelled images; None: the training split of config.data.

    Raises:
      ConfigError: a width above the numbers per image, a patch larger than the image, or no corruption in the grid.
      DataError: no labels, a single class, images that cannot be analysed.
    """
    size = tuple(config.data.image_size)
    D, width = size[0] * size[1] * 3, config.align.width
    if width > D:
        raise ConfigError(
            f"config.align.width={width}: images of {size[0]} x {size[1]} have only {D} numbers; set a smaller width "
            "or larger images (config.data.image_size, config.align.side)"
        )
    if any(patch[0] > size[0] or patch[1] > size[1] for patch in grid.shapes(config)):
        raise ConfigError(f"config.align.patch_sizes={tuple(config.align.patch_sizes)}: images are only {size} pixels")
    settings = grid.settings(config)
    if not settings:
        raise ConfigError(
            "config.align: there is no corruption to look at; give mask_ratios and patch_sizes or rop_ratios"
        )
    source = source or data.open_split(config, "train", labels_required=True)
    if source is None or source.class_names is None:
        raise DataError(f"config.data.source={config.data.source!r}: alignment needs labels, but the images have none")
    indices = np.sort(sample(len(source), config.evaluation.train_images, config.seed))
    batches = eval_batches(config, source, indices, moments.ROWS)
    start = time.perf_counter()
    found = moments.of_images(batches, len(source.class_names), mesh, config.align.noise, config.data.source)
    log.info("second moments of %d images, D = %d (%.1f s)", found.count, D, time.perf_counter() - start)
    if found.count <= D:
        log.warning(
            "%d images of %d numbers: any labels can be fitted exactly, and alignment says little; use more images, or "
            "a smaller config.data.image_size", found.count, D,
        )  # fmt: skip
    start = time.perf_counter()
    aligner = Aligner(found, min(D, max(width, config.align.latents)))
    log.info("principal components (%.1f s)", time.perf_counter() - start)
    about = {
        "data": config.data.source,
        "images": found.count,
        "classes": len(found.targets_CC),
        "image_size": list(size),
    }
    return Answer(width, aligner.clean(), grid.evaluate(aligner, settings, size), about)


def _write(folder: Path, config: ConfigDict, answer: Answer, record: dict[str, Any]) -> None:
    metrics.write_json(folder / "alignment.json", record)
    metrics.write_json(folder / "config.json", config.to_dict())
    command = shlex.join(["python", *sys.orig_argv[1:]])
    metrics.write_text(folder / "table.md", answer.markdown(command))
    for name, draw in FIGURES.items():
        picture = draw(answer)
        for kind in ("png", "svg"):
            # Without a date, the same numbers give the same file.
            picture.savefig(folder / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
