"""What a run logged about itself: curves, scores and their controls, settings, pictures.

Reads the records (:mod:`crate_jax.analysis.records`) and ``pictures/`` of the workdirs; needs no images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure as Plot
from matplotlib.lines import Line2D

from crate_jax.analysis.records import COLUMNS, Logged, read
from crate_jax.config import WITHOUT_METHOD, acts, base, has_effect, method_name, parts
from crate_jax.data import decoding
from crate_jax.errors import DataError
from crate_jax.evals.metrics import COMPARED, TOP1, interval, reading
from crate_jax.models import widths
from crate_jax.parallel import parameters
from crate_jax.report.section import Best, Cell, Estimate, Figure, Section, Subject, Table, short_names
from crate_jax.report.style import tidy
from crate_jax.report.svg import escape, legend
from crate_jax.training.clock import PARTS
from crate_jax.validation import flatten
from crate_jax.workdir import metrics

CURVES = {  # key in metrics.jsonl -> label of the axis, caption
    "loss": ("loss", "Training loss, the mean between two log points, penalty included."),
    "lr": ("learning rate", "Learning rate."),
    "grad_norm": ("gradient norm", "Norm of the gradient before clipping, the mean between two log points."),
    "images_per_sec": ("images/s", "Training speed; the first point of each start includes the compilation."),
    "probe_top1": ("probe accuracy (%)", "Top-1 accuracy of a logistic regression on frozen features during training."),
    "knn_top1": ("k-NN accuracy (%)", "Top-1 accuracy of nearest neighbours on frozen features during training."),
    "rankme": ("RankMe", "RankMe of frozen features during training: how many dimensions they use."),
    "lidar": ("LiDAR", "LiDAR of frozen features during training: in how many dimensions images differ."),
    "top1": ("top-1 accuracy (%)", "Accuracy on the evaluation split during training."),
    "miou": ("mIoU (%)", "Mean intersection over union on the evaluation split during training."),
}
LAYERS = {  # measure that telemetry logs for each layer -> label of the axis, caption
    "encoder/subspace_rate": ("$R^c$ (nats)", "coding rate of the patch tokens in each layer's own subspaces"),
    "encoder/released_rate": ("$R^c$ of unit tokens (nats)", "coding rate as the released script computes it"),
    "encoder/rate": ("$R$ (nats)", "coding rate of the patch tokens without subspaces"),
    "encoder/nonzero": ("share of non-zero entries", "share of the entries that are not 0 after each layer"),
    "decoder/inversion_error_scaled": (
        "relative error",
        "the part of the encoder features that each decoder layer fails to restore, at the best scale",
    ),
}  # fmt: skip
MAX_STEPS_DRAWN = 5  # steps for which a run's layers are drawn
MARKS: dict[str, dict[str, Any]] = {
    "_pixels": dict(marker="|", color="C7", markersize=13, markeredgewidth=2),
    "_untrained": dict(marker="o", color="C7", markerfacecolor="none", markersize=7),
    "": dict(marker="o", markersize=7),  # drawn in the run's colour
}
FASTER = 1.1  # a run is the fastest if its speed is so many times that of any other: on a busy machine speeds vary
LOG_SPAN = 20  # an axis is logarithmic if largest / smallest value is above this


def section(subjects: Sequence[Subject]) -> Section:
    """The section with one line for each run, and figures of its scores beside those of its controls.

    Raises:
      DataError: a record of a run is damaged.
    """
    logged = {s.name: read(s.workdir) for s in subjects}
    return Section(
        title="Overview",
        text=_text(logged),
        figures=tuple(_score_figures(logged)),
        tables=(_verdict(subjects, logged),),
        leading=1,
        numbers={
            name: {"summary": log.summary, "results": log.results, "starts": list(log.starts)}
            for name, log in logged.items()
        },
    )


def details(subjects: Sequence[Subject]) -> Section:
    """The section with the curves, results, starts and settings of the runs.

    Raises:
      DataError: a record of a run is damaged.
    """
    logged = {s.name: read(s.workdir) for s in subjects}
    tables = (
        _scores(logged), _runs(subjects, logged), _goodput(logged), _starts(logged), _results(logged),
        _settings(subjects, logged),
    )  # fmt: skip
    return Section(
        title="Curves and settings",
        text="What the runs logged during training, and all that they were told.",
        figures=(*_curves(logged, short_names(subjects)), *_layers(logged)),
        tables=tuple(t for t in tables if t),
    )


def _verdict(subjects: Sequence[Subject], logged: Mapping[str, Logged]) -> Table:
    """One line for each run: what it is, its scores with their intervals, its loss and its speed."""
    named = {**TOP1, "miou": "mIoU"}
    keys = [k for k in named if any(log.summary.get(k) is not None for log in logged.values())]
    columns = [[_estimate(logged[s.name].summary, k) for s in subjects] for k in keys]
    scores = [dict(zip(logged, _marked(column), strict=True)) for column in columns]
    speeds = _fastest(subjects, logged)
    rows = []
    for s in subjects:
        summary, c = logged[s.name].summary, s.config
        method = None if c.job in WITHOUT_METHOD else method_name(c)
        found = (score[s.name] for score in scores)
        rows.append((s.name, method, c.encoder.name, *found, summary.get("loss"), speeds[s.name]))
    caption = (
        "The runs. ± is half of the 95 % interval that follows from the number of test images; scores also differ "
        "from seed to seed, which it leaves out. A score is bold if its interval lies above those of all other runs, "
        f"a speed if it is {FASTER} times any other one or more, with images of one size on the same devices. "
        "Losses under different methods, corruptions or targets cannot be compared."
    )
    names = ("run", "method", "encoder", *(f"{named[k]} %" for k in keys), "loss", "images/s")
    return Table(caption, names, tuple(rows))


def _fastest(subjects: Sequence[Subject], logged: Mapping[str, Logged]) -> dict[str, Cell]:
    """{run: its speed}, with a mark at the best one if all runs had images of one size on the same known devices.

    Runs that differ only in their seed do not compete: each of them must be faster than all others.
    """
    speeds: dict[str, Any] = {s.name: logged[s.name].summary.get("images_per_sec") for s in subjects}
    where = {(logged[s.name].summary.get("devices"), tuple(s.config.data.image_size)) for s in subjects}
    if len(where) != 1 or None in next(iter(where)) or None in speeds.values():
        return speeds
    best = max(subjects, key=lambda s: speeds[s.name])
    same = {s.name: settings(s) == settings(best) for s in subjects}
    slowest = min(speed for name, speed in speeds.items() if same[name])
    others = [speed for name, speed in speeds.items() if not same[name]]
    is_clear = others and slowest >= FASTER * max(others)
    return {name: Best(speed) if is_clear and name == best.name else speed for name, speed in speeds.items()}


def settings(subject: Subject) -> dict[str, Any]:
    """The keys that a run reads and on which its numbers depend, without its seed: they are the same in a recipe."""
    flat = flatten(subject.config)
    return {k: v for k, v in flat.items() if k != "seed" and has_effect(k) and acts(subject.config, k)}


def _estimate(summary: Mapping[str, Any], key: str) -> Estimate | float | None:
    """An accuracy in per cent, with its interval if the number of test images is known."""
    share = summary.get(key)
    if share is None or key not in TOP1 or not summary.get("test_images"):
        return None if share is None else 100 * share
    low, high = interval(share, summary["test_images"])
    return Estimate(100 * share, 100 * low, 100 * high)


def _marked(column: Sequence[Estimate | float | None]) -> list[Estimate | float | None]:
    """The column with a mark at the number whose interval lies above the intervals of all others.

    >>> [x.best for x in _marked([Estimate(5.0, 4.0, 6.0), Estimate(9.0, 7.0, 11.0)])]
    [False, True]
    """
    known = [x for x in column if isinstance(x, Estimate)]
    comparable = 1 < len(known) == sum(x is not None for x in column)  # mIoU has no interval

    def is_best(x: Estimate) -> bool:
        return comparable and all(x.low > other.high for other in known if other is not x)

    return [dataclasses.replace(x, best=is_best(x)) if isinstance(x, Estimate) else x for x in column]


def _text(logged: Mapping[str, Logged]) -> str:
    lines = []
    if any(name in log.summary for log in logged.values() for name in ("probe_top1_pixels", "knn_top1_pixels")):
        lines.append(
            "Accuracies are top-1 on the evaluation split: logistic regression (probe) and nearest neighbours (k-NN) "
            "on frozen features of the trained encoder, on those of the same encoder before training, and on raw "
            "pixels (at most 32 px a side). What an encoder has learned is its gain over both controls."
        )
    unfinished = [name for name, log in logged.items() if log.metrics and not log.summary]
    for name, log in logged.items():
        lines += [f"{name}, {line}." for line in reading(log.summary, intervals=False)]  # the table has those
    scores = (*TOP1, "miou")
    silent = [n for n, log in logged.items() if log.summary and all(log.summary.get(k) is None for k in scores)]
    if silent:
        lines.append(f"Without scores, as their images lack labels or an evaluation split: {', '.join(silent)}.")
    if unfinished:
        lines.append(f"Not finished when this page was written: {', '.join(unfinished)}.")
    return " ".join(lines)


def _axes(height: float) -> tuple[Plot, Any]:
    plot = Plot(figsize=(4.2, height), layout="constrained")
    return plot, plot.subplots()


def _curves(logged: Mapping[str, Logged], names: Mapping[str, str]) -> list[Figure]:
    """One figure for each key of CURVES that at least one run logged more than once; one line per run.

    Args:
      logged: the runs' names -> their records.
      names: the runs' names for the legend.
    """
    figures = []
    for key, (label, caption) in CURVES.items():
        scale = 100 if "%" in label else 1
        lines = {
            name: [(m["step"], scale * m[key]) for m in log.metrics if m.get(key) is not None]
            for name, log in logged.items()
        }
        if not any(len(line) > 1 for line in lines.values()):
            continue
        plot, ax = _axes(2.7 + 0.2 * (len(logged) > 1) * -(-len(logged) // 2))
        for i, (name, line) in enumerate(lines.items()):
            if line:
                ax.plot(*zip(*line, strict=True), "." if len(line) == 1 else "-", color=f"C{i}", label=escape(name))
        values = [y for line in lines.values() for _, y in line]
        if key in ("loss", "grad_norm") and min(values) > 0 and max(values) / min(values) > LOG_SPAN:
            ax.set_yscale("log")
        ax.set_xlabel("step")
        tidy(ax, label)
        legend(plot, names, "outside lower center")
        figures.append(Figure(caption, plot))
    return figures


def _layers(logged: Mapping[str, Logged]) -> list[Figure]:
    """One figure per run and measure that telemetry logged (config.whitebox.every): one line per step, over layers."""
    figures = []
    for name, log in logged.items():
        for key, (label, what) in LAYERS.items():
            prefix = f"whitebox/{key}/"
            looks = {}
            for m in log.metrics:
                values = [m[k] for k in sorted(m) if k.startswith(prefix)]
                if values:
                    looks[m["step"]] = values
            if not looks:
                continue
            steps = sorted(looks)
            shown = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, MAX_STEPS_DRAWN)})]
            plot, ax = _axes(2.9)
            # Both ends of this range of colours can be seen on white and on black.
            for step, shade in zip(shown, colormaps["viridis"](np.linspace(0.85, 0.25, len(shown))), strict=True):
                layers = range(1, len(looks[step]) + 1)
                ax.plot(layers, looks[step], "o-", color=shade, markersize=3, label=f"step {step:,}")
            ax.set_xticks(range(1, max(map(len, looks.values())) + 1))
            ax.set_xlabel("layer")
            tidy(ax, label)
            plot.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
            figures.append(Figure(f"{name}: {what}, during training; dark lines are late steps.", plot))
    return figures


def _score_figures(logged: Mapping[str, Logged]) -> list[Figure]:
    """One figure per protocol on frozen features: the trained encoder beside its controls, one row per run."""
    figures = []
    for key, protocol in (("probe_top1", "linear probe"), ("knn_top1", "k-NN")):
        scored = {name: log.summary for name, log in logged.items() if log.summary.get(key) is not None}
        colours = {name: f"C{i}" for i, name in enumerate(logged)}
        if not scored:
            continue
        plot, ax = _axes(1.5 + 0.32 * len(scored))
        for y, (name, summary) in enumerate(scored.items()):
            for suffix, style in MARKS.items():
                if summary.get(key + suffix) is not None:
                    look = {"color": colours[name], "linestyle": "none", **style}
                    ax.plot(100 * summary[key + suffix], y, label=escape(name), **look)
            if summary.get("test_images"):
                ends = [100 * end for end in interval(summary[key], summary["test_images"])]
                ax.plot(ends, [y, y], "-", color=colours[name], alpha=0.4, linewidth=3, label=escape(name))
        ax.set_yticks(range(len(scored)), [escape(name) for name in scored])
        ax.set_ylim(len(scored) - 0.5, -0.5)
        ax.margins(x=0.08)
        tidy(ax, f"{protocol}, top-1 accuracy (%)", grid="x")
        marks = [
            Line2D([], [], linestyle="none", label=COMPARED[suffix], **{"color": "black", **style})
            for suffix, style in MARKS.items()
            if any(s.get(key + suffix) is not None for s in scored.values())
        ]
        plot.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        caption = f"Top-1 accuracy of the {protocol} on frozen features, against an untrained encoder and raw pixels."
        if any("test_images" in summary for summary in scored.values()):
            caption += " A bar is the 95 % interval (Wilson's) that follows from the number of test images."
        figures.append(Figure(caption, plot))
    return figures


def _scores(logged: Mapping[str, Logged]) -> Table | None:
    """One row for each run's encoder and one for each of its controls."""
    keys = [k for k in COLUMNS if any(isinstance(log.summary.get(k), float) for log in logged.values())]
    rows: list[tuple[str | float | None, ...]] = []
    for name, log in logged.items():
        for suffix, what in COMPARED.items():
            values = [log.summary.get(k + suffix) for k in keys]
            if any(v is not None for v in values):
                rows.append((name, what, *(None if v is None else 100 * v for v in values)))
    if not rows:
        return None
    return Table("Scores at the end of training.", ("run", "what", *(COLUMNS[k] for k in keys)), tuple(rows))


