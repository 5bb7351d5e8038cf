"""Reads a grid of alignment curves: which corruption raises alignment at a width, by how much, and which never does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from crate_jax.analysis.alignment.closed_form import Curve
from crate_jax.analysis.alignment.grid import Setting
from crate_jax.errors import escaped, in_markdown


@dataclasses.dataclass(frozen=True)
class Answer:
    """The curves of one labelled data set, and the width at which they are read.

    Attributes:
      width: the width k of the user's encoder.
      clean: the curve without corruption.
      curves: one curve per setting.
      about: facts about the data: source, images, classes, image_size.
    """

    width: int
    clean: Curve
    curves: Mapping[Setting, Curve]
    about: Mapping[str, Any]

    @property
    def caution(self) -> str:
        """Why alignment says little about these labels; empty if there are enough images."""
        return caution(self.about["images"], 3 * math.prod(self.about["image_size"]))

    def gain(self, setting: Setting, width: int | None = None) -> float:
        """alignment(k) under the corruption minus alignment(k) without it; k is the encoder's width unless given."""
        k = (width or self.width) - 1
        return float(self.curves[setting].alignment_K[k] - self.clean.alignment_K[k])

    def error(self, setting: Setting) -> float:
        """The numerical error of a setting's gains: that of its curve plus that of the curve without corruption."""
        return self.curves[setting].error + self.clean.error

    def is_raised(self, setting: Setting) -> bool:
        """Whether the gain at the encoder's width is above its numerical error."""
        return self.gain(setting) > self.error(setting)

    def groups(self) -> dict[str, list[Setting]]:
        """The settings by family and patch size."""
        out: dict[str, list[Setting]] = {}
        for setting in self.curves:
            out.setdefault(setting.group, []).append(setting)
        return out

    def best(self, group: list[Setting]) -> Setting:
        """The setting of a group with the largest gain at the width."""
        return max(group, key=self.gain)

    def never(self) -> list[str]:
        """The groups in which no ratio raises alignment at the width, and Gaussian noise (corollary of Theorem 3)."""
        bad = [name for name, group in self.groups().items() if not any(map(self.is_raised, group))]
        return [*bad, "gaussian noise"]

    def share_raised(self, setting: Setting) -> float:
        """The share of the widths 1 .. K at which the setting raises alignment; 0 if it never does."""
        gain_K = self.curves[setting].alignment_K - self.clean.alignment_K
        return float(np.mean(gain_K > self.error(setting)))

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            **self.about,
            "width": self.width,
            "clean": np.round(self.clean.alignment_K, 6),
            "settings": [
                {
                    "corruption": s.family,
                    "patch": list(s.patch),
                    "ratio": s.ratio,
                    "alignment": float(curve.alignment_K[self.width - 1]),
                    "gain": self.gain(s),
                    "error": self.error(s),
                    "share_of_widths_raised": self.share_raised(s),
                    "curve": np.round(curve.alignment_K, 6),
                }
                for s, curve in self.curves.items()
            ],
            "best": {name: self.best(group).ratio for name, group in self.groups().items()},
            "never": self.never(),
        }

    def summary(self) -> str:
        """A short table: the best ratio of each group at the width, and the groups that never raise alignment."""
        share = 100 * self.clean.alignment_K[self.width - 1]
        head = f"alignment at width {self.width} of {self.about['images']} images without corruption: {share:.2f} %"
        rows = [
            (
                "corruption",
                "patch",
                "best ratio",
                "alignment",
                "gain",
                f"raised at this share of widths 1..{len(self.clean.alignment_K)}",
            )
        ]
        for group in sorted(self.groups().values(), key=lambda g: -self.gain(self.best(g))):
            s = self.best(group)
            rows.append((
                s.family, "x".join(map(str, s.patch)), f"{s.ratio:.3g}", f"{share + 100 * self.gain(s):.2f} %",
                _points(self.gain(s)), f"{self.share_raised(s):.0%}",
            ))  # fmt: skip
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, sizes, strict=True)).rstrip() for row in rows]
        if any(map(self.is_raised, self.curves)):
            verdict = f"never at this width: {', '.join(self.never())}"
        else:
            verdict = "no corruption of this grid raises alignment at this width by more than its numerical error"
        return "\n".join([head, *lines, verdict, *filter(None, [self.caution])])

    def markdown(self, command: str) -> str:
        """The whole grid as a page in Markdown; `command` is shown as the command that made it."""
        width = self.width
        shown = sorted({k for k in (32, 64, 128, 256, 512, 1024) if k <= len(self.clean.alignment_K)} | {width})
        first = "| corruption | patch | ratio | " + " | ".join(f"k = {k}" for k in shown) + " | error |"
        clean = " | ".join(f"{100 * self.clean.alignment_K[k - 1]:.2f}" for k in shown)
        rows = [f"| none | | | {clean} | |"]
        best = {self.best(group) for group in self.groups().values()}
        for s in self.curves:
            cells = []
            for k in shown:
                text = _points(self.gain(s, k))
                cells.append(f"**{text}**" if k == width and s in best else text)
            patch = "x".join(map(str, s.patch))
            rows.append(f"| {s.family} | {patch} | {s.ratio:.3g} | {' | '.join(cells)} | {100 * self.error(s):.3f} |")
        return "\n".join([
            f"# Alignment at width {width}: {in_markdown(self.about['data'])}, {self.about['images']} images, "
            f"{self.about['classes']} classes", "", f"    {escaped(command)}", "", "```", self.summary(), "```", "",
            "First row: alignment(k) in per cent without corruption, which is PCA. Others: what a corruption adds, in "
            "points. Ratio: for a mask, the removed share of the patches; for rop (random orthogonal projection), the "
            "kept share of the dimensions. Bold: the best ratio of each patch size at the encoder's width. Error: the "
            "numerical error in points, without sampling error.", "", first, "|" + "---|" * (len(shown) + 4), *rows, "",
        ])  # fmt: skip


def caution(images: int, numbers: int) -> str:
    """Why alignment says little about the labels of `images` images of so many numbers; empty if there are enough.

    >>> caution(4000, 3072), caution(120, 3072)[:67]
    ('', '120 images of 3072 numbers: a linear map can fit any labels exactly')
    """
    if images > numbers:
        return ""
    return (
        f"{images} images of {numbers} numbers: a linear map can fit any labels exactly, so alignment says little; use "
        "more images, or a smaller config.data.image_size"
    )


def _points(gain: float) -> str:
    """A gain (a share) as text in points.

    >>> _points(0.01234), _points(-1e-9)
    ('+1.23', '+0.00')
    """
    return f"{round(100 * gain, 2) + 0.0:+.2f}"  # + 0.0 turns -0.0 into 0.0
