"""Collapse measures on spectra with known answers, against float64, on any devices; the section they fill."""

from __future__ import annotations

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.analysis.collapse import section, subject as collapse_subject, weights
from crate_jax.data.pixels import normalise
from crate_jax.data.views import augmented_views
from crate_jax.errors import DataError, NonFiniteError
from crate_jax.evals import spectra
from crate_jax.evals.frozen import FrozenEvaluation, collapse_scores
from crate_jax.evals.lidar import of_views as lidar_of_views
from crate_jax.models import autoencoder, representation
from crate_jax.parallel import sharding
from crate_jax.report import Subject, svg
from crate_jax.report.section import short_names

pytestmark = pytest.mark.one_python


def orthonormal(n: int, d: int, seed: int = 0) -> np.ndarray:
    """(n, d) with orthonormal columns whose means are zero."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    return np.linalg.qr(x - x.mean(0))[0]


def with_spectrum(eigenvalues, n: int = 400, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    """Rows whose covariance has exactly these eigenvalues, in a random basis."""
    values = np.asarray(eigenvalues, np.float64)
    basis = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(len(values),) * 2))[0]
    return orthonormal(n, len(values), seed) * np.sqrt(values * (n - 1)) @ basis + mean


def reference(x: np.ndarray) -> dict[str, float]:
    """The definitions in float64, by other routes: SVD of the rows and NumPy's covariance."""
    x = x.astype(np.float64)
    c, off = np.cov(x.T), ~np.eye(x.shape[1], dtype=bool)
    r = np.corrcoef(x.T)[off]

    def rank(s):
        p = s / s.sum() + 1e-7
        return np.exp(-np.sum(p * np.log(p)))

    eigenvalues = np.sort(np.linalg.eigvalsh(c))[::-1]
    ranks = np.arange(11, min(100, x.shape[1]) + 1)
    line = np.polyfit(np.log(ranks), np.log(eigenvalues[ranks - 1]), 1, w=ranks**-0.5)
    return {
        "rankme": rank(np.linalg.svd(x, compute_uv=False)),
        "effective_rank": rank(np.linalg.svd(x - x.mean(0), compute_uv=False)),
        "stable_rank": eigenvalues.sum() / eigenvalues[0],
        "condition": np.sqrt(eigenvalues[0] / eigenvalues[-1]),
        "alpha_req": -line[0],
        "off_diagonal": np.sum(c[off] ** 2) / np.sum(c**2),
        "mean_squared_correlation": np.mean(r**2),
        "mean_abs_correlation": np.mean(np.abs(r)),
    }


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_every_measure_equals_its_definition_in_float64(mean):
    x = with_spectrum(np.arange(1, 41) ** -1.5, mean=mean).astype(np.float32)
    found = spectra.measure_features(x)
    for name, value in reference(x).items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-4), name
    np.testing.assert_allclose(found.eigenvalues, np.arange(1, 41) ** -1.5, rtol=2e-4)
    assert found.numerical_rank == 40 and found.warnings == () and not found.rank_limited


def test_orthonormal_features_have_full_rank_and_copies_do_not():
    """RankMe of an identity spectrum is D, of r equal directions r, of one direction 1."""
    assert spectra.measure_features(orthonormal(200, 32)).rankme == pytest.approx(32, rel=1e-3)
    for r in (1, 5, 17):
        found = spectra.measure_features(with_spectrum([1.0] * r + [0.0] * (32 - r)))
        assert found.rankme == pytest.approx(r, rel=1e-3) and found.numerical_rank == r
        assert found.stable_rank == pytest.approx(r, rel=1e-4) and found.condition is None


