"""How fast a run learns each subspace of the images: rates by bands of variance and by bands of frequency.

Balestriero & LeCun (ICML 2024, arXiv 2402.11337) find that reconstruction learns the subspaces of little variance
exponentially later than those of much. A question about their talk is whether that is only the frequency principle:
networks fit low frequencies first. In natural images the two go together. So the order of the rates is compared with
both, also within bands of principal components that have nearly the same of one and differ in the other.

Shapes: S checkpoints, D numbers per (shrunk) image, K directions, L groups of directions.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot

from crate_jax.analysis.alignment import bands
from crate_jax.analysis.alignment.section import BAND_IMAGES, EDGES, TEST_IMAGES, given_means, run_steps
from crate_jax.data import eval_images
from crate_jax.data.sampling import sample
from crate_jax.report.section import Absent, Figure, Section, Subject, Table
from crate_jax.report.style import tidy
from crate_jax.workdir import checkpoint

log = logging.getLogger(__name__)

LEAST_CHECKPOINTS = 4
RINGS = (0, 0.25, 1, 2, 4, 8, 64)  # edges of the bands of frequency, cycles per image; the first is the mean colour
BANDS, PARTS = 32, 3  # bands at most whose order is compared, and parts of each
RATES = 400  # that the fit tries


def waves(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosine basis (DCT-II) of images of the given size, and the frequency of each of its vectors.

    Returns:
      vectors (D, D), orthonormal, one per column, in the order of the frequencies; and frequencies (D,) in cycles per
      image, sqrt(u^2 + v^2) / 2 for u and v half periods along the sides.
    """
    rows, columns = (
        np.cos(np.pi * (np.arange(n)[:, None] + 0.5) * np.arange(n) / n) * np.sqrt(np.where(np.arange(n), 2, 1) / n)
        for n in (height, width)
    )
    vectors = np.kron(np.kron(rows, columns), np.eye(channels))
    radius = np.hypot(np.arange(height)[:, None], np.arange(width)[None, :]) / 2
    frequency = np.repeat(radius.ravel(), channels)
    order = np.argsort(frequency, kind="stable")
    return vectors[:, order], frequency[order]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Curves error(t) = exp(-rate t) that fit errors best, for L groups.

    Attributes:
      rate: per step, (L,); 0 where the error never lies below 1.
      misfit: the root of the mean squared difference between curve and errors, (L,).
      last: the error at the last step, (L,).
    """

    rate: np.ndarray
    misfit: np.ndarray
    last: np.ndarray


def fit(steps: Sequence[int], error_SL: np.ndarray) -> Fit:
    """Fits one rate per group by least squares, from 1, the error of the mean image, to 0.

    An error above 1, which the noise of an untrained network makes, counts as 1: nothing is learned yet. A curve with a
    floor would take the fall of that noise for learning. Rates are tried on a logarithmic grid, and 0.

    Args:
      steps: S steps, ascending.
      error_SL: the errors at these steps.
    """
    t_S = np.asarray(steps, float)
    rates_R = np.append(0, np.geomspace(1e-3 / t_S[-1], 5 / t_S[0], RATES))
    differences_RSL = np.exp(-rates_R[:, None] * t_S)[..., None] - np.minimum(error_SL, 1)
    misfit_RL = np.sqrt(np.square(differences_RSL).mean(1))
    return Fit(rates_R[misfit_RL.argmin(0)], misfit_RL.min(0), error_SL[-1])


def cells(first_K: np.ndarray, second_K: np.ndarray, parts: int = PARTS) -> list[list[np.ndarray]]:
    """Bands of directions of nearly the same `first`, each cut into parts of equal size by `second`.

    There are BANDS bands at most, whose edges are spread evenly over the logarithm of the rank: equal edges make one,
    and bands of fewer than `parts` directions are left out.

    Args:
      first_K: a number of each direction; the smallest come first.
      second_K: another one.
      parts: the number of parts of a band.

    Returns:
      for each band the directions' indices in each part.

    >>> [[part.tolist() for part in band] for band in cells(np.array([3, 1, 2]), np.array([0, 7, 5]), 1)]
    [[[1]], [[2]], [[0]]]
    """
    edges = np.unique(np.geomspace(1, len(first_K) + 1, BANDS + 1).astype(int)) - 1
    order = np.argsort(first_K, kind="stable")
    wide = [order[a:b] for a, b in itertools.pairwise(edges) if b - a >= parts]
    return [np.array_split(band[np.argsort(second_K[band], kind="stable")], parts) for band in wide]


def falls(rate_BP: np.ndarray) -> float:
    """The mean over B rows of Spearman's rank correlation of falling order and rate; constant rows are left out.

    >>> round(falls(np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [0.0, 0.0, 0.0]])), 6)
    0.75
    """
    from scipy.stats import spearmanr  # takes half a second to import

    rows = [row for row in rate_BP if np.ptp(row) > 0]
    order = -np.arange(rate_BP.shape[1])
    return float(np.mean([spearmanr(order, row).statistic for row in rows])) if rows else float("nan")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the order of the rates goes with, as rank correlations: 1 is always, 0 not at all.

    Attributes:
      variance: more variance is learned sooner, over bands of principal components.
      frequency: a lower frequency is learned sooner, over bands of waves.
      variance_within: more variance sooner, within bands of components of nearly the same frequency.
      frequency_within: a lower frequency sooner, within bands of components of nearly the same variance.
      bands, bands_within: the number of bands of components over which the first goes, and of those within which the
        last two do.
    """

    variance: float
    frequency: float
    variance_within: float
    frequency_within: float
    bands: int
    bands_within: int


