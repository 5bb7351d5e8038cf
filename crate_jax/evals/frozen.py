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
from crate_jax.evals.features import encode_split
from crate_jax.parallel import distributed, sharding

log = logging.getLogger(__name__)

# Larger images are shrunk for the baseline of raw pixels: a probe on all pixels of 224 px images would need a
# covariance matrix of 90 GB.
MAX_PIXEL_SIDE = 32


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """Returns images, uint8 (n, H, W, 3), as rows of numbers in 0..1, float32 (n, h * w * 3).

    Larger images are first averaged to h and w of at most MAX_PIXEL_SIDE pixels.

    >>> pixel_rows(np.full((2, 64, 48, 3), 255, np.uint8)).shape  # 32 x 24 pixels
    (2, 2304)
    """
    height, width = images.shape[1:3]
    shrink = max(height, width) / MAX_PIXEL_SIDE
    if shrink > 1:
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        images = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BOX)) for x in images])
    return images.reshape(len(images), -1).astype(np.float32) / 255.0


def split_pixels(config: ConfigDict, source: data.Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns :func:`pixel_rows` and labels of the decodable images at `indices`.

    Each process decodes a part of the images; every process gets the whole result.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    own = np.array_split(indices, distributed.processes())[distributed.process()]
    chunks = [(pixel_rows(b["image"]), b["label"]) for b in data.eval_batches(config, source, own, CHUNK)]
    if distributed.max_over_processes(len(chunks)) == 0:
        raise DataError(f"evaluation: none of {len(indices)} images can be decoded, for example {source.name(0)}")
    width = pixel_rows(np.zeros((1, *config.data.image_size, 3), np.uint8)).shape[1]
    rows = np.concatenate([np.zeros((0, width), np.float32), *(x for x, _ in chunks)])
    labels = np.concatenate([np.zeros(0, np.int32), *(y for _, y in chunks)])
    return distributed.gather_rows(rows), distributed.gather_rows(labels)


def collapse_scores(features: np.ndarray) -> dict[str, float]:
    """Returns those :class:`crate_jax.evals.spectra.Measures` of features (n, D) that a run logs.

    It logs a warning if n <= D.

    Returns:
      ``rankme``; ``rankme_limit``, its upper bound min(n, D); ``alpha_req``, absent if it cannot be fitted;
      ``off_diagonal``. {} if there are fewer than two rows.

    Raises:
      NonFiniteError: a feature is NaN or infinite.
    """
    if len(features) < 2:
        return {}
    found = spectra.measure_features(features)
    if found.rank_limited:
        log.warning("rankme, alpha_req: %s (config.evaluation.train_images)", found.warnings[0])
    scores = {"rankme": found.rankme, "rankme_limit": float(min(found.rows, found.width))}
    alpha = {} if found.alpha_req is None else {"alpha_req": found.alpha_req}
    return {**scores, **alpha, "off_diagonal": found.off_diagonal}


class FrozenEvaluation:
    """Classifiers on frozen features of a fixed, seeded sample of the labelled splits.

    It also measures how many dimensions the training features use (:func:`collapse_scores`).

    Args:
      config: the whole config; reads config.data, config.evaluation and config.seed.
      features: the function (params, images uint8 (b, H, W, 3)) -> features (b, D).
      train: the training images.
      mesh: the devices that encode.

    Attributes:
      shown: the images that pictures are made of: the evaluation split, or the training images if there is no
        evaluation split.
    """

    def __init__(self, config: ConfigDict, features: Callable[..., jax.Array], train: data.Source, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._features = jax.jit(sharding.on_mesh(mesh, features), out_shardings=sharding.split(mesh))
        test = data.open_split(config, "eval")
        self.shown = train if test is None else test
        self._splits: tuple[data.Source, data.Source] | None = None
        self._classes = 0
        # We check the names of the classes, not the labels: to read the labels of a TFDS split is to read all of it.
        if train.class_names is None or test is None or test.class_names is None:
            log.info("no k-NN and no probe: both need labels and an evaluation split (config.data.eval_split)")
        else:
            self._splits = (train, test)
            self._classes = max(len(train.class_names), len(test.class_names))

    def _score(
        self, read: Callable[[data.Source, np.ndarray], tuple[np.ndarray, np.ndarray]], with_collapse: bool
    ) -> dict[str, float]:
        """Returns the scores of the rows that `read` makes.

        Args:
          read: the function (split, indices of images) -> (rows (n, D), labels (n,)).
          with_collapse: whether to add :func:`collapse_scores` of the training rows.
        """
        if self._splits is None:
            return {}
        options, parts = self._config.evaluation, []
        for source, limit in zip(self._splits, (options.train_images, options.test_images), strict=True):
            parts.append(read(source, sample(len(source), limit, self._config.seed)))
        (train_x, train_y), (test_x, test_y) = parts
        scores = evaluate(train_x, train_y, test_x, test_y, self._classes, self._config.evaluation)
        return {**scores, **(collapse_scores(train_x) if with_collapse else {})}

    def scores(self, params: dict) -> dict[str, float]:
        """Returns ``{"knn_top1": .., "probe_top1": .., "rankme": ..}`` of an encoder; {} if there are no labels.

        The first two are shares in 0..1; for the others see :func:`collapse_scores`.

        Raises:
          DataError: too many images cannot be decoded, or none can.
          NonFiniteError: a feature is NaN or infinite.
        """
        encode = functools.partial(self._features, params)

        def read(source: data.Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return encode_split(encode, self._config, source, indices, self._mesh)

        return self._score(read, with_collapse=True)

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, float | None]:
        """Returns :meth:`scores` of the encoder, of the untrained encoder and of raw pixels.

        Names of the latter two end in ``_untrained`` and ``_pixels``. If there are no labels, values are None.
        """
        if self._splits is None:
            return dict.fromkeys(("knn_top1", "probe_top1", "probe_top1_untrained"))
        baselines = {"_untrained": self.scores(untrained()), "_pixels": self.pixel_scores()}
        named = {k + suffix: v for suffix, scores in baselines.items() for k, v in scores.items()}
        return {**self.scores(params), **named}

    def pixel_scores(self) -> dict[str, float]:
        """Returns the scores of k-NN and probe on raw pixels (:func:`pixel_rows`), a baseline for any encoder."""
        return self._score(functools.partial(split_pixels, self._config), with_collapse=False)
