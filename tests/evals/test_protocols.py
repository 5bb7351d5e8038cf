"""Protocols on frozen features: what they choose, on what, and what they report."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from crate_jax.errors import ConfigError, DataError, NonFiniteError
from crate_jax.evals import linear_sgd, protocols
from crate_jax.evals.metrics import accuracies, mean_per_class
from crate_jax.evals.protocols import PROTOCOLS, Features, hold_out
from crate_jax.validation import check_types, check_values, flatten

pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def digits() -> Features:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    return Features(x[:1300], y[:1300], x[1300:], y[1300:], 10)


def run(name: str, f: Features, **options):
    """Runs a protocol on options that were checked, as `evaluate` does."""
    protocol = PROTOCOLS[name]
    given = ConfigDict({"metric": "top1", **protocol.options, **options})
    check_types(flatten({"protocol": given}), protocol.flat())
    check_values(flatten({"protocol": given}), protocol.flat())
    return protocol.run(f, given, 0)


def test_accuracies_by_hand():
    scores = np.eye(7)[[0, 0, 1, 2, 6]]
    labels = np.array([0, 1, 1, 1, 6])
    found = accuracies(scores, labels)
    assert found["top1"] == pytest.approx(3 / 5)
    assert found["mean_per_class"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert found["top5"] >= found["top1"]
    assert mean_per_class(np.array([1, 1]), np.array([1, 4])) == 0.5  # classes that do not occur do not count


def test_features_that_cannot_be_scored_are_named(digits):
    """Of test features too: a class would be read out of NaN without a word."""
    broken = digits.test_x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="the test features of 1 of 497"):
        Features(digits.train_x, digits.train_y, broken, digits.test_y, 10)
    with pytest.raises(DataError, match="test labels must be integers in 0..8"):
        Features(digits.train_x[digits.train_y < 9], digits.train_y[digits.train_y < 9], broken, digits.test_y, 9)


def counted(*counts):
    """Features with so many rows of each class; the first column numbers them."""
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.random.default_rng(0).normal(size=(len(y), 3))
    x[:, 0] = np.arange(len(y))
    return Features(x.astype(np.float32), y, x.astype(np.float32), y, len(counts))


@pytest.mark.parametrize(
    "counts,share,held",
    [
        ((1, 2, 30, 40), 0.1, [0, 1, 3, 4]),
        ((2, 3, 0, 90), 0.1, [1, 1, 0, 9]),
        ((130, 130), 0.001, [1, 1]),
        ((4, 1), 0.9, [3, 0]),
        ((2, 2, 2, 2), 0.1, [1, 1, 1, 1]),
    ],
)
def test_of_small_classes_one_image_is_set_aside_and_one_is_kept(counts, share, held):
    f = counted(*counts)
    part = hold_out(f, share, seed=5)
    assert np.bincount(part.test_y, minlength=len(counts)).tolist() == held
    rows = np.concatenate([part.train_x[:, 0], part.test_x[:, 0]])
    np.testing.assert_array_equal(np.sort(rows), np.arange(sum(counts)))
    assert all(f.train_y[int(row)] == label for row, label in zip(part.test_x[:, 0], part.test_y, strict=True))
    np.testing.assert_array_equal(hold_out(f, share, seed=5).test_x, part.test_x)
    if max(held) > 1:
        assert not np.array_equal(np.sort(hold_out(f, share, seed=6).test_x, axis=0), np.sort(part.test_x, axis=0))


def test_of_large_classes_the_images_set_aside_are_scikit_learns():
    f = counted(30, 50, 20)
    train, held = train_test_split(np.arange(100), test_size=0.1, stratify=f.train_y, random_state=7)
    part = hold_out(f, 0.1, seed=7)
    np.testing.assert_array_equal(part.train_x, f.train_x[train])
    np.testing.assert_array_equal(part.test_x, f.train_x[held])


def test_nothing_can_be_set_aside_where_no_class_has_two_images():
    with pytest.raises(
        DataError, match="validation=0.1: cannot set this share of 3 training images aside, as no class"
    ):
        hold_out(counted(1, 1, 1), 0.1, seed=0)


@pytest.mark.parametrize("name,options", [("knn", {"k": (1, 2)}), ("logreg", {"c": (0.1, 1.0)})])
def test_protocols_take_classes_of_one_image(name, options):
    found = run(name, counted(1, 2, 9), **options)
    assert found["selected_on"] == "2 training images set aside" and 0 <= found["top1"] <= 1


def test_hold_out_keeps_the_shares_of_the_classes_and_loses_nothing(digits):
    part = hold_out(digits, 0.1, seed=2**40 + 3)
    assert len(part.test_y) == 130 and len(part.train_y) == 1170
    counts = np.bincount(part.test_y) / np.bincount(digits.train_y)
    assert np.all(np.abs(counts - 0.1) < 0.02)
    both = np.concatenate([part.train_x, part.test_x])
    assert sorted(map(bytes, both)) == sorted(map(bytes, digits.train_x))
    rows = train_test_split(np.arange(1300), test_size=0.1, stratify=digits.train_y, random_state=3)
    np.testing.assert_array_equal(part.train_x, digits.train_x[rows[0]])  # large classes: as scikit-learn splits them
    np.testing.assert_array_equal(part.test_x, digits.train_x[rows[1]])


def test_a_strength_that_has_not_converged_is_not_chosen(digits, monkeypatch, caplog):
    """Neither the one that did not converge when settings were judged, nor the one that did not on all images."""
    cs = (0.001, 0.01, 1.0, 30.0)
    best = sorted(run("logreg", digits, c=cs)["selection"], key=lambda row: -row["top1"])
    fit, broken = protocols.fit_all, {len(hold_out(digits, 0.1, 0).train_y): best[0]["c"], 1300: best[1]["c"]}

    def fit_all(x, y, num_classes, strengths, standardise):
        probes = fit(x, y, num_classes, strengths, standardise)
        return [p._replace(converged=broken[len(x)] != c) for p, c in zip(probes, strengths, strict=True)]

    monkeypatch.setattr(protocols, "fit_all", fit_all)
    found = run("logreg", digits, c=cs)
    assert found["chosen"] == {"c": best[2]["c"]} and found["converged"] is True
    assert [row["c"] for row in found["selection"] if not row["converged"]] == [best[0]["c"]]
    assert run("logreg", digits, c=(best[1]["c"],))["converged"] is False


def test_logistic_regression_stays_float32_where_jax_has_64_bits(digits):
    few = dataclasses.replace(digits, train_x=digits.train_x[:90], train_y=digits.train_y[:90])
    with jax.enable_x64(True):
        assert run("logreg", few, c=(0.9,))["top1"] > 0.7


def test_selection_never_sees_the_test_split(digits):
    """Other test images change the accuracy, not the choice; with select=test the choice is the table's best."""
    few = dataclasses.replace(digits, train_x=digits.train_x[:300], train_y=digits.train_y[:300])
    other = dataclasses.replace(few, test_x=digits.test_x[::-1].copy())
    for name in ("knn", "logreg"):
        ours, theirs = run(name, few), run(name, other)
        assert ours["chosen"] == theirs["chosen"] and ours["selection"] == theirs["selection"]
        assert theirs["top1"] < 0.5 < ours["top1"]
    peeked = run("logreg", few, select="test")
    assert "optimistic" in peeked["selected_on"]
    assert peeked["top1"] == max(row["top1"] for row in peeked["selection"])


