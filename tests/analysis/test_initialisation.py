"""Theorem 2 of the alignment paper: the experiments against other ways to the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from crate_jax.analysis.alignment import initialisation

pytestmark = pytest.mark.one_python


def test_no_free_latents_are_better_than_the_minimum_and_alternating_least_squares_finds_it():
    """W and Z are best for the latents, then the latents for W and Z."""
    x, y = initialisation.images(50)
    lam, rng = 0.7, np.random.default_rng(0)
    both = np.concatenate([y, np.sqrt(lam) * x])
    latents = rng.normal(size=(initialisation.K, 50))
    for _ in range(3000):
        maps = both @ np.linalg.pinv(latents)
        latents = np.linalg.pinv(maps) @ both
    found = np.square(maps @ latents - both).sum()
    least = initialisation.free_minimum(x, y, initialisation.K, lam)
    assert least <= found * (1 + 1e-12) and found == pytest.approx(least, rel=1e-6)


def test_a_linear_encoder_reaches_it_with_few_images_or_without_labels():
    for count, lam, gap in ((20, 0.1, 0), (200, 0.1, 0.5), (200, 1e5, 0)):
        x, y = initialisation.images(count)
        ratio = initialisation.linear_minimum(x, y, 4, lam) / initialisation.free_minimum(x, y, 4, lam)
        assert ratio - 1 > gap if gap else ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("free", "curved"), [(True, True), (True, False), (False, False)])
def test_gradients_are_those_of_the_loss(free, curved):
    """Along a random direction, by central differences."""
    x, _ = initialisation.images(7)
    model = initialisation.model(7, 0.4, free, curved)
    rng = np.random.default_rng(1)
    tangents = [rng.normal(size=part.shape) for part in (model.features(x), model.inner, model.outer)]

    def loss(shift: float) -> float:
        parts = zip((model.features(x), model.inner, model.outer), tangents, strict=True)
        latents, inner, outer = (part + shift * tangent for part, tangent in parts)
        moved = initialisation.Model(latents, None, inner, outer, curved)
        return np.square(moved.output(x) - x).sum() / 2

    slope = sum(np.sum(g * t) for g, t in zip(model.gradient(x), tangents, strict=True))
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


def test_small_latents_make_a_curved_decoder_linear_and_all_models_turn_to_the_principal_subspace():
    """Tanh has no even powers, so the difference falls with the square of the scale."""
    assert initialisation.difference(0.03) / initialisation.difference(0.01) == pytest.approx(9, rel=0.1)
    for kind in ((False, False), (True, False), (True, True)):
        shares = initialisation.descend(*kind)
        assert list(shares) == list(initialisation.FALLEN)
        assert 0.4 < shares[0.1] < shares[0.5] < shares[0.9] and shares[0.9] > 0.9
