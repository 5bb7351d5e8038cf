"""The report's section on alignment: can a corruption teach anything about these labels, and what is learned when?"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot
from ml_collections import ConfigDict

from crate_jax.analysis import records
from crate_jax.analysis.alignment import bands, plots
from crate_jax.analysis.alignment.analyse import analyse, shrink_to_side
from crate_jax.analysis.alignment.answer import Answer
from crate_jax.config import parts
from crate_jax.data import eval_images
from crate_jax.data.sampling import sample
from crate_jax.errors import UserError
from crate_jax.models import ENCODERS, widths
from crate_jax.parallel import distributed
from crate_jax.report.section import Figure, Section, Subject, Table
from crate_jax.report.style import tidy
from crate_jax.workdir import checkpoint, checkpoint_files

log = logging.getLogger(__name__)

TITLE = "Can reconstruction teach these labels?"
IMAGES = 10_000  # images for the second moments
BAND_IMAGES = 4000  # training images for the principal components and probes
TEST_IMAGES = 1000
MAX_WIDTH = 512  # alignment is not read above this width, as the time of a setting grows with its square
RATIOS = (0.25, 0.5, 0.75, 0.9)
SHARES = (0.5, 0.9, 0.99)
EDGES = (0, 4, 16, 64, 256, 1024, 4096)  # edges of the bands of principal components, up to their number
MAX_CHECKPOINTS = 8  # checkpoints of a run that are measured


def section(subjects: Sequence[Subject]) -> Section:
    """The section: alignment under corruptions near the runs' own, accuracy by subspace, and error by band.

    Runs with the same images, width and grid of patches share one analysis. Runs with the same images share the
    principal components and the probes on them.

    Raises:
      UserError: an analysis failed and there are several processes. A single process notes the failure in the text.
    """
    figures: list[Figure] = []
    tables: list[Table] = []
    numbers: dict[str, Any] = {"alignment": {}, "subspaces": {}, "bands": {}}
    notes: list[str] = []
    together: dict[tuple, list[tuple[Subject, ConfigDict]]] = {}
    for subject in subjects:
        if subject.config.data.channels != 3:
            notes.append(f"{subject.name}: no alignment, as its images have {subject.config.data.channels} channels.")
    subjects = [subject for subject in subjects if subject.config.data.channels == 3]
    for subject in subjects:
        if subject.train is None or subject.train.class_names is None:
            notes.append(f"{subject.name}: no alignment, as there are no labelled training images.")
            continue
        align = aligned_config(subject)
        size, patch = tuple(align.data.image_size), align.encoder.patch_size
        projection = (align.corruption.rop_buckets, align.corruption.paper_scale)
        key = (subject.train.fingerprint(), align.align.width, size, patch, *projection, *_pixels(subject.config))
        together.setdefault(key, []).append((subject, align))
    for members in together.values():
        name = _label([subject for subject, _ in members])
        subject, align = members[0]
        for kind in ("mask_ratios", "rop_ratios"):
            align.align[kind] = tuple(sorted({ratio for _, config in members for ratio in config.align[kind]}))
        try:
            answer = analyse(align, subject.mesh, subject.train)
            notes.append(_sentence(name, answer))
            figures.append(Figure(_caption(name, answer), plots.gain_by_ratio(answer)))
            tables.append(_alignment_table(name, answer))
            numbers["alignment"][name] = answer.record()
        except UserError as e:
            if distributed.processes() > 1:  # other processes may be in the middle of this analysis
                raise
            notes.append(f"{name}: no alignment ({e}).")
    _bands(subjects, figures, tables, numbers)
    text = (
        "alignment(k) is the share of the label Gram matrix that the k latents of the best linear denoising "
        "auto-encoder hold (Balestriero & LeCun, ICML 2024). It is a closed form of the images, without training. A "
        "corruption that does not raise it at the encoder's width gives a linear model no reason to learn more about "
        f"the labels. At most {IMAGES} images, width at most {MAX_WIDTH}; the sampling error is not shown. "
        + given_means([s for s in subjects if run_steps(s)])
        + " ".join(notes)
    )
    return Section(TITLE, text, tuple(figures), tuple(tables), numbers)


def given_means(subjects: Sequence[Subject]) -> str:
    """A sentence on the runs whose prediction is given each patch's mean and variance; empty if there are none."""
    names = [s.name for s in subjects if s.config.loss.target == "patch_normalised"]
    if not names:
        return ""
    return (
        f"The targets of {', '.join(names)} are normalised by patch: the prediction is given each patch's mean and "
        "variance, so its error is 1 where it is no better than these means, and not the mean image. "
    )


def _pixels(config: ConfigDict) -> tuple:
    """The keys that decide which numbers an image gives to the encoder, and which images are drawn."""
    c = config.data
    return (tuple(c.image_size), tuple(c.mean), tuple(c.std), c.eval_crop, c.interpolation, config.seed)