def _runs(subjects: Sequence[Subject], logged: Mapping[str, Logged]) -> Table:
    rows = []
    for s in subjects:
        summary, c = logged[s.name].summary, s.config
        was = told(logged[s.name])
        steps = summary.get("steps") or max((m["step"] for m in logged[s.name].metrics), default=None)
        size = f"{len(widths(c))} x {widths(c)[-1]}"
        corruption = c.corruption.name if "corruption" in parts(c, s.params) else "none"
        rows.append((
            s.name, None if c.job in WITHOUT_METHOD else method_name(c), c.encoder.name, size, corruption,
            was.get("penalty.name", c.penalty.name), steps, was.get("batch_size", c.batch_size), summary.get("loss"),
            summary.get("images_per_sec"), summary.get("params") or (parameters.count(s.params) if s.params else None),
            c.job, was.get("data.source", c.data.source), summary.get("devices"),
        ))  # fmt: skip
    columns = (
        "run", "method", "encoder", "layers x width", "corruption", "penalty", "steps", "batch", "loss", "images/s",
        "parameters", "job", "images", "devices",
    )  # fmt: skip
    caption = "What the runs are."
    return Table(caption, columns, tuple(rows))


def _goodput(logged: Mapping[str, Logged]) -> Table | None:
    """Where the wall time of the finished runs went."""
    rows = [
        (name, goodput["wall_seconds"] / 60, *(100 * goodput[part] for part in PARTS))
        for name, goodput in ((name, log.summary.get("goodput")) for name, log in logged.items())
        if goodput
    ]
    meanings = "; ".join(f"{part}: {meaning}" for part, meaning in PARTS.items())
    caption = f"Wall time of the runs over all their starts, and its shares. {meanings[0].upper()}{meanings[1:]}."
    return Table(caption, ("run", "minutes", *(f"{part} %" for part in PARTS)), tuple(rows)) if rows else None


