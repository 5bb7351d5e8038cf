"""Evaluations of frozen features: k-nearest neighbours and a linear probe."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from crate_jax.evals.knn import knn_top1
from crate_jax.evals.probe import probe_top1


def evaluate(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    num_classes: int,
    evaluation_config: ConfigDict,
) -> dict[str, float]:
    """Scores features by k-nearest neighbours and by a linear probe.

    Args:
      train_x: features (n, D) on which the classifiers are fitted.
      train_y: their integer labels (n,) in 0 .. num_classes - 1.
      test_x: features (m, D) on which the classifiers are scored.
      test_y: their integer labels (m,).
      num_classes: number of classes.
      evaluation_config: ``config.evaluation``; reads knn_k, knn_temperature and probe_c.

    Returns:
      ``{"knn_top1": .., "probe_top1": ..}``, shares of the test rows in 0..1.

    Raises:
      DataError: a label is out of range, or shapes do not match.
      NonFiniteError: a feature is NaN or infinite.
    """
    data = (train_x, train_y, test_x, test_y, num_classes)
    return {
        "knn_top1": knn_top1(*data, evaluation_config.knn_k, evaluation_config.knn_temperature),
        "probe_top1": probe_top1(*data, evaluation_config.probe_c),
    }