def test_rates_are_tried_on_as_many_updates_as_the_chosen_one_gets(digits, monkeypatch):
    """1300 rows, of which 130 are set aside, fill three batches of 16384 when they are repeated."""
    seen = []

    def fit(train_x, train_y, test_x, classes, recipe, seed):
        seen.append(len(train_x) * recipe.repeats // recipe.batch_size)
        return np.eye(classes)[np.zeros(len(test_x), int)], 0.0

    monkeypatch.setattr(linear_sgd, "fit", fit)
    run("linear_sgd", digits, recipe="mae", lr=(0.1, 0.3))
    assert seen == [3, 3, 3]


def test_the_metric_asked_for_is_what_settings_are_chosen_by(digits):
    """Few zeros among the test digits: a class that is rarely right counts as much as the others."""
    kept = np.flatnonzero((digits.test_y > 0) | (np.arange(len(digits.test_y)) % 9 == 0))
    f = Features(digits.train_x[:60], digits.train_y[:60], digits.test_x[kept], digits.test_y[kept], 10)
    found = run("knn", f, metric="mean_per_class", select="test", k=(1, 30))
    assert [row["mean_per_class"] for row in found["selection"]] == [row["mean_per_class"] for row in found["sweep"]]
    assert found["mean_per_class"] == max(row["mean_per_class"] for row in found["sweep"]) != found["top1"]


def test_logreg_is_scikit_learns(digits):
    few = dataclasses.replace(digits, train_x=digits.train_x[:500], train_y=digits.train_y[:500])
    for c in (0.1, 10.0):
        reference = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(few.train_x, few.train_y)
        expected = reference.score(few.test_x, few.test_y)
        assert run("logreg", few, c=(c,))["top1"] == pytest.approx(expected, abs=0.0025)  # one image


@pytest.fixture(scope="module")
def mae(digits):
    """The whole of MAE's recipe on the digits, most of whose seconds are the order of 49,400 rows in each epoch."""
    return run("linear_sgd", digits)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if name == "mae" else name for name in linear_sgd.RECIPES]
)
def test_linear_probes_learn(digits, recipe, request):
    epochs = linear_sgd.RECIPES[recipe].epochs if recipe == "mae" else 30
    few = run("linear_sgd", digits, recipe=recipe, epochs=1)
    more = request.getfixturevalue("mae") if recipe == "mae" else run("linear_sgd", digits, recipe=recipe, epochs=30)
    assert more["recipe"]["epochs"] == epochs and more["chosen"] == {"lr": linear_sgd.RECIPES[recipe].lr}
    assert more["train_loss"] < few["train_loss"]
    assert more["top1"] > 0.85