def _starts(logged: Mapping[str, Logged]) -> Table | None:
    """The starts of the runs, if one of them was continued."""
    if all(len(log.starts) < 2 and not told(log) for log in logged.values()):
        return None
    rows = []
    for name, log in logged.items():
        for start in log.starts:
            changes = (f"{c['key']}: {shown(c['old'])} -> {shown(c['new'])}" for c in start.get("changed", ()))
            versions = ", ".join(f"{package} {version}" for package, version in start.get("versions", {}).items())
            cells = start["step"], start.get("time"), "; ".join(changes), start.get("devices"), versions
            rows.append((name, *cells))
    caption = "Starts of the runs, with the keys that each changed. Starts whose steps were lost are in starts.jsonl."
    return Table(caption, ("run", "from step", "time", "changed", "devices", "versions"), tuple(rows))


def _results(logged: Mapping[str, Logged]) -> Table | None:
    """The results that evaluations appended to results.jsonl in the same workdir."""
    found = [(name, r) for name, log in logged.items() for r in log.results]
    keys = [k for k in COLUMNS if any(isinstance(r.get(k), float) for _, r in found)]
    if not keys:
        return None
    rows = [
        (name, r.get("protocol"), r.get("data"), *(None if r.get(k) is None else 100 * r[k] for k in keys))
        for name, r in found
    ]
    columns = ("run", "protocol", "data", *(COLUMNS[k] for k in keys))
    return Table("Evaluations recorded in results.jsonl.", columns, tuple(rows))


