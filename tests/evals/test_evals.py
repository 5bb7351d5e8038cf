"""k-NN and linear probe against scikit-learn; features in batches and over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from crate_jax import config as configs, data
from crate_jax.errors import DataError, NonFiniteError
from crate_jax.evals.classification import ClassifierEvaluation
from crate_jax.evals.features import extract
from crate_jax.evals.frozen import FrozenEvaluation, pixel_rows
from crate_jax.evals.knn import _top_k, knn_sweep, knn_top1
from crate_jax.evals.probe import fit_all, probe_top1
from crate_jax.parallel import sharding
from tests import parity
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    return x[:1300], y[:1300], x[1300:], y[1300:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 1.0)])
def test_knn_equals_scikit_learn(digits, k, temperature):
    train_x, train_y, test_x, test_y = digits
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train_x, train_y)
    ours = knn_sweep(train_x, train_y, test_x, 10, [k], [temperature])[0, 0]
    assert np.mean(ours == reference.predict(test_x)) > 0.995  # the rest: ties within rounding
    assert knn_top1(*digits, 10, k, temperature) == pytest.approx(reference.score(test_x, test_y), abs=0.005)


@pytest.fixture(scope="module")
def judged():
    """Features, and what solo-learn's and lightly's k-NN make of them."""
    with np.load(ROOT / "tests" / "golden" / "knn.npz") as archive:
        return {k: archive[k] for k in archive.files}


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (200, 0.1), (5, 0.5)])
def test_knn_is_solo_learns(judged, k, temperature):
    data = [judged[f"in/{name}"] for name in ("train", "train_labels", "test", "test_labels")]
    percent = judged[f"out/solo/cosine_k{k}_T{temperature}"][0]
    assert 100 * knn_top1(*data, 12, k, temperature) == pytest.approx(percent, abs=1e-9)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (200, 0.1)])
def test_knn_is_lightlys(judged, k, temperature):
    """Every image's class, not only how many are right."""
    ranking = judged[f"out/lightly/k{k}_T{temperature}/ranking"]
    np.testing.assert_array_equal(parity.knn_classes(judged, k, temperature), ranking[:, 0])


def test_knn_chunks_change_nothing_and_k_is_clamped(digits):
    train_x, train_y, test_x, _ = digits
    whole = knn_sweep(train_x, train_y, test_x, 10, [20], [0.07], chunk=1000)
    np.testing.assert_array_equal(whole, knn_sweep(train_x, train_y, test_x, 10, [20], [0.07], chunk=7))
    few = knn_sweep(train_x[:5], train_y[:5], test_x, 10, [20, 5], [0.07])
    np.testing.assert_array_equal(few[0], few[1])


def test_a_sweep_of_k_and_temperature_is_each_alone(digits):
    train_x, train_y, test_x, _ = digits
    swept = knn_sweep(train_x, train_y, test_x, 10, [1, 20, 200], [0.07, 1.0])
    for i, k in enumerate([1, 20, 200]):
        for j, t in enumerate([0.07, 1.0]):
            np.testing.assert_array_equal(swept[i, j], knn_sweep(train_x, train_y, test_x, 10, [k], [t])[0, 0])