def test_small_directions_are_seen_in_float32():
    """Singular values of 1e-5: a float32 covariance would lose them, their squares being 1e-10 of the largest."""
    singular = np.array([1.0, 1e-2, 1e-4, 1e-5])
    found = spectra.measure_features(with_spectrum(singular**2, n=300))
    np.testing.assert_allclose(np.sqrt(found.eigenvalues), singular, rtol=2e-2)
    assert found.condition == pytest.approx(1e5, rel=2e-2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("width", "ranks"), [(128, (11, 100)), (40, (11, 40)), (16, (1, 16))])
def test_the_exponent_of_a_power_law_is_recovered(alpha, width, ranks):
    found = spectra.measure_features(with_spectrum(np.arange(1.0, width + 1) ** -alpha))
    assert found.alpha_req == pytest.approx(alpha, rel=1e-3)
    assert found.alpha_r2 == pytest.approx(1, abs=1e-3) and found.alpha_range == ranks


def test_the_power_law_is_fitted_only_where_it_is_asked_to():
    """Another slope outside of the ranks changes nothing; eigenvalues that are zero are not on the line."""
    rank = np.arange(1.0, 61)
    broken = jnp.asarray(np.where(rank < 11, 100 * rank**-0.1, rank**-1.5), jnp.float32)
    alpha, r2 = spectra.power_law(broken, 11, 60)
    assert float(alpha) == pytest.approx(1.5, rel=1e-4) and float(r2) == pytest.approx(1, abs=1e-4)
    assert float(spectra.power_law(broken, 1, 60)[0]) != pytest.approx(1.5, rel=0.1)
    assert np.isnan(spectra.power_law(broken, 11, 12)[0])
    bent = np.exp(-rank / 20)  # on no line: what is found depends on the weights, 1 / rank
    line = np.polyfit(np.log(rank[10:]), np.log(bent[10:]), 1, w=rank[10:] ** -0.5)
    assert float(spectra.power_law(jnp.asarray(bent, jnp.float32), 11, 60)[0]) == pytest.approx(-line[0], rel=1e-4)
    found = spectra.measure_features(with_spectrum([*np.arange(1.0, 31) ** -1.0, *[0.0] * 10]))
    assert found.alpha_range == (11, 30) and found.alpha_req == pytest.approx(1, rel=1e-3)


def test_off_diagonal_mass_by_hand():
    """[[2, 1], [1, 3]]: 2 / (4 + 9 + 2); nothing for white features; 1 - 1/D for D copies of one."""
    assert float(spectra.off_diagonal(jnp.array([[2.0, 1.0], [1.0, 3.0]]))) == pytest.approx(2 / 15)
    white = spectra.measure_features(orthonormal(300, 12))
    assert white.off_diagonal < 1e-10 and white.mean_abs_correlation < 1e-5
    copies = spectra.measure_features(np.repeat(np.random.default_rng(0).normal(size=(50, 1)), 8, axis=1))
    assert copies.off_diagonal == pytest.approx(1 - 1 / 8, rel=1e-4)
    assert copies.mean_abs_correlation == pytest.approx(1, rel=1e-4)


def test_rotation_and_scale_change_no_rank():
    x = with_spectrum(np.arange(1, 31) ** -1.2, mean=0.1)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(30, 30)))[0]
    before = spectra.measure_features(x)
    for other in (x @ turn, 1e-4 * x, 1e4 * x):
        after = spectra.measure_features(other)
        for name in ("rankme", "effective_rank", "stable_rank", "alpha_req", "condition"):
            assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-3), name
    for scaled in (1e-4 * x, 1e4 * x):  # these two depend on the axes, but not on the scale
        found = spectra.measure_features(scaled)
        assert found.off_diagonal == pytest.approx(before.off_diagonal, rel=1e-3)
        assert found.mean_abs_correlation == pytest.approx(before.mean_abs_correlation, rel=1e-3)
    shifted = spectra.measure_features(x + 2.0)
    assert shifted.effective_rank == pytest.approx(before.effective_rank, rel=1e-3)
    assert shifted.rankme < before.rankme  # RankMe does not centre: a common mean is one dimension more than others