def _settings(subjects: Sequence[Subject], logged: Mapping[str, Logged]) -> Table | None:
    """The keys in which the runs differ; for a single run, the keys in which it differs from the defaults.

    A key that a run does not read has no value there. One that a single run reads stands here if it is not the default.
    """
    default, flat = flatten(base()), {}
    for s in subjects:
        own = flatten(s.config) | told(logged[s.name])
        flat[s.name] = {k: v for k, v in own.items() if has_effect(k) and acts(s.config, k, s.params)}
    keys = dict.fromkeys(k for f in flat.values() for k in sorted(f))
    if len(flat) == 1:
        flat["default"] = default

    def differs(key: str) -> bool:
        values = [repr(f[key]) for f in flat.values() if key in f]
        return len({*values, *([repr(default.get(key))] if len(values) == 1 else [])}) > 1

    differing = [k for k in keys if differs(k)]
    rows = [(k, *(shown(f.get(k)) for f in flat.values())) for k in differing]
    if not rows:
        return None
    names = ["this run", "default"] if len(subjects) == 1 else list(flat)
    what = "in which this run differs from the defaults" if len(subjects) == 1 else "in which the runs differ"
    return Table(f"Settings {what}.", ("config", *names), tuple(rows))


def told(log: Logged) -> dict[str, str]:
    """For each key that a start has changed its values in order, as a text for a cell."""
    cells: dict[str, str] = {}
    for change in (change for start in log.starts for change in start.get("changed", ())):
        before = cells.get(change["key"], str(shown(change["old"])))
        cells[change["key"]] = f"{before}; from step {change['step']:,} on {shown(change['new'])}"
    return cells


