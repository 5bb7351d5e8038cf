"""Alignment: moments, Theorems 1 and 3, projection's closed form, and the job."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from PIL import Image

from configs import align as align_config, joint, quickstart
from crate_jax import config as configs, data
from crate_jax.analysis.alignment import analyse, answer, bands, closed_form, corrupted, grid, moments, section
from crate_jax.data.sources import ArraySource
from crate_jax.errors import ConfigError, DataError
from crate_jax.jobs import align
from crate_jax.methods import reconstruction
from crate_jax.models import autoencoder, corruption
from crate_jax.parallel import sharding
from crate_jax.report import Subject
from crate_jax.workdir import checkpoint
from tests.parity import joint_loss, moments_of

pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def images():
    """600 images of 8 x 8 x 3 bytes whose class shifts smooth waves, and labels of 5 classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 600)
    waves = rng.normal(size=(40, 8, 8, 3)).cumsum(1).cumsum(2)
    strength = rng.normal(size=(600, 40)) / np.arange(1, 41)
    strength[:, :5] += 0.4 * np.eye(5)[labels]
    pixels = np.tensordot(strength, waves, 1)
    pixels = 128 + 30 * pixels / pixels.std() + rng.normal(size=pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), labels.astype(np.int32)


@pytest.fixture(scope="module")
def of_images(images):
    x, y = images
    return moments.of_images([{"image": x, "label": y}], 5, sharding.make_mesh(8, 1))


@pytest.fixture(scope="module")
def aligner(of_images):
    return closed_form.Aligner(of_images, 192)


def test_approximate_components(of_images, monkeypatch):
    """Above DIRECT_SIZE the components are iterated for; the curves stay within their stated error."""
    exact = closed_form.Aligner(of_images, 20, exact=True)
    monkeypatch.setattr(closed_form, "DIRECT_SIZE", 10)
    iterated = closed_form.Aligner(of_images, 20)
    G = corrupted.masking(of_images.second_DD, corrupted.patch_of_number((8, 8), (2, 2)), 0.75)
    for found, truth in ((iterated.clean(), curve_of(exact, None)), (iterated.curve(G), curve_of(exact, G))):
        assert 0 < abs(found.alignment_K - truth).max() <= found.error < 0.01


def curve_of(aligner, G, latents=None):
    return (aligner.clean() if G is None else aligner.curve(G)).alignment_K[:latents]


ONE_DEVICE = sharding.make_mesh(1, 1, jax.devices()[:1])