def test_no_more_rows_than_features_is_said(caplog):
    x = np.random.default_rng(0).normal(size=(20, 32))
    found = spectra.measure_features(x)
    assert found.rank_limited and found.numerical_rank == 19 and found.to_dict()["rank_limited"] is True
    assert "20 rows for 32 features" in found.warnings[0] and "use more than 32" in found.warnings[0]
    assert found.rankme <= 20
    with caplog.at_level(logging.WARNING):
        scores = collapse_scores(x)
    assert scores["rankme_limit"] == 20 and "20 rows for 32 features" in caplog.text
    assert not spectra.measure_features(np.random.default_rng(0).normal(size=(33, 32))).rank_limited


def test_constant_features_give_no_nan_and_are_counted():
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    dead = np.concatenate([x, np.full((100, 2), 3.7, np.float32)], axis=1)
    found = spectra.measure_features(dead)
    assert found.constant == 2 and found.numerical_rank == 6 and "2 of 8 features are constant" in found.warnings[0]
    alive = spectra.measure_features(x)
    for name in ("effective_rank", "off_diagonal", "mean_abs_correlation"):
        assert getattr(found, name) == pytest.approx(getattr(alive, name), rel=1e-3), name
    for value in (0.0, 5.0):
        found = spectra.measure_features(np.full((50, 4), value))
        assert found.rankme == pytest.approx(1, abs=1e-3) and found.numerical_rank == 0 and found.alpha_req is None
        json.dumps(found.to_dict(), allow_nan=False)


def test_broken_features_and_too_few_rows_are_refused():
    x = np.ones((10, 3), np.float32)
    x[4, 1] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        spectra.measure_features(x)
    with pytest.raises(ValueError, match="at least 2 rows"):
        spectra.measure_features(np.ones((1, 3)))


def test_pieces_of_any_size_give_the_same_factor(monkeypatch):
    """Streaming, filled-up last pieces and merged parts: one set of measures."""
    x = with_spectrum(np.arange(1, 21) ** -1.0, n=101, mean=1.0).astype(np.float32)
    whole = spectra.measure_features(x)
    monkeypatch.setattr(spectra, "CHUNK", 17)
    parts = spectra.merge(jnp.stack([spectra.factor(x[:30]), spectra.factor(x[30:])]))
    for found in (spectra.measure_features(x), spectra.measures(parts[None], len(x))[0]):
        np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=1e-4)
        assert found.rankme == pytest.approx(whole.rankme, rel=1e-4)


