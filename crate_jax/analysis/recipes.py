"""Runs that differ only in their seed, taken together: means, intervals, and which recipes differ clearly."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot

from crate_jax.analysis import logged, records
from crate_jax.evals import seeds
from crate_jax.report.section import Cell, Estimate, Figure, Section, Subject, Table
from crate_jax.report.style import tidy
from crate_jax.report.svg import escape

SCORES = {name: shown for name, shown in records.COLUMNS.items() if name not in ("top5", "pixel_accuracy")}
Recipes = dict[str, list[Subject]]  # name of a recipe -> its runs


def section(subjects: Sequence[Subject]) -> Section | None:
    """The section about recipes; None if no recipe was run with two seeds or more.

    Raises:
      DataError: a record of a run is damaged.
    """
    recipes = group(subjects)
    if not any(len({s.config.seed for s in runs}) > 1 for runs in recipes.values()):
        return None
    summaries = {s.name: records.read(s.workdir).summary for s in subjects}
    numbers = {score: {name: _numbers(runs, summaries, score) for name, runs in recipes.items()} for score in SCORES}
    found = {score: by for score, by in numbers.items() if any(by.values())}
    tables = tuple(table for table in (_means(found), _differences(found)) if table)
    first = next(iter(recipes))
    seeds_of = {name: collections.Counter(s.config.seed for s in runs) for name, runs in recipes.items()}
    twice = [f"{name} (seed {seed})" for name, of in seeds_of.items() for seed, n in of.items() if n > 1]
    repeated = f" Runs with the same seed count as one, their mean: {'; '.join(twice)}." if twice else ""
    return Section(
        title="Recipes over seeds",
        text="Runs that differ only in their seed are one recipe. ± is half of the 95 % interval of the mean over "
        "seeds (Student's t). A mean is bold if it differs clearly from that of every other recipe: paired t-tests "
        "over the seeds that both have, p < 0.05 after Holm's correction. The second table compares each recipe with "
        f"the first one, {first}; a difference within the noise may come from the seeds alone." + repeated,
        figures=tuple(_figure(score, of) for score, of in found.items()),
        tables=tables,
        leading=len(tables),
        numbers={
            score: {name: {str(s): x for s, x in of.items()} for name, of in by.items()} for score, by in found.items()
        },
    )


def group(subjects: Sequence[Subject]) -> Recipes:
    """The runs of each recipe, which has the name of its settings that other recipes do not share.

    Two runs have the same recipe if all keys are equal that both read and that their numbers depend on, but the seed.
    """
    flat = [logged.settings(s) for s in subjects]
    keys = sorted({key for f in flat for key in f})
    differing = [k for k in keys if len({repr(f.get(k)) for f in flat}) > 1]
    out: Recipes = {}
    for subject, f in zip(subjects, flat, strict=True):
        name = ", ".join(f"{k}={logged.shown(f[k])}" for k in differing if k in f)
        out.setdefault(name or "all runs", []).append(subject)
    return out


def _numbers(runs: Sequence[Subject], summaries: Mapping[str, Mapping[str, Any]], score: str) -> dict[int, float]:
    """{seed: accuracy in 0..1} of a recipe's runs, the mean of those that have one seed."""
    found: dict[int, list[float]] = {}
    for s in runs:
        if (x := summaries[s.name].get(score)) is not None:
            found.setdefault(s.config.seed, []).append(float(x))
    return {seed: statistics.fmean(x) for seed, x in found.items()}


def _means(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Table | None:
    names = list(dict.fromkeys(name for by in found.values() for name in by))
    best = {score: seeds.best([by[name] for name in names]) for score, by in found.items()}
    rows = []
    for i, name in enumerate(names):
        row: list[Cell] = [name, max(len(by[name]) for by in found.values())]
        for score, by in found.items():
            mean = seeds.mean(list(by[name].values()))
            row += [None, None] if mean is None else [_estimate(mean, best[score] == i), 100 * mean.std or None]
        rows.append(tuple(row))
    columns = [column for score in found for column in (SCORES[score], f"deviation of {SCORES[score]}")]
    caption = "Each recipe's mean over its seeds, and the standard deviation of single runs."
    return Table(caption, ("recipe", "seeds", *columns), tuple(rows)) if rows else None


def _estimate(mean: seeds.Mean, best: bool) -> Estimate | float:
    if not mean.std:  # one seed, or no spread that an interval could follow from
        return 100 * mean.value
    return Estimate(100 * mean.value, 100 * mean.low, 100 * mean.high, best)


def _differences(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Table | None:
    names = list(dict.fromkeys(name for by in found.values() for name in by))
    rows: list[tuple[Cell, ...]] = []
    for score, by in found.items():
        compared = seeds.compare([by[name] for name in names], 0)
        for name, d in zip(names[1:], compared[1:], strict=True):
            if d is not None:
                row = (name, SCORES[score], d.seeds)
                if np.isnan(d.p):
                    rows.append((*row, 100 * d.value, None, "not tested: it is the same for each seed"))
                    continue
                estimate = Estimate(100 * d.value, 100 * d.low, 100 * d.high)
                rows.append((*row, estimate, d.p, "clear" if d.clear else "within the noise"))
    if not rows:
        return None
    columns = ("recipe", "score", "seeds", "difference in points", "p", "verdict")
    return Table(f"Differences from the first recipe, {names[0]}, seed by seed.", columns, tuple(rows))


def _figure(score: str, by: Mapping[str, Mapping[int, float]]) -> Figure:
    """One row for each recipe: every seed, their mean and its interval."""
    plot = Plot(figsize=(6.4, 1.3 + 0.36 * len(by)), layout="constrained")
    ax = plot.subplots()
    for y, of in enumerate(by.values()):
        mean = seeds.mean(list(of.values()))
        if mean is None:
            continue
        ax.plot([100 * x for x in of.values()], [y] * len(of), "|", color=f"C{y}", markersize=11)
        ax.plot(100 * mean.value, y, "o", color=f"C{y}")
        if mean.std:
            ax.plot([100 * mean.low, 100 * mean.high], [y, y], "-", color=f"C{y}", alpha=0.4, linewidth=3)
    ax.set_yticks(range(len(by)), [escape(name) for name in by])
    ax.set_ylim(len(by) - 0.5, -0.5)
    ax.margins(x=0.08)
    tidy(ax, SCORES[score], grid="x")
    return Figure("A stroke is one seed, the point their mean, the bar the 95 % interval of the mean.", plot)