def reference_moments(x, y, noise):
    """In NumPy's float64, from all images at once."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    ridge = len(x) * (noise * rows.std()) ** 2
    centred = rows - rows.mean(0)
    second = centred.T @ centred + ridge * np.eye(rows.shape[1])
    variance = np.trace(second) / rows.size
    return second / variance, centred.T @ np.eye(5)[y] / np.sqrt(variance)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [64, 250])
def test_streamed_moments_are_exact(images, devices, size, monkeypatch):
    """In batches, over devices, collected often or once: the float64 numbers of all images at once."""
    monkeypatch.setattr(moments, "FLUSH", 2)
    x, y = images
    mesh = sharding.make_mesh(8, 1, jax.devices()[:devices])
    batches = [{"image": x[i : i + size], "label": y[i : i + size]} for i in range(0, len(x), size)]
    ours = moments.of_images(batches, 7, mesh, noise=0.01)  # two classes have no image
    second, cross = reference_moments(x, y, 0.01)
    np.testing.assert_allclose(ours.second_DD, second, rtol=0, atol=1e-11 * second.max())
    np.testing.assert_allclose(ours.cross_DC, cross, rtol=0, atol=1e-11 * abs(cross).max())
    np.testing.assert_array_equal(ours.targets_CC, np.diag(np.bincount(y)))
    assert ours.count == 600


def test_sums_are_exact_at_their_limit():
    """ROWS images of the byte furthest from 128: the largest sum that float32 has to hold."""
    x = np.zeros((moments.ROWS, 1, 2, 3), np.uint8)
    x[0, 0, 0, 0] = 129  # a sum that is not a power of two
    gram, _, _ = moments.exact_sums([{"image": x, "label": np.zeros(len(x), int)}] * 3, 1, ONE_DEVICE)
    rows = x.reshape(len(x), -1).astype(np.int64) - 128
    np.testing.assert_array_equal(gram, 3 * rows.T @ rows)
    with pytest.raises(ValueError, match="at most 1024"):
        moments.exact_sums(
            [{"image": np.zeros((1025, 1, 1, 3), np.uint8), "label": np.zeros(1025, int)}], 1, ONE_DEVICE
        )


def test_alignment_grows_from_0_to_1(aligner, of_images):
    patch_D = corrupted.patch_of_number((8, 8), (2, 2))
    for G in (None, corrupted.masking(of_images.second_DD, patch_D, 0.75)):
        curve = curve_of(aligner, G)
        assert np.all(np.diff(curve) >= -1e-12) and curve[0] > 0
        assert curve[-1] == pytest.approx(1, abs=1e-9)
        few = closed_form.Aligner(of_images, 20)
        found = few.clean() if G is None else few.curve(G)
        assert abs(found.alignment_K - curve[:20]).max() <= max(found.error / 5, 1e-9) < 1e-3
        exact = closed_form.Aligner(of_images, 20, exact=True)
        np.testing.assert_allclose(curve_of(exact, G), curve[:20], atol=1e-9)
        np.testing.assert_allclose(closed_form.authors_scale(curve), 100 * np.sqrt(curve))


def test_alignment_is_the_definition(images, aligner, of_images):
    """QR of V^T X over all images, as the paper defines it (X with the noise of the moments added as images)."""
    x, y = images
    rows = x.reshape(len(x), -1).astype(np.float64)
    D = rows.shape[1]
    padded = np.concatenate([rows - rows.mean(0), np.sqrt(len(x)) * 1e-3 * rows.std() * np.eye(D)])
    targets = np.concatenate([np.eye(5)[y], np.zeros((D, 5))])
    G = corrupted.masking(of_images.second_DD, corrupted.patch_of_number((8, 8), (4, 4)), 0.6)
    C = padded.T @ padded
    _, V = scipy.linalg.eigh(C @ C, G)
    Q = np.linalg.qr(padded @ V[:, ::-1])[0]
    seen = np.cumsum(np.sum((targets @ (targets.T @ Q)) ** 2, axis=0))
    np.testing.assert_allclose(curve_of(aligner, G, D), seen / seen[-1], atol=1e-6)


def test_gaussian_noise_changes_nothing(aligner, of_images):
    clean = curve_of(aligner, None, 100)
    for std in (0.1, 1.0, 10.0):
        np.testing.assert_allclose(
            curve_of(aligner, corrupted.gaussian(of_images.second_DD, 600, std), 100), clean, atol=1e-6
        )


def test_the_released_scale_changes_nothing(of_images, aligner):
    """Where all buckets hold equally many tokens."""
    patch_D = corrupted.patch_of_number((8, 8), (2, 2))
    mixes = (corrupted.mixing(16, 4, "balanced", scale) for scale in (0.0, 0.14))
    exact, released = (corrupted.projection(of_images.second_DD, patch_D, mix) for mix in mixes)
    np.testing.assert_allclose(exact, released, atol=1e-9 * exact.max())


def test_masking_of_whole_images_or_nothing_changes_nothing(of_images, aligner):
    clean = curve_of(aligner, None, 50)
    for patch, ratio in (((8, 8), 0.9), ((1, 1), 0.0), ((2, 4), 0.0)):
        G = corrupted.masking(of_images.second_DD, corrupted.patch_of_number((8, 8), patch), ratio)
        np.testing.assert_allclose(curve_of(aligner, G, 50), clean, atol=1e-7)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (3, 5)])
def test_masking_by_simulation(of_images, patch):
    """The mean of drawn masks, within five standard errors; a patch loses all its channels."""
    patch_D = corrupted.patch_of_number((8, 8), patch)
    keep = np.random.default_rng(0).random((20_000, patch_D.max() + 1)) >= 0.3
    pairs = (keep.T @ keep.astype(np.float64)) / len(keep) / 0.7**2
    drawn = of_images.second_DD * pairs[np.ix_(patch_D, patch_D)]
    G = corrupted.masking(of_images.second_DD, patch_D, 0.3)
    np.testing.assert_allclose(drawn, G, rtol=5 / np.sqrt(len(keep)) / 0.7, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_masking_of_a_fixed_count_by_simulation(of_images, ratio):
    """Draws of the training code's sampler, which keeps the same number of 16 patches; at 0.9 one."""
    patch_D = corrupted.patch_of_number((8, 8), (2, 2))
    c = configs.base()
    c.corruption.mask_ratio = ratio
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = corruption.CORRUPTIONS["mask"](c.corruption, 16, 12)(keys)
    keep = 1.0 - np.asarray(drawn.removed_BN, np.float64)
    pairs = keep.T @ keep / len(keep) / (drawn.kept / 16) ** 2
    C = of_images.second_DD
    G = corrupted.masking_of_count(C, patch_D, drawn.kept)
    # Kept for sure together with probability q: a standard error of sqrt((1 - q) / q / draws), q >= 6 / 120 or 0.
    np.testing.assert_allclose(C * pairs[np.ix_(patch_D, patch_D)], G, rtol=5 * np.sqrt(20 / len(keep)), atol=1e-12)
    if drawn.kept > 1:
        independent = corrupted.masking(C, patch_D, 1 - (drawn.kept - 1) / 15)
        np.testing.assert_allclose(G / G[0, -1], independent / independent[0, -1], rtol=1e-12)


