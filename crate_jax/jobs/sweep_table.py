"""The results of a sweep for people: ``sweep.json``, ``sweep.csv``, ``table.md``, ``sweep.png`` and ``sweep.svg``."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crate_jax.config import is_read
from crate_jax.errors import escaped, in_markdown
from crate_jax.evals import seeds
from crate_jax.evals.metrics import COMPARED, FROZEN, RANKS
from crate_jax.parallel import distributed
from crate_jax.report.style import tidy
from crate_jax.workdir import metrics

Record = Mapping[str, Any]

RECONSTRUCTION = "reconstruction"  # the loss without a penalty and without the guide
JUDGE = "judge "  # begins the names of accuracies by config.sweep.judge
RANKS_TEXT = "RankMe and LiDAR say how many dimensions the features use; more is not better by itself."
NUMBERS = ("loss", *(name + suffix for name in (*FROZEN, *RANKS) for suffix in COMPARED))
LOG_SPAN = 20  # the axis is logarithmic if the largest value / the smallest value is above this


def label(value: Any) -> str:
    """A value as text for people and for names of folders: four digits, hyphens between a tuple's items.

    >>> label(0.123456), label((32, 32)), label(True)
    ('0.1235', '32-32', 'True')
    """
    if isinstance(value, tuple | list):
        return "-".join(map(label, value))
    return metrics.format_number(value) if isinstance(value, float) else str(value)


def write(folder: Path, config: ConfigDict, records: Sequence[Record], total: int) -> str:
    """Writes all files anew; returns the table's text.

    Args:
      folder: the sweep's workdir.
      config: the sweep's config.
      records: for each finished or failed run its value, seed, folder, status, and summary or error.
      total: the number of runs of the whole sweep.
    """
    command = shlex.join(["python", *sys.orig_argv[1:]])
    text = table(config.sweep.key, records, total, command)
    if distributed.first():
        metrics.write_json(folder / "sweep.json", list(records))
        metrics.write_text(folder / "sweep.csv", _csv(records))
        metrics.write_text(folder / "table.md", text)
        if any(r["status"] == "done" for r in records):
            metrics.write_figure(folder / "sweep", figure(config, records))
    return text


def _csv(records: Sequence[Record]) -> str:
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: escaped(cell) if isinstance(cell, str) else cell for name, cell in record.items()})
    return out.getvalue()


def groups(records: Sequence[Record]) -> list[tuple[Any, list[Record], int]]:
    """For each value (value, its finished runs, the number of its failed runs), in the order of the sweep."""
    out: list[tuple[Any, list[Record], int]] = []
    for value in dict.fromkeys(label(r["value"]) for r in records):
        same = [r for r in records if label(r["value"]) == value]
        done = [r for r in same if r["status"] == "done"]
        out.append((same[0]["value"], done, len(same) - len(done)))
    return out


def judged(records: Sequence[Record]) -> dict[str, str]:
    """{column: judge} of all accuracies by config.sweep.judge.

    >>> judged([{"loss": 1.0, "judge knn@digits": 0.5}])
    {'judge knn@digits': 'knn@digits'}
    """
    return {name: name.removeprefix(JUDGE) for record in records for name in record if name.startswith(JUDGE)}


def per_seed(runs: Sequence[Record], name: str) -> dict[int, float]:
    """{seed: number} of the runs that have the number.

    >>> per_seed([{"seed": 0, "loss": 1.0}, {"seed": 7, "loss": 3.0}, {"seed": 8, "loss": None}], "loss")
    {0: 1.0, 7: 3.0}
    """
    return {r["seed"]: r[name] for r in runs if r.get(name) is not None}


def _mean(runs: Sequence[Record], name: str) -> seeds.Mean | None:
    return seeds.mean(list(per_seed(runs, name).values()))


def table(key: str, records: Sequence[Record], total: int, command: str) -> str:
    """The Markdown page: the swept key, the command, and one row per value."""
    rows = groups(records)
    columns = {"loss": "loss"}
    if any(r.get(RECONSTRUCTION, r.get("loss")) != r.get("loss") for r in records):
        columns[RECONSTRUCTION] = RECONSTRUCTION
    for suffix in COMPARED:
        columns |= {score + suffix: f"{suffix[1:]} {shown} %".strip() for score, shown in FROZEN.items()}
    columns |= {name: f"{shown} %" for name, shown in judged(records).items()}
    for suffix in ("", "_untrained"):
        columns |= {rank + suffix: f"{suffix[1:]} {shown}".strip() for rank, shown in RANKS.items()}
    columns = {c: shown for c, shown in columns.items() if any(_mean(done, c) for _, done, _ in rows)}
    scores = {c: columns[c] for c in (*FROZEN, *judged(records)) if c in columns}
    best = {c: seeds.best([per_seed(done, c) for _, done, _ in rows]) for c in scores}
    cells = [[key, "seeds", *columns.values()]]
    for i, (value, done, failed) in enumerate(rows):
        cells.append([in_markdown(label(value)), f"{len(done)} + {failed} failed" if failed else str(len(done))])
        for column in columns:
            text = _entry(_mean(done, column), column.startswith((*FROZEN, JUDGE)), column in scores)
            cells[-1].append(f"**{text}**" if best.get(column) == i else text)
    done_count = sum(r["status"] == "done" for r in records)
    failed_runs = [(escaped(r["folder"]).replace("`", "'"), r["error"]) for r in records if r["status"] == "failed"]
    failures = [f"* `{name}` failed: {in_markdown(error)}" for name, error in failed_runs]
    lines = [
        f"# Sweep of `{key}`: {done_count} of {total} runs finished",
        "",
        f"    {escaped(command)}",
        "",
        *_aligned(cells),
        "",
        "Accuracies are top-1 of frozen features on the evaluation split: logistic regression (probe) and nearest "
        "neighbours (k-NN) on the trained encoder, on the same encoder untrained, and on raw pixels. "
        "± is the standard deviation over seeds, [ ] the 95 % interval of their mean (Student's t). Bold: an accuracy "
        "that differs clearly from that of every other row (paired t-test over the seeds, p < 0.05 after Holm's "
        "correction). The loss is that of the training objective, which the swept key may change: it does not rank the "
        "rows.",
        *(
            [f"Of the trained encoder by config.sweep.judge: {', '.join(found)}; segmentation has the mean IoU."]
            if (found := judged(records).values())
            else []
        ),
        *(["", RANKS_TEXT] if RANKS.keys() & columns.keys() else []),
        *_differences(key, rows, scores),
        *(["", *failures] if failures else []),
    ]
    return "\n".join(lines) + "\n"


def _differences(key: str, rows: Sequence[tuple[Any, list[Record], int]], scores: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: what each value gains over the first one, in points, and whether that is more than noise."""
    found = {c: seeds.compare([per_seed(done, c) for _, done, _ in rows], 0) for c in scores}
    if len(rows) < 2 or not scores:
        return []
    if not any(d for differences in found.values() for d in differences):
        return ["", "Two seeds or more for each value would tell which differences are more than noise."]
    cells = [[key, "seeds", *scores.values()]]
    for i, (value, done, _) in enumerate(rows[1:], start=1):
        both = {d.seeds for differences in found.values() if (d := differences[i])}
        cells.append([in_markdown(label(value)), str(max(both, default=len(done)))])
        cells[-1] += [difference(found[c][i]) for c in scores]
    first = in_markdown(label(rows[0][0]))
    return [
        "",
        f"Differences from `{key}` {first}, in points, seed by seed, with their 95 % intervals and p-values (paired "
        "t-test, Holm's correction over the rows). What is within the noise may come from the seeds alone.",
        "",
        *_aligned(cells),
    ]


