"""The job ``align``: computes from labelled images which corruption can teach an encoder something about the labels.

It writes ``alignment.json``, ``table.md`` and the figures ``curves``, ``gain_by_ratio``, ``gain_by_width`` as SVG and
PNG.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crate_jax.analysis.alignment import plots
from crate_jax.analysis.alignment.analyse import analyse, shrink_to_side
from crate_jax.analysis.alignment.answer import Answer
from crate_jax.config import KEYS, require_keys, validate
from crate_jax.convert import pretrained
from crate_jax.errors import escaped
from crate_jax.models import check_patches, widths
from crate_jax.parallel import distributed, sharding
from crate_jax.validation import check_values, flatten
from crate_jax.workdir import metrics
from crate_jax.workdir.folder import lock, require_no_run

log = logging.getLogger(__name__)

FIGURES = {"curves": plots.curves, "gain_by_ratio": plots.gain_by_ratio, "gain_by_width": plots.gain_by_width}


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Analyses the training split of `config.data`.

    Returns:
      the contents of alignment.json, a ``summary`` for people and the ``folder``.

    Raises:
      UserError: the config, the data or the workdir cannot be used; one line says why.
    """
    require_keys(config)
    check_values(flatten(config), KEYS)
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)  # before the checksums, which start JAX
    sharding.all_devices()  # raises if there are no devices
    config = resolve(config)
    validate(config)
    with lock(workdir) as folder:
        require_no_run(folder, "an alignment analysis")
        start = time.perf_counter()
        answer = analyse(config, sharding.make_mesh(jax.device_count(), 1))
        record = {**answer.record(), "seconds": round(time.perf_counter() - start, 1)}
        if distributed.first():
            _write(folder, config, answer, record)
    return {**record, "summary": answer.summary(), "folder": str(folder)}


def show(result: dict[str, Any]) -> None:
    """Prints the answer of an alignment analysis, and where its files are."""
    print(result["summary"])
    print(escaped(f"table, figures and all curves: {result['folder']}"))


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the encoder of `config.checkpoint`, if it is set, and images shrunk to `config.align.side`.

    Shrunk images keep the encoder's grid of tokens: 224 px in patches of 16 px become 28 px in patches of 2 px.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    full = config.copy_and_resolve_references()
    if config.checkpoint:
        encoder = pretrained.load(config.checkpoint, "config.checkpoint")
        full.encoder.update(encoder.config["encoder"])
        full.data.image_size = tuple(encoder.config["data"]["image_size"])
    check_patches(full)
    shrink_to_side(full)
    full.align.width = full.align.width or widths(full)[-1]
    return full


def _write(folder: Path, config: ConfigDict, answer: Answer, record: dict[str, Any]) -> None:
    metrics.write_json(folder / "alignment.json", record)
    metrics.write_json(folder / "config.json", config.to_dict())
    command = shlex.join(["python", *sys.orig_argv[1:]])
    metrics.write_text(folder / "table.md", answer.markdown(command))
    for name, draw in FIGURES.items():
        metrics.write_figure(folder / name, draw(answer))