def drawn_projections(tokens, buckets, kind, scale, draws):
    """P of the training code's sampler, (draws, N, N)."""
    c = configs.base()
    c.corruption.rop_buckets, c.corruption.rop_ratio, c.corruption.paper_scale = kind, buckets / tokens, scale
    sample = corruption.CORRUPTIONS["rop"](c.corruption, tokens, 3)

    @jax.jit
    def draw(keys):
        return sample(keys).project(jnp.broadcast_to(jnp.eye(tokens), (len(keys), tokens, tokens)))

    return np.asarray(draw(jax.random.split(jax.random.key(buckets), draws)), np.float64)


def all_buckets(tokens, buckets, kind):
    """Every draw of buckets, each as likely as the others, (draws, N)."""
    if kind == "independent":
        return np.array(list(itertools.product(range(buckets), repeat=tokens)))
    orders = list(itertools.permutations(range(buckets)))
    draws = [sum(runs, ())[:tokens] for runs in itertools.product(orders, repeat=-(-tokens // buckets))]
    shifts = range(tokens) if tokens % buckets else (0,)
    return np.array([np.roll(draw, shift) for draw in draws for shift in shifts])


@pytest.mark.parametrize(
    ("kind", "tokens", "buckets", "scale"),
    [
        *(("independent", 4, *rest) for rest in ((1, 0.0), (2, 0.0), (3, 0.0), (3, 0.14))),
        ("independent", 1, 1, 0.0),
        *(("balanced", 5, *rest) for rest in ((2, 0.0), (3, 0.0), (4, 0.0), (3, 0.14))),
        *(("balanced", 4, *rest) for rest in ((2, 0.0), (4, 0.0))),
    ],
)
def test_projection_by_enumeration(kind, tokens, buckets, scale):
    """The mean over all buckets and all signs, to rounding."""
    h_dN = all_buckets(tokens, buckets, kind)
    s_dN = np.array(list(itertools.product((1, -1), repeat=tokens)))
    together_dNN = h_dN[:, :, None] == h_dN[:, None, :]
    of_buckets = together_dNN * (scale or 1 / together_dNN.sum(-1, keepdims=True))
    draws = (of_buckets[:, None] * (s_dN[:, :, None] * s_dN[:, None, :])).reshape(-1, tokens, tokens)
    P = 2
    x = np.random.default_rng(1).normal(size=(20, tokens * P))
    blocks = (x.T @ x).reshape(tokens, P, tokens, P)
    mean = np.einsum("sik,kplq,sjl->ipjq", draws, blocks, draws, optimize=True) / len(draws)
    mix = corrupted.mixing(tokens, buckets, kind, scale)
    G = corrupted.projection(x.T @ x, np.repeat(np.arange(tokens), P), mix) * mix.mean**2
    np.testing.assert_allclose(G, mean.reshape(G.shape), atol=1e-12 * abs(G).max())
    np.testing.assert_allclose(draws.mean(0), mix.mean * np.eye(tokens), atol=1e-12)


@pytest.mark.parametrize("kind", ["balanced", "independent"])
@pytest.mark.parametrize(("buckets", "scale"), [(3, 0.0), (4, 0.14)])
def test_projection_by_simulation(kind, buckets, scale):
    """The error of a mean over n draws of the sampler falls as 1 / sqrt(n): the closed form is its limit."""
    N, P = 8, 2
    x = np.random.default_rng(1).normal(size=(100, N * P)) @ np.random.default_rng(2).normal(size=(N * P, N * P))
    C = x.T @ x
    mix = corrupted.mixing(N, buckets, kind, scale)
    G = corrupted.projection(C, np.repeat(np.arange(N), P), mix) * mix.mean**2
    draws = drawn_projections(N, buckets, kind, scale, 16_384)
    blocks = C.reshape(N, P, N, P)

    def error(matrices):
        drawn = np.einsum("sik,kplq,sjl->ipjq", matrices, blocks, matrices, optimize="greedy") / len(matrices)
        return np.linalg.norm(drawn.reshape(C.shape) - G) / np.linalg.norm(G)

    few, many = np.mean([error(d) for d in draws.reshape(64, 256, N, N)]), error(draws)
    assert 1 / 24 < many / few < 1 / 3  # 1 / sqrt(64) = 1 / 8, itself random
    np.testing.assert_allclose(draws.mean(0), mix.mean * np.eye(N), atol=5 / np.sqrt(len(draws)))


def test_balanced_and_independent_buckets_differ(of_images, aligner):
    patch_D = corrupted.patch_of_number((8, 8), (2, 2))
    mixes = (corrupted.mixing(16, 4, kind) for kind in ("balanced", "independent"))
    a, b = (curve_of(aligner, corrupted.projection(of_images.second_DD, patch_D, mix), 20) for mix in mixes)
    assert abs(a - b).max() > 1e-4


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_theorem1_is_never_beaten_by_descent(lam):
    """Adam in float64 from 20 random starts gets to the minimum and not below it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    x /= x.std()
    y = np.eye(4)[rng.integers(0, 4, 200)]
    m = moments_of(x, y)
    best = closed_form.theorem1(m, 3, lam)
    assert joint_loss(m, lam, best) == pytest.approx(best.loss, rel=1e-9)
    with jax.enable_x64(True):
        shapes = {"V": (12, 3), "W": (3, 4), "Z": (3, 12)}
        starts = {k: jnp.asarray(rng.normal(size=(20, *s)) / 3) for k, s in shapes.items()}
        solver = optax.adam(optax.cosine_decay_schedule(0.03, 3000))

        def loss(p):
            latents = jnp.asarray(x) @ p["V"]
            return jnp.sum((latents @ p["W"] - y) ** 2) + lam * jnp.sum((latents @ p["Z"] - x) ** 2)

        def step(carry, _):
            p, state = carry
            updates, state = solver.update(jax.grad(loss)(p), state)
            return (optax.apply_updates(p, updates), state), None

        def descend(p):
            (p, _), _ = jax.lax.scan(step, (p, solver.init(p)), None, length=3000)
            return loss(p)

        found = np.asarray(jax.jit(jax.vmap(descend))(starts))
    assert found.min() >= best.loss * (1 - 1e-9)
    assert found.min() <= best.loss * (1 + 1e-4)  # and it is a value that is reached


def test_limits_of_theorem1(of_images):
    """Lam = 0: least squares; large lam: PCA."""
    D = len(of_images.second_DD)
    ols = closed_form.theorem1(of_images, 5, 0.0)
    weights = np.linalg.solve(of_images.second_DD, of_images.cross_DC)
    np.testing.assert_allclose(ols.encoder_DK @ ols.head_KC, weights, atol=1e-6 * abs(weights).max())
    near = closed_form.theorem1(of_images, 5, 1e-9)
    np.testing.assert_allclose(near.encoder_DK @ near.head_KC, weights, atol=1e-3 * abs(weights).max())
    pca = closed_form.theorem1(of_images, 5, 1e9)
    top = np.linalg.eigh(of_images.second_DD)[1][:, -5:]
    np.testing.assert_allclose(pca.encoder_DK @ pca.decoder_KD, top @ top.T, atol=1e-6)
    assert D > 5


def test_theorem1_with_fewer_images_than_numbers():
    """A singular X X^T: the pseudo-inverse, and K up to its rank."""
    rng = np.random.default_rng(0)
    m = moments_of(rng.normal(size=(10, 30)), np.eye(3)[rng.integers(0, 3, 10)])
    found = closed_form.theorem1(m, 10, 1.0)
    assert found.loss == pytest.approx(0, abs=1e-9)
    assert joint_loss(m, 1.0, found) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="must lie in 1..10"):
        closed_form.theorem1(m, 11, 1.0)


def test_what_cannot_be_aligned_is_named(images, of_images, aligner):
    x, y = images
    mesh = sharding.make_mesh(8, 1)
    with pytest.raises(DataError, match="photos: all 600 images have the same label"):
        moments.of_images([{"image": x, "label": 0 * y}], 5, mesh, name="photos")
    with pytest.raises(DataError, match="there are no images"):
        moments.of_images([], 5, mesh)
    with pytest.raises(DataError, match="are the same"):
        moments.of_images([{"image": np.repeat(x[:1], 600, 0), "label": y}], 5, mesh)
    with pytest.raises(DataError, match="config.align.noise must be larger"):
        closed_form.Aligner(moments.of_images([{"image": x[:50], "label": y[:50]}], 5, mesh, noise=0.0), 3)
    with pytest.raises(ValueError, match=r"latents=193: must lie in 1\.\.192"):
        closed_form.Aligner(of_images, 193)


@pytest.fixture(scope="module")
def small():
    """The job's config on the digits, two ratios of each."""
    c = align_config.get_config("debug")
    c.data.source = "digits"
    c.evaluation.train_images = 0
    c.align.width, c.align.latents, c.align.patch_sizes = 16, 32, (1, (2, 4))
    return c


def test_job_answers(small, tmp_path):
    record = align.run(small, str(tmp_path))
    files = {p.name for p in tmp_path.iterdir()}
    drawings = {f"{name}.{kind}" for name in align.FIGURES for kind in ("png", "svg")}
    assert {"alignment.json", "table.md", "config.json"} | drawings <= files
    stored = json.loads((tmp_path / "alignment.json").read_text())
    assert stored["images"] == 1437 and stored["classes"] == 10 and len(stored["clean"]) == 32
    assert [(s["corruption"], s["patch"], s["ratio"]) for s in stored["settings"]] == [
        ("mask", p, r) for p in ([1, 1], [2, 4]) for r in (0.25, 0.75)
    ] + [("rop", [4, 4], r) for r in (0.25, 0.75)]
    for s in stored["settings"]:
        assert s["gain"] == pytest.approx(s["alignment"] - stored["clean"][15], abs=1e-5)
    table = (tmp_path / "table.md").read_text()
    assert record["summary"] in table and "gaussian noise" in record["summary"].splitlines()[-1]
    assert table.count("| mask |") == 4 and table.count("| rop |") == 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_answer_reads_the_curves():
    """Which ratio is best, what never helps, and at which widths a gain is above its error."""
    clean = closed_form.Curve(np.array([0.2, 0.4, 0.6]), 0.002)
    ratios = ((1, 0.1), (1, 0.5), (1, 0.9), (2, 0.1))
    good, better, heavy, bad = (grid.Setting("mask", (p, p), r) for p, r in ratios)
    curves = {
        good: closed_form.Curve(np.array([0.1, 0.5, 0.6]), 0.01),
        better: closed_form.Curve(np.array([0.3, 0.6, 0.6]), 0.01),
        heavy: closed_form.Curve(np.array([0.1, 0.3, 0.5]), 0.01),
        bad: closed_form.Curve(np.array([0.3, 0.411, 0.5]), 0.01),
    }
    about = {"data": "d", "images": 193, "classes": 2, "image_size": [8, 8]}
    found = answer.Answer(2, clean, curves, about)
    assert found.best(found.groups()["mask 1x1"]) == better
    assert found.gain(better) == pytest.approx(0.2)
    assert found.never() == ["mask 2x2", "gaussian noise"]  # its gain at width 2 is below the errors of both curves
    assert found.share_raised(good) == pytest.approx(1 / 3) and found.share_raised(better) == pytest.approx(2 / 3)
    assert found.record()["best"] == {"mask 1x1": 0.5, "mask 2x2": 0.1}
    assert "+20.00" in found.summary() and found.summary().endswith("never at this width: mask 2x2, gaussian noise")
    useless = answer.Answer(2, clean, {bad: curves[bad]}, about)
    assert useless.summary().splitlines()[-1].startswith("no corruption of this grid raises alignment at this width")
    assert section._sentence("run", useless).endswith("no corruption of the grid raises it.")
    few = answer.Answer(2, clean, curves, about | {"images": 192})  # as many as an image has numbers
    assert few.summary().splitlines()[-1].startswith("192 images of 192 numbers: a linear map can fit any labels")
    sentence = section._sentence("run", few)
    assert sentence.startswith("run: 40.0 % at width 2. 192 images of 192 numbers") and "raises" not in sentence


def test_larger_images_keep_their_grid_of_tokens():
    c = align_config.get_config()
    c.data.image_size, c.encoder.patch_size = (224, 224), 16
    analyse.shrink_to_side(c)
    assert c.data.image_size == (28, 28) and c.encoder.patch_size == 2
    c.data.image_size, c.encoder.patch_size = (32, 32), 4
    analyse.shrink_to_side(c)
    assert c.data.image_size == (32, 32) and c.encoder.patch_size == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"align.width": 193}, r"config.align.width=193: images of 8 x 8 have only 192 numbers"),
        ({"align.patch_sizes": (16,)}, r"config.align.patch_sizes=\(16,\): images are only \(8, 8\)"),
        ({"align.patch_sizes": (4, (2, 9))}, r"config.align.patch_sizes=\(4, \(2, 9\)\): images are only"),
        ({"align.patch_sizes": (4, (2, 0))}, r"config.align.patch_sizes=.* must be a side in pixels or"),
        ({"align.patch_sizes": (1.5,)}, r"config.align.patch_sizes=.*1.5 must be a side in pixels or"),
        ({"align.mask_ratios": (0.5, 1.0)}, r"align.mask_ratios=.*between 0 and 1"),
        ({"align.patch_sizes": (), "align.rop_ratios": ()}, r"config.align: the grid has no corruption"),
        ({"align.noise": 0.0}, r"config.align.noise must be larger"),  # grey digits: three equal channels
    ],
)
def test_bad_settings_are_named(small, tmp_path, values, message):
    c = small.copy_and_resolve_references()
    for key, value in values.items():
        c.align[key.removeprefix("align.")] = value
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        align.run(c, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_images_without_labels_are_refused(small, tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    c = small.copy_and_resolve_references()
    c.data.source = f"folder:{tmp_path}"
    with pytest.raises(DataError, match="this job needs labels"):
        align.run(c, str(tmp_path / "w"))


def test_few_images_are_warned_about(small, tmp_path, caplog):
    c = small.copy_and_resolve_references()
    c.evaluation.train_images = 100
    align.analyse(c, ONE_DEVICE)  # what the job runs before it draws
    assert "100 images of 192 numbers" in caplog.text


def tiny_run():
    c = quickstart.get_config("debug")
    c.loss.region = "all"
    return c, jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))()