def section(subjects: Sequence[Subject]) -> Section:
    """The section: rates by band of variance and of frequency for each run with LEAST_CHECKPOINTS checkpoints or more.

    Raises:
      Absent: there is no such run.
    """
    chosen = [s for s in subjects if s.config.data.channels == 3 and s.train is not None]
    chosen = [s for s in chosen if len(run_steps(s)) >= LEAST_CHECKPOINTS]
    parts = [_of_run(subject) for subject in chosen]
    if not parts:
        raise Absent(
            f"no run with a decoder and images of three channels kept {LEAST_CHECKPOINTS} checkpoints, see "
            "config.save.keep"
        )
    figures, tables, sentences, numbers = zip(*parts, strict=True)
    return Section(
        title="What is learned when?",
        text="Rates at which the error of the reconstruction falls from that of the mean image, by curves exp(-rate "
        "step) fitted to the checkpoints that the run kept (Balestriero & LeCun, ICML 2024). Bands of variance hold "
        "principal components of the images, bands of frequency cosine waves. The order of the rates is compared with "
        "both over the given numbers of bands, as rank correlations: 1 is always, 0 not at all; also within bands of "
        f"components of nearly the same frequency or variance, cut into {PARTS}. The learning rate's schedule is in "
        "all rates. " + given_means(chosen) + " ".join(sentences),
        figures=figures,
        tables=tuple(itertools.chain(*tables)),
        numbers={s.name: n for s, n in zip(chosen, numbers, strict=True)},
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rates of a run.

    Attributes:
      steps: the steps of the S checkpoints.
      of_variance: name of each band of variance -> its directions.
      of_frequency: name of each band of frequency -> its directions.
      by_variance, by_frequency: their fits.
      answer: what the order of the rates goes with.
    """

    steps: list[int]
    of_variance: dict[str, np.ndarray]
    of_frequency: dict[str, np.ndarray]
    by_variance: Fit
    by_frequency: Fit
    answer: Answer


def measure(subject: Subject) -> Measured:
    """The rates of a run with training images and a decoder; principal components and waves share each pass."""
    config, train, side = subject.config, subject.train, subject.config.align.side
    assert train is not None and subject.workdir is not None
    (images, _), (test_images, _) = (
        eval_images(config, source, np.sort(sample(len(source), count, config.seed)))
        for source, count in ((train, BAND_IMAGES), (subject.test or train, TEST_IMAGES))
    )
    components = bands.components_of(bands.rows_of(config, images, side), side)
    box = bands.box_of(tuple(config.data.image_size), side)
    height, width = (n // box for n in config.data.image_size)
    waves_DD, ring_D = waves(height, width, 3)
    both_DJ = np.concatenate([components.vectors_DK, waves_DD], axis=1)
    steps, errors, totals = run_steps(subject), bands.errors_of(config, side), []
    for step in steps:
        params = checkpoint.read_params(subject.workdir, step, judged=True)[0]
        totals.append(bands.totals_along(config, params, test_images, components.mean_D, both_DJ, errors))
        log.info("%s: error by direction at step %d of %d", subject.name, step, steps[-1])
    total_SJK, K = np.stack(totals), len(components.variances_K)

    def fitted(groups: Iterable[np.ndarray]) -> Fit:
        sums_SJL = np.stack([total_SJK[:, :, group].sum(-1) for group in groups], axis=-1)
        return fit(steps, sums_SJL[:, 0] / np.maximum(sums_SJL[:, 1], 1e-12))

    edges = [*(e for e in EDGES if e < K), K]
    of_variance = {f"{a + 1}..{b}": np.arange(a, b) for a, b in itertools.pairwise(edges)}
    rings = {(a, b): K + np.flatnonzero((ring_D >= a) & (ring_D < b)) for a, b in itertools.pairwise(RINGS)}
    of_frequency = {f"{a:g} to {b:g}": group for (a, b), group in rings.items() if len(group)}
    frequency_K = ring_D @ np.square(waves_DD.T @ components.vectors_DK)
    return Measured(
        steps, of_variance, of_frequency, fitted(of_variance.values()), fitted(of_frequency.values()),
        answer(lambda groups: fitted(groups).rate, components.variances_K, frequency_K, ring_D),
    )  # fmt: skip


def answer(
    rates: Callable[[list[np.ndarray]], np.ndarray],
    variance_K: np.ndarray,
    frequency_K: np.ndarray,
    ring_D: np.ndarray,
) -> Answer:
    """Compares the order of rates with variance and with frequency.

    Args:
      rates: the function from groups of directions to their rates; components have the numbers from 0, waves from K.
      variance_K: the components' variances.
      frequency_K: the components' frequencies.
      ring_D: the waves' frequencies.
    """

    def order(first: np.ndarray, second: np.ndarray, parts: int, start: int = 0) -> float:
        found = cells(first, second, parts)
        if not found:
            return float("nan")
        rate = rates([start + part for band in found for part in band])
        return falls(rate.reshape(1, -1) if parts == 1 else rate.reshape(-1, parts))

    return Answer(
        order(-variance_K, frequency_K, 1), order(ring_D, ring_D, 1, len(variance_K)),
        order(frequency_K, -variance_K, PARTS), order(-variance_K, frequency_K, PARTS),
        *(len(cells(variance_K, frequency_K, parts)) for parts in (1, PARTS)),
    )  # fmt: skip


def _of_run(subject: Subject) -> tuple[Figure, list[Table], str, dict[str, Any]]:
    m = measure(subject)
    kinds = (
        ("variance", "components", m.of_variance, m.by_variance),
        ("frequency", "cycles per image", m.of_frequency, m.by_frequency),
    )
    columns = ("rate per 1000 steps", "misfit", "last error")
    tables = [
        Table(f"{subject.name}: rate by band of {what}", (of, *columns), _rows(groups, found))
        for what, of, groups, found in kinds
    ]
    a = m.answer
    sentence = (
        f"{subject.name}, over {a.bands} bands of components and within {a.bands_within}: more variance is learned "
        f"sooner {a.variance:.2f} (among components of one frequency {a.variance_within:.2f}), a lower frequency is "
        f"learned sooner {a.frequency:.2f} (among components of one variance {a.frequency_within:.2f})."
    )
    numbers: dict[str, Any] = {"steps": m.steps, "answer": vars(a)}
    numbers |= {what: {"bands": list(groups), **vars(found)} for what, _, groups, found in kinds}
    return Figure(f"{subject.name}: rate of each band.", _plot(m)), tables, sentence, numbers


def _rows(groups: dict[str, np.ndarray], found: Fit) -> tuple[tuple[Any, ...], ...]:
    numbers = zip(groups, 1000 * found.rate, found.misfit, found.last, strict=True)
    return tuple((name, *map(float, row)) for name, *row in numbers)


def _plot(m: Measured) -> Plot:
    picture = Plot(figsize=(7.2, 3.2), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    for ax, groups, found, of in (
        (left, m.of_variance, m.by_variance, "principal components"),
        (right, m.of_frequency, m.by_frequency, "cycles per image"),
    ):
        ax.bar(list(groups), 1000 * found.rate)
        ax.tick_params(axis="x", labelrotation=30)
        ax.set_xlabel(of)
    if (m.by_variance.rate > 0).all() and (m.by_frequency.rate > 0).all():
        left.set_yscale("log")
    tidy(left, "rate per 1000 steps")
    tidy(right)
    return picture