def _label(subjects: Sequence[Subject]) -> str:
    """The name of one run, or words for several runs.

    The words do not begin with a run's name, so that the page does not hide a shared figure with one run.
    """
    *names, last = [subject.name for subject in subjects]
    return f"Images of {', '.join(names)} and {last}" if names else last


def aligned_config(subject: Subject) -> ConfigDict:
    """The config of a small grid around a run's own corruption, with its images shrunk as job `align` does."""
    full = subject.config.copy_and_resolve_references()
    if not ENCODERS[full.encoder.name].patches and "corruption" not in parts(full, subject.params):
        _choose_patch(full)
    shrink_to_side(full)
    numbers = 3 * int(np.prod(full.data.image_size))
    full.align.width = full.align.latents = min(widths(full)[-1], MAX_WIDTH, numbers)
    side = full.encoder.patch_size
    full.align.patch_sizes = tuple(sorted({1, 2, side}))
    full.align.mask_ratios = full.align.rop_ratios = RATIOS
    own = full.corruption.name if "corruption" in parts(full, subject.params) else ""
    if own == "mask":
        full.align.mask_ratios = tuple(sorted({*RATIOS, full.corruption.mask_ratio}))
    if own == "rop":
        full.align.rop_ratios = tuple(sorted({*RATIOS, full.corruption.rop_ratio}))
    full.evaluation.train_images = IMAGES
    return full


def _choose_patch(config: ConfigDict) -> None:
    """Sets patches that fit where nobody chose any, and smaller images where none fit.

    >>> from crate_jax.config import base
    >>> c = base()
    >>> c.data.image_size, c.encoder.patch_size = (299, 150), 16
    >>> _choose_patch(c)
    >>> c.data.image_size, c.encoder.patch_size
    ((32, 16), 16)
    """
    size, patch, side = config.data.image_size, config.encoder.patch_size, config.align.side
    if max(size) > side * math.gcd(*size, patch):
        config.data.image_size = tuple(max(1, round(n * side / max(size))) for n in size)
    config.encoder.patch_size = math.gcd(*config.data.image_size, patch)


def _sentence(name: str, answer: Answer) -> str:
    best = max(answer.curves, key=answer.gain)
    clean = 100 * answer.clean.alignment_K[answer.width - 1]
    if answer.caution:
        return f"{name}: {clean:.1f} % at width {answer.width}. {answer.caution}."
    if not answer.is_raised(best):
        return f"{name}: {clean:.1f} % at width {answer.width}, and no corruption of the grid raises it."
    return (
        f"{name}: {clean:.1f} % at width {answer.width} without corruption; {best.group} at ratio {best.ratio:.3g} "
        f"raises it most, by {100 * answer.gain(best):.2f} points; never raised by: {', '.join(answer.never())}."
    )


def _caption(name: str, answer: Answer) -> str:
    return (
        f"{name}: points of alignment that a corruption adds at width {answer.width}, against its ratio (mask: removed "
        "share of the patches; rop: kept share of the dimensions). Below 0 the corruption removes what the labels "
        "need. Bars are the numerical error: a point within its bar is 0."
    )


def _alignment_table(name: str, answer: Answer) -> Table:
    rows = tuple(
        (s.family, "x".join(map(str, s.patch)), s.ratio, float(curve.alignment_K[answer.width - 1]), answer.gain(s))
        for s, curve in answer.curves.items()
    )
    clean = float(answer.clean.alignment_K[answer.width - 1])
    columns = ("corruption", "patch (px)", "ratio", f"alignment at {answer.width}", "gain")
    return Table(f"{name}: alignment, shares", columns, (("none", None, None, clean, 0.0), *rows))


def _bands(subjects: Sequence[Subject], figures: list[Figure], tables: list[Table], numbers: dict[str, Any]) -> None:
    """Adds accuracy by subspace if there are labels, and error by band if there are checkpoints with a decoder."""
    together: dict[tuple, list[Subject]] = {}
    for subject in subjects:
        if subject.train is None or not (_has_labels(subject) or run_steps(subject)):
            continue
        evaluated = None if subject.test is None else subject.test.fingerprint()
        c = subject.config.evaluation
        learned = (c.knn_k, c.knn_temperature, repr(c.probe_c))
        key = (subject.train.fingerprint(), evaluated, *_pixels(subject.config), *learned)
        together.setdefault(key, []).append(subject)
    for members in together.values():
        _bands_together(members, figures, tables, numbers)


def _has_labels(subject: Subject) -> bool:
    return all(s is not None and s.class_names is not None for s in (subject.train, subject.test))