def difference(found: seeds.Difference | None) -> str:
    """A difference of two accuracies as text, in points.

    >>> difference(seeds.Difference(0.012, 0.003, 0.021, 0.031, 3))
    '+1.2 [+0.3, +2.1], p = 0.031'
    >>> difference(seeds.Difference(0.012, np.nan, np.nan, np.nan, 3))
    '+1.2 for each seed, not tested'
    """
    if found is None:
        return "-"
    if np.isnan(found.p):
        return f"{100 * found.value:+.1f} for each seed, not tested"
    text = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    if not found.clear:
        text += ", within the noise"
    return f"{text}, p = {found.p:.2g}"


def _entry(found: seeds.Mean | None, is_share: bool, with_interval: bool) -> str:
    if found is None:
        return "-"
    numbers = (found.value, found.std, found.low, found.high)
    mean, std, low, high = (
        (f"{100 * x:.1f}" for x in numbers)
        if is_share
        else (metrics.format_number(found.value), f"{found.std:.2g}", "", "")
    )
    if found.seeds == 1:
        return mean
    with_interval = with_interval and found.std > 0
    return f"{mean} ± {std} [{low}, {high}]" if with_interval else f"{mean} ± {std}"


def _aligned(cells: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, whose columns are also aligned in plain text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def figure(config: ConfigDict, records: Sequence[Record]) -> Any:
    """A matplotlib Figure of the accuracies over the swept values; of the loss if there are no labels.

    It needs no display and changes no state of matplotlib.
    """
    from matplotlib.figure import Figure  # here: 0.3 s that no other job has to spend

    rows = groups(records)
    panels = [c for c in (*FROZEN, *judged(records)) if any(_mean(done, c) for _, done, _ in rows)] or ["loss"]
    picture = Figure(figsize=(4.4 * len(panels), 4.2), layout="constrained")
    picture.suptitle(_title(config, rows), fontsize=10)
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, panels, strict=True):
        _panel(ax, config.sweep.key, rows, column)
    axes[0].set_ylabel("training loss" if panels == ["loss"] else "top-1 accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return picture


def _title(config: ConfigDict, rows: Sequence[tuple[Any, list[Record], int]]) -> str:
    """The figure's title: what all runs share, for a reader who has the figure without the table."""
    kind, _, rest = config.data.source.partition(":")
    if config.sweep.key == "checkpoint":
        return "the same runs, judged on several tasks"
    steps = next(r["steps"] for _, done, _ in rows for r in done)
    parts = {
        "method": config.method,
        "encoder.name": f"{config.encoder.name} encoder",
        "corruption.name": f"{config.corruption.name} corruption" if is_read(config, "corruption.name") else "",
        "penalty": f"{config.penalty.name} penalty" if config.penalty.name != "none" else "",
        "data.source": rest if kind == "tfds" else Path(rest).name or kind,
        "steps": f"{steps} steps",
    }
    shown = [text for key, text in parts.items() if text and key != config.sweep.key]
    return ", ".join(shown)


def _panel(ax: Any, key: str, rows: Sequence[tuple[Any, list[Record], int]], column: str) -> None:
    """Draws one score of the trained encoder, each seed and their mean with its interval, and the baselines."""
    at = _place(ax, [value for value, _, _ in rows])
    scale = 1 if column == "loss" else 100
    count = max(len(done) for _, done, _ in rows)
    names = {"": f"trained (mean, 95 % interval; {count} seeds)" if count > 1 else "trained"}
    if column != "loss":
        names = COMPARED | names
    styles: dict[str, dict[str, Any]] = {
        "": dict(fmt="o" if any(isinstance(v, str | bool) for v, _, _ in rows) else "o-", color="tab:blue", capsize=4),
        "_untrained": dict(fmt="--", color="tab:gray"),
        "_pixels": dict(fmt="--", color="tab:orange", dashes=(1, 1.5)),
    }
    for suffix, name in names.items():
        found = [(x, _mean(done, column + suffix)) for x, (_, done, _) in zip(at, rows, strict=True)]
        points = sorted((x, mean) for x, mean in found if mean is not None)
        if not points:
            continue
        places, means = [x for x, _ in points], [scale * mean.value for _, mean in points]
        if len(points) == 1 and suffix:  # one point does not make a line
            ax.axhline(means[0], label=name, **{k: v for k, v in styles[suffix].items() if k != "fmt"}, linestyle="--")
            continue
        halves = [scale * np.nan_to_num(mean.high - mean.value) for _, mean in points]
        ax.errorbar(places, means, halves if count > 1 and not suffix else None, label=name, **styles[suffix])
    if count > 1:
        every = [
            (x, scale * y) for x, (_, done, _) in zip(at, rows, strict=True) for y in per_seed(done, column).values()
        ]
        ax.plot(*zip(*every, strict=True), ".", color="tab:blue", alpha=0.5, label="each seed")
    for x, (_, done, failed) in zip(at, rows, strict=True):
        if failed and not done:
            ax.axvline(x, color="tab:red", alpha=0.15, linewidth=8)
            ax.text(x, 0.5, "failed", color="tab:red", rotation=90, ha="center", va="center",
                    transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xlabel(key if ax.get_xscale() == "linear" else f"{key} (log scale)")
    tidy(ax, (FROZEN | {"probe_top1": "linear probe"}).get(column, column.removeprefix(JUDGE)))


def _place(ax: Any, values: Sequence[Any]) -> list[float]:
    """Scales and labels the x axis for the values; returns the position of each value.

    Numbers lie at their value, on a logarithmic axis if they span more than LOG_SPAN (0 then lies one decade below the
    smallest other number). Other values lie side by side.
    """
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    at = [float(v) for v in values] if is_number else [float(i) for i in range(len(values))]
    if is_number:
        sizes = [abs(x) for x in at if x]
        if len(sizes) > 1 and max(sizes) / min(sizes) > LOG_SPAN:
            if min(at) > 0:
                ax.set_xscale("log")
            else:
                ax.set_xscale("symlog", linthresh=min(sizes))
    labels = [label(float(f"{v:.3g}")) if isinstance(v, float) else label(v) for v in values]
    labels = [text if len(text) < 25 else f"…{text[-23:]}" for text in labels]  # the end of a path
    ax.set_xticks(at, labels)
    ax.set_xticks([], minor=True)
    places = np.sort(ax.xaxis.get_transform().transform(np.array(at)))
    closest = np.diff(places).min(initial=np.inf) / max(np.ptp(places), 1e-30)
    if closest < max(map(len, labels)) / 40:  # about 40 characters fit along a panel
        ax.tick_params(axis="x", rotation=60)
    return at
