"""What a number tells that was measured with several seeds: its spread, and whether two recipes differ in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CLEAR = 0.05  # a difference is clear if its p-value is below this
LEVEL = 0.95  # of the intervals


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
      value: the mean.
      std: the sample standard deviation, which estimates the spread of single runs; 0 for one seed.
      low: the lower end of the 95 % interval of the mean (Student's t); NaN for one seed, and if all numbers are equal,
        as few test images make likely: then nothing tells how the next seed would differ.
      high: its upper end.
      seeds: the number of seeds.
    """

    value: float
    std: float
    low: float
    high: float
    seeds: int


def mean(values: Sequence[float]) -> Mean | None:
    """The mean of at least one number, one per seed; None of no number.

    >>> [round(x, 3) for x in dataclasses.astuple(mean([1.0, 3.0, 2.0]))]
    [2.0, 1.0, -0.484, 4.484, 3]
    """
    if not values:
        return None
    middle, count = float(np.mean(values)), len(values)
    std = float(np.std(values, ddof=1)) if np.ptp(values) else 0.0
    low, high = _t_test(values).confidence_interval(LEVEL) if std else (np.nan, np.nan)
    return Mean(middle, std, float(low), float(high), count)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two recipes that were run with the same seeds.

    Attributes:
      value: the mean of the differences, seed by seed.
      low: the lower end of its 95 % interval; NaN where p is.
      high: its upper end.
      p: the p-value of a paired t-test, two-sided; :func:`compare` corrects it for the number of comparisons. NaN
        where all differences are equal, so that there is no spread to compare with.
      seeds: the number of seeds that both have.
    """

    value: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the difference is larger than what seeds explain."""
        return self.p < CLEAR


def paired(recipe: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Compares two recipes over the seeds that both have; None if these are fewer than two.

    A pair has the same order of images and, where the recipes allow it, the same initial weights, so that the
    differences spread less than the numbers.

    Args:
      recipe: {seed: number}.
      reference: {seed: number} of the other recipe.

    >>> found = paired({0: 3.0, 1: 4.5, 2: 3.5}, {0: 2.0, 1: 3.0, 2: 2.5, 7: 9.0})
    >>> [round(x, 3) for x in dataclasses.astuple(found)], found.clear
    ([1.167, 0.45, 1.884, 0.02, 3], True)
    """
    both = sorted(recipe.keys() & reference.keys())
    differences = [round(recipe[s] - reference[s], 12) for s in both]  # rounding errors of equal ones are no spread
    found = mean(differences)
    if found is None or found.seeds < 2:
        return None
    p = float(_t_test(differences).pvalue) if found.std else np.nan
    return Difference(found.value, found.low, found.high, p, found.seeds)


def compare(recipes: Sequence[Mapping[int, float]], reference: int) -> list[Difference | None]:
    """The difference of each recipe from recipe number `reference`; None for itself and where there are too few seeds.

    The p-values are corrected for the number of comparisons (Holm, 1979): the chance that any of them is below 0.05
    without a true difference is at most 0.05.

    >>> a, b = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.4, 2: 3.3}
    >>> [d and round(d.p, 3) for d in compare([a, b], 0)], [d and round(d.p, 3) for d in compare([a, b, a], 0)]
    ([None, 0.094], [None, 0.094, nan])
    """
    found = [None if i == reference else paired(r, recipes[reference]) for i, r in enumerate(recipes)]
    tested = sorted(((d.p, i, d) for i, d in enumerate(found) if d is not None and d.p == d.p), key=lambda x: x[0])
    largest = 0.0
    for rank, (p, i, difference) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        found[i] = dataclasses.replace(difference, p=largest)
    return found


def best(recipes: Sequence[Mapping[int, float]]) -> int | None:
    """The number of the recipe whose mean is larger than that of every other one, each difference being clear."""
    if len(recipes) < 2:
        return None
    first = int(np.argmax([float(np.mean(list(r.values()))) if r else -np.inf for r in recipes]))
    others = [d for i, d in enumerate(compare(recipes, first)) if i != first]
    return first if all(d is not None and d.clear for d in others) else None


def _t_test(values: Sequence[float]) -> Any:
    """Student's test of the mean against 0."""
    from scipy.stats import ttest_1samp  # takes half a second to import

    return ttest_1samp(values, 0.0)
