"""The rows of all parts as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.accelerator.parts import MACHINE, PARTS, WITHOUT, Row
from benchmarks.accelerator.runner import measured, software

Rows = Mapping[str, Mapping[str, Row]]  # part -> case -> row
DIFFERS = 0.05  # of the largest number: more than bfloat16 explains
MODELS = [name for name, part in PARTS.items() if part.module == "steps" and name != WITHOUT]


def markdown(rows: Rows) -> str:
    """All tables.

    Args:
      rows: part -> case -> row, the row of the machine included.

    Returns:
      the text; a part without rows is left out.
    """
    machine = rows[MACHINE][MACHINE]
    card = machine.get("nvidia_smi") or machine["runtime"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    head = f"{machine['devices']} x {machine['device']} ({card}); {versions}; Python {machine['python']}; "
    parts = [head + f"{machine['cores']} cores. Times are medians of windows, after warm-up."]
    for make in (ceilings, models, profile, parity, kernel_times, tune, feed, cifar, questions, left_out, older):
        if text := make(rows):
            parts.append(text)
    return "\n\n".join(parts) + "\n"


def grid(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table under a title; empty without lines."""
    if not lines:
        return ""
    show = [[text.replace("|", "/") for text in map(str, line)] for line in (columns, *lines)]
    body = [f"| {' | '.join(line)} |" for line in show]
    return "\n".join([f"### {title}", "", body[0], "|" + "---|" * len(columns), *body[1:]])


def number(row: Row | None, value: str | Callable[[Row], Any], form: str) -> str:
    """A number of a row, under a name or computed, or '-' where there is no such row or number."""
    try:
        found = None if row is None else row[value] if isinstance(value, str) else value(row)
    except (KeyError, TypeError, ZeroDivisionError):
        found = None
    return "-" if found is None else format(found, form)


def times(row: Row | None) -> str:
    """Both times of a version of a kernel, in ms; a result that is another one than the plain version's is said."""
    wrong = " WRONG" if row and row.get("differs_by", 0.0) > DIFFERS else ""
    return " / ".join(number(row, name, ".3f") for name in ("forward_ms", "with_gradients_ms")) + wrong


def ceilings(rows: Rows) -> str:
    """The measured peaks."""
    found = rows.get("peak", {})
    lines = [
        [what, number(found[case], value, form)]
        for case, what, value, form in (
            ("matmul", "bfloat16 products, TFLOP/s", lambda r: r["flops"] / 1e12, ".4g"),
            ("bandwidth", "memory, GB/s", lambda r: r["bytes_per_s"] / 1e9, ".4g"),
        )
        if case in found
    ]
    return grid("Ceilings of one device, measured", ("", "best"), lines)


def models(rows: Rows) -> str:
    """The steps."""
    peak = rows.get("peak", {})
    flops = peak.get("matmul", {}).get("flops")
    bandwidth = peak.get("bandwidth", {}).get("bytes_per_s")
    devices = rows[MACHINE][MACHINE]["devices"]

    def share(row: Row) -> float | None:
        return row["images_per_sec"] * row["model_flops_per_image"] / (flops * devices) if flops else None

    def bound(row: Row) -> float | None:
        """The least time by what the program computes and moves, over the measured time."""
        if not (flops and bandwidth):
            return None
        return max(row["compiled"]["flops"] / flops, row["compiled"]["bytes"] / bandwidth) * 1e3 / row["ms"]

    lines = []
    for name in MODELS:
        found = rows.get(name, {})
        if not found:
            continue
        ours, torch, plain = found.get("ours"), found.get("pytorch"), rows.get(WITHOUT, {}).get(name)
        per_device = ours["images_per_sec"] / devices if ours and measured(ours) else None
        lines.append(
            [
                name,
                number(ours, "batch", "d"),
                number(ours, "images_per_sec", ".0f"),
                number(ours, "ms", ".2f"),
                number(ours, share, ".1%"),
                number(ours, bound, ".1%"),
                number(ours, lambda r: r["peak_bytes"] / 1e9, ".1f"),
                number(plain, "images_per_sec", ".0f"),
                number(torch, "images_per_sec", ".0f"),
                number(torch, lambda r: r["peak_bytes"] / 1e9, ".1f"),
                number(torch, lambda r, rate=per_device: rate / r["images_per_sec"], ".2f"),
                (ours or {}).get("attention", ""),
            ]
        )
    columns = (
        "step", "batch", "images/s", "ms", "of the peak", "of the roofline", "memory, GB", "without kernels, images/s",
        "PyTorch, images/s", "its memory, GB", "ours / PyTorch", "attention by",
    )  # fmt: skip
    return grid("Train steps", columns, lines)


def profile(rows: Rows) -> str:
    """Where the time of the steps goes, in ms."""
    found = {name: row for name, row in rows.get("profile", {}).items() if measured(row)}
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row["kinds"]))

    def cell(row: Row, kind: str) -> str:
        of = row["kinds"].get(kind)
        return f"{of['ms']:.2f} ({of['kernels']:.0f})" if of else "-"

    lines = [
        [name, number(row, "span_ms", ".2f"), number(row, lambda r: r["span_ms"] - r["busy_ms"], ".2f"),
         *(cell(row, kind) for kind in kinds)]
        for name, row in found.items()
    ]  # fmt: skip
    return grid("Profile of a step, ms (number of kernels)", ("step", "whole", "idle", *kinds), lines)