def test_spectra_of_weights():
    """Stacked layers, wide, tall and convolution kernels in batches of one shape; ones for orthonormal weights."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": {
            "blocks": {"a": {"kernel": rng.normal(size=(3, 8, 12))}, "b": {"kernel": rng.normal(size=(3, 12, 8))}},
            "conv": {"kernel": rng.normal(size=(2, 2, 3, 8))},
            "flat": {"kernel": 2 * orthonormal(20, 5)},
        }
    }
    names = [f"encoder/{n}/kernel" for n in ("blocks/a", "blocks/b", "conv", "flat")]
    found = weights.weight_eigenvalues(params, names)
    assert list(found) == names and [found[n].shape for n in names] == [(3, 8), (3, 8), (1, 8), (1, 5)]
    for name, kernels in zip(names, ([*params["encoder"]["blocks"]["a"]["kernel"]], None, None, None), strict=True):
        for values, kernel in zip(found[name], kernels or (), strict=kernels is not None):
            np.testing.assert_allclose(values, np.linalg.svd(kernel, compute_uv=False) ** 2, rtol=1e-4)
    b, conv = params["encoder"]["blocks"]["b"]["kernel"], params["encoder"]["conv"]["kernel"].reshape(12, 8)
    np.testing.assert_allclose(found[names[1]][2], np.linalg.svd(b[2], compute_uv=False) ** 2, rtol=1e-4)
    np.testing.assert_allclose(found[names[2]][0], np.linalg.svd(conv, compute_uv=False) ** 2, rtol=1e-4)
    measured = weights.weight_measures(found[names[3]][0])  # all eigenvalues are 4
    expected = {"effective_rank": 5, "stable_rank": 5, "condition": 1, "so": 45, "srip": 3}
    assert measured == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}


def clusters(between, within, classes: int = 60, views: int = 8, seed: int = 0) -> np.ndarray:
    """(c, q, D) whose covariances of means (over c - 1) and within (over c (q - 1)) are exactly these diagonals."""
    width = len(between)
    means = orthonormal(classes, width, seed) * np.sqrt(np.asarray(between) * (classes - 1))
    rng = np.random.default_rng(seed + 1)
    deviations = rng.normal(size=(classes, views, width))
    deviations -= deviations.mean(1, keepdims=True)
    flat = np.linalg.qr(deviations.reshape(-1, width))[0] * np.sqrt(np.asarray(within) * classes * (views - 1))
    return means[:, None] + flat.reshape(classes, views, width)


def test_lidar_of_clusters_with_known_covariances():
    """The eigenvalues are between / (within + delta); its rank ignores what views change as much as images do."""
    between, within = [4.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.25, 1.0, 1.0, 0.01]
    found = lidar_of_views(clusters(between, within), delta=1e-2)
    expected = np.sort(np.array(between) / (np.array(within) + 1e-2))[::-1]
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-3, atol=1e-5)
    p = expected / expected.sum() + 1e-7
    assert found.value == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-3)
    assert found.warnings == ()
    assert lidar_of_views(clusters([1.0] * 6, [1.0] * 6)).value == pytest.approx(6, rel=1e-3)
    assert lidar_of_views(clusters([1.0, 1.0, 0, 0, 0, 0], [1.0] * 6)).value == pytest.approx(2, rel=1e-3)


def test_lidar_follows_a_linear_map_of_the_features():
    """S_w^-1 S_b has the same eigenvalues in any basis, where the covariance's spectrum (RankMe) has not."""
    x = clusters([4.0, 2.0, 1.0, 0.5], [1.0, 0.5, 1.0, 2.0])
    turn = np.random.default_rng(3).normal(size=(4, 4))
    assert lidar_of_views(x @ turn, 1e-9).value == pytest.approx(lidar_of_views(x, 1e-9).value, rel=1e-3)


def test_lidar_equals_float64_on_rank_deficient_views(monkeypatch):
    x = np.random.default_rng(0).normal(size=(12, 3, 40)) + 2 * np.random.default_rng(1).normal(size=(12, 1, 40))
    mean = x.mean(1)
    within = np.einsum("cqd,cqe->de", x - mean[:, None], x - mean[:, None]) / (12 * 2) + 0.1 * np.eye(40)
    root = np.linalg.inv(np.linalg.cholesky(within))
    expected = np.linalg.eigvalsh(root @ np.cov(mean.T) @ root.T)[::-1]
    found = lidar_of_views(x, delta=0.1)
    np.testing.assert_allclose(found.eigenvalues[:11], expected[:11], rtol=1e-3)
    assert "12 images for 40 features" in found.warnings[0] and "singular" in found.warnings[1]
    monkeypatch.setattr(spectra, "CHUNK", 16)  # 5, 5 and 2 images at a time
    np.testing.assert_allclose(lidar_of_views(x, delta=0.1).eigenvalues, found.eigenvalues, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        lidar_of_views(x[:, :1])
    assert lidar_of_views(np.ones((5, 3, 2))).value == pytest.approx(1, abs=1e-3)


@functools.cache
def drawn_params(corruption: str, encoder: str):
    """Parameters of the subjects on any number of devices."""
    c = subject_config(corruption, encoder)
    return jax.device_get(jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))())


