"""White-box measures against float64 references and cases known by hand; pictures of planted cases; Theorem 3."""

from __future__ import annotations

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from PIL import Image

from crate_jax import config as configs, data
from crate_jax.analysis.whitebox import measures as whitebox, pictures as draw, section as sections, theory
from crate_jax.config import validate
from crate_jax.errors import UserError
from crate_jax.jobs import train
from crate_jax.models import ENCODERS, Encoder, autoencoder, representation
from crate_jax.models.corruption import Identity, Masking
from crate_jax.models.layers import scan_blocks
from crate_jax.models.patches import patchify
from crate_jax.parallel import sharding, target
from crate_jax.report import Subject

pytestmark = pytest.mark.one_python


def small(encoder: str = "crate", decoder: str = "crate", fill: str = "token", **encoder_values):
    """A tiny model: 16 patches of 4 x 4 pixels, width 16, 3 layers in the encoder and 2 in the decoder."""
    c = configs.base()
    c.steps, c.batch_size, c.data.source = 4, 8, "synthetic"
    c.data.image_size = (16, 16)
    c.encoder.name, c.encoder.patch_size = encoder, 4
    c.encoder.width, c.encoder.depth, c.encoder.heads = 16, 3, 2
    c.encoder.update(encoder_values)
    c.decoder.name, c.decoder.depth, c.decoder.heads = decoder, 2, 2
    c.corruption.mask_fill, c.decoder.positions = fill, fill == "drop"
    c.corruption.mask_ratio = 0.6
    validate(c)
    return c


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rate64(x: np.ndarray, precision: float) -> float:
    """The definition, float64, always with the N x N matrix."""
    x, (N, D) = x.astype(np.float64), x.shape
    return 0.5 * np.linalg.slogdet(np.eye(N) + D / (N * precision) * x @ x.T)[1]


