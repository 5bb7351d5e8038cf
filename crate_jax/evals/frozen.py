"""k-NN, linear probe and collapse measures of an encoder's frozen features, during and after training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import data
from crate_jax.data.evaluation import CHUNK
from crate_jax.data.sampling import sample
from crate_jax.errors import DataError
from crate_jax.evals import evaluate, spectra
from crate_jax.evals.features import of_split
from crate_jax.parallel import distributed, sharding

log = logging.getLogger(__name__)

# Larger images are shrunk for the baseline of raw pixels: a probe on all numbers of 224 px images would need a
# covariance of 90 GB.
PIXEL_SIDE = 32


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, 3) as rows of numbers in 0..1, by averaging to at most PIXEL_SIDE pixels a side."""
    height, width = images.shape[1:3]
    shrink = max(height, width) / PIXEL_SIDE
    if shrink > 1:
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        images = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BOX)) for x in images])
    return images.reshape(len(images), -1).astype(np.float32) / 255.0


def pixels_of_split(config: ConfigDict, source: data.Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`pixel_rows` and labels of the images at `indices`; each process decodes its part, all get the whole.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    own = np.array_split(indices, distributed.processes())[jax.process_index()]
    chunks = [(pixel_rows(b["image"]), b["label"]) for b in data.eval_batches(config, source, own, CHUNK)]
    if distributed.largest(len(chunks)) == 0:
        raise DataError(f"evaluation: none of {len(indices)} images can be decoded, {source.name(0)} for one")
    width = pixel_rows(np.zeros((1, *config.data.image_size, 3), np.uint8)).shape[1]
    rows = np.concatenate([np.zeros((0, width), np.float32), *(x for x, _ in chunks)])
    labels = np.concatenate([np.zeros(0, np.int32), *(y for _, y in chunks)])
    return distributed.in_order(rows), distributed.in_order(labels)


def collapse_scores(features: np.ndarray) -> dict[str, float]:
    """What is logged of :class:`crate_jax.evals.spectra.Measures` of features (n, D).

    ``rankme``; ``rankme_limit``, the most it can be, min(n, D); ``alpha_req``, left out where it cannot be fitted;
    ``off_diagonal``. Warns where n <= D; {} for a single row.

    Raises:
      NonFiniteError: a feature is NaN or infinite.
    """
    if len(features) < 2:
        return {}
    found = spectra.of_features(features)
    if found.rank_limited:
        log.warning("rankme, alpha_req: %s (config.evaluation.train_images)", found.warnings[0])
    scores = {"rankme": found.rankme, "rankme_limit": float(min(found.rows, found.width))}
    alpha = {} if found.alpha_req is None else {"alpha_req": found.alpha_req}
    return {**scores, **alpha, "off_diagonal": found.off_diagonal}


class FrozenEvaluation:
    """Classifiers on frozen features of a fixed, seeded sample of the labelled splits.

    Of the features that they are fitted on, also how many dimensions are used (:func:`collapse_scores`).

    Args:
      config: the whole config; reads config.data, config.evaluation and the seed.
      features: (params, images uint8 (b, H, W, 3)) -> (b, D).
      train: the training images.
      mesh: the devices that encode.

    Attributes:
      shown: the images to look at: the evaluation split, or the training images where there is none.
    """

    def __init__(self, config: ConfigDict, features: Callable[..., jax.Array], train: data.Source, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._features = jax.jit(sharding.on_mesh(mesh, features), out_shardings=sharding.split(mesh))
        test = data.open_split(config, "eval")
        self.shown = train if test is None else test
        self._splits: tuple[data.Source, data.Source] | None = None
        self._classes = 0
        # Not by the labels: of a TFDS split they cannot be had without reading it all.
        if train.class_names is None or test is None or test.class_names is None:
            log.info("no k-NN and no probe: they need labels and an evaluation split (config.data.eval_split)")
        else:
            self._splits = (train, test)
            self._classes = max(len(train.class_names), len(test.class_names))

    def _score(
        self, read: Callable[[data.Source, np.ndarray], tuple[np.ndarray, np.ndarray]], collapsed: bool
    ) -> dict[str, float]:
        """The scores of `read`: (split, numbers of images) -> (rows, labels)."""
        if self._splits is None:
            return {}
        options, parts = self._config.evaluation, []
        for source, limit in zip(self._splits, (options.train_images, options.test_images), strict=True):
            parts.append(read(source, sample(len(source), limit, self._config.seed)))
        (train_x, train_y), (test_x, test_y) = parts
        scores = evaluate(train_x, train_y, test_x, test_y, self._classes, self._config.evaluation)
        return {**scores, **(collapse_scores(train_x) if collapsed else {})}

    def scores(self, params: dict) -> dict[str, float]:
        """``{"knn_top1": .., "probe_top1": .., "rankme": ..}`` of an encoder; {} without labels.

        The first two are shares in 0..1; for the others see :func:`collapse_scores`.
        """
        encode = functools.partial(self._features, params)
        return self._score(lambda source, indices: of_split(encode, self._config, source, indices, self._mesh), True)

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, float | None]:
        """:meth:`scores`, the same of the untrained encoder and of raw pixels; None where there are no labels."""
        if self._splits is None:
            return dict.fromkeys(("knn_top1", "probe_top1", "probe_top1_untrained"))
        others = {"_untrained": self.scores(untrained()), "_pixels": self.pixel_scores()}
        named = {k + suffix: v for suffix, scores in others.items() for k, v in scores.items()}
        return {**self.scores(params), **named}

    def pixel_scores(self) -> dict[str, float]:
        """k-NN and probe of the pixels themselves (:func:`pixel_rows`), the baseline that any encoder should beat."""
        return self._score(functools.partial(pixels_of_split, self._config), False)
