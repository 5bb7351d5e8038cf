"""Intersection over union of a segmenter on a set of image/mask pairs, during training and after it.

Shapes: B batch, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.sampling import sample
from crate_jax.errors import DataError
from crate_jax.evals.features import images_per_process, pad_rows, process_batches
from crate_jax.parallel import distributed, sharding

MAX_COUNTED = int(np.iinfo(np.int32).max)  # pixels that the counts on the device can hold


def confusion(truth_BHW: jax.Array, predicted_BHW: jax.Array, classes: int) -> jax.Array:
    """Counts the pixels of each true class (row) that were predicted as each class (column).

    Args:
      truth_BHW: true classes, integers (B, H, W); pixels with data.IGNORED are not counted.
      predicted_BHW: predicted classes, int32 (B, H, W).
      classes: number of classes, C.

    Returns:
      The counts, int32 (C, C).

    >>> truth = jnp.array([[[0, 0, 1, data.IGNORED]]])
    >>> confusion(truth, jnp.array([[[0, 1, 1, 1]]]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    truth = truth_BHW.reshape(-1).astype(jnp.int32)
    cell = jnp.where(truth == data.IGNORED, classes * classes, truth * classes + predicted_BHW.reshape(-1))
    # An index past the end is dropped. Integers are summed, so their order does not matter.
    return jnp.zeros(classes * classes, jnp.int32).at[cell].add(1, mode="drop").reshape(classes, classes)


def segmentation_scores(confusion_CC: np.ndarray) -> dict[str, Any]:
    """Computes scores, shares in 0..1, from the counts (C, C) of :func:`confusion`.

    Returns:
      ``miou``: intersection over union, averaged over the classes that occur in truth or prediction;
      ``mean_accuracy``: share of a true class's pixels that are predicted correctly, averaged over the true classes;
      ``pixel_accuracy``: share of all pixels that are predicted correctly;
      ``iou``: intersection over union of each class, None if the class occurs neither in truth nor in prediction.

    Raises:
      DataError: no pixel was counted.

    >>> segmentation_scores(np.array([[1, 1], [0, 2]]))["iou"]
    [0.5, 0.6666666666666666]
    """
    counts = confusion_CC.astype(np.float64)
    right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    if not counts.sum():
        raise DataError("evaluation: no pixel of the evaluation masks has a class")
    union = true + predicted - right
    iou = np.divide(right, union, out=np.full_like(union, np.nan), where=union > 0)
    return {
        "miou": float(np.nanmean(iou)),
        "mean_accuracy": float(np.mean(right[true > 0] / true[true > 0])),
        "pixel_accuracy": float(right.sum() / counts.sum()),
        "iou": [None if np.isnan(x) else float(x) for x in iou],
    }


class SegmentationEvaluation:
    """Scores a segmenter on the evaluation split.

    Each image, or the central share config.data.eval_crop of its sides, is resized to config.data.image_size; its mask
    is resized with it, to the nearest class. Each pixel of that size counts once.

    Args:
      config: the whole config; reads config.data, config.evaluation and config.seed.
      predict: the function (params, images uint8 (b, H, W, 3)) -> classes, int32 (b, H, W).
      train: the training pairs, which have as many classes as the segmenter.
      mesh: the devices that predict.

    Attributes:
      mark: the name of a number that each of its results has.
      shown: the pairs that pictures are made of.

    Raises:
      DataError: there is no evaluation split, or it holds a class that the training split does not have.
    """

    mark = "miou"

    def __init__(self, config: ConfigDict, predict: Callable[..., jax.Array], train: data.Source, mesh: Mesh) -> None:
        test = data.open_split(config, "eval")
        if not isinstance(train, data.PairSource) or not isinstance(test, data.PairSource):
            raise DataError(
                f"config.data.source={config.data.source!r}: has no evaluation split (config.data.eval_split); "
                "segmentation is judged on one"
            )
        test.require_highest_below(train.classes)
        self._config, self._mesh, self.shown = config, mesh, test

        def add(total_CC: jax.Array, params: dict, images: jax.Array, mask_BHW: jax.Array) -> jax.Array:
            return total_CC + confusion(mask_BHW, predict(params, images), train.classes)

        self._zero = np.zeros((train.classes, train.classes), np.int32)
        self._add = jax.jit(sharding.on_mesh(mesh, add), out_shardings=sharding.replicated(mesh))

    def scores(self, params: dict) -> dict[str, Any]:
        """Returns :func:`segmentation_scores` of the test images.

        The counts stay on the device as long as int32 can hold them.

        Raises:
          DataError: too many images cannot be decoded, or none can.
        """
        options, place = self._config.evaluation, sharding.split(self._mesh)
        size = images_per_process(self._config, self._mesh)
        counted, total_CC, on_device = 0, self._zero.astype(np.int64), jnp.asarray(self._zero)
        indices = sample(len(self.shown), options.test_images, self._config.seed)
        for batch in process_batches(self._config, self.shown, indices, self._mesh):
            images = pad_rows(batch["image"], size)
            mask = np.full(images.shape[:3], data.IGNORED, np.int16)
            mask[: len(batch["image"])] = batch.get("mask", 0)
            pixels = mask.size * distributed.processes()
            if counted + pixels > MAX_COUNTED:
                total_CC, on_device, counted = total_CC + np.asarray(on_device), jnp.asarray(self._zero), 0
            put = (jax.make_array_from_process_local_data(place, x) for x in (images, mask))
            on_device, counted = self._add(on_device, params, *put), counted + pixels
        return segmentation_scores(total_CC + np.asarray(on_device))

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, Any]:
        """Returns :meth:`scores` alone: the baseline is another run (``scratch``)."""
        return self.scores(params)
