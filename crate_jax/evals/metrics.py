"""Accuracies from predictions and from class scores."""

from __future__ import annotations

import numpy as np


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of the images whose predicted class (n,) is their label (n,)."""
    return float(np.mean(predicted == labels))


def mean_per_class(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean, over the classes that occur in `labels`, of the accuracy on the images of a class.

    Flowers-102 and Pets use this metric. Both arguments are integers (n,).

    >>> predicted, labels = np.array([0, 0, 0, 2]), np.array([0, 0, 0, 1])
    >>> top1(predicted, labels), mean_per_class(predicted, labels)
    (0.75, 0.5)
    """
    right = np.bincount(labels, weights=predicted == labels)
    count = np.bincount(labels)
    return float(np.mean(right[count > 0] / count[count > 0]))


# config.protocol.metric -> the function (predicted classes (n,), labels (n,)) -> share in 0..1
METRICS = {"top1": top1, "mean_per_class": mean_per_class}


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes every metric of METRICS and, if there are more than five classes, top-5 accuracy.

    Args:
      scores: class scores (n, C); among equal scores the lower class wins.
      labels: integer labels (n,) in 0 .. C - 1.

    Returns:
      ``{"top1": .., "mean_per_class": .., "top5": ..}``, shares in 0..1.
    """
    predicted = np.argmax(scores, axis=1)
    found = {name: metric(predicted, labels) for name, metric in METRICS.items()}
    if scores.shape[1] > 5:
        best = np.argpartition(-scores, 5, axis=1)[:, :5]
        found["top5"] = float(np.mean((best == labels[:, None]).any(axis=1)))
    return found