def _bands_together(
    subjects: Sequence[Subject], figures: list[Figure], tables: list[Table], numbers: dict[str, Any]
) -> None:
    """Adds the results of :func:`_bands` for runs that have the same images."""
    first = subjects[0]
    config, train, side = first.config, first.train, first.config.align.side
    assert train is not None
    (images, labels), (test_images, test_labels) = (
        eval_images(config, source, np.sort(sample(len(source), count, config.seed)))
        for source, count in ((train, BAND_IMAGES), (first.test or train, TEST_IMAGES))
    )
    rows = bands.rows_of(config, images, side)
    components = bands.components_of(rows, side)
    if _has_labels(first) and labels is not None and test_labels is not None:
        name = _label(subjects)
        test = (bands.rows_of(config, test_images, side), test_labels)
        classes = len(train.class_names or ())
        found = bands.accuracy_by_subspace((rows, labels), test, classes, components, SHARES, config.evaluation)
        caption = (
            f"{name}: accuracy on {len(test_images)} images from the first (top) and from the other (bottom) principal "
            f"components of the pixels, {len(images)} training images"
        )
        columns = ("subspace", "components", "variance", "probe", "k-NN")
        if found:
            tables.append(
                Table(caption, columns, tuple((f.place, f.dimensions, f.variance, f.probe, f.knn) for f in found))
            )
        numbers["subspaces"][name] = [vars(f) for f in found]
    edges = [e for e in EDGES if e < len(components.variances_K)] + [len(components.variances_K)]
    names = [f"{a + 1}..{b}" for a, b in zip(edges, edges[1:], strict=False)]
    for subject in subjects:
        steps = run_steps(subject)
        if not steps or subject.workdir is None:
            continue
        errors = bands.errors_of(subject.config, side)
        found_by_step = []
        for step in steps:
            start = time.monotonic()
            params = checkpoint.read_params(subject.workdir, step, judged=True)[0]
            found_by_step.append(
                bands.reconstruction_by_band(subject.config, params, test_images, components, edges, errors)
            )
            seconds = time.monotonic() - start
            log.info("%s: error by band at step %d of %d (%.1f s)", subject.name, step, steps[-1], seconds)
        by_step = np.stack(found_by_step)
        probes = logged_probes(subject, steps)
        numbers["bands"][subject.name] = {"steps": steps, "edges": edges, "error": by_step, "probe": probes}
        caption = (
            f"{subject.name}: error of the reconstruction by band of principal components (1: no better than the mean "
            "image) at the checkpoints that the run kept, and the accuracy of a linear probe at these steps"
        )
        table = tuple((s, *map(float, e), probe) for s, e, probe in zip(steps, by_step, probes, strict=True))
        tables.append(Table(caption, ("step", *names, "probe"), table))
        figures.append(Figure(f"{caption}.", band_figure(steps, names, by_step, probes)))


def run_steps(subject: Subject) -> list[int]:
    """At most MAX_CHECKPOINTS steps of the run's checkpoints, spread evenly; no steps if the run has no decoder."""
    if subject.workdir is None or "decoder" not in subject.params:
        return []
    steps = sorted(checkpoint_files.steps(subject.workdir / checkpoint.FOLDER))
    if len(steps) <= MAX_CHECKPOINTS:
        return steps
    return [steps[i] for i in np.linspace(0, len(steps) - 1, MAX_CHECKPOINTS).round().astype(int)]


def logged_probes(subject: Subject, steps: Sequence[int]) -> list[float | None]:
    """Top-1 accuracy (a share) of the probe that the run logged at each step; None where it logged none."""
    metrics = records.read(subject.workdir).metrics
    found = {line["step"]: line["probe_top1"] for line in metrics if line.get("probe_top1") is not None}
    return [found.get(step) for step in steps]


def band_figure(
    steps: Sequence[int], names: Sequence[str], error_SL: np.ndarray, probe_S: Sequence[float | None]
) -> Plot:
    """Plots the error against the step, one line per band, or against the band if there is only one step.

    The probe's accuracy has an axis of its own, at the steps that have a probe.

    Args:
      steps: the S steps.
      names: the L bands.
      error_SL: the errors, from :func:`crate_jax.analysis.alignment.bands.reconstruction_by_band`.
      probe_S: the accuracies (shares), or None.
    """
    picture = Plot(figsize=(4.4, 3.6), layout="constrained")
    ax = picture.subplots()
    if len(steps) == 1:
        ax.bar(names, error_SL[0])
        ax.tick_params(axis="x", labelrotation=30)
        ax.set_xlabel("principal components")
    else:
        for name, errors in zip(names, error_SL.T, strict=True):
            ax.plot(steps, errors, "o-", markersize=3, label=name)
        ax.set_xlabel("step")
        # Below the axes: the lines may cross every corner.
        picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, title="components")
        points = [(s, 100 * p) for s, p in zip(steps, probe_S, strict=True) if p is not None]
        if points:
            right = ax.twinx()
            right.plot(*zip(*points, strict=True), "k:s", markersize=3)
            right.set_ylabel("probe accuracy (%), dotted")
            right.spines[["top", "left"]].set_visible(False)
    tidy(ax, "error / variance")
    return picture