def parity(rows: Rows) -> str:
    """The largest errors of each kernel."""
    lines = []
    for name, row in [*rows.get("parity", {}).items(), *rows.get("parity_more", {}).items()]:
        if "errors" in row:
            worst = ", ".join(f"{array} {error:.1e}" for array, error in row["errors"].items())
            plain = ", ".join(f"{error:.1e}" for error in row["plain_errors"].values())
            lines.append([name, worst, plain, "yes" if row["ok"] else "NO"])
    return grid("Kernels against float64", ("case", "errors", "of the plain version", "right"), lines)


def kernel_times(rows: Rows) -> str:
    """The versions beside each other, in ms."""
    flops = rows.get("peak", {}).get("matmul", {}).get("flops")
    lines = []
    for name, row in rows.get("kernel_times", {}).items():
        if not measured(row):
            continue
        share = number(
            row["ours"], lambda r, row=row: row["with_gradients_flops"] / r["with_gradients_ms"] * 1e3 / flops, ".1%"
        )
        versions = [times(row.get(version)) for version in ("ours", "xla", "cudnn", "cudnn_padded", "triton_padded")]
        lines.append([name, *versions, share])
    columns = (
        "forward / with gradients, ms",
        "ours",
        "XLA",
        "cuDNN",
        "cuDNN, padded",
        "JAX's Triton, padded",
        "ours, of the peak",
    )
    return grid("Kernels, times", columns, lines)


def tune(rows: Rows) -> str:
    """The cut of the kernels, as it is and as it would be best."""
    lines = [
        [
            name,
            *(f"{tile}: {number(row['tried'].get(tile), 'ms', '.3f')}" for tile in (row["default"], row["best"])),
            sum("refused" in trial for trial in row["tried"].values()),
        ]
        for name, row in rows.get("tune", {}).items()
        if measured(row)
    ]
    columns = ("kernel", "its tiles, ms of the pass", "best tiles, ms", "refused")
    return grid("Tiles of the kernels of attention", columns, lines)


def feed(rows: Rows) -> str:
    """What the pipeline costs."""
    keys = ("step_images_per_sec", "host_images_per_sec", "fed_images_per_sec")
    lines = [
        [
            name,
            *(number(row, key, ".0f") for key in keys),
            number(row, "overlap", ".2f"),
            row["bound_by"],
        ]
        for name, row in rows.get("feed", {}).items()
        if measured(row)
    ]
    columns = ("images/s", "step alone", "pipeline alone", "together", "overlap", "bound by")
    return grid("Step and input pipeline", columns, lines)


def cifar(rows: Rows) -> str:
    """The accuracies."""
    lines = [
        [
            {"so": "SO 1e-6", "none": "plain"}[penalty],
            number(row, "epochs", ".1f"),
            number(row, "images_per_sec", ".0f"),
            *(number(row, name, ".1%") for name in ("knn_top1", "probe_top1", "knn_top1_untrained")),
        ]
        for penalty, row in rows.get("cifar10", {}).items()
        if measured(row)
    ]
    columns = ("BYOL, ResNet18", "epochs", "images/s", "k-NN", "probe", "k-NN, untrained")
    return grid("CIFAR-10", columns, lines)


def questions(rows: Rows) -> str:
    """The mean accuracies of the sweeps, with their intervals."""

    def shown(means: Row, column: str) -> str:
        if column not in means:
            return "-"
        mean, *ends = (f"{x:.1f}" for x in means[column])
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    lines = [
        [name, value, *(shown(means, c) for c in ("knn_top1", "probe_top1"))]
        + [next((shown(means, c) for c in means if c.startswith("judge ")), "-")]
        for name, row in rows.get("questions", {}).items()
        if measured(row)
        for value, means in row["values"].items()
    ]
    columns = ("", "value", "k-NN, %", "probe, %", "mean IoU of montages, %")
    return grid(
        "Open questions: means over seeds, 95 % intervals; the sweeps' own tables have the differences", columns, lines
    )


def left_out(rows: Rows) -> str:
    """What failed, and what was not there."""
    lines = [
        [f"{part}: {case}", kind, row[kind]]
        for part, cases in rows.items()
        for case, row in cases.items()
        for kind in ("failed", "absent")
        if kind in row
    ]
    return grid("Not measured", ("case", "", "why"), lines)


def older(rows: Rows) -> str:
    """What was measured with other versions than those of the first line."""
    now = software(rows[MACHINE][MACHINE])
    lines = [
        [f"{part}: {case}", ", ".join(f"{k} {v or 'none'}" for k, v in row["by"].items() if now.get(k, "") != v)]
        for part, cases in rows.items()
        for case, row in cases.items()
        if measured(row) and row.get("by", now) != now
    ]
    return grid("Measured with other versions", ("case", "with"), lines)
