"""The report's section with test images beside the training images whose features are the nearest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure as Plot
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.evals.features import extract, images_per_process, process_batches
from crate_jax.models import representation
from crate_jax.parallel import distributed, sharding
from crate_jax.report.section import Figure, Section, Subject
from crate_jax.report.svg import escape
from crate_jax.workdir.pictures import rgb

IMAGES = 2000  # training images that are searched
SHOWN, NEAREST = 5, 5  # test images, and neighbours of each
BATCH = 64
CELL, TEXT = 0.78, 0.22  # height of an image and of the text above it, in inches
SMALLEST = 96  # smallest side of a picture in pixels; smaller images are enlarged by a whole factor
LONGEST = 14  # letters of a class's name


@dataclasses.dataclass(frozen=True)
class Found:
    """The nearest training images of some test images (B images, K neighbours, nearest first).

    Attributes:
      queries: the test images' indices, (B,).
      nearest: the training images' indices, (B, K).
      cosine: the cosines between their features and the test images', (B, K).
    """

    queries: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray


def section(subjects: Sequence[Subject]) -> Section:
    """The section with one figure for each run: test images, always the same ones, and their nearest training images.

    Args:
      subjects: the runs, whose training images can be read; those without an evaluation split show training images,
        and their neighbours among the other ones.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    figures, numbers = [], {}
    for s in subjects:
        assert s.train is not None
        test = s.train if s.test is None else s.test
        found = search(s, s.train, test)
        shown = draw(s.config, s.train, test, found)
        split = "training" if s.test is None else "test"
        figures.append(Figure(f"{s.name}: {split} images (left), and their nearest training images.", shown))
        numbers[s.name] = {
            "test": [test.name(int(i)) for i in found.queries],
            "nearest": [[s.train.name(int(i)) for i in row] for row in found.nearest],
            "cosine": found.cosine.tolist(),
        }
    text = (
        f"What the encoder takes for alike: {SHOWN} images of the evaluation split (of the training images if there is "
        f"none), drawn by the seed, and the {NEAREST} nearest of at most {IMAGES:,} training images by the cosine of "
        "their features, which are pooled as for k-NN; the nearest stands first. With labels, a solid frame and ✓ say "
        "that the class is the same, a dashed frame and ✗ that it is another one. A few images are no score: see k-NN "
        "in the overview."
    )
    return Section("Nearest neighbours", text, tuple(figures), numbers=numbers)


def search(subject: Subject, train: data.Source, test: data.Source) -> Found:
    """The training images nearest to a few test images; all processes must call it.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    config, mesh = subject.config.copy_and_resolve_references(), subject.mesh
    config.evaluation.batch_size = BATCH
    represent = representation.build(config)

    @functools.partial(jax.jit, out_shardings=sharding.split(mesh))
    def encode(params: Any, images_uint8: jax.Array) -> jax.Array:
        return represent(params, normalise(images_uint8, config))

    apply = functools.partial(encode, jax.device_put({"encoder": subject.params["encoder"]}, sharding.replicated(mesh)))

    def features(source: data.Source, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Unit features (n, D) and the indices (n,) of the decodable ones of `count` images."""
        own = [np.zeros(0, np.int32)]

        def images() -> Iterator[np.ndarray]:
            for batch in process_batches(config, source, np.sort(sample(len(source), count, config.seed)), mesh):
                own.extend([batch["index"]] if "index" in batch else [])
                yield batch["image"]

        rows = extract(apply, images(), images_per_process(config, mesh), sharding.split(mesh))
        x, index = distributed.gather_rows(rows), distributed.gather_rows(np.concatenate(own))
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny), index

    (test_x, queries), (train_x, gallery) = features(test, SHOWN), features(train, IMAGES)
    cosine = test_x @ train_x.T
    if test is train:
        cosine[queries[:, None] == gallery] = -np.inf  # an image is not its own neighbour
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(NEAREST, len(gallery) - (test is train))]
    return Found(queries, gallery[order], np.take_along_axis(cosine, order, axis=1))


def draw(config: ConfigDict, train: data.Source, test: data.Source, found: Found) -> Plot:
    """One row for each test image: the image, then its neighbours, each with its class, if there are classes."""
    rows, columns = found.nearest.shape[0], 1 + found.nearest.shape[1]
    height, width = config.data.image_size
    size = (columns * CELL * width / height, rows * (CELL + TEXT))
    plot = Plot(figsize=size)
    place = dict(left=0.01, right=0.99, bottom=0.01, top=1 - TEXT / size[1], wspace=0.12, hspace=TEXT / CELL)
    axes = plot.subplots(rows, columns, squeeze=False, gridspec_kw=place)
    for row, query, nearest in zip(axes, found.queries, found.nearest, strict=True):
        own = _class(test, query)
        for ax, source, index in zip(row, [test] + [train] * len(nearest), [query, *nearest], strict=True):
            image = rgb(data.eval_images(config, source, [int(index)])[0])[0]
            scale = -(-SMALLEST // min(*image.shape[:2], SMALLEST))
            ax.imshow(np.repeat(np.repeat(image, scale, axis=0), scale, axis=1), interpolation="none")
            ax.set_xticks([])
            ax.set_yticks([])
            name = _class(source, index)
            same = name == own
            shown = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
            if ax is row[0] or not name:
                ax.spines[:].set_visible(False)
                ax.set_title(escape(shown), fontsize=8, pad=2, weight="bold")
                continue
            ax.spines[:].set(color="C2" if same else "C3", linewidth=2, linestyle="-" if same else (0, (2, 1.5)))
            ax.set_title(escape(f"{'✓' if same else '✗'} {shown}"), fontsize=8, pad=2)
    return plot


def _class(source: data.Source, index: int) -> str:
    """The name of an image's class; empty if there are no labels."""
    labels = source.labels_of(np.array([index]))
    return "" if labels is None or source.class_names is None else source.class_names[int(labels[0])]
