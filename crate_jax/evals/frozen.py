"""k-NN, linear probe and collapse measures of an encoder's frozen features, during and after training."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import data
from crate_jax.data import decoding
from crate_jax.data.evaluation import CHUNK
from crate_jax.data.sampling import sample
from crate_jax.data.views import augmented_views
from crate_jax.evals import collapse, evaluate, lidar, spectra
from crate_jax.evals.features import encode_split, extract, images_per_process
from crate_jax.evals.metrics import guessing
from crate_jax.parallel import distributed, sharding

log = logging.getLogger(__name__)

# Larger images are shrunk for the baseline of raw pixels: a probe on all pixels of 224 px images would need a
# covariance matrix of 90 GB.
MAX_PIXEL_SIDE = 32

Rows = tuple[np.ndarray, np.ndarray]  # (n, D) and the labels (n,)
Read = Callable[[data.Source, np.ndarray], Rows]  # of a split and the indices of images


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """Returns images, uint8 (n, H, W, C), as rows of numbers in 0..1, float32 (n, h * w * C).

    Larger images are first averaged to h and w of at most MAX_PIXEL_SIDE pixels.

    >>> pixel_rows(np.full((2, 64, 48, 3), 255, np.uint8)).shape  # 32 x 24 pixels
    (2, 2304)
    """
    height, width = images.shape[1:3]
    shrink = max(height, width) / MAX_PIXEL_SIDE
    if shrink > 1:
        size = max(1, round(height / shrink)), max(1, round(width / shrink))
        box, filter = (0, 0, height, width), Image.Resampling.BOX
        images = np.stack([np.asarray(decoding.crop_resize(decoding.picture(x), box, size, filter)) for x in images])
    return images.reshape(len(images), -1).astype(np.float32) / 255.0


def split_pixels(config: ConfigDict, source: data.Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns :func:`pixel_rows` and labels of the decodable images at `indices`.

    Each process decodes a part of the images; every process gets the whole result.

    Raises:
      DataError: too many images cannot be decoded, or none can.
    """
    own = np.array_split(indices, distributed.processes())[distributed.process()]
    chunks = [(pixel_rows(b["image"]), b["label"]) for b in data.eval_batches(config, source, own, CHUNK)]
    width = pixel_rows(np.zeros((1, *config.data.image_size, config.data.channels), np.uint8)).shape[1]
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

    It also measures how many dimensions the training features use (:func:`collapse_scores`, and LiDAR on demand), with
    or without labels, and says in the log when they collapse.

    Args:
      config: the whole config; reads config.data, config.evaluation and config.seed.
      features: the function (params, images uint8 (b, H, W, 3)) -> features (b, D).
      train: the training images.
      mesh: the devices that encode.
      recipe: whether training draws views by config.views, so that LiDAR's views are drawn so too.

    Attributes:
      mark: the name of a number that each of its results has.
      shown: the images that pictures are made of: the evaluation split, or the training images if there is no
        evaluation split.

    Raises:
      DataError: the evaluation split cannot be read, or has other classes than the training images.
    """

    def __init__(
        self,
        config: ConfigDict,
        features: Callable[..., jax.Array],
        train: data.Source,
        mesh: Mesh,
        recipe: bool = False,
    ) -> None:
        self._config, self._mesh, self._recipe = config, mesh, recipe
        self._features = jax.jit(sharding.on_mesh(mesh, features), out_shardings=sharding.split(mesh))
        test = data.open_split(config, "eval")
        self.shown = train if test is None else test
        self._train = train
        self._rank = collapse.Fall(config.evaluation.collapse_share)
        self._earlier: Sequence[dict[str, float]] = ()
        self._splits: tuple[data.Source, data.Source] | None = None
        self._classes = 0
        self.mark = "rankme"
        # We check the names of the classes, not the labels: to read the labels of a TFDS split is to read all of it.
        if train.class_names is None or test is None or test.class_names is None:
            lacks = "an evaluation split (config.data.eval_split)" if test is None else "labels"
            log.info("neither k-NN nor probe: the images lack %s", lacks)
        else:
            data.require_same_classes(train, test)
            self._splits = (train, test)
            self.mark = "knn_top1"
            self._classes = len(train.class_names)

    def _labelled(self, read: Read) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What `read` makes of the samples of both splits: training rows and labels, test rows and labels."""
        assert self._splits is not None
        options = self._config.evaluation
        train, test = (
            read(source, sample(len(source), limit, self._config.seed))
            for source, limit in zip(self._splits, (options.train_images, options.test_images), strict=True)
        )
        return *train, *test

    def _accuracies(
        self, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
    ) -> dict[str, float]:
        return evaluate(train_x, train_y, test_x, test_y, self._classes, self._config.evaluation)

    def scores(self, params: dict) -> dict[str, float]:
        """Returns ``{"knn_top1": .., "probe_top1": .., "rankme": ..}`` of an encoder.

        The first two are shares in 0..1, and absent if there are no labels; for the others see :func:`collapse_scores`
        and :meth:`lidar`.

        Raises:
          DataError: too many images cannot be decoded, or none can.
          NonFiniteError: a feature is NaN or infinite.
        """
        encode = functools.partial(self._features, params)

        def read(source: data.Source, indices: np.ndarray) -> Rows:
            return encode_split(encode, self._config, source, indices, self._mesh)

        if self._splits is None:
            train_x = read(self._train, self._chosen(self._config.evaluation.train_images))[0]
            return {**collapse_scores(train_x), **self.lidar(params)}
        rows = self._labelled(read)
        return {**self._accuracies(*rows), **collapse_scores(rows[0]), **self.lidar(params)}

    def lidar(self, params: dict) -> dict[str, float]:
        """Returns ``lidar`` and its upper bound ``lidar_limit``, of views of training images as training draws them.

        The views are those of :func:`crate_jax.data.views.augmented_views`: the large ones of config.views where the
        method trains on them, otherwise crops, flips and RandAugment of config.data. {} if
        config.evaluation.lidar_images is 0, or fewer than two of them can be decoded. See
        :func:`crate_jax.evals.lidar.measures`.

        Raises:
          DataError: too many images cannot be decoded.
          NonFiniteError: a feature is NaN or infinite.
        """
        options = self._config.evaluation
        if not options.lidar_images:
            return {}
        q, rows = options.lidar_views, images_per_process(self._config, self._mesh)
        parts = np.array_split(self._chosen(options.lidar_images), distributed.processes())
        views = augmented_views(self._config, self._train, parts[distributed.process()], q, self._recipe)
        images = (view for views_q, _ in views for view in views_q)

        size = self._config.data.image_size

        def batches() -> Iterator[np.ndarray]:  # as many in every process
            for _ in range(-(-len(parts[0]) * q // rows)):
                batch = list(itertools.islice(images, rows))
                yield np.stack(batch) if batch else np.zeros((0, *size, self._config.data.channels), np.uint8)

        encode = functools.partial(self._features, params)
        features = distributed.gather_rows(extract(encode, batches(), rows, sharding.split(self._mesh)))
        count = len(features) // q
        if count < 2:
            return {}
        found = lidar.of_views(features.reshape(count, q, -1))
        for warning in found.warnings:
            log.warning("lidar: %s (config.evaluation.lidar_images)", warning)
        return {"lidar": found.value, "lidar_limit": float(min(count - 1, features.shape[1]))}

    def _chosen(self, limit: int) -> np.ndarray:
        return sample(len(self._train), limit, self._config.seed)

    def remember(self, earlier: Sequence[dict[str, float]]) -> None:
        """Takes ``rankme`` and ``rankme_limit`` of the evaluations before the run was stopped.

        A fall that the log has said then is not said again, and a later one is seen against the best rank of the run.
        """
        self._earlier = earlier

    def watched_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, float]:
        """Returns :meth:`scores`, and says in the log if the rank of the features has fallen since the last call.

        Args:
          params: the encoder's parameters.
          untrained: returns those of the untrained encoder, whose rank is measured if it matters.
        """
        scores = self.scores(params)
        self._watch(scores, lambda: self.scores(untrained()))
        return scores

    def _watch(self, scores: dict[str, float], untrained: Callable[[], dict[str, float]]) -> None:
        share = collapse.rank_share(scores)

        @functools.cache
        def first() -> float:
            return collapse.rank_share(untrained()) or 0.0

        for earlier in map(collapse.rank_share, self._earlier):
            if earlier is not None:
                self._rank.begins(earlier, first)
        self._earlier = ()
        if share is not None and self._rank.begins(share, first):
            collapse.warn(
                f"RankMe of its features is {scores['rankme']:.3g} of at most {scores['rankme_limit']:.0f}, it was "
                f"{1 + self._rank.best * (scores['rankme_limit'] - 1):.3g} "
                f"(config.evaluation.collapse_share={self._rank.bound:g})"
            )

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, float | None]:
        """Returns :meth:`scores` of the encoder, of the untrained encoder and of raw pixels (:func:`pixel_rows`).

        Names of the latter two end in ``_untrained`` and ``_pixels``. With labels there is also
        :func:`crate_jax.evals.metrics.guessing`; without, accuracies are None.
        """
        unknown = dict.fromkeys(("knn_top1", "probe_top1", "probe_top1_untrained")) if self._splits is None else {}
        before, (pixels, guesses) = self.scores(untrained()), self.pixel_scores()
        scores = self.scores(params)
        self._watch(scores, lambda: before)
        baselines = {"_untrained": before, "_pixels": pixels}
        named = {k + suffix: v for suffix, found in baselines.items() for k, v in found.items()}
        return {**unknown, **scores, **named, **guesses}

    def pixel_scores(self) -> tuple[dict[str, float], dict[str, float | int]]:
        """Returns the scores of k-NN and probe on raw pixels, a baseline for any encoder, and the test images' guesses.

        See :func:`pixel_rows` and :func:`crate_jax.evals.metrics.guessing`. Both are {} if there are no labels.
        """
        if self._splits is None:
            return {}, {}
        rows = self._labelled(functools.partial(split_pixels, self._config))
        return self._accuracies(*rows), guessing(rows[3])