def test_bands_add_up_to_the_loss():
    """All bands together are the training loss, and a prediction of the mean has error 1 in each."""
    c, params = tiny_run()
    c.corruption.name = "none"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, *c.data.image_size, 3)).astype(np.uint8)
    components = bands.components_of(bands.rows_of(c, images, 32), 32)
    D = len(components.variances_K)
    assert D == 192
    error = bands.reconstruction_by_band(c, params, images, components, [0, D])[0]
    loss = jax.jit(reconstruction.build(c).loss)(
        params, {}, {"image": jnp.asarray(images)}, jax.random.split(jax.random.key(0), 200)
    )[0]
    assert error * components.variances_K.sum() / D == pytest.approx(float(loss), rel=1e-4)
    centred = bands.Components(0 * components.mean_D, components.vectors_DK, components.variances_K, 32)
    nothing = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(bands.reconstruction_by_band(c, nothing, images, centred, [0, 3, 50, D]), 1, rtol=1e-4)


def test_bands_of_normalised_targets_start_from_the_means_that_are_given():
    """A decoder that says nothing has error 1 in each band, though it is given the mean of each patch."""
    c, params = tiny_run()
    c.loss.target = "patch_normalised"
    images = np.random.default_rng(0).integers(0, 256, (24, *c.data.image_size, 3)).astype(np.uint8)
    components = bands.components_of(bands.rows_of(c, images, 32), 32)
    params["decoder"]["head"] = jax.tree.map(jnp.zeros_like, params["decoder"]["head"])
    np.testing.assert_allclose(bands.reconstruction_by_band(c, params, images, components, [0, 3, 23]), 1, rtol=1e-4)
    subjects = [Subject(name, c, {}, None, None, None, None) for name in ("a", "b")]
    assert "The targets of a, b are normalised by patch" in section.given_means(subjects)


