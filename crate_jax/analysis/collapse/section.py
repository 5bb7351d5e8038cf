"""The report's section on collapse: do weights, hidden features and representations use all their dimensions?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import LogLocator, NullFormatter

from crate_jax.analysis.collapse import subject
from crate_jax.analysis.collapse.weights import weight_measures
from crate_jax.evals import spectra
from crate_jax.evals.lidar import Lidar
from crate_jax.report import Figure, Section, Subject, Table
from crate_jax.report.section import short_names
from crate_jax.report.svg import escape, legend

IMAGES = 4096
CLASSES, VIEWS = 1024, 10  # for LiDAR: images, and views of each
COLUMNS, MAX_COLUMNS = 4, 5  # panels beside each other
MAX_LAYERS = 6  # blocks of a transformer whose weights are drawn
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
    names = short_names(subjects)
    figures = (
        Figure(
            "Eigenvalues of W W^T (the smaller Gram matrix) of each weight, one colour per run. An orthonormal weight "
            "lies on the dotted line at 1; a steep end means that few directions pass through the weight. Of more than "
            f"{MAX_LAYERS} equal blocks {MAX_LAYERS} are drawn; the table has all.",
            weight_plot(weights, names),
        ),
        Figure(
            "Eigenvalues of the covariance of the pooled features, divided by the largest, one colour per run: of what "
            "enters the first block (input), after each block, and of the representation. Where a line falls sooner, "
            "the features use fewer dimensions.",
            feature_plot(features, names),
        ),
        Figure(
            "Eigenvalues of the covariance of the representations, divided by the largest, for all runs. Dotted: the "
            "power law of alpha-ReQ, over the ranks on which it was fitted.",
            representation_plot(features, names),
        ),
    )
    return Section(
        title="Do the features collapse?",
        text=_text(features, lidars),
        figures=figures,
        tables=(_feature_table(features, lidars), _weight_table(weights)),
        numbers=_numbers(features, weights, lidars),
    )


def _text(features: Features, lidars: Mapping[str, Mapping[str, Lidar]]) -> str:
    rows = sorted({m.rows for run in features.values() for m in run.values()})
    places: dict[str, dict[str, list[str]]] = {}  # warning -> run -> places
    for results in (features, lidars):
        for run, found in results.items():
            for place, measured in found.items():
                for text in measured.warnings:
                    places.setdefault(text, {}).setdefault(run, []).append(place)
    warnings = [
        f"{'; '.join(_of_run(run, at, features[run]) for run, at in runs.items())}: {text}."
        for text, runs in places.items()
    ]
    used = [
        f"{run}: the representation uses {found['representation'].rankme:.3g} of {found['representation'].width} "
        "dimensions (RankMe)."
        for run, found in features.items()
    ]
    return " ".join(
        [
            "Features have collapsed when a few directions hold nearly all their variance (arXiv 2411.00392).",
            f"Measured on pooled features of {' or '.join(map(str, rows))} images without corruption: of what",
            "enters the first block (input), after each block, and of the representation. RankMe (arXiv 2210.02885) is",
            "the exponential of the entropy of the features' singular values, from 1 to the width. alpha-ReQ is the",
            "exponent at which the covariance's eigenvalues fall; it is high for collapsed features. LiDAR (arXiv",
            "2312.04000) is the rank of the differences between images, relative to the differences between views of",
            "one image. Views are drawn as in training: under joint embedding by config.views (crop, flip, colours,",
            "grey, blur, solarisation), otherwise by config.data (crop, flip, RandAugment). Off-diagonal is the share",
            "of the covariance's squared mass that lies off its diagonal.",
            *used,
            *(["LIMITED:", *warnings] if warnings else []),
        ]
    )


def _of_run(run: str, places: Sequence[str], known: Mapping[str, Any]) -> str:
    """The run and the places that a warning is about; all of them: the run alone.

    >>> _of_run("a", ["input"], {"input": 1, "block 1": 2}), _of_run("a", ["input"], {"input": 1})
    ('a (input)', 'a')
    """
    return run if set(places) == set(known) else f"{run} ({', '.join(places)})"


def _feature_table(features: Features, lidars: Mapping[str, Mapping[str, Lidar]]) -> Table:
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


def _numbers(features: Features, weights: Weights, lidars: Mapping[str, Mapping[str, Lidar]]) -> dict[str, Any]:
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


def _colours(runs: Sequence[str]) -> dict[str, str]:
    return {run: f"C{i % 10}" for i, run in enumerate(runs)}


def _line(ax: Axes, values: np.ndarray, **style: Any) -> None:
    """Draws a spectrum without the eigenvalues that are zero up to rounding."""
    shown = values[values > FLOOR * values[0]] if values[0] > 0 else values[:0]
    ax.plot(np.arange(1, len(shown) + 1), shown, **style)


def _log_log(ax: Axes, title: str) -> None:
    ax.set(xscale="log", yscale="log")
    ax.set_title(title, fontsize=7.5, pad=3)
    ax.tick_params(which="both", labelsize=7, pad=2)
    ax.spines[["top", "right"]].set_visible(False)


def _grid(titles: Sequence[str], columns: int, shared: bool = False) -> tuple[Plot, list[Axes]]:
    """A figure with a small panel for each title; an empty title leaves its place empty."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    plot = Plot(figsize=(max(2.1 * columns, 3.2), 1.6 * rows + 0.55), layout="constrained")
    axes = list(plot.subplots(rows, columns, squeeze=False, sharey=shared).flat)
    for ax, title in zip(axes, titles, strict=False):
        _log_log(ax, title)
        ax.tick_params(labelleft=True)
    for ax in [ax for ax, title in zip(axes, titles, strict=False) if not title] + axes[len(titles) :]:
        ax.remove()
    return plot, [ax for ax, title in zip(axes, titles, strict=False) if title]


