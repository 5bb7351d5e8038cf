"""How fast subspaces are learned: fits against curves that are known, frequencies of waves, and what goes with what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from crate_jax import data
from crate_jax.analysis.alignment import bands, section, speed
from crate_jax.data import eval_images
from crate_jax.models import autoencoder
from crate_jax.parallel import sharding
from crate_jax.report import Subject
from crate_jax.report.section import Absent
from crate_jax.workdir import checkpoint

pytestmark = pytest.mark.one_python
STEPS = [100, 250, 400, 700, 1000, 1700, 2500]


def test_a_fit_finds_the_rate():
    """An error above that of the mean image says nothing about the rate; what never falls below it has the rate 0."""
    t = np.array(STEPS)[:, None]
    rate = np.array([0.004, 0.0007, 0.00003])
    curves = np.exp(-rate * t)
    found = speed.fit(STEPS, curves)
    np.testing.assert_allclose(found.rate, rate, rtol=0.02)
    assert (found.misfit < 0.005).all() and (found.last == curves[-1]).all()
    noise = 0.01 * np.random.default_rng(0).normal(size=curves.shape)
    np.testing.assert_allclose(speed.fit(STEPS, curves + noise).rate[:2], rate[:2], rtol=0.1)
    above = np.linspace(7, 1.1, 7)[:, None]
    assert speed.fit(STEPS, above).rate == 0 and speed.fit(STEPS, above).last == 1.1
    late = np.exp(-0.00003 * t)
    loud = np.where(t < 300, 5, late)
    np.testing.assert_allclose(speed.fit(STEPS, loud).rate, speed.fit(STEPS, late).rate, rtol=0.1)


def test_waves_are_a_basis_with_known_frequencies():
    waves, frequency = speed.waves(6, 10, 3)
    np.testing.assert_allclose(waves.T @ waves, np.eye(180), atol=1e-12)
    assert (frequency[:3] == 0).all() and (np.diff(frequency) >= 0).all()
    image = np.zeros((6, 10, 3))  # three half periods down, five to the right, in green
    image[..., 1] = np.outer(
        np.cos(3 * np.pi * (np.arange(6) + 0.5) / 6), np.cos(5 * np.pi * (np.arange(10) + 0.5) / 10)
    )
    share = np.square(waves.T @ image.ravel()) / np.square(image).sum()
    assert frequency @ share == pytest.approx(np.hypot(3, 5) / 2)


def test_what_sets_the_rate_is_told_from_what_goes_with_it():
    """Components of which frequency goes with variance, and waves; the rates follow one of the two."""
    rng = np.random.default_rng(0)
    variance = np.sort(np.exp(rng.normal(size=800) * 2))[::-1]
    frequency = 10 - np.log(variance) + rng.normal(size=800)
    ring = np.sort(rng.uniform(0, 9, 800))
    found = {}
    for what, of in (("variance", np.append(variance, np.exp(-ring))), ("frequency", 1 / np.append(frequency, ring))):
        rates = lambda groups, of=of: np.array([of[group].mean() for group in groups])  # noqa: E731
        found[what] = speed.answer(rates, variance, frequency, ring)
    one, other = found.values()
    whole = (one.variance, one.frequency, one.variance_within, other.frequency, other.frequency_within)
    assert whole == pytest.approx((1,) * 5)
    assert (one.bands, one.bands_within) == (28, 21)  # of 32: the first edges fall together
    assert other.variance > 0.8  # frequency and variance go together
    assert one.frequency_within < 0.3 and other.variance_within < 0.3
    (alone,) = speed.cells(np.arange(800.0), frequency)[-1:]
    assert np.concatenate(alone).max() == 799 and frequency[alone[0]].max() < frequency[alone[2]].min()


def test_the_section_has_the_rates_of_the_bands(tmp_path, monkeypatch):
    """Of a run with four checkpoints, against the errors by band; a run with three says nothing."""
    c = quickstart.get_config("debug")
    saved = checkpoint.Checkpoints(tmp_path, 9)
    params = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))()
    head = params["decoder"]["head"]
    for step in (1, 3, 5, 7):
        params["decoder"]["head"] = {name: x * 2.0**-step for name, x in head.items()}
        saved.save(step, params, {"step": jnp.int32(step)}, {"config": c.to_dict()})
    saved.close()
    splits = [data.open_split(c, s) for s in ("train", "eval")]
    subject = Subject(
        "quick", c, checkpoint.read_params(tmp_path)[0], tmp_path, *splits, sharding.make_mesh(1, 1, jax.devices()[:1])
    )
    made = speed.section([subject])
    found = made.numbers["quick"]
    assert found["steps"] == [1, 3, 5, 7] and len(made.tables) == 2 and len(made.figures) == 1
    assert all(len(row) == len(table.columns) for table in made.tables for row in table.rows)
    assert "quick, over 22 bands of components and within 9: more variance" in made.text  # of 61
    side, every = c.align.side, np.arange(len(splits[0]))
    images, tests = (eval_images(c, source, every[: len(source)])[0] for source in splits)
    components = bands.components_of(bands.rows_of(c, images, side), side)
    along, edges = bands.errors_of(c, side), [0, 4, 16, 61]  # digits are grey, and 3 of their 64 pixels are always 0
    assert found["variance"]["bands"] == ["1..4", "5..16", "17..61"]
    errors = [
        bands.reconstruction_by_band(c, checkpoint.read_params(tmp_path, step)[0], tests, components, edges, along)
        for step in (1, 3, 5, 7)
    ]
    expected = speed.fit([1, 3, 5, 7], np.stack(errors))
    np.testing.assert_allclose(found["variance"]["last"], expected.last, rtol=1e-4)
    np.testing.assert_allclose(found["variance"]["rate"], expected.rate)
    monkeypatch.setattr(section, "MAX_CHECKPOINTS", 3)
    with pytest.raises(Absent, match="kept 4 checkpoints"):
        speed.section([subject])
