"""Intersection over union of a segmenter on a set of image/mask pairs, while it is trained and after.

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
from crate_jax.evals.features import filled, lockstep, per_process
from crate_jax.parallel import distributed, sharding

MOST_COUNTED = int(np.iinfo(np.int32).max)  # pixels, on the device


def confusion(truth_BHW: jax.Array, predicted_BHW: jax.Array, classes: int) -> jax.Array:
    """Pixels of each true class (row) that were predicted as each class (column), int32 (C, C).

    Pixels whose truth is data.IGNORED count nowhere.
    """
    truth = truth_BHW.reshape(-1).astype(jnp.int32)
    cell = jnp.where(truth == data.IGNORED, classes * classes, truth * classes + predicted_BHW.reshape(-1))
    # An index past the end is dropped; the sum is of integers, so its order does not matter.
    return jnp.zeros(classes * classes, jnp.int32).at[cell].add(1, mode="drop").reshape(classes, classes)


def segmentation_scores(confusion_CC: np.ndarray) -> dict[str, Any]:
    """Scores from whole counts, rows being the truth.

    Returns:
      ``miou``: intersection over union, averaged over the classes that occur in truth or prediction;
      ``mean_accuracy``: share of a true class's pixels that are right, averaged over the true classes;
      ``pixel_accuracy``; ``iou``: one number per class, None where it occurs in neither.

    Raises:
      DataError: no pixel was counted.
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

    Each image is resized as a whole to config.data.image_size (config.data.eval_crop is the share of both
    sides that is kept), its mask with it, to the nearest class; every pixel of that size counts once.

    Args:
      config: the whole config; reads config.data, config.evaluation and the seed.
      predict: (params, images uint8 (b, H, W, 3)) -> classes, int32 (b, H, W).
      train: the training pairs; their number of classes is that of the segmenter.
      mesh: the devices that predict.

    Attributes:
      shown: the pairs to look at.

    Raises:
      DataError: there is no evaluation split, or it holds a class that training does not know.
    """

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
        """The scores of :func:`segmentation_scores`; the counts are kept on the device while they fit int32."""
        options, place = self._config.evaluation, sharding.split(self._mesh)
        size = per_process(self._config, self._mesh)
        counted, total_CC, on_device = 0, self._zero.astype(np.int64), jnp.asarray(self._zero)
        indices = sample(len(self.shown), options.test_images, self._config.seed)
        for batch in lockstep(self._config, self.shown, indices, self._mesh):
            images = filled(batch["image"], size)
            mask = np.full(images.shape[:3], data.IGNORED, np.int16)
            mask[: len(batch["image"])] = batch.get("mask", 0)
            pixels = mask.size * distributed.processes()
            if counted + pixels > MOST_COUNTED:
                total_CC, on_device, counted = total_CC + np.asarray(on_device), jnp.asarray(self._zero), 0
            put = (jax.make_array_from_process_local_data(place, x) for x in (images, mask))
            on_device, counted = self._add(on_device, params, *put), counted + pixels
        return segmentation_scores(total_CC + np.asarray(on_device))

    def final_scores(self, params: dict, untrained: Callable[[], dict]) -> dict[str, Any]:
        """:meth:`scores`; what it compares with is a run of its own (``scratch``)."""
        return self.scores(params)