@pytest.mark.parametrize(("n", "k"), [(1000, 1), (1000, 7), (1001, 20), (50, 49), (50, 50), (3, 2)])
def test_top_k_by_groups_is_top_k_with_its_ties(n, k):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 40, (64, n)), jnp.float32)  # many equal values
    for ours, theirs in zip(_top_k(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def reference_fit(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x, y)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_probe_equals_scikit_learn(digits, c):
    """The same objective on the same standardised features: accuracy and probabilities agree."""
    train_x, train_y, test_x, test_y = digits
    (probe,) = fit_all(train_x, train_y, 10, [c], standardise=True)
    assert probe.converged
    scaled = (train_x - probe.mean) / probe.std
    reference = reference_fit(scaled, train_y, c)
    accuracy = reference.score((test_x - probe.mean) / probe.std, test_y)
    assert probe_top1(*digits, 10, c) == pytest.approx(accuracy, abs=0.005)
    centred = probe.weights - probe.weights.mean(1, keepdims=True)  # softmax ignores a common shift
    expected = reference.coef_.T - reference.coef_.T.mean(1, keepdims=True)
    np.testing.assert_allclose(centred, expected, atol=1e-2 * np.abs(expected).max())


def objective(weights: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray, c: float) -> float:
    """The mean loss with its penalty, in float64."""
    z = x @ weights.astype(np.float64) + bias
    odds = np.where(np.eye(z.shape[1], dtype=bool)[y], -np.inf, z - z[np.arange(len(y)), y][:, None])
    return np.logaddexp(0, np.logaddexp.reduce(odds, axis=1)).mean() + np.square(weights).sum() / (2 * c * len(y))


# The least loss at C = 0.01, 1, 100, 1e3 and 1e5: float64, scikit-learn's newton-cholesky (tol=1e-10).
LEAST_LOSS = {
    (200, 128, 128, 3.0): (0.978989365, 0.105204056, 3.68051254e-3, 5.75023105e-4, 1.15032436e-5),  # separable
    (200, 128, 11, 1.0): (0.971506691, 0.269151323, 8.69029569e-2, 6.54096269e-2, 5.85184250e-2),  # nearly
    (31, 64, 64, 2.0): (1.18286195, 0.137218218, 4.76874493e-3, 7.41836227e-4, 1.47449556e-5),  # few rows
}


@pytest.mark.parametrize(("n", "width", "rank", "spread"), LEAST_LOSS)
def test_the_probe_is_at_float64s_minimum_for_any_strength(n, width, rank, spread):
    """A bound of 1e-6 on the gradient, where a solver in float32 stopped, was up to 18 times above the minimum here."""
    rng = np.random.default_rng(0)
    y = np.concatenate([np.arange(7), rng.integers(0, 7, n - 7)]).astype(np.int32)
    mixed = rng.normal(size=(rank, width)) / np.arange(1, rank + 1)[:, None]
    x = ((rng.normal(size=(7, rank))[y] + spread * rng.normal(size=(n, rank))) @ mixed).astype(np.float32)
    strengths = [1e-2, 1.0, 1e2, 1e3, 1e5]
    for c, probe, least in zip(
        strengths, fit_all(x, y, 7, strengths, standardise=False), LEAST_LOSS[n, width, rank, spread], strict=True
    ):
        found = objective(probe.weights, probe.bias, x - probe.mean.astype(np.float64), y, c)
        # What `converged` promises. At C = 1e5 the rounding of float32 alone gives up to 6e-5 on some CPUs.
        assert probe.converged and found == pytest.approx(least, rel=1e-4)


def test_a_probe_that_runs_out_of_products_says_so(digits, caplog):
    train_x, train_y, _, _ = digits
    strong, weak = fit_all(train_x, train_y, 10, [1e-6, 1e5], standardise=False, max_iterations=40)
    assert strong.converged and not weak.converged and 40 <= weak.iterations < 50
    assert "C=100000: not converged after" in caplog.text and "C=1e-06" not in caplog.text


def test_a_sweep_of_c_is_each_alone_and_keeps_its_order(digits):
    """Warm starts and the order of the path change nothing but rounding; raw features as scikit-learn takes them."""
    train_x, train_y, test_x, test_y = digits
    train_x, train_y = train_x[:400], train_y[:400]
    strengths = [0.1, 0.0001, 0.01]  # raw features are badly scaled: weaker penalties take thousands of steps
    for c, probe in zip(strengths, fit_all(train_x, train_y, 10, strengths, standardise=False), strict=True):
        assert probe.converged and set(probe.std[np.isfinite(probe.std)]) == {1.0}
        reference = reference_fit(train_x, train_y, c)
        assert np.mean(probe.predict(test_x) == test_y) == pytest.approx(reference.score(test_x, test_y), abs=0.005)
        (alone,) = fit_all(train_x, train_y, 10, [c], standardise=False)
        assert np.mean(probe.predict(test_x) == alone.predict(test_x)) > 0.99


def test_probe_survives_constant_features(digits):
    train_x, train_y, test_x, test_y = digits
    dead = [np.concatenate([x, np.full((len(x), 3), 5.0, np.float32)], 1) for x in (train_x, test_x)]
    assert probe_top1(dead[0], train_y, dead[1], test_y, 10, 1.0) == pytest.approx(probe_top1(*digits, 10, 1.0))


def test_bad_labels_and_features_are_named(digits):
    train_x, train_y, test_x, test_y = digits
    with pytest.raises(DataError, match="integers in 0..4"):
        knn_top1(*digits, 5, 20, 0.07)
    broken = train_x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="1 of 1300"):
        probe_top1(broken, train_y, test_x, test_y, 10, 1.0)


def test_features_keep_their_order_in_any_batch_and_on_any_devices():
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), np.uint8)
    expected = images.reshape(37, -1).astype(np.float32)[:, :5]
    apply = jax.jit(lambda x: x.reshape(len(x), -1)[:, :5].astype(jnp.float32))
    for devices, rows in ((1, 10), (1, 64), (8, 16)):
        place = sharding.split(sharding.make_mesh(8, 1, jax.devices()[:devices]))
        batches = (images[i : i + rows] for i in range(0, 37, rows))
        np.testing.assert_array_equal(extract(apply, batches, rows, place), expected)
    assert apply._cache_size() == 3  # one shape per call: the last batch is filled up


