"""Runs that differ in their seed are one recipe; recipes are compared seed by seed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from configs import quickstart
from crate_jax.analysis import recipes
from crate_jax.report import Subject
from crate_jax.report.section import Estimate

pytestmark = pytest.mark.one_python

PROBES = {0.25: (0.5, 0.52, 0.49), 0.75: (0.552, 0.571, 0.54)}  # of seeds 0, 1 and 2


def subject(folder, ratio, seed, probe, **log):
    c = quickstart.get_config("debug")
    c.corruption.mask_ratio, c.seed = ratio, seed
    for key, value in log.items():
        c.log[key] = value
    workdir = folder / f"r={ratio},s={seed}"
    workdir.mkdir()
    (workdir / "summary.json").write_text(json.dumps({"probe_top1": probe, "steps": 4}))
    return Subject(workdir.name, c, {}, workdir, None, None, None)


@pytest.fixture
def subjects(tmp_path):
    return [subject(tmp_path, r, seed, p, every=seed + 1) for r, ps in PROBES.items() for seed, p in enumerate(ps)]


def test_runs_that_differ_in_their_seed_are_one_recipe(subjects):
    """Keys without effect on the numbers, such as log.every, do not separate them."""
    found = recipes.group(subjects)
    assert {name: [s.config.seed for s in runs] for name, runs in found.items()} == {
        "corruption.mask_ratio=0.25": [0, 1, 2], "corruption.mask_ratio=0.75": [0, 1, 2]
    }  # fmt: skip


def test_the_section_has_means_and_paired_differences(subjects):
    section = recipes.section(subjects)
    means, differences = section.tables
    assert means.columns == ("recipe", "seeds", "probe %", "deviation of probe %")
    (_, count, low, deviation), (_, _, high, _) = means.rows
    assert count == 3 and deviation == pytest.approx(1.5275, abs=1e-4)
    assert (low.value, low.low, low.high, low.best) == pytest.approx((50.333, 46.539, 54.128, False), abs=1e-3)
    assert high.value == pytest.approx(55.433, abs=1e-3) and high.best
    ((name, score, pairs, difference, p, verdict),) = differences.rows
    assert (name, score, pairs, verdict) == ("corruption.mask_ratio=0.75", "probe %", 3, "clear")
    assert isinstance(difference, Estimate) and difference.value == pytest.approx(5.1) and p < 0.001
    assert difference.high - difference.low < (low.high - low.low) / 10  # the seeds move both recipes alike
    assert section.numbers["probe_top1"]["corruption.mask_ratio=0.25"] == {"0": 0.5, "1": 0.52, "2": 0.49}


def test_a_difference_within_the_noise_is_called_so(tmp_path):
    runs = [
        subject(tmp_path, r, seed, p)
        for r, seed, p in ((0.25, 0, 0.5), (0.25, 1, 0.6), (0.75, 0, 0.61), (0.75, 1, 0.52))
    ]
    means, differences = recipes.section(runs).tables
    assert not any(row[2].best for row in means.rows)
    assert differences.rows[0][-1] == "within the noise"
    other = tmp_path / "equal"
    other.mkdir()
    scores = ((0.25, 0, 0.4), (0.25, 1, 0.4), (0.75, 0, 0.38), (0.75, 1, 0.38))
    runs = [subject(other, r, seed, p) for r, seed, p in scores]
    means, differences = recipes.section(runs).tables
    assert [row[2] for row in means.rows] == [pytest.approx(40), pytest.approx(38)]
    assert differences.rows[0][3:] == (pytest.approx(-2), None, "not tested: it is the same for each seed")


def test_runs_of_one_recipe_and_seed_count_as_one_and_are_named(tmp_path):
    """Whatever their order is."""
    runs = [subject(tmp_path, 0.25, seed, 0.5 + seed / 10) for seed in (0, 1)]
    (tmp_path / "again").mkdir()
    again = subject(tmp_path / "again", 0.25, 0, 0.9)
    runs.append(dataclasses.replace(again, name="again"))
    for order in (runs, runs[::-1]):
        section = recipes.section(order)
        assert section.numbers["probe_top1"] == {"all runs": {"0": pytest.approx(0.7), "1": pytest.approx(0.6)}}
        assert "Runs with the same seed count as one, their mean: all runs (seed 0)." in section.text


def test_runs_of_one_seed_have_no_such_section(subjects):
    assert recipes.section(subjects[::3]) is None