def subject_config(corruption: str, encoder: str):
    """A tiny run on the digits."""
    c = configs.base()
    c.steps = 1
    c.data.source, c.data.image_size, c.data.eval_crop = "digits", (8, 8), 1.0
    c.encoder.name, c.encoder.patch_size, c.encoder.width = encoder, 2, 16
    c.encoder.depth, c.encoder.heads, c.decoder.depth, c.decoder.heads = 2, 2, 1, 2
    c.encoder.stage_width, c.encoder.stem, c.encoder.stem_padding = 4, "cifar", 1
    c.corruption.name, c.evaluation.pool, c.evaluation.batch_size = corruption, "mean", 24
    c.data.crop_scale, c.data.randaugment_layers = (0.5, 1.0), 1
    return c


def subject(devices: int = 8, corruption: str = "mask", encoder: str = "vit") -> Subject:
    c = subject_config(corruption, encoder)
    params = jax.tree.map(np.copy, drawn_params(corruption, encoder))
    mesh = sharding.make_mesh(devices, 1, jax.devices()[:devices])
    source = data.open_split(c, "train")
    return Subject(f"{encoder} on {devices}", c, params, None, source, data.open_split(c, "eval"), mesh)


def test_sharded_equals_unsharded_and_numpy():
    """50 images in batches of 24 over 8 devices and over 1: the features' own spectra, block by block."""
    one, eight = (collapse_subject.measure(subject(n), 50) for n in (1, 8))
    s = subject(1)
    indices = np.sort(np.random.default_rng(s.config.seed).permutation(len(s.train))[:50])
    images = data.eval_images(s.config, s.train, indices)[0]
    groups = collapse_subject.features(s.config)(s.params, images)
    x = np.concatenate([np.asarray(group) for group in groups])
    assert list(eight) == ["input", "block 1", "block 2", "representation"]
    for i, (place, found) in enumerate(eight.items()):
        assert found.rows == len(x[i]) == 50
        np.testing.assert_allclose(found.eigenvalues, one[place].eigenvalues, rtol=1e-3, atol=1e-7)
        expected = np.linalg.svd(x[i] - x[i].mean(0), compute_uv=False) ** 2 / (len(x[i]) - 1)
        np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-2, atol=1e-6)
        assert found.rankme == pytest.approx(one[place].rankme, rel=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean", "cls_mean"])
def test_the_input_is_what_enters_the_first_block(pool):
    """The embedded patches with positions; a class token is there the same for all images, whatever is pooled later."""
    s = subject(1)
    s.config.evaluation.pool = pool
    images = np.stack([s.train.read(i) for i in range(3)])
    first, rest = collapse_subject.features(s.config)(s.params, images)
    _, points = representation.points(s.config)(s.params, normalise(images, s.config))
    np.testing.assert_allclose(first, jnp.mean(points["input"][:1, :, 1:], axis=2), atol=1e-6)
    assert first.shape == (1, 3, 16) and rest.shape == (3, 3, 32 if pool == "cls_mean" else 16)
    assert np.abs(first[0, 0] - first[0, 1]).max() > 0.01


def test_lidar_of_a_run_on_any_devices():
    one, eight = (collapse_subject.measure_lidar(subject(n), 30, 4) for n in (1, 8))
    for place, found in eight.items():
        assert (found.classes, found.views) == (30, 4) and 1 < found.value < 16
        assert found.value == pytest.approx(one[place].value, rel=1e-3)
    assert found.warnings == ()


def test_views_are_drawn_by_the_training_augmentation():
    """The whole image again without augmentation; with it q different ones, the same each time."""
    s = subject()
    with s.config.unlocked():
        plain = s.config.copy_and_resolve_references()
    plain.data.crop_scale, plain.data.flip, plain.data.randaugment_layers = (1.0, 1.0), 0.0, 0
    for views, index in augmented_views(plain, s.train, np.array([3, 5]), 3):
        assert all(np.array_equal(view, s.train.read(index)) for view in views)
    plain.data.flip = 1.0
    ((views, index),) = augmented_views(plain, s.train, np.array([7]), 2)
    np.testing.assert_array_equal(views, [s.train.read(index)[:, ::-1]] * 2)
    first, again = ([v for v, _ in augmented_views(s.config, s.train, np.arange(4), 3)] for _ in "ab")
    np.testing.assert_array_equal(first, again)
    assert all(len({v.tobytes() for v in views}) == 3 for views in first)


def test_a_run_without_images_is_refused():
    blind = subject()
    with pytest.raises(DataError, match="no images"):
        collapse_subject.measure(Subject("x", blind.config, blind.params, None, None, None, blind.mesh))


def test_every_encoder_has_weights():
    for name in ("crate", "vit", "resnet18"):
        found = collapse_subject.weights(subject(1, encoder=name))
        assert all(n.startswith("encoder/") for n in found)
        assert any(v.shape[0] == 2 for v in found.values()) or name == "resnet18"


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_stages_of_different_width_are_measured_each(layer):
    """The representation is the last stage's, or that of config.evaluation.layer."""
    s = subject(1, encoder="resnet18", corruption="none")  # a split over devices is the same for all encoders
    s.config.evaluation.layer = layer
    found = collapse_subject.measure(s, 50)
    images = data.eval_images(s.config, s.train, data.sampling.sample(len(s.train), 50, s.config.seed))[0]
    groups = jax.jit(collapse_subject.features(s.config))(s.params, images)
    expected = [np.asarray(x) for group in groups for x in group]
    assert list(found) == ["input", "stage 1", "stage 2", "stage 3", "stage 4", "representation"]
    for place, m in found.items():
        n = int(place[-1]) - 1 if "stage" in place else {"input": 0, "representation": (layer or 4) - 1}[place]
        assert (m.width, m.rows) == (4 * 2**n, 50), place
        x = expected.pop(0)
        x = x.reshape(-1, x.shape[-1])
        squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / (len(x) - 1)
        np.testing.assert_allclose(m.eigenvalues, squares, rtol=1e-2, atol=1e-6)
    np.testing.assert_array_equal(found["representation"].eigenvalues, found[f"stage {layer or 4}"].eigenvalues)
    if not layer:
        lidar = collapse_subject.measure_lidar(s, 30, 4)
        assert list(lidar) == list(found) and all(1 <= x.value <= found[place].width for place, x in lidar.items())


def test_the_section_shows_every_run():
    subjects = [subject(1, encoder="vit"), subject(1, encoder="crate", corruption="none")]
    made = section.section(subjects, images=12, classes=24, views=2)
    features, weights = made.tables
    assert len(made.figures) == 3 and len(features.rows) == 8
    assert all(len(row) == len(table.columns) for table in made.tables for row in table.rows)
    assert {row[0] for row in weights.rows} == {s.name for s in subjects}
    for figure in made.figures:
        axes = figure.content.axes
        assert axes and all(ax.get_lines() and ax.get_xscale() == ax.get_yscale() == "log" for ax in axes)
        figure.content.canvas.draw()
    panels = made.figures[1].content.axes
    assert [ax.get_title() for ax in panels] == ["input", "block 1", "block 2", "representation"]
    for ax in panels:  # the runs beside each other, on axes that can be compared by eye
        assert [line.get_label() for line in ax.lines] == [s.name for s in subjects]
    assert len({ax.get_ylim() for ax in panels}) == 1
    assert "12 rows for 16 features" in made.text and {row[-1] for row in features.rows} == {"yes"}
    json.dumps(made.numbers, allow_nan=False)
    assert made.numbers["vit on 1"]["features"]["block 1"]["rankme"] == features.rows[1][3]


def test_weights_have_a_panel_for_each_kernel_and_layer():
    """Runs lie in the same panels; a run without a kernel has no line there; of many blocks six are drawn."""
    stack = np.linspace(3.0, 0.5, 12 * 7).reshape(12, 7)
    names = ("encoder/blocks/mlp_in/kernel", "encoder/blocks/mlp_out/kernel", "encoder/embedding/kernel")
    found = {"x, 1": dict(zip(names, (stack, stack + 1, stack[:1]), strict=True)), "b$": {names[0]: 2 * stack[:4]}}
    plot = section.weight_plot(found, {"x, 1": "short", "b$": "other"})
    titles = [ax.get_title() for ax in plot.axes]
    rows = [f"block {n}: mlp_{part}" for n in (1, 3, 5, 8, 10, 12) for part in ("in", "out")]
    assert titles == ["embedding", *rows]
    lines = {
        t: {line.get_label(): line.get_ydata() for line in ax.lines} for t, ax in zip(titles, plot.axes, strict=True)
    }
    np.testing.assert_array_equal(lines["block 3: mlp_in"]["x, 1"], stack[2])
    np.testing.assert_array_equal(lines["block 3: mlp_in"][r"b\$"], 2 * stack[2])
    assert r"b\$" not in lines["block 3: mlp_out"] and r"b\$" not in lines["block 5: mlp_in"]
    legend = plot.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["short", "other"]
    text, _ = svg.element(plot, "f", ("x, 1", "b$"), "")
    # the run's lines, its sample in the legend, and its text
    assert text.count('data-run="0"') == 13 + 2 and text.count('data-run="1"') == 2 + 2
    assert text.count(">short<") == 1


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ((("over/penalty=none,seed=0", "none"), ("over/penalty=so,seed=0", "so")), ["penalty=none", "penalty=so"]),
        ((("a/run", "none"), ("b/run", "srip")), ["a (none)", "b (srip)"]),
        ((("a", "so"), ("b/run", "so")), ["a", "b/run"]),
        ((("only,one", "so"),), ["only,one"]),
    ],
)
def test_legends_name_what_distinguishes_runs(runs, expected):
    subjects = []
    for name, penalty in runs:
        c = configs.base()
        c.penalty.name = penalty
        subjects.append(Subject(name, c, {}, None, None, None, None))
    assert short_names(subjects) == {name: short for (name, _), short in zip(runs, expected, strict=True)}


