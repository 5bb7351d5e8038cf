"""The noise of projections and masks, and how many there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from crate_jax.analysis import projection

pytestmark = pytest.mark.one_python

RNG = np.random.default_rng(5)
X, Y = RNG.normal(size=12), RNG.normal(size=12) + 0.5


@pytest.mark.parametrize("name", ["mask", "rop"])
def test_the_measured_noise_is_the_closed_form(name):
    found = projection.noise(name, np.stack([X, Y], 1), np.stack([Y, Y], 1), kept=4, draws=8_000)
    assert found.measured == pytest.approx(found.exact, rel=0.08)  # the error of a variance of 8,000 draws is 2 %


def test_projections_keep_their_bound_and_masks_do_not():
    one = np.eye(12)[3]
    for x, y in ((X, Y), (X, X), (one, one), (np.ones(12), Y)):
        assert projection.variance_of_projections(x, y, 4) <= projection.bound(x, y, 4)
    assert projection.variance_of_masks(one, one, 4) == pytest.approx(2) and projection.bound(one, one, 4) == 0.5
    assert projection.variance_of_projections(one, one, 4) == 0  # a token alone in its bucket comes back whole


def test_patterns_are_counted_as_they_are():
    """All draws for six tokens in two buckets, written out."""
    seen = set()
    for runs in itertools.product(itertools.permutations(range(2)), repeat=3):
        bucket = np.concatenate(runs)
        for signs in itertools.product((-1, 1), repeat=6):
            sketch = np.array([[s * (b == k) for b, s in zip(bucket, signs, strict=True)] for k in range(2)])
            seen.add((sketch.T @ sketch).tobytes())
    assert 2 ** projection.patterns(6, 2)["rop"] == pytest.approx(len(seen)) == 64
    assert 2 ** projection.patterns(6, 2)["mask"] == pytest.approx(15)