@pytest.mark.slow
def test_a_set_too_small_for_a_recipe_is_repeated(digits, mae):
    """1300 digits are less than a batch of MAE's recipe: once per pass, its 90 updates had an accuracy of 25 %."""
    assert mae["recipe"]["repeats"] == 38 and mae["recipe"]["batch_size"] == 16384
    assert mae["top1"] > run("logreg", digits, c=(1.0,))["top1"] - 0.03
    assert run("linear_sgd", digits, recipe="lightly", epochs=1)["recipe"]["repeats"] == 1


def test_a_set_is_repeated_until_a_recipe_has_batches():
    assert [linear_sgd.RECIPES["mae"].for_rows(n).repeats for n in (1, 16384, 49151, 49152)] == [49152, 3, 2, 1]


def test_a_repeated_set_is_the_same_set_written_several_times(digits):
    """With the whole set in each batch nothing depends on the order: the probe is that of the tiled features."""
    x, y, other = digits.train_x[:70], digits.train_y[:70], digits.test_x[:9]
    recipe = linear_sgd.Recipe("lars", 2.0, 256, 12, 4, "cosine", True, repeats=3)
    ours, loss = linear_sgd.fit(x, y, other, 10, recipe, 3)
    whole = dataclasses.replace(recipe, repeats=1)
    theirs, expected = linear_sgd.fit(np.tile(x, (3, 1)), np.tile(y, 3), other, 10, whole, 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_lars_probe_is_maes(digits):
    """Step by step in NumPy, as written in main_linprobe.py and util/lars.py; the batch is the whole set."""
    x, y = digits.train_x[:200].astype(np.float64), np.eye(10)[digits.train_y[:200]]
    recipe = linear_sgd.Recipe("lars", 2.0, 256, 12, 4, "cosine", True)
    ours, _ = linear_sgd.fit(digits.train_x[:200], digits.train_y[:200], digits.test_x, 10, recipe, 3)
    w = 0.01 * np.asarray(jax.random.normal(jax.random.split(jax.random.key(3))[0], (x.shape[1], 10)), np.float64)
    b, momentum, momentum_b = np.zeros(10), 0.0, 0.0
    mean, variance, normal = np.zeros(x.shape[1]), np.ones(x.shape[1]), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    for step in range(12):
        rise, fall = step / 4, 0.5 * (1 + np.cos(np.pi * (step - 4) / (12 - 4)))
        rate = 2.0 * 200 / 256 * (rise if step < 4 else fall)
        scores = normal @ w + b
        share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        grad, grad_b = normal.T @ (share - y) / 200, (share - y).mean(0)
        momentum = 0.9 * momentum + grad * 0.001 * np.linalg.norm(w) / np.linalg.norm(grad)
        momentum_b = 0.9 * momentum_b + grad_b
        w, b = w - rate * momentum, b - rate * momentum_b
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0, ddof=1)
    theirs = (digits.test_x - mean) / np.sqrt(variance + 1e-6) @ w + b
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_rates_of_linear_probes_fall_as_their_recipes_say():
    """Ten steps an epoch at a batch of 256, for which rates are given."""
    cosine = [0.1 * 0.5 * (1 + np.cos(np.pi * share)) for share in (0.5, 0.601, 0.801)]
    warmed = [0.1 * 0.5 * (1 + np.cos(np.pi * (90 * share - 10) / 80)) for share in (0.5, 0.601, 0.801)]
    expected = {"solo": [0.3, 0.3, 0.03, 0.003], "lightly": [0.1, *cosine], "mae": [0.0, *warmed]}
    for name, rates in expected.items():
        recipe = linear_sgd.RECIPES[name]
        found = [linear_sgd._schedule(recipe, 256, 10)(share * recipe.epochs * 10) for share in (0, 0.5, 0.601, 0.801)]
        np.testing.assert_allclose(found, rates, rtol=1e-4)


