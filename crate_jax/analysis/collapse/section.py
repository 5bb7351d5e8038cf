"""The report's section on collapse: do weights, hidden features and representations use all their dimensions?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from crate_jax.analysis.collapse import subject
from crate_jax.analysis.collapse.weights import weight_measures
from crate_jax.evals import spectra
from crate_jax.report import Figure, Section, Subject, Table

IMAGES = 4096
CLASSES, VIEWS = 1024, 10  # for LiDAR: images, and views of each
FLOOR = 1e-12  # an eigenvalue below this share of the largest is rounding, and would stretch the axes

FEATURE_COLUMNS = {
    "rankme": "RankMe",
    "effective_rank": "centred",
    "stable_rank": "stable rank",
    "numerical_rank": "numerical rank",
    "condition": "condition",
    "alpha_req": "alpha-ReQ",
    "off_diagonal": "off-diagonal",
    "mean_abs_correlation": "mean |cos|",
    "constant": "constant",
}
WEIGHT_COLUMNS = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "condition": "condition",
    "so": "SO",
    "srip": "SRIP",
}

Features = Mapping[str, Mapping[str, spectra.Measures]]  # run -> place -> measures
Weights = Mapping[str, Mapping[str, np.ndarray]]  # run -> kernel -> eigenvalues (L, n)


def section(subjects: Sequence[Subject], images: int = IMAGES, classes: int = CLASSES, views: int = VIEWS) -> Section:
    """Measures every run and shows their spectra side by side.

    Args:
      subjects: the runs.
      images: the number of each run's images that give spectra and ranks; 0: all.
      classes: the number of images for LiDAR; 0: no LiDAR.
      views: the number of views of each image for LiDAR, made by the training augmentation.

    Raises:
      ConfigError: a run's config.penalty selects a parameter that does not exist or is not a kernel.
      DataError: a run has no images.
      NonFiniteError: a feature is NaN or infinite.
    """
    features = {s.name: subject.measure(s, images) for s in subjects}
    weights = {s.name: subject.weights(s) for s in subjects}
    lidars = {s.name: subject.measure_lidar(s, classes, views) for s in subjects} if classes else {}
    figures = (
        Figure(
            "Eigenvalues of W W^T (the smaller Gram matrix), one line per layer, one colour per run. An orthonormal "
            "weight lies on the dotted line at 1; a steep end means that few directions pass through the weight.",
            weight_plot(weights),
        ),
        Figure(
            "Eigenvalues of the covariance of the pooled features after each block, divided by the largest; dark lines "
            "are early blocks. Where a line falls sooner, the features use fewer dimensions.",
            layer_plot(features),
        ),
        Figure(
            "Eigenvalues of the covariance of the representations, divided by the largest, for all runs. Dotted: the "
            "power law of alpha-ReQ, over the ranks on which it was fitted.",
            representation_plot(features),
        ),
    )
    return Section(
        title="Do the features collapse?",
        text=_text(features, lidars),
        figures=figures,
        tables=(_feature_table(features, lidars), _weight_table(weights)),
        numbers=_numbers(features, weights, lidars),
    )


def _text(features: Features, lidars: Mapping[str, Mapping[str, spectra.Lidar]]) -> str:
    rows = sorted({m.rows for run in features.values() for m in run.values()})
    warnings = list(
        dict.fromkeys(
            f"{run}, {place}: {text}."
            for results in (features, lidars)
            for run, found in results.items()
            for place, measured in found.items()
            for text in measured.warnings
        )
    )
    return " ".join(
        [
            "Features have collapsed when a few directions hold nearly all their variance (arXiv 2411.00392).",
            f"Measured on pooled features of {' or '.join(map(str, rows))} images without corruption, after each block",
            "and for the representation. RankMe (arXiv 2210.02885) is the exponential of the entropy of the features'",
            "singular values, from 1 to the width. alpha-ReQ is the exponent at which the covariance's eigenvalues",
            "fall; it is high for collapsed features. LiDAR (arXiv 2312.04000) is the rank of the differences between",
            "images, relative to the differences between views of one image; views are drawn as the run's training draws",
            "them: under joint embedding by config.views (crop, flip, colours, grey, blur, solarisation), otherwise crops",
            "and flips by config.data. Off-diagonal is the share of the",
            "covariance's squared mass that lies off its diagonal.",
            *(["LIMITED:", *warnings] if warnings else []),
        ]
    )


def _feature_table(features: Features, lidars: Mapping[str, Mapping[str, spectra.Lidar]]) -> Table:
    lidar = ("LiDAR",) if lidars else ()
    rows = [
        (
            run,
            place,
            m.width,
            *(getattr(m, key) for key in FEATURE_COLUMNS),
            *((lidars[run][place].value,) if lidars else ()),
            "yes" if m.rank_limited else "no",
        )
        for run, found in features.items()
        for place, m in found.items()
    ]
    ranges = sorted({m.alpha_range for found in features.values() for m in found.values()})
    fitted = " or ".join(f"{first} to {last}" for first, last in ranges)
    return Table(
        f"Pooled features by run and place. alpha-ReQ is fitted on the ranks {fitted}. There is no condition number "
        "where the numerical rank is below the width. Rank-limited: there are not more images than features, so the "
        "number of images bounds the ranks.",
        ("run", "place", "width", *FEATURE_COLUMNS.values(), *lidar, "rank-limited"),
        tuple(rows),
    )


def _weight_table(weights: Weights) -> Table:
    rows = []
    for run, kernels in weights.items():
        for name, eigenvalues_Ln in kernels.items():
            for layer, values_n in enumerate(eigenvalues_Ln):
                found = weight_measures(values_n)
                place = layer + 1 if len(eigenvalues_Ln) > 1 else None
                rows.append((run, _short(name), place, len(values_n), *(found[key] for key in WEIGHT_COLUMNS)))
    return Table(
        "Weights that the config's penalty selects, whether the run penalised them or not. SO is ||G - I||_F^2 and "
        "SRIP is sigma_max(G - I), where G is the smaller Gram matrix.",
        ("run", "weight", "layer", "singular values", *WEIGHT_COLUMNS.values()),
        tuple(rows),
    )


def _numbers(features: Features, weights: Weights, lidars: Mapping[str, Mapping[str, spectra.Lidar]]) -> dict[str, Any]:
    return {
        run: {
            "features": {place: m.to_dict() for place, m in features[run].items()},
            "lidar": {
                place: {"value": x.value, "classes": x.classes, "views": x.views, "warnings": list(x.warnings)}
                for place, x in lidars.get(run, {}).items()
            },
            "weights": {
                name: [{**weight_measures(v), "eigenvalues": v.tolist()} for v in eigenvalues_Ln]
                for name, eigenvalues_Ln in weights[run].items()
            },
        }
        for run in features
    }


def _colours(runs: Sequence[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab10"]
    return {run: palette(i % 10) for i, run in enumerate(runs)}


def _line(ax: Axes, values: np.ndarray, **style: Any) -> None:
    """Draws a spectrum without the eigenvalues that are zero up to rounding."""
    shown = values[values > FLOOR * values[0]] if values[0] > 0 else values[:0]
    ax.plot(np.arange(1, len(shown) + 1), shown, **style)


def _log_log(ax: Axes, title: str) -> None:
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("rank", fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.tick_params(which="both", labelsize=7)


def _grid(count: int, shared: bool = False) -> tuple[Plot, list[Axes]]:
    columns = min(3, count)
    rows = -(-count // columns)
    plot = Plot(figsize=(3.2 * columns, 2.7 * rows + 0.4), layout="constrained")
    axes = list(plot.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.tick_params(labelbottom=True)  # also above a place that is empty
    return plot, axes[:count]


def _short(kernel: str) -> str:
    return kernel.removeprefix("encoder/").removesuffix("/kernel")


def weight_plot(weights: Weights) -> Plot:
    """Log-log spectra of weights: one panel per kernel, one colour per run, one line per layer."""
    kernels = list(dict.fromkeys(name for found in weights.values() for name in found))
    colours = _colours(list(weights))
    plot, axes = _grid(len(kernels))
    for ax, name in zip(axes, kernels, strict=True):
        for run, found in weights.items():
            for layer, values in enumerate(found.get(name, ())):
                _line(ax, values, color=colours[run], lw=1, alpha=0.8, label=run if layer == 0 else None)
        ax.axhline(1.0, color="grey", lw=1, ls=":")
        _log_log(ax, _short(name))
        ax.set_ylabel("eigenvalue", fontsize=8)
    axes[0].legend(fontsize=7)
    return plot


def layer_plot(features: Features) -> Plot:
    """Log-log spectra of hidden features: one panel per run, one line per block."""
    plot, axes = _grid(len(features), shared=True)  # so that runs can be compared by eye
    for ax, (run, found) in zip(axes, features.items(), strict=True):
        blocks = [(place, m) for place, m in found.items() if place != "representation"]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.85, len(blocks)))  # visible on black and on white
        for (place, m), shade in zip(blocks, shades, strict=True):
            _line(ax, _normalised(m.eigenvalues), color=shade, lw=1.2, label=place)
        _log_log(ax, run)
        ax.set_ylabel("eigenvalue / largest", fontsize=8)
    axes[0].legend(fontsize=7)
    return plot


def representation_plot(features: Features) -> Plot:
    """Log-log spectra of the representations of all runs in one panel, with the fitted power laws."""
    plot = Plot(figsize=(5.0, 3.8), layout="constrained")
    ax = plot.subplots()
    for run, colour in _colours(list(features)).items():
        m = features[run]["representation"]
        values = _normalised(m.eigenvalues)
        _line(ax, values, color=colour, lw=1.4, label=f"{run}: RankMe {m.rankme:.1f} of {m.width}")
        if m.alpha_req is not None:
            first, last = m.alpha_range
            rank = np.arange(first, last + 1)
            weight = 1 / rank / np.sum(1 / rank)
            height = np.sum(weight * (np.log(values[first - 1 : last]) + m.alpha_req * np.log(rank)))
            ax.plot(rank, np.exp(height) * rank**-m.alpha_req, color=colour, lw=1, ls=":")
    _log_log(ax, "representation")
    ax.set_ylabel("eigenvalue / largest", fontsize=8)
    ax.legend(fontsize=7)
    return plot


def _normalised(eigenvalues: np.ndarray) -> np.ndarray:
    return eigenvalues / eigenvalues[0] if eigenvalues[0] > 0 else eigenvalues
