"""Accuracies from class scores."""

from __future__ import annotations

import numpy as np


def mean_per_class(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their images that is right (Flowers-102, Pets)."""
    right = np.bincount(labels, weights=predicted == labels)
    count = np.bincount(labels)
    return float(np.mean(right[count > 0] / count[count > 0]))


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, mean per class and, above five classes, top-5 accuracy.

    Args:
      scores: class scores [n, C]; of equal ones the lower class wins.
      labels: integers [n] in 0 .. C - 1.

    Returns:
      ``{"top1": .., "mean_per_class": .., "top5": ..}``, shares in 0..1.
    """
    predicted = np.argmax(scores, axis=1)
    found = {"top1": float(np.mean(predicted == labels)), "mean_per_class": mean_per_class(predicted, labels)}
    if scores.shape[1] > 5:
        best = np.argpartition(-scores, 5, axis=1)[:, :5]
        found["top5"] = float(np.mean((best == labels[:, None]).any(axis=1)))
    return found
