"""Accuracies from predictions and from class scores, and what of them may be chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SHARES = {  # key of a score in 0..1 -> its name for people
    "probe_top1": "probe", "knn_top1": "k-NN", "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class",
    "miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy",
}  # fmt: skip
TOP1 = {key: SHARES[key] for key in ("knn_top1", "probe_top1", "top1")}  # accuracies that :func:`reading` explains
# Frozen features are judged by these accuracies and by ranks, the trained encoder's beside those of other features:
# ending of a key -> whose score it is. Pixels have no ranks.
FROZEN = {key: SHARES[key] for key in ("probe_top1", "knn_top1")}
RANKS = {"rankme": "RankMe", "lidar": "LiDAR"}
COMPARED = {"": "trained encoder", "_untrained": "untrained encoder", "_pixels": "raw pixels"}


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


def guessing(labels: np.ndarray) -> dict[str, float | int]:
    """What is needed to read an accuracy on images with `labels`, whole numbers (n,), at least one.

    Returns:
      ``test_images``, n; ``majority_top1``, the accuracy of always answering the most frequent label, in 0..1.

    >>> guessing(np.array([2, 0, 2, 2]))
    {'test_images': 4, 'majority_top1': 0.75}
    """
    return {"test_images": len(labels), "majority_top1": float(np.bincount(labels).max() / len(labels))}


def interval(share: float, images: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval (Wilson's) of an accuracy in 0..1 that was measured on so many images.

    >>> [round(end, 3) for end in interval(0.25, 372)]
    [0.209, 0.296]
    """
    from scipy.stats import binomtest  # takes half a second to import

    found = binomtest(round(share * images), images).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def reading(scores: Mapping[str, Any], intervals: bool = True) -> list[str]:
    """Returns sentences that say how to read the accuracies of a run: how exact they are, and what of them is chance.

    Args:
      scores: accuracies in 0..1 by their names in TOP1, some perhaps None, and :func:`guessing`, which records
        without labels lack. Those on raw pixels have the ending ``_pixels``, those of the encoder before training
        ``_untrained``.
      intervals: whether one of them gives the intervals.

    >>> reading({"knn_top1": 0.12, "majority_top1": 0.1, "test_images": None})  # a record that somebody has changed
    []
    >>> scores = {"knn_top1": 0.12, "knn_top1_untrained": 0.12, "knn_top1_pixels": 0.4}
    >>> for line in reading({**scores, "test_images": 360, "majority_top1": 0.1}):
    ...     print(line)
    95 % intervals on 360 test images: k-NN 9.0 to 15.7 %
    k-NN: not clearly above 10.0 %, the accuracy of always answering the most frequent class
    k-NN: not above the untrained encoder
    k-NN: below raw pixels, the values of the images themselves; train longer, on more images or by another method
    >>> len(reading({**scores, "test_images": 360, "majority_top1": 0.1}, intervals=False))
    3
    """
    found = {name: scores[name] for name in TOP1 if scores.get(name) is not None}
    if not found or scores.get("majority_top1") is None or not scores.get("test_images"):
        return []
    images, chance = scores["test_images"], scores["majority_top1"]
    ends = {name: interval(share, images) for name, share in found.items()}
    ranges = ", ".join(f"{TOP1[name]} {100 * low:.1f} to {100 * high:.1f} %" for name, (low, high) in ends.items())
    lines = [f"95 % intervals on {images:,} test images: {ranges}"] if intervals else []
    if low := " and ".join(TOP1[name] for name in found if ends[name][0] <= chance):
        lines.append(
            f"{low}: not clearly above {100 * chance:.1f} %, the accuracy of always answering the most frequent class"
        )
    untrained = {name: scores.get(f"{name}_untrained") for name in found}
    if level := " and ".join(TOP1[name] for name, x in untrained.items() if x is not None and found[name] <= x):
        lines.append(f"{level}: not above the untrained encoder")
    if beaten := " and ".join(TOP1[name] for name in found if (scores.get(f"{name}_pixels") or 0) > found[name]):
        lines.append(
            f"{beaten}: below raw pixels, the values of the images themselves; train longer, on more images or by "
            "another method"
        )
    return lines