def test_batch_norm_makes_the_scale_of_features_irrelevant(digits):
    """Of each test image's scores, up to rounding; pixels that never change are left out: their scale is rounding."""
    varies = digits.train_x[:200].std(0) > 0.05
    x, y, other = digits.train_x[:200, varies], digits.train_y[:200], digits.test_x[:, varies]
    recipe = dataclasses.replace(linear_sgd.RECIPES["mae"], batch_size=256, epochs=100, lr=2.0)
    kept, scaled = (linear_sgd.fit(a * x + b, y, a * other + b, 10, recipe, 3)[0] for a, b in ((1, 0), (50, 3)))
    np.testing.assert_allclose(scaled, kept, rtol=0.02, atol=0.01 * np.abs(kept).max())
    assert np.mean(kept.argmax(1) == digits.test_y) > 0.5


def test_several_rates_are_chosen_by_validation(digits):
    found = run("linear_sgd", digits, recipe="lightly", lr=(1e-6, 0.3), epochs=20)
    assert found["chosen"] == {"lr": 0.3} and found["recipe"]["lr"] == 0.3 and len(found["selection"]) == 2


def test_more_shots_do_better(digits):
    found = run("fewshot", digits, shots=(1, 20), trials=3)
    one, many = found["fewshot"]
    assert (one["shots"], many["shots"]) == (1, 20)
    assert 0.2 < one["top1"] < many["top1"] - 0.1 and many["top1"] == found["top1"]
    assert one["deviation"] > 0


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("logreg", {"select": "best"}, ConfigError, "select='best': must be one of validation, test"),
        ("logreg", {"validation": 1.5}, ConfigError, r"validation=1.5: must lie in \(0, 1\)"),
        (
            "logreg",
            {"c": (1.0, -1.0)},
            ConfigError,
            r"c=\[1.0, -1.0\]: must hold one value or more; each must be greater",
        ),
        ("logreg", {"c": 1.0}, ConfigError, "config.protocol.c=1.0: must be a tuple"),
        ("logreg", {"c": (float("inf"),)}, ConfigError, r"c=\[inf\]: must be finite"),
        ("logreg", {"standardise": 1}, ConfigError, "standardise=1: must be True or False"),
        ("knn", {"k": ()}, ConfigError, r"config.protocol.k=\[\]: must hold one value or more"),
        ("linear_sgd", {"recipe": "adam"}, ConfigError, "mae, solo, lightly"),
        ("linear_sgd", {"recipe": "solo", "lr": (1e39,), "epochs": 2}, NonFiniteError, "diverged"),
        ("linear_sgd", {"epochs": -1}, ConfigError, "epochs=-1: must not be negative"),
        ("linear_sgd", {"lr": ("a",)}, ConfigError, "must hold numbers only"),
        ("linear_sgd", {"lr": (0.1, 0.0)}, ConfigError, r"lr=\[0.1, 0.0\]: each must be greater than 0"),
        ("knn", {"k": (2.5,)}, ConfigError, r"config.protocol.k=\[2.5\]: must hold whole numbers only"),
        ("fewshot", {"trials": 0}, ConfigError, "trials=0: must be greater than 0"),
        ("fewshot", {"c": -1.0}, ConfigError, "config.protocol.c"),
        ("fewshot", {"shots": (1, 5000)}, DataError, "fewest training images"),
    ],
)
def test_bad_options_are_named(digits, name, options, error, words):
    with pytest.raises(error, match=words):
        run(name, digits, **options)