def test_lidar_takes_the_views_that_the_run_trains_on(monkeypatch):
    class Drawn(Exception):
        pass

    def drawn(config, source, indices, views, recipe):
        raise Drawn(recipe)

    monkeypatch.setattr(collapse_subject, "augmented_views", drawn)
    for method, recipe in (("simclr", True), ("reconstruction", False)):
        s = subject(1)
        s.config.method = method
        with pytest.raises(Drawn, match=str(recipe)):
            collapse_subject.measure_lidar(s, 30, 4)


def test_frozen_evaluation_logs_collapse_beside_accuracy():
    c = subject().config
    c.evaluation.train_images, c.evaluation.test_images = 300, 200
    mesh = sharding.make_mesh(16, 1, jax.devices()[:1])
    evaluation = FrozenEvaluation(
        c, lambda p, x: x.reshape(len(x), -1)[:, :24].astype(jnp.float32) * p, data.open_split(c, "train"), mesh
    )
    scores = evaluation.final_scores(jnp.float32(1.0), lambda: jnp.float32(0.0))
    assert {"knn_top1", "probe_top1", "rankme", "rankme_limit", "alpha_req", "off_diagonal"} <= scores.keys()
    assert 1 < scores["rankme"] < scores["rankme_limit"] == 24
    assert scores["rankme_untrained"] == pytest.approx(1, abs=1e-3)  # all features zero
    assert "alpha_req_untrained" not in scores and "rankme_pixels" not in scores
    assert scores.pop("test_images") == 200
    assert all(isinstance(v, float) for v in scores.values())