def orthonormal(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(random(d, d, seed=seed))[0].astype(np.float32)


@pytest.mark.parametrize("shape", [(5, 40), (33, 64), (70, 20), (197, 48)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_coding_rate_is_its_definition(shape, scale):
    z = scale * random(2, *shape)
    expected = [rate64(x, 0.01) for x in z]
    np.testing.assert_allclose(whitebox.coding_rate(z), expected, rtol=1e-4)


def test_coding_rate_of_tokens_known_by_hand():
    orthogonal, same = np.eye(8, 32, dtype=np.float32)[None], np.tile(np.eye(1, 32, dtype=np.float32), (1, 8, 1))
    np.testing.assert_allclose(whitebox.coding_rate(orthogonal, 0.25), 8 / 2 * np.log(1 + 32 / (8 * 0.25)), rtol=1e-6)
    np.testing.assert_allclose(whitebox.coding_rate(same, 0.25), 1 / 2 * np.log(1 + 32 / 0.25), rtol=1e-6)
    np.testing.assert_array_equal(whitebox.coding_rate(0 * same), 0.0)


@pytest.mark.parametrize(
    ("N", "D", "rank", "scale", "noise"),
    [(196, 384, 8, 1.0, 0.0), (197, 768, 8, 9.0, 0.0), (196, 768, 8, 100.0, 1e-4), (67, 128, 2, 30.0, 1e-3)],
)
def test_coding_rate_of_tokens_in_few_directions_is_float64s(N, D, rank, scale, noise):
    """The Gram matrix in float32 cannot hold 1 beside its entries: the rate was up to 15 % away here."""
    x = scale / np.sqrt(rank) * random(N, rank) @ random(rank, D, seed=1) + noise * random(N, D, seed=2)
    x = x.astype(np.float32)
    np.testing.assert_allclose(whitebox.coding_rate(x[None]), [rate64(x, 0.01)], rtol=5e-4)


def test_a_diverged_layer_measures_as_nan():
    z = random(1, 6, 8)
    z[0, 2, 3] = np.nan
    assert np.isnan(whitebox.coding_rate(z)).all()


def test_subspace_rate_is_its_definition():
    z, u = random(3, 20, 32), random(32, 32, seed=1)
    expected = [sum(rate64(x @ u[:, k : k + 8], 0.01) for k in range(0, 32, 8)) for x in z]
    np.testing.assert_allclose(whitebox.subspace_rate(z, u, 4), expected, rtol=1e-5)


def test_orthogonal_subspaces_code_their_own_tokens_as_no_model_does_at_a_coarser_precision():
    """R^c(Z | U; eps^2) = R(Z; H eps^2) if every token is in one of the subspaces; else larger (Fischer)."""
    H, u = 4, orthonormal(32)
    z = np.concatenate([random(6, 8, seed=k) @ u[:, 8 * k : 8 * k + 8].T for k in range(H)])[None]
    rate, coarse = whitebox.subspace_rate(z, u, H), whitebox.coding_rate(z, H * whitebox.PRECISION)
    np.testing.assert_allclose(rate, coarse, rtol=1e-5)
    assert float(rate[0]) < float(whitebox.coding_rate(z)[0])
    z = random(1, 24, 32)
    assert float(whitebox.subspace_rate(z, u, H)[0]) > 1.05 * float(whitebox.coding_rate(z, H * whitebox.PRECISION)[0])


def test_rates_do_not_change_under_rotation():
    z, u, q = random(2, 10, 32), random(32, 32, seed=1), orthonormal(32, seed=2)
    np.testing.assert_allclose(whitebox.coding_rate(z @ q), whitebox.coding_rate(z), rtol=1e-5)
    np.testing.assert_allclose(whitebox.subspace_rate(z @ q, q.T @ u, 4), whitebox.subspace_rate(z, u, 4), rtol=1e-5)


def test_released_rate_is_that_of_unit_tokens_in_each_head():
    z, u = random(2, 12, 32), random(32, 32, seed=1)

    def one(x):
        heads = [x @ u[:, k : k + 8] for k in range(0, 32, 8)]
        return sum(rate64(w / np.linalg.norm(w, axis=1, keepdims=True), 0.01) for w in heads)

    value = whitebox.released_rate(z, u, 4)
    np.testing.assert_allclose(value, [one(x) for x in z], rtol=1e-5)
    lengths = np.exp(random(2, 12, 1, seed=3))
    np.testing.assert_allclose(whitebox.released_rate(lengths * z, u, 4), value, rtol=1e-5)


def test_tokens_that_ista_made_zero_are_no_number_that_is_not_a_number():
    z, u = random(2, 12, 32), random(32, 32, seed=1)
    z[0, 5] = 0
    z[1] = 0
    kept = np.delete(z[:1], 5, axis=1)
    with_zero, nothing = whitebox.released_rate(z, u, 4)
    assert nothing == 0 and with_zero == pytest.approx(float(whitebox.released_rate(kept, u, 4)[0]), rel=0.2)
    raw, scaled = whitebox.inversion_error(z, z + 1, Identity())
    assert np.isfinite(raw).all() and float(raw[1]) == pytest.approx(np.sqrt(12 * 32)) and float(scaled[1]) == 0


def test_one_token_is_no_object():
    colours, found = draw.token_components(np.ones((1, 1, 1, 8), np.float32))
    assert not found.any() and not colours.any()


def test_nonzero_counts():
    x = np.zeros((2, 3, 4), np.float32)
    x[0, 0, 0], x[0, 2, 1], x[1] = 1e-30, -2.0, 1.0
    np.testing.assert_allclose(whitebox.nonzero(x), [2 / 12, 1.0])


def test_incoherence_of_subspaces_known_by_hand():
    apart = whitebox.incoherence(jnp.eye(8), 2)
    assert {name: float(value) for name, value in apart.items()} == dict.fromkeys(apart, 0.0)
    twice = np.concatenate([np.eye(8)[:, :4], 2 * np.eye(8)[:, :4]], axis=1).astype(np.float32)
    same = whitebox.incoherence(twice, 2)
    assert float(same["coherence_max"]) == 1.0  # lengths do not matter to it
    assert float(same["coherence_mean"]) == pytest.approx(4 / 16)
    assert float(same["orthonormality_error"]) == pytest.approx((0 + 3) / 2)  # |I - I|, |4 I - I| / sqrt(4)
    wide = whitebox.incoherence(random(512, 64), 4)
    assert float(wide["coherence_mean"]) == pytest.approx(np.sqrt(2 / (np.pi * 512)), rel=0.05)


def test_inversion_error_known_by_hand():
    z = random(1, 6, 8)
    raw, scaled = whitebox.inversion_error(z, z, Identity())
    assert float(raw[0]) == 0.0 and float(scaled[0]) < 1e-3
    raw, scaled = whitebox.inversion_error(z, -3 * z, Identity())
    assert float(raw[0]) == pytest.approx(4.0) and float(scaled[0]) < 1e-3
    raw, scaled = whitebox.inversion_error(np.eye(2, 8)[None], np.eye(8)[None, 2:4], Identity())
    assert float(raw[0]) == pytest.approx(np.sqrt(2)) and float(scaled[0]) == 1.0
    y = z.copy()
    y[0, :3] += 100.0  # the kept patches do not count
    masking = Masking.from_noise(jnp.arange(6.0)[None], 3, False)
    assert float(whitebox.inversion_error(z, y, masking)[0][0]) == 0.0
    assert float(whitebox.inversion_error(z, y, Identity())[0][0]) > 1.0


def init(c):
    return jax.device_get(jax.jit(lambda key: autoencoder.init_params(c, key))(jax.random.key(0)))


def images(c, count: int = 4, seed: int = 5):
    return random(count, *c.data.image_size, 3, seed=seed)


def measured(c, params, x, measures=whitebox.MEASURES):
    keys = jax.random.split(jax.random.key(1), len(x))
    return jax.device_get(jax.jit(whitebox.build(c, measures))(params, x, keys))


@functools.cache
def plain():
    """The config of a small CRATE, its parameters, images and what :func:`measured` finds: for tests that only read."""
    c = small()
    params, x = init(c), images(c)
    return c, params, x, measured(c, params, x)


@functools.cache
def plain_features():
    """The named points of the layers that :func:`plain` measures: of the encoder and of the decoder; the corruption."""
    c, params, x, _ = plain()
    return jax.jit(whitebox._features(c))(params, x, jax.random.split(jax.random.key(1), len(x)))


def test_what_a_map_leaves_needs_two_batches_of_two_images():
    """One to fit the map and one to judge it; a report on one image ended in a traceback."""
    c = small()
    params = init(c)
    for counts in ((), (1,), (3,), (3, 1), (1, 1)):
        assert len(whitebox.linear_inversion_error(c, params, [images(c, n) for n in counts])) == 0
    found = whitebox.linear_inversion_error(c, params, [images(c, n) for n in (3, 3, 1)])
    assert len(found) == 2 and np.isfinite(found).all()


def test_all_layers_at_once_equal_layer_by_layer_in_float64():
    """The scanned blocks' points with the right layer's parameters, rates by the definition."""
    c, params, x, found = plain()
    got, points = found["encoder"], jax.device_get(jax.jit(representation.points(c))(params, x)[1])
    z, half, out = (points[name] for name in ("input", "after_mssa", "after_ista"))
    np.testing.assert_array_equal(z[1:], out[:-1])
    for layer in range(3):
        block = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), params["encoder"]["blocks"])
        u = block["mssa"]["subspaces"]["kernel"]
        heads = [u[:, :8], u[:, 8:]]
        for b in range(len(x)):
            assert got["rate"][layer, b] == pytest.approx(rate64(half[layer, b, 1:], 0.01), rel=1e-4)
            for name, tokens in (("subspace_rate", half), ("subspace_rate_before", z)):
                expected = sum(rate64(tokens[layer, b, 1:] @ w, 0.01) for w in heads)
                assert got[name][layer, b] == pytest.approx(expected, rel=1e-4)
            normed = z[layer, b] - z[layer, b].mean(-1, keepdims=True)
            normed = normed / np.sqrt(np.square(normed).mean(-1, keepdims=True) + 1e-5)
            seen = [normed @ w for w in heads]
            expected = sum(rate64(w / np.linalg.norm(w, axis=1, keepdims=True), 0.01) for w in seen)
            assert got["released_rate"][layer, b] == pytest.approx(expected, rel=1e-4)
            assert got["nonzero"][layer, b] == pytest.approx(np.count_nonzero(out[layer, b, 1:]) / (16 * 16))
            assert got["released_nonzero"][layer, b] == pytest.approx(np.count_nonzero(out[layer, b]) / (17 * 16))


def test_decoder_layers_are_paired_with_encoder_layers_from_the_bottleneck():
    """Decoder layer j against what encoder layer L - 1 - j was given, at the removed patches."""
    got = plain()[3]["decoder"]
    assert got["inversion_error"].shape == (2, 4)
    points, decoded, corruption = plain_features()
    removed = np.asarray(corruption.removed_BN) > 0
    assert removed.sum(1).tolist() == [10] * 4
    for j in range(2):
        z, y = (np.asarray(a[i, :, 1:]) for a, i in ((points["input"], 2 - j), (decoded["after_mssa"], j)))
        for b in range(4):
            a, e = z[b][removed[b]], (z[b] - y[b])[removed[b]]
            assert got["inversion_error"][j, b] == pytest.approx(np.linalg.norm(e) / np.linalg.norm(a), rel=1e-4)


CASES = [
    (small("crate", "crate"), {"encoder", "decoder"}),
    # the same blocks as above, and the same drop as below
    pytest.param(small("crate", "crate", "drop"), {"encoder", "decoder"}, marks=pytest.mark.slow),
    (small("crate", "linear", dictionary="overcomplete", tied_output=True), {"encoder"}),
    (small("vit", "transformer", "drop"), {"encoder", "decoder"}),
    (small("vit", "linear", positions="relative", qkv_bias="qv"), {"encoder"}),
]


@pytest.mark.parametrize(
    ("c", "parts"), CASES, ids=lambda x: f"{x.encoder.name}-{x.decoder.name}" if hasattr(x, "encoder") else ""
)
def test_telemetry_of_every_kind_of_model(c, parts):
    params, x = init(c), images(c)
    c = c.copy_and_resolve_references()
    c.whitebox.measure = "both"
    keys = jax.random.split(jax.random.key(1), len(x))
    scalars = jax.device_get(jax.jit(whitebox.telemetry(c))(params, x, keys))
    assert {name.split("/")[1] for name in scalars} == parts
    assert all(re.fullmatch(r"whitebox/\w+/\w+/0[123]", name) and np.isfinite(v) for name, v in scalars.items())
    sparse = float(scalars["whitebox/encoder/nonzero/02"])
    if c.encoder.name == "crate":
        assert 0.1 < sparse < 0.9  # of the over-complete code, not of the residual stream around it
        assert "whitebox/encoder/coherence_mean/01" in scalars
    else:
        assert sparse == 1.0 and 0.1 < float(scalars["whitebox/encoder/active/02"]) < 0.9


def test_telemetry_of_a_decoder_on_tpus(monkeypatch):
    """There its tokens have one more axis of length one. Seen: traced for a TPU, every such run ended at its start."""
    c = small("crate", "crate")
    params, x = init(c), images(c)
    keys = jax.random.split(jax.random.key(1), len(x))
    expected = jax.jit(whitebox.telemetry(c))(params, x, keys)
    monkeypatch.setattr(target, "is_tpu", lambda: True)
    monkeypatch.setenv("CRATE_JAX_KERNELS", "0")
    found = jax.jit(whitebox.telemetry(c))(params, x, keys)
    assert any("/decoder/" in name for name in found)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)