def test_frozen_evaluation_scores_an_encoder_and_pixels():
    """An encoder that returns pixels scores as pixels do; the sample is fixed by the seed."""
    c = configs.base()
    c.data.source, c.data.image_size, c.data.eval_crop = "digits", (8, 8), 1.0
    c.encoder.patch_size, c.evaluation.train_images, c.evaluation.test_images = 2, 600, 200
    train = data.open_split(c, "train")

    def pixels(params, x):
        return x.reshape(len(x), -1).astype(jnp.float32) * params["scale"]

    evaluation = FrozenEvaluation(c, pixels, train, sharding.make_mesh(16, 1))
    scores = evaluation.scores({"scale": jnp.float32(2.0)})
    assert scores == evaluation.scores({"scale": jnp.float32(2.0)})
    baseline, guesses = evaluation.pixel_scores()
    assert guesses["test_images"] == 200 and 0.1 < guesses["majority_top1"] < 0.15
    assert scores["knn_top1"] == pytest.approx(baseline["knn_top1"], abs=0.01)
    assert 0.85 < scores["probe_top1"] <= 1.0
    assert evaluation.scores({"scale": jnp.float32(0.0)})["probe_top1"] < 0.3


@pytest.mark.parametrize("answers", [1, 2])
def test_a_classifier_that_answers_one_class_is_named(answers, caplog):
    c = configs.base()
    c.data.source, c.data.image_size, c.evaluation.test_images = "digits", (8, 8), 90

    def scores(params, x):
        other = x[:, 0, 3, 0] > params if answers == 2 else jnp.zeros(len(x), bool)
        return jax.nn.one_hot(jnp.where(other, 7, 4), 10)

    evaluation = ClassifierEvaluation(c, scores, data.open_split(c, "train"), sharding.make_mesh(16, 1))
    found = evaluation.final_scores(jnp.float32(90), lambda: {})
    assert found["test_images"] == 90 and 0.1 < found["majority_top1"] < 0.2 and found["top1"] < 0.3
    assert ("every test image is taken for 4" in caplog.text) == (answers == 1)


@pytest.mark.parametrize("judge", [FrozenEvaluation, ClassifierEvaluation])
def test_splits_of_different_classes_are_not_compared(judge):
    c = configs.base()
    c.data.source, c.data.image_size = "digits", (8, 8)
    train = data.open_split(c, "train")
    train.class_names = [*train.class_names[1:], "0"]
    with pytest.raises(DataError, match="class 0 is 1 in one and 0 in the other"):
        judge(c, lambda params, x: x, train, sharding.make_mesh(16, 1))


def test_the_baseline_of_raw_pixels_stays_small_for_large_images():
    """Up to 32 px every pixel counts; above, blocks are averaged: a probe on all of 224 px fits no memory."""
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 32, 3), np.uint8)
    np.testing.assert_array_equal(pixel_rows(small), small.reshape(3, -1).astype(np.float32) / 255.0)
    large = small.repeat(7, axis=1).repeat(7, axis=2)
    np.testing.assert_allclose(pixel_rows(large), pixel_rows(small), atol=1 / 255)
    assert pixel_rows(np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 32 * 32 * 3)


def test_a_split_without_a_readable_image_is_named(tmp_path):
    for split, content in (("train", None), ("test", b"not an image")):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            path = tmp_path / split / label / "0.png"
            path.write_bytes(content) if content else Image.new("RGB", (8, 8)).save(path)
    c = configs.base()
    c.data.source, c.data.image_size, c.data.max_undecodable = f"folder:{tmp_path}", (8, 8), 1.0
    evaluation = FrozenEvaluation(c, lambda params, x: x, data.open_split(c, "train"), sharding.make_mesh(16, 1))
    with pytest.raises(DataError, match="none of 2 images can be decoded, for example test/a/0.png"):
        evaluation.pixel_scores()
    with pytest.raises(DataError, match="none of 1 images can be decoded, for example test/b/0.png"):
        list(data.eval_batches(c, data.open_split(c, "eval"), [1], 4))
