"""Figures of alignment, made with Matplotlib's object interface."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from crate_jax.analysis.alignment.answer import Answer
from crate_jax.report.style import tidy


def curves(answer: Answer) -> Figure:
    """alignment(k) without corruption and under the best ratio of each group; below them, the gain by corruption."""
    picture = Figure(figsize=(6.4, 6.4), layout="constrained")
    top, bottom = picture.subplots(2, 1, sharex=True)
    k = np.arange(1, len(answer.clean.alignment_K) + 1)
    top.plot(k, 100 * answer.clean.alignment_K, color="black", label="none (PCA)")
    for name, group in answer.groups().items():
        setting = answer.best(group)
        curve = answer.curves[setting].alignment_K
        line = top.plot(k, 100 * curve, label=f"{name}, ratio {setting.ratio:.3g}")[0]
        bottom.plot(k, 100 * (curve - answer.clean.alignment_K), color=line.get_color())
    bottom.axhline(0, color="black", linewidth=1)
    for ax in (top, bottom):
        ax.axvline(answer.width, color="gray", linestyle=":", linewidth=1)
        ax.set_xscale("log")
    tidy(top, "alignment (%)", grid="both")
    top.legend(frameon=False, fontsize=8)
    tidy(bottom, "gain (points)", grid="both")
    bottom.set_xlabel(f"latents k (dotted: {answer.width})")
    return picture


def gain_by_ratio(answer: Answer) -> Figure:
    """The gain at the encoder's width against the ratio, one line per corruption and patch size."""
    picture = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = picture.subplots()
    for name, group in answer.groups().items():
        group = sorted(group, key=lambda s: s.ratio)
        error = [100 * answer.error(s) for s in group]
        ax.errorbar([s.ratio for s in group], [100 * answer.gain(s) for s in group], error, fmt="o-", ms=3, label=name)
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xlabel("ratio: removed (mask), kept (rop)")
    ax.legend(frameon=False, fontsize=8)
    tidy(ax, f"gain at k = {answer.width} (points)", grid="both")
    return picture


def gain_by_width(answer: Answer) -> Figure:
    """The paper's Figure 7: gain against k, one panel per corruption and patch size, one line per ratio."""
    groups = answer.groups()
    picture = Figure(figsize=(6.4, 1.2 + 1.8 * len(groups)), layout="constrained")
    panels = picture.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    k = np.arange(1, len(answer.clean.alignment_K) + 1)
    for ax, (name, group) in zip(panels, groups.items(), strict=True):
        for setting in group:
            change = 100 * (answer.curves[setting].alignment_K - answer.clean.alignment_K)
            ax.plot(k, change, color=colormaps["viridis"](setting.ratio), linewidth=1, label=f"{setting.ratio:.2g}")
        ax.axhline(0, color="black", linewidth=1)
        ax.set_xscale("log")
        ax.legend(frameon=False, fontsize=6, ncols=5)
        tidy(ax, f"{name}: gain (points)", grid="both")
    panels[-1].set_xlabel("latents k")
    return picture
