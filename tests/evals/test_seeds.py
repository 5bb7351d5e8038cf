"""Statistics over seeds: what is called clear must be, and noise must not be called a result."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from crate_jax.evals import seeds

pytestmark = pytest.mark.one_python

NOISE = np.random.default_rng(3).normal(size=(3, 5))


def by_seed(numbers):
    return dict(enumerate(map(float, numbers)))


def test_a_pair_is_tested_as_scipy_tests_it_on_the_seeds_that_both_have():
    a, b = 0.4 + 0.01 * NOISE[0], 0.38 + 0.01 * NOISE[1]
    found = seeds.paired({**by_seed(a), 77: 0.9}, {**by_seed(b), 88: 0.1})
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue) and found.seeds == 5
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))


def test_what_pairs_share_is_no_noise():
    """Seeds that move both recipes alike hide no difference between them."""
    shared = by_seed(0.1 * NOISE[0])
    better = {seed: x + 0.01 + 0.001 * NOISE[1, seed] for seed, x in shared.items()}
    assert seeds.paired(better, shared).clear
    assert stats.ttest_ind(list(better.values()), list(shared.values())).pvalue > 0.5


def test_p_values_are_corrected_for_the_number_of_comparisons():
    """Holm: the smallest of three times 3, the next times 2, none below one that comes before it."""
    reference = by_seed(np.zeros(5))
    recipes = [by_seed(shift + 0.1 * NOISE[i]) for i, shift in enumerate((0.4, 0.3, 0.05))]
    raw = [seeds.paired(r, reference).p for r in recipes]
    found = [d.p for d in seeds.compare([*recipes, reference], 3)[:3]]
    order = np.argsort(raw)
    steps = [min(1.0, raw[i] * (3 - rank)) for rank, i in enumerate(order)]
    assert [found[i] for i in order] == pytest.approx(np.maximum.accumulate(steps))
    assert sum(p < seeds.CLEAR for p in raw) > sum(p < seeds.CLEAR for p in found) > 0


def test_noise_has_no_best_and_a_clear_lead_has():
    noise = [by_seed(0.5 + 0.01 * row) for row in NOISE]
    assert seeds.best(noise) is None
    lead = by_seed(0.6 + 0.01 * NOISE[2])
    assert seeds.best([noise[0], lead, noise[1]]) == 1
    assert seeds.best([noise[0], lead, lead]) is None  # two that lead


@pytest.mark.parametrize("recipes", [[], [{0: 0.9}], [{0: 0.9}, {0: 0.1}], [{0: 0.9, 1: 0.8}, {}]])
def test_too_few_seeds_or_recipes_have_no_best(recipes):
    assert seeds.best(recipes) is None
    assert all(d is None for i in range(len(recipes)) for d in seeds.compare(recipes, i))


def test_differences_without_spread_are_not_called_clear():
    same = seeds.paired({0: 0.2, 1: 0.3}, {0: 0.1, 1: 0.2})
    assert same.value == pytest.approx(0.1) and not same.clear
    assert np.isnan([same.low, same.high, same.p]).all()  # an interval of no width would look like certainty
