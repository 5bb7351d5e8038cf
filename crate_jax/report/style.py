"""The one style of the axes in a report's figures."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes

LEAST_SPAN = 0.05  # of a linear axis, as a share of its largest value


def tidy(ax: Axes, title: str = "", grid: Literal["x", "y", "both"] = "y") -> None:
    """Gives axes the report's style: a title in place of a label, no frame at the top and right, a thin grid.

    Call it when everything is drawn. A linear vertical axis is widened to LEAST_SPAN of its largest value, so that a
    difference that means little looks small.

    Args:
      ax: the axes.
      title: what the axis of the values shows, with its unit.
      grid: the axes with grid lines: "x", "y" or "both".
    """
    if title:
        ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis=grid, alpha=0.3)
    low, high = ax.get_ylim()
    lack = LEAST_SPAN * max(abs(low), abs(high)) - abs(high - low)
    if ax.get_yscale() == "linear" and lack > 0:
        down = -1 if high < low else 1  # an axis may be turned around
        ax.set_ylim(low - down * lack / 2, high + down * lack / 2)
