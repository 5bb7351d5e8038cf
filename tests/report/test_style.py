"""The style of the axes in a report."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from crate_jax.report.style import tidy


@pytest.mark.parametrize(
    ("values", "scale", "turned", "expected"),
    [
        ((0.9981, 0.9995), "linear", False, 0.05),  # noise: the axis is widened around it
        ((0.9981, 0.9995), "linear", True, -0.05),
        ((0.1, 0.9), "linear", False, 0.88),  # Matplotlib's own: the values and 5 % at both ends
        ((1.0, 1.001), "log", False, 0.0011),
    ],
)
def test_little_differences_look_little(values, scale, turned, expected):
    ax = Figure().subplots()
    ax.plot(values)
    ax.set_yscale(scale)
    if turned:
        ax.invert_yaxis()
    tidy(ax, "error", grid="x")
    low, high = ax.get_ylim()
    assert high - low == pytest.approx(expected, rel=0.02)
    assert (low + high) / 2 == pytest.approx(sum(values) / 2, rel=1e-3)
    assert ax.get_title() == "error" and not ax.spines["top"].get_visible() and ax.spines["left"].get_visible()