def _ticks(ax: Axes) -> None:
    """Numbers such as 0.5, which need less room than 5 x 10^-1; powers of ten only, where an axis is long."""
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,), numticks=6))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _finish(plot: Plot, names: Mapping[str, str]) -> None:
    for ax in plot.axes:
        _ticks(ax)
    legend(plot, names, "outside upper left")


def _short(kernel: str) -> str:
    return kernel.removeprefix("encoder/").removesuffix("/kernel").replace("blocks/", "")


def _drawn_layers(count: int) -> list[int]:
    """The layers of a stack that are drawn: all, or MAX_LAYERS from the first to the last.

    >>> _drawn_layers(3), _drawn_layers(12)
    ([0, 1, 2], [0, 2, 4, 7, 9, 11])
    """
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_LAYERS))})


def weight_plot(weights: Weights, names: Mapping[str, str]) -> Plot:
    """Log-log spectra of weights: one panel per kernel and layer, one colour per run.

    Args:
      weights: see :func:`subject.weights`.
      names: the runs' names for the legend (:func:`short_names`).
    """
    counts: dict[str, int] = {}
    for found in weights.values():
        for kernel, values in found.items():
            counts[kernel] = max(counts.get(kernel, 0), len(values))
    stacks = [kernel for kernel, count in counts.items() if count > 1]
    singles = sorted((k for k in counts if k not in stacks), key=lambda k: _short(k).startswith("stage"))
    columns = len(stacks) if 1 < len(stacks) <= MAX_COLUMNS else COLUMNS
    panels: list[tuple[str, int, str]] = [(kernel, 0, _short(kernel)) for kernel in singles]
    if stacks:
        panels += [("", 0, "")] * (-len(panels) % columns)  # each layer begins a row
    for layer in range(max((counts[kernel] for kernel in stacks), default=0)):
        for kernel in stacks:
            if layer in _drawn_layers(counts[kernel]):
                panels.append((kernel, layer, f"block {layer + 1}: {_short(kernel)}"))
    plot, axes = _grid([title for *_, title in panels], columns)
    colours = _colours(list(weights))
    for ax, (kernel, layer, _) in zip(axes, [panel for panel in panels if panel[0]], strict=True):
        for run, found in weights.items():
            if layer < len(found.get(kernel, ())):
                _line(ax, found[kernel][layer], color=colours[run], lw=1.1, label=escape(run))
        ax.axhline(1.0, color="grey", lw=0.8, ls=":")
    plot.supylabel("eigenvalue", fontsize=8)
    plot.supxlabel("rank", fontsize=8)
    _finish(plot, names)
    return plot


def feature_plot(features: Features, names: Mapping[str, str]) -> Plot:
    """Log-log spectra of features: one panel per place, one colour per run; the panels share the vertical axis.

    Args:
      features: see :func:`subject.measure`.
      names: the runs' names for the legend (:func:`short_names`).
    """
    found = list(dict.fromkeys(place for of_run in features.values() for place in of_run))
    found.sort(key=lambda place: place == "representation")  # runs may have different numbers of layers
    plot, axes = _grid(found, COLUMNS if len(found) % 3 or len(found) > 9 else 3, shared=True)
    colours = _colours(list(features))
    for ax, place in zip(axes, found, strict=True):
        for run, of_run in features.items():
            if place in of_run:
                values = _normalised(of_run[place].eigenvalues)
                _line(ax, values, color=colours[run], lw=1.1, label=escape(run))
    plot.supylabel("eigenvalue / largest", fontsize=8)
    plot.supxlabel("rank", fontsize=8)
    _finish(plot, names)
    return plot


def representation_plot(features: Features, names: Mapping[str, str]) -> Plot:
    """Log-log spectra of the representations of all runs in one panel, with the fitted power laws.

    Args:
      features: see :func:`subject.measure`.
      names: the runs' names for the legend (:func:`short_names`).
    """
    plot = Plot(figsize=(4.6, 3.4), layout="constrained")
    ax = plot.subplots()
    for run, colour in _colours(list(features)).items():
        m = features[run]["representation"]
        values = _normalised(m.eigenvalues)
        _line(ax, values, color=colour, lw=1.4, label=escape(run))
        if m.alpha_req is not None:
            first, last = m.alpha_range
            rank = np.arange(first, last + 1)
            weight = 1 / rank / np.sum(1 / rank)
            height = np.sum(weight * (np.log(values[first - 1 : last]) + m.alpha_req * np.log(rank)))
            fit = np.exp(height) * rank**-m.alpha_req
            ax.plot(rank, fit, color=colour, lw=1, ls=":", label=escape(run))
    _log_log(ax, "representation")
    ax.set_ylabel("eigenvalue / largest", fontsize=8)
    ax.set_xlabel("rank", fontsize=8)
    ranks = {run: features[run]["representation"] for run in features}
    _finish(plot, {run: f"{names[run]}: RankMe {m.rankme:.1f} of {m.width}" for run, m in ranks.items()})
    return plot


def _normalised(eigenvalues: np.ndarray) -> np.ndarray:
    return eigenvalues / eigenvalues[0] if eigenvalues[0] > 0 else eigenvalues