def test_directions_that_no_image_has_are_no_components():
    """What float32 leaves along them says nothing about labels: grey images, and fewer images than numbers."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(np.int32)
    rows = np.repeat(rng.normal(size=(300, 9)), 3, axis=1)
    rows = (rows + 0.2 * (2 * labels - 1)[:, None]) / np.tile((0.229, 0.224, 0.225), 9)
    rows = rows.astype(np.float32)
    components = bands.components_of(rows, 3)
    assert components.vectors_DK.shape == (27, 9) and components.variances_K.min() > 0.01
    evaluation = configs.base().evaluation
    found = bands.accuracy_by_subspace((rows, labels), (rows, labels), 2, components, [0.5], evaluation)
    assert sum(f.dimensions for f in found) == 9
    assert len(bands.components_of(rows[:5], 3).variances_K) == 4
    same = bands.components_of(np.ones((5, 27), np.float32), 3)
    assert len(same.variances_K) == 1
    assert bands.accuracy_by_subspace((rows, labels), (rows, labels), 2, same, [0.5], evaluation) == []


def test_images_whose_sides_share_no_divisor_with_a_patch_stay_small():
    """Nobody chose patches for a ResNet under joint embedding; 299 x 299 x 3 numbers have second moments of 500 GB."""
    c = joint.get_config("method=byol")
    for size, expected in (((299, 299), (32, 32)), ((75, 50), (32, 21)), ((224, 224), (28, 28)), ((30, 30), (30, 30))):
        c.data.image_size = size
        assert section.aligned_config(Subject("x", c, {}, None, None, None, None)).data.image_size == expected


def test_shrinking_takes_means_of_boxes():
    x = np.arange(2 * 12 * 8 * 3, dtype=np.float32).reshape(2, 12, 8, 3)
    small = np.asarray(bands.shrink(jnp.asarray(x), 6))
    assert small.shape == (2, 6, 4, 3)
    np.testing.assert_allclose(small[1, 2, 3], x[1, 4:6, 6:8].mean((0, 1)))


def test_the_subspace_with_the_signal_is_found(caplog):
    """Labels in the last components only: the bottom has them, the top is at chance."""
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600).astype(np.int32)
    rows = rng.normal(size=(600, 12)) * np.repeat([10, 0.1], [5, 7])
    rows[:, -1] += 0.3 * (2 * labels - 1)
    components = bands.components_of(rows[:400], 2)
    found = bands.accuracy_by_subspace(
        (rows[:400], labels[:400]), (rows[400:], labels[400:]), 2, components, [0.95], configs.base().evaluation
    )
    top, bottom = found
    assert (top.place, bottom.place) == ("top", "bottom")
    assert top.probe < 0.65 < 0.95 < bottom.probe
    assert (top.dimensions, bottom.dimensions) == (5, 7)
    assert "1 of 2: accuracy from 5 top components" in caplog.text
    assert "2 of 2: accuracy from 7 bottom components" in caplog.text
    assert top.variance >= 0.9 and top.variance + bottom.variance == pytest.approx(1)


def test_section_of_a_run(images, tmp_path, monkeypatch, caplog):
    """A run with two checkpoints on the digits, and one without labels or decoder."""
    monkeypatch.setattr(section, "SHARES", (0.9,))
    c = quickstart.get_config("debug")
    saved = checkpoint.Checkpoints(tmp_path, 3)
    params = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))()
    for step in (1, 2):
        saved.save(step, params, {"step": jnp.int32(step)}, {"config": c.to_dict()})
    saved.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "probe_top1": 0.5}\n')
    params, _ = checkpoint.read_params(tmp_path)
    splits = [data.open_split(c, s) for s in ("train", "eval")]
    subject = Subject("quick", c, params, tmp_path, *splits, ONE_DEVICE)
    unlabelled = ArraySource("grey", images[0], None, None)
    other = Subject("other", c, {"encoder": params["encoder"]}, None, unlabelled, None, subject.mesh)
    again = Subject("again", c.copy_and_resolve_references(), subject.params, None, *splits, subject.mesh)
    again.config.corruption.mask_ratio = 0.3
    caplog.set_level("INFO")
    made = section.section([subject, other, again])
    assert "quick: error by band at step 2 of 2" in caplog.text
    assert (
        "other: no alignment, as there are no labelled training images" in made.text
        and "Images of quick and again: " in made.text
    )
    assert len(made.tables) == 3 and len(made.figures) == 2
    for table in made.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    assert made.numbers["bands"]["quick"]["steps"] == [1, 2]
    assert [row[-1] for row in made.tables[2].rows] == made.numbers["bands"]["quick"]["probe"] == [None, 0.5]
    assert (
        set(made.numbers["alignment"]) == set(made.numbers["subspaces"]) == {"Images of quick and again"}
    )  # taken once
    assert {0.3, 0.5} < {row[2] for row in made.tables[0].rows if row[0] == "mask"}  # the ratios of both
