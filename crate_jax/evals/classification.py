"""Accuracy of a classifier on a labelled split, during fine-tuning and after it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.sampling import sample
from crate_jax.errors import DataError
from crate_jax.evals.features import encode_split
from crate_jax.evals.metrics import accuracies, guessing
from crate_jax.parallel import sharding

log = logging.getLogger(__name__)


class ClassifierEvaluation:
    """Scores a classifier on the evaluation split.

    Args:
      config: the whole config; reads config.data and config.evaluation.
      scores: the function (params, images uint8 (b, H, W, 3)) -> class scores (b, C).
      train: the training images.
      mesh: the devices that classify.

    Attributes:
      mark: the name of a number that each of its results has.
      shown: the images that pictures are made of.

    Raises:
      DataError: there is no labelled evaluation split, or it has other classes than the training images.
    """

    mark = "top1"

    def __init__(self, config: ConfigDict, scores: Callable[..., jax.Array], train: data.Source, mesh: Mesh) -> None:
        test = data.open_split(config, "eval", labels_required=True)
        if test is None:
            raise DataError(
                f"config.data.source={config.data.source!r}: has no evaluation split (config.data.eval_split); "
                "fine-tuning is judged on one"
            )
        data.require_same_classes(train, test)
        self._config, self._mesh, self.shown = config, mesh, test
        self._classify = jax.jit(sharding.on_mesh(mesh, scores), out_shardings=sharding.split(mesh))

    def _classified(self, params: dict) -> tuple[np.ndarray, np.ndarray]:
        indices = sample(len(self.shown), self._config.evaluation.test_images, self._config.seed)
        classify = functools.partial(self._classify, params)
        return encode_split(classify, self._config, self.shown, indices, self._mesh)

    def scores(self, params: dict) -> dict[str, float]:
        """Returns :func:`crate_jax.evals.metrics.accuracies` on the test images, shares in 0..1.

        Raises:
          DataError: too many images cannot be decoded, or none can.
        """
        return accuracies(*self._classified(params))

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, float]:
        """Returns :meth:`scores` and :func:`crate_jax.evals.metrics.guessing`.

        The baseline is another run (``protocol=scratch``). A classifier that answers one class only is named in the
        log.
        """
        scores, labels = self._classified(params)
        answers = np.unique(np.argmax(scores, axis=1))
        if len(answers) == 1 and len(np.unique(labels)) > 1 and self.shown.class_names:
            log.warning("every test image is taken for %s", self.shown.class_names[answers[0]])
        return {**accuracies(scores, labels), **guessing(labels)}
