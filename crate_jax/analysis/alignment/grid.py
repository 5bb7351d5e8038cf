"""Alignment over a grid of corruptions, patch sizes and ratios."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from crate_jax.analysis.alignment import corrupted
from crate_jax.analysis.alignment.closed_form import Aligner, Curve
from crate_jax.models import corruption

log = logging.getLogger(__name__)

FAMILIES = {"mask": "masking", "rop": "random orthogonal projection"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One corruption of the grid.

    Attributes:
      family: a key of FAMILIES.
      patch: (height, width) in pixels of a patch, the unit that is masked or projected.
      ratio: the removed share of the patches (mask), or the kept share of the dimensions, K'/N (rop).
      buckets: "balanced" or "independent"; rop only.
      scale: the factor of a bucket's sum; 0: the exact projector; rop only.
    """

    family: str
    patch: tuple[int, int]
    ratio: float
    buckets: str = "balanced"
    scale: float = 0.0

    @property
    def group(self) -> str:
        """The name of the group of settings that differ in their ratio only.

        >>> Setting("mask", (4, 2), 0.75).group
        'mask 4x2'
        """
        return f"{self.family} {'x'.join(map(str, self.patch))}"

    def second_moments(self, second_DD: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """G = E[X' X'^T], scaled as in :mod:`.corrupted`, from X X^T (D, D) of images of (height, width)."""
        patch_D = corrupted.patch_of_number(image_size, self.patch)
        if self.family == "mask":
            return corrupted.masking(second_DD, patch_D, self.ratio)
        tokens = int(patch_D[-1]) + 1
        buckets = corruption.bucket_count(tokens, self.ratio)
        return corrupted.projection(second_DD, patch_D, corrupted.mixing(tokens, buckets, self.buckets, self.scale))


def shapes(config: ConfigDict) -> list[tuple[int, int]]:
    """(height, width) of every entry of `config.align.patch_sizes`; a single number is the side of a square."""
    return [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in config.align.patch_sizes]


def settings(config: ConfigDict) -> list[Setting]:
    """The grid of `config.align`: masks of each patch size and ratio, and projections of the encoder's patches."""
    align, side = config.align, config.encoder.patch_size
    masks = [Setting("mask", patch, r) for patch in shapes(config) for r in align.mask_ratios]
    options = (config.corruption.rop_buckets, config.corruption.paper_scale)
    return masks + [Setting("rop", (side, side), r, *options) for r in align.rop_ratios]


def evaluate(aligner: Aligner, grid: Sequence[Setting], image_size: tuple[int, int]) -> dict[Setting, Curve]:
    """The curve alignment(1) .. alignment(K) of every setting, for images of (height, width)."""
    curves = {}
    for i, setting in enumerate(grid):
        start = time.perf_counter()
        curves[setting] = aligner.curve(setting.second_moments(aligner.moments.second_DD, image_size))
        seconds = time.perf_counter() - start
        log.info("%d of %d: %s, ratio %.3g (%.1f s)", i + 1, len(grid), setting.group, setting.ratio, seconds)
    return curves