class Bare(nn.Module):
    """A block of an encoder that somebody adds: it names the tokens after it, and nothing else."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(x.shape[-1])(x)
        self.sow("intermediates", "after_block", x)
        return x, None


class OfBareBlocks(nn.Module):
    @nn.compact
    def __call__(self, images, corruption=None, keys_B=None):
        return scan_blocks(Bare, 2, "")(nn.Dense(6)(patchify(images, 4)), None)[0]


def test_blocks_without_the_points_that_are_measured_are_named(monkeypatch):
    c = small("vit", "linear")
    monkeypatch.setitem(ENCODERS, "bare", Encoder(lambda c: OfBareBlocks(), prefix=0, output_point="after_block"))
    c.encoder.name, c.encoder.width = "bare", 6
    params = {"encoder": OfBareBlocks().init(jax.random.key(0), images(c))["params"]}
    said = r"encoder.name='bare': its blocks do not name the points after_attention, after_mlp, mlp_hidden \(flax's sow"
    with pytest.raises(UserError, match=said):
        measured(c, params, images(c))


def test_telemetry_is_the_mean_over_images():
    c, params, x, found = plain()
    keys = jax.random.split(jax.random.key(1), len(x))
    scalars = jax.device_get(jax.jit(whitebox.telemetry(c))(params, x, keys))
    for part, layers in found.items():
        for layer, values in enumerate(layers["rate"]):
            assert scalars[f"whitebox/{part}/rate/{layer + 1:02d}"] == pytest.approx(values.mean(), rel=1e-5)


@pytest.fixture
def two_devices(monkeypatch):
    """As many as a split needs: a program for eight takes longer to compile."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *args, **options: make_mesh(*args, jax.devices()[:2], **options))


