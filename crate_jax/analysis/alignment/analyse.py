"""The whole analysis: from labelled images to the alignment under every corruption of the grid."""

from __future__ import annotations

import logging
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.analysis.alignment import grid, moments
from crate_jax.analysis.alignment.answer import Answer, caution
from crate_jax.analysis.alignment.closed_form import Aligner
from crate_jax.data.evaluation import eval_batches
from crate_jax.data.sampling import sample
from crate_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def shrink_to_side(config: ConfigDict) -> None:
    """Sets image and patch size so that no side exceeds `config.align.side` pixels; the grid of tokens stays.

    A grid of more tokens than that on a side stays too: then a patch is one pixel.
    """
    size, patch = config.data.image_size, config.encoder.patch_size
    if max(size) > config.align.side:
        rows_columns = [-(-side // patch) for side in size]
        shrunk = min(patch, max(1, config.align.side // max(rows_columns)))
        config.data.image_size = tuple(n * shrunk for n in rows_columns)
        config.encoder.patch_size = shrunk


def analyse(config: ConfigDict, mesh: jax.sharding.Mesh, source: data.Source | None = None) -> Answer:
    """Computes all alignment curves of a config.

    Args:
      config: valid and resolved; the function reads data, encoder.patch_size, corruption, evaluation.train_images
        and align.
      mesh: the devices that sum the moments.
      source: labelled images; None: the training split of config.data.

    Raises:
      ConfigError: the width exceeds the numbers per image, a patch is larger than the image, or the grid has no
        corruption.
      DataError: the images have no labels, all have one label, or their second moments are singular.
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
        raise ConfigError("config.align: the grid has no corruption; give mask_ratios and patch_sizes, or rop_ratios")
    source = source or data.open_split(config, "train", labels_required=True)
    if source is None or source.class_names is None:
        raise DataError(f"config.data.source={config.data.source!r}: alignment needs labels, but the images have none")
    indices = np.sort(sample(len(source), config.evaluation.train_images, config.seed))
    batches = eval_batches(config, source, indices, moments.ROWS)
    start = time.perf_counter()
    found = moments.of_images(batches, len(source.class_names), mesh, config.align.noise, config.data.source)
    log.info("second moments of %d images, D = %d (%.1f s)", found.count, D, time.perf_counter() - start)
    if few := caution(found.count, D):
        log.warning("%s", few)
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