def shown(value: Any) -> str | float | int | None:
    """A config value as a cell of a table.

    >>> shown([1, ""]), shown([]), shown(True)
    ('1, ""', '()', 'True')
    """
    if isinstance(value, list):
        return ", ".join(str(shown(v)) for v in value) or "()"
    if isinstance(value, str):
        return value or '""'
    return str(value) if isinstance(value, bool) else value


# What a kind of picture shows; a method names its kind (`Method.pictures_name`).
DRAWN = {
    "reconstruction": "A reconstruction shows the original; what the encoder got of it (P x); what the decoder adds, "
    "which is the part that the loss compares ((I - P) x^; under a mask, patches that the encoder saw have one colour, "
    "since nothing trains the decoder there); and both together.",
    "views": "Beside each image are the views that the networks get of it.",
    "segmentation": "Beside each image are its mask and the mask that the model predicts.",
}


def pictures(subjects: Sequence[Subject]) -> Section:
    """The section with the newest picture of each kind of each run.

    Raises:
      DataError: no run has pictures, or one of them cannot be decoded.
    """
    figures, kinds = [], set()
    for s in subjects:
        newest: dict[str, tuple[int, Path]] = {}
        for path in sorted((s.workdir / "pictures").glob("*.png")) if s.workdir else ():
            if match := metrics.PICTURE.fullmatch(path.name):
                newest[match["name"]] = (int(match["step"]), path)  # paths are sorted by step, so the newest one stays
        for kind, (step, path) in newest.items():
            try:
                array = decoding.decode(decoding.open_image(decoding.read_file(str(path))))
            except decoding.DecodeError as e:
                raise DataError(f"{path}: {e}; delete it") from None
            kinds.add(kind)
            figures.append(Figure(f"{s.name}, {kind} at step {step:,}.", array))
    if not figures:
        raise DataError("no run has pictures; config.log.pictures says how many images they show")
    first = (
        "Images of the evaluation split (of the training images if there is none), always the same ones, drawn during "
        "training."
    )
    text = " ".join([first, *(text for kind, text in DRAWN.items() if kind in kinds)])
    return Section("Pictures", text, tuple(figures))