@pytest.mark.slow
def test_training_is_the_same_with_telemetry(tmp_path, two_devices):
    """The weights to the bit; the numbers at their steps, of images split over the devices."""
    c = small("crate", "linear", depth=1)
    for i in range(8):  # no labels: no classifiers to wait for
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(
            tmp_path / f"images/{i}.png"
        )
    c.data.source = f"folder:{tmp_path / 'images'}"
    c.log.every, c.log.tensorboard, c.log.pictures, c.log.report = 2, False, 0, False
    plain = train.run(c, str(tmp_path / "plain"))
    c.whitebox.every, c.whitebox.images = 2, 8
    looked = train.run(c, str(tmp_path / "looked"))
    assert looked["params_sha256"] == plain["params_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "looked" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "whitebox/encoder/subspace_rate/01" in line}
    assert sorted(steps) == [2, 4]
    measures = [name for name in steps[2] if name.startswith("whitebox/")]
    assert any(steps[2][name] != steps[4][name] for name in measures)  # the layers changed in between


def test_batches_add_up_to_the_whole():
    c = small("vit", "linear")
    params, x = init(c), np.asarray(images(c, 10))
    spread, count = whitebox.over_images(c, params, [x[:4], x[4:8], x[8:]])
    assert count == 10
    whole = measured(c, params, x)["encoder"]
    for name, (mean, std) in spread["encoder"].items():
        np.testing.assert_allclose(mean, whole[name].astype(np.float64).mean(1), rtol=1e-5)
        np.testing.assert_allclose(std, whole[name].astype(np.float64).std(1, ddof=1), rtol=1e-3, atol=1e-6)


def test_what_a_linear_map_leaves():
    """Nothing where Z = Y A + c; nearly all where Y knows nothing; half the energy where it knows half."""
    y, other = (random(4000, 6, seed=seed).astype(np.float64) for seed in (0, 1))
    ones = np.ones((4000, 1))

    def left(z):
        both = np.concatenate([z, y, ones], axis=1)
        return whitebox._left_by_map(both[::2].T @ both[::2], both[1::2].T @ both[1::2])

    a = random(6, 6, seed=2).astype(np.float64)
    assert left(y @ a + 3.0) < 0.01
    assert left(other) == pytest.approx(1.0, abs=0.01)
    assert left(other + y) == pytest.approx(np.sqrt(0.5), rel=0.05)


@pytest.mark.parametrize("encoder", ["crate", "vit"])
def test_attention_map_shows_a_planted_patch(encoder):
    """Class token and one patch point one way, all others are zero: every head looks there."""
    c = small(encoder, "linear", positions="none", depth=1)
    c.data.mean, c.data.std = (0.0,) * 3, (1.0,) * 3
    params = init(c)
    direction = random(16)
    embedding = params["encoder"]["embedding"]
    embedding["cls_token"] = direction[None, None]
    embedding["patch_embed"]["kernel"] = np.tile(direction / 48, (48, 1))
    if encoder == "vit":  # what CRATE does by itself: compare with what one is
        qkv = params["encoder"]["blocks"]["attention"]["qkv"]
        query, _, value = np.split(qkv["kernel"], 3, axis=-1)
        qkv["kernel"] = np.concatenate([query, query, value], axis=-1)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[0, 4:8, 8:12], images[1, 12:, :4] = 255, 255
    maps = draw.class_attention(c, params, images)
    assert maps.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(maps.sum((2, 3)), 1.0, rtol=1e-5)
    assert [np.unravel_index(m.argmax(), m.shape) for m in maps[0]] == [(1, 2)] * 2
    assert [np.unravel_index(m.argmax(), m.shape) for m in maps[1]] == [(3, 0)] * 2
    picture = draw.attention_maps(c, params, images)
    yellow = (np.abs(picture.astype(int) - [253, 231, 36]).sum(-1) < 6).sum()
    assert yellow == 2 * 2 * 24 * 24  # one patch in each of four maps, at 6 times its 4 pixels


def planted(seed: int = 0):
    """Tokens of 5 images, 6 x 6: an object 2 x 3 in the middle, all around it background."""
    rng = np.random.default_rng(seed)
    thing, ground = orthonormal(16, seed)[:2]
    tokens = np.broadcast_to(3 * ground, (5, 6, 6, 16)) + 0.1 * rng.standard_normal((5, 6, 6, 16))
    where = np.zeros((5, 6, 6), bool)
    where[:, 2:4, 1:4] = True
    tokens[where] += 4 * thing - 3 * ground
    return tokens, where


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_components_find_a_planted_object(seed, centred):
    tokens, where = planted(seed)
    colours, found = draw.token_components(tokens, centred=centred)
    np.testing.assert_array_equal(found, where)
    np.testing.assert_array_equal(colours[~where], 0.0)
    assert colours[where].max() == 1.0 and 0.0 <= colours.min()


def test_components_tell_parts_of_an_object_apart():
    tokens, where = planted()
    left = where.copy()
    left[:, :, 2:] = False
    tokens[left] += 2 * orthonormal(16)[5]
    colours, found = draw.token_components(tokens)
    np.testing.assert_array_equal(found, where)
    between = np.linalg.norm(colours[left].mean(0) - colours[where & ~left].mean(0))
    assert between > 2 * colours[left].std(0).max()


def test_a_threshold_of_the_users_is_used():
    """B.3.1: tokens whose part along the first component is large enough, whatever lies at the border."""
    tokens, where = planted()
    np.testing.assert_array_equal(draw.token_components(tokens, threshold=0.5)[1], ~where)  # most tokens are background
    assert draw.token_components(tokens, threshold=1.0)[1].sum() == 1


@pytest.fixture(scope="module")
def subjects():
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    out = []
    for name, c in (("white", small()), ("black", small("vit", "transformer", "drop"))):
        params = init(c)
        out.append(Subject(name, c, params, None, data.open_split(c, "train"), data.open_split(c, "eval"), mesh))
    return out


def drawn(figure) -> float:
    """How much of a figure is not its commonest colour."""
    if isinstance(figure.content, Plot):
        canvas = FigureCanvasAgg(figure.content)
        canvas.draw()
        image = np.asarray(canvas.buffer_rgba())[..., :3]
    else:
        image = figure.content
        assert image.dtype == np.uint8
    _, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return 1 - counts.max() / counts.sum()


def test_section_has_every_measure_of_every_run(subjects):
    subjects[0].config.whitebox.images = 24
    section = sections.section(subjects)
    assert len(section.figures) == 8
    assert all(drawn(figure) > 0.01 for figure in section.figures)
    json.dumps(section.numbers)
    change = np.asarray(section.numbers["white"]["encoder"]["compression"]["mean"])
    assert f"white: {(change < 0).sum()} of 3 encoder layers compress" in section.text and "black: " not in section.text
    assert "white: 1 of 2 encoder layers compress their tokens towards their subspaces; by the theory all do." in (
        sections._compressing({"white": {"encoder": {"compression": (np.array([-0.1, 0.2]), None)}}})
    )
    (table,) = section.tables
    assert [row[:3] for row in table.rows] == [
        (name, part, layer + 1)
        for name in ("white", "black")
        for part, depth in (("encoder", 3), ("decoder", 2))
        for layer in range(depth)
    ]
    value = dict(zip(table.columns, table.rows[1], strict=True))
    numbers = section.numbers["white"]["encoder"]
    assert value["Rᶜ after"] == numbers["subspace_rate"]["mean"][1]
    assert value["change"] == pytest.approx(value["Rᶜ after"] - value["Rᶜ before"])
    measured = {m for parts in section.numbers.values() for layers in parts.values() for m in layers}
    assert set(table.columns[3:]) == {sections.COLUMNS[m] for m in measured}
    assert not any("$" in figure.caption for figure in section.figures)  # captions are plain text
    assert numbers["subspace_rate"]["std"][1] > 0
    assert 0 < section.numbers["white"]["decoder"]["inversion_error_linear"]["mean"][0] < 2


def test_section_of_weights_without_images(subjects):
    """A file of weights alone still has subspaces to look at."""
    lone = Subject("lone", subjects[0].config, subjects[0].params, None, None, None, subjects[0].mesh)
    section = sections.section([lone])
    assert set(section.numbers["lone"]["encoder"]) == {"coherence_max", "coherence_mean", "orthonormality_error"}
    assert not sections.pictures_section([lone]).figures


@pytest.mark.slow
@pytest.mark.parametrize("names", [("white",), ("white", "black")])
def test_pictures_of_every_run(subjects, names, monkeypatch):
    monkeypatch.setitem(sections.RATIOS, "mask", (0.25, 0.9))  # each is a program
    section = sections.pictures_section(subjects[: len(names)])
    captions = [figure.caption.split(":")[0].split(",")[0] for figure in section.figures]
    assert captions == [name for name in names for _ in range(3)]
    assert all(drawn(figure) > 0.2 for figure in section.figures)


def test_compression_gradient_is_the_rates():
    sample = theory.draw(24, 6, 3, 0.1, 0)
    z, beta, h = sample.observed, 5.0, 1e-5
    gradient = theory.rate_gradient(z, sample.bases, beta)
    for i, j in ((0, 0), (7, 3), (23, 5)):
        step = np.zeros_like(z)
        step[i, j] = h
        slope = (theory.rate(z + step, sample.bases, beta) - theory.rate(z - step, sample.bases, beta)) / (2 * h)
        assert gradient[i, j] == pytest.approx(slope, rel=1e-5)
    tokens, bases = z.T[None].astype(np.float32), np.concatenate(list(sample.bases), axis=1).astype(np.float32)
    measure = whitebox.subspace_rate(tokens, bases, 3, precision=8 / (6 * beta))  # beta = p / (N eps^2)
    assert float(measure[0]) == pytest.approx(theory.rate(z, sample.bases, beta), rel=1e-5)


@pytest.mark.parametrize(("d", "N", "K"), [(128, 32, 4), (256, 32, 4)])
def test_theorem_3_holds_and_its_error_falls_with_the_noise(d, N, K):
    """Under the bound with a constant of 1, and in proportion to sigma where sigma is small (eq. A.47)."""
    outcomes = [theory.experiment(d, N, K, sigma) for sigma in (0.3, 0.1, 1e-2, 1e-3, 1e-4)]
    assert all(0 < x.error < x.bound for x in outcomes)
    errors = [x.error for x in outcomes]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(errors[-2] / 10, rel=0.1)
    assert outcomes[-1].shrinkage == pytest.approx(1.0, abs=1e-3)


def test_compression_leaves_noise_where_other_subspaces_hold_tokens():
    """Eq. A.116: N / d of the energy outside the own subspace stays as sigma falls; a denoiser leaves none."""
    for d, N in ((128, 32), (256, 32)):
        outcomes = [theory.experiment(d, N, 4, 1e-4, seed) for seed in range(3)]
        assert np.mean([x.compression for x in outcomes]) == pytest.approx(N / d, rel=0.1)
        assert max(abs(x.denoising) for x in outcomes) < 1e-6


def test_theory_section_draws_its_figures():
    section = sections.theory_section(seeds=1)
    assert all(drawn(figure) > 0.01 for figure in section.figures)
    assert len(section.tables[0].rows) == len(sections.SIGMAS)


def test_what_theorem_3_says_is_exact_to_first_order_in_noise_outside():
    """Eqs. A.40, A.116 for tokens that are orthonormal within their subspace, whatever beta and eta are."""
    bases, subspace, beta, eta = theory.draw(24, 6, 3, 0.0, 0).bases, np.arange(6) % 3, 5.0, 0.3
    clean = np.stack([bases[k][:, i // 3] for i, k in enumerate(subspace)], axis=1)
    noise = random(24, 6).astype(np.float64)
    for i, k in enumerate(subspace):
        noise[:, i] -= bases[k] @ (bases[k].T @ noise[:, i])
    for scale, most in ((0.0, 1e-12), (1e-4, 1e-6)):
        sample = theory.Sample(bases, clean, scale * noise, subspace)
        error = theory.norm(theory.compressed(sample, beta, eta) - theory.predicted(sample, beta, eta))
        assert error < most, scale


def test_the_denoiser_is_the_step_along_the_score():
    """E[x | z] = z + sigma^2 / d grad log p(z) (eq. A.33), the density of the mixture written out."""
    d, sigma, h = 6, 1.5, 1e-5  # so much noise that no token is surely of one subspace
    sample = theory.draw(d, 4, 2, sigma, 0)

    def log_density(z):
        parts = []
        for basis in sample.bases:
            covariance = basis @ basis.T / 3 + sigma**2 / d * np.eye(d)
            parts.append(-0.5 * (np.linalg.slogdet(covariance)[1] + z @ np.linalg.solve(covariance, z)))
        return np.logaddexp(*parts)

    got = theory.denoised(sample, sigma)
    for z, x in zip(sample.observed.T, got.T, strict=True):
        slope = [(log_density(z + h * e) - log_density(z - h * e)) / (2 * h) for e in np.eye(d)]
        np.testing.assert_allclose(x, z + sigma**2 / d * np.array(slope), atol=1e-7)
