"""How well decoders restore what a corruption removed, on training and on evaluation images, side by side.

After arXiv 2404.02446, Table 4 and Figures 6 and 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.methods.reconstruction import predict, reconstruct, silent
from crate_jax.models import autoencoder, corruption as corruptions
from crate_jax.report.section import Absent, Cell, Estimate, Figure, Section, Subject, Table
from crate_jax.workdir.pictures import reconstruction_grid

BATCH = 64
SHOWN = 8  # images in a grid
COLUMNS = (
    "run", "corruption", "target", "training images", "evaluation images", "evaluation / training",
    "of a silent decoder",
)  # fmt: skip


def section(subjects: Sequence[Subject]) -> Section:
    """The section with the errors of all runs that have a decoder, and one grid for those of one size of image.

    Args:
      subjects: the runs. Each is measured on at most `config.whitebox.images` images of either split.

    Raises:
      Absent: no run has a decoder.
    """
    subjects = [s for s in subjects if "decoder" in s.params]
    if not subjects:
        raise Absent("no run has a decoder")
    images = subjects[0].config.whitebox.images  # a key of the report, so all runs have the same number
    found = {
        s.name: {
            split: errors(s.config, s.params, source, images)
            for split, source in (("training", s.train), ("evaluation", s.test))
            if source is not None
        }
        for s in subjects
    }
    rows = [
        (s.name, s.config.corruption.name, s.config.loss.target, *_cells(found[s.name]), _silent(found[s.name]))
        for s in subjects
    ]
    by_size: dict[tuple[int, ...], list[Subject]] = {}
    for s in subjects:
        by_size.setdefault(tuple(s.config.data.image_size), []).append(s)
    return Section(
        title="How well is restored what was removed?",
        text="After arXiv 2404.02446, Table 4 and Figures 6 and 8: the mean squared error of normalised pixels on what "
        f"each run's own corruption removed, without augmentation, on at most {images} images of each split. ± is half "
        "of the 95 % interval of the mean over images. Errors under different corruptions cannot be compared, nor "
        "those of different targets: normalised by patch, the prediction is given each patch's mean and variance. "
        "The last column has the error of a decoder that says nothing: it predicts the mean colour, or these means.",
        figures=tuple(Figure(*_grid(of)) for of in by_size.values()),
        tables=(
            Table(
                "Mean squared error of what was removed, and by how much it is larger on evaluation images.",
                COLUMNS,
                tuple(rows),
            ),
        ),
        numbers={
            name: {split: float(np.mean(e[0])) for split, e in of.items()} | {"silent": _silent(of)}
            for name, of in found.items()
        },
    )


def errors(config: ConfigDict, params: dict[str, Any], source: data.Source, images: int) -> np.ndarray:
    """The mean squared error on what the run's corruption removed, for a seeded choice of at most `images`.

    It is the loss of the reconstruction with the l2 norm over normalised pixels, whatever norm and target the run had:
    the mean over removed patches under masking, over all patches under projection.

    Args:
      config: a valid config of a model with a decoder.
      params: the parameters ``encoder`` and ``decoder``.
      source: the images.
      images: the largest number of images; 0: all.

    Returns:
      (2, n): of the run, and of a decoder whose output is 0 (:func:`crate_jax.methods.reconstruction.silent`).
    """
    measure = _measure(config)
    chosen = sample(len(source), images, config.seed)
    keys = jax.random.split(jax.random.key(config.seed), len(chosen))
    out, start = [], 0
    for batch in data.eval_batches(config, source, chosen, min(BATCH, len(chosen))):
        count = len(batch["image"])
        out.append(jax.device_get(measure(params, batch["image"], keys[start : start + count])))
        start += count
    return np.concatenate(out, axis=1)


def _measure(config: ConfigDict) -> Callable[[dict[str, Any], np.ndarray, jax.Array], jax.Array]:
    apply: Any = autoencoder.build(config).apply
    draw = corruptions.sampler(config, *autoencoder.patch_numbers(config))

    @jax.jit
    def measure(params: dict[str, Any], images_uint8: jax.Array, keys_B: jax.Array) -> jax.Array:
        corruption = draw(keys_B)
        x_BNP, predicted_BNP = predict(config, apply, corruption, params, normalise(images_uint8, config))

        def error(said_BNP: jax.Array) -> jax.Array:
            removed_BNP = corruption.complement(x_BNP - said_BNP)
            return jnp.mean(jnp.square(removed_BNP), axis=(1, 2)) / corruption.complement_share()

        return jnp.stack([error(predicted_BNP), error(silent(config, x_BNP))])

    return measure


def _cells(found: Mapping[str, np.ndarray]) -> list[Cell]:
    cells: list[Cell] = []
    for split in ("training", "evaluation"):
        if split not in found:
            cells.append(None)
            continue
        e = found[split][0]
        half = 1.96 * float(np.std(e, ddof=1)) / len(e) ** 0.5 if len(e) > 1 else None
        mean = float(e.mean())
        cells.append(mean if half is None else Estimate(mean, mean - half, mean + half))
    ratio = None if len(found) < 2 else float(found["evaluation"][0].mean() / found["training"][0].mean())
    return [*cells, ratio]


def _silent(found: Mapping[str, np.ndarray]) -> float | None:
    """The error of a silent decoder on the evaluation images, or on the training images if there are no others."""
    return float(list(found.values())[-1][1].mean()) if found else None


def _grid(subjects: Sequence[Subject]) -> tuple[str, np.ndarray]:
    """A caption, and the same images as each run completes them; uint8 (H, W, 3)."""
    first = subjects[0]
    source = first.test or first.train
    assert source is not None  # the job passes only runs whose images can be read
    images, _ = data.eval_images(first.config, source, sample(len(source), SHOWN, first.config.seed))
    columns: dict[str, np.ndarray] = {}
    inputs: set[bytes] = set()  # what encoders got
    for s in subjects:
        apply: Any = autoencoder.build(s.config).apply
        keys = jax.random.split(jax.random.key(first.config.seed), len(images))  # one draw for all, where shapes agree
        corruption = corruptions.sampler(s.config, *autoencoder.patch_numbers(s.config))(keys)
        run = jax.jit(functools.partial(reconstruct, s.config, apply))
        original, given, _, both = jax.device_get(run(corruption, s.params, normalise(jnp.asarray(images), s.config)))
        columns.setdefault("original", original)
        if given.tobytes() not in inputs:
            inputs.add(given.tobytes())
            columns[f"input of {s.name}" if len(subjects) > 1 else "input"] = given
        columns[s.name] = both
    return (
        "The same images as each run completes them: what its encoder got, joined with what its decoder says about the "
        "rest. Runs with the same corruption share one input.",
        reconstruction_grid(columns),
    )
