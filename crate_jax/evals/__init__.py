"""Evaluations of frozen features: k-nearest neighbours and a linear probe."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.evals.knn import knn_top1
from crate_jax.evals.probe import probe_top1
from crate_jax.models import ENCODERS, widths
from crate_jax.validation import FIXED, FREE, Key, Section, at_least, must, one_of, positive, within

__all__ = ["evaluate"]


def _check_evaluation(c: ConfigDict) -> None:
    layers, what = len(widths(c)), ENCODERS[c.encoder.name].layer
    if c.evaluation.layer > layers:
        raise ConfigError(
            f"config.evaluation.layer={c.evaluation.layer}: the encoder has {layers} {what}s (0: its output)"
        )


EVALUATION = Section(
    "evaluation",
    "How the encoder is scored during and after training, and which of its tokens each job reads.",
    of_the_run=True,
    resume=FREE,
    check=_check_evaluation,
    keys=dict(
        every=Key(0, at_least(0), "steps between evaluations; 0: only at the end"),
        train_images=Key(10_000, at_least(0), "number of images on which classifiers are fitted; 0: all"),
        test_images=Key(10_000, at_least(0), "number of images on which classifiers are scored; 0: all"),
        batch_size=Key(256, positive, "images encoded at once"),
        pool=Key(
            "cls",
            one_of("cls", "mean", "cls_mean"),
            "cls: the class token; mean: the mean of patch tokens; cls_mean: both, side by side",
            resume=FIXED,
        ),
        layer=Key(
            0, at_least(0), "block (resnet: stage) whose output is read, from 1; 0: the encoder's output", resume=FIXED
        ),
        knn_k=Key(20, positive, "number of neighbours"),
        knn_temperature=Key(0.07, positive, "temperature of the neighbours' weights"),
        probe_c=Key(1.0, positive, "inverse strength of the logistic regression's L2 penalty"),
        lidar_images=Key(
            0,
            must("be 0 or at least 2", lambda value: value == 0 or value > 1),
            "number of training images for LiDAR, whose views are drawn as in training; 0: none",
        ),
        lidar_views=Key(10, at_least(2), "number of views of each of these images"),
        collapse_share=Key(
            0.02,
            within(0, 1, "[)"),
            "a warning if RankMe falls to this share of the way from 1 to its limit, and to half of its peak; 0: off",
        ),
    ),
)


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
