"""Properties of the corruptions: what makes masking and projection the same object."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.models import corruption as corruptions
from crate_jax.models.corruption import CORRUPTIONS, Masking, Projection

N, P = 24, 6


def make(name: str, **values):
    c = configs.base()
    c.corruption.name = name
    for key, value in values.items():
        c.corruption[key] = value
    return corruptions.sampler(c, N, P)


def keys(n: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), n)


def matrices(corruption: Projection) -> np.ndarray:
    """P of every image, (B, N, N), by projecting the identity."""
    n = corruption.bucket_BN.shape[1]
    return np.asarray(corruption.project(jnp.broadcast_to(jnp.eye(n), (len(corruption.bucket_BN), n, n))))


VARIANTS = list(itertools.product((1 / 6, 0.3, 0.5, 0.9), ("balanced", "independent"), ("independent", "balanced")))


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("ratio", "buckets", "signs"),
    [
        pytest.param(*values, marks=() if values[0] == 0.3 or values[1:] == VARIANTS[0][1:] else pytest.mark.slow)
        for values in VARIANTS
    ],
)
def test_projection_is_an_orthogonal_projector(ratio, buckets, signs):
    """P^2 = P = P^T; rank K' with balanced buckets, the number of non-empty ones otherwise."""
    drawn = make("rop", rop_ratio=ratio, rop_buckets=buckets, rop_signs=signs)(keys(5))
    for p, bucket in zip(matrices(drawn), np.asarray(drawn.bucket_BN), strict=True):
        np.testing.assert_allclose(p @ p, p, atol=1e-6)
        np.testing.assert_array_equal(p, p.T)
        rank = np.linalg.matrix_rank(p)
        assert rank == len(np.unique(bucket))
        assert round(np.trace(p)) == rank
        if buckets == "balanced":
            assert rank == corruptions.bucket_count(N, ratio)


@pytest.mark.one_python
@pytest.mark.parametrize("name", ["mask", "rop"])
def test_projection_and_complement_sum_to_the_identity(name):
    """P X + (I - P) X = X, and the two parts are orthogonal for every image."""
    corruption = make(name, mask_fill="zero", rop_ratio=0.3)(keys(4))
    x = jax.random.normal(jax.random.key(1), (4, N, P))
    kept, rest = corruption.corrupt_tokens(x, None), corruption.complement(x)
    np.testing.assert_allclose(kept + rest, x, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(kept * rest, (1, 2)), 0.0, atol=1e-4)
    assert float(jnp.linalg.norm(rest)) > 1.0


@pytest.mark.one_python
@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.7])  # 0.3: 8 buckets, of 24; 0.7: 17, which do not divide 24
def test_mean_projector_is_a_multiple_of_the_identity(ratio):
    """E[P] = (K'/N) I: the corruption favours no patch, also where K' does not divide N."""
    draws = 6000
    drawn = make("rop", rop_ratio=ratio)(keys(draws))
    mean = np.mean(matrices(drawn), 0)
    expected = np.eye(N) * corruptions.bucket_count(N, ratio) / N
    np.testing.assert_allclose(mean, expected, atol=5 / np.sqrt(draws))


def test_balanced_buckets_cover_every_run_of_tokens():
    """As released: each bucket holds one token of every K' consecutive ones, and 7 of 196 in all."""
    drawn = jax.vmap(lambda k: corruptions.balanced_buckets(k, 196, 28))(keys(3))
    for bucket in np.asarray(drawn):
        for run in bucket.reshape(7, 28):
            assert sorted(run) == list(range(28))
    assert len({tuple(b) for b in np.asarray(drawn)}) == 3


def test_released_ratio_gives_28_of_196():
    assert corruptions.bucket_count(196, 0.14) == corruptions.bucket_count(196, 1 / 7) == 28


@pytest.mark.one_python
def test_balanced_signs_sum_to_zero_and_vary():
    signs = np.asarray(make("rop", rop_signs="balanced")(keys(8)).sign_BN)
    np.testing.assert_array_equal(signs.sum(1), 0)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert len({tuple(s) for s in signs}) == 8


@pytest.mark.one_python
def test_paper_scale_reproduces_the_release():
    """Scale 0.14 over buckets of 7: eigenvalues 0.98, so not idempotent (||Q^2 - Q||_F = .104)."""
    c = configs.base()
    c.corruption.name, c.corruption.paper_scale = "rop", 0.14
    drawn = corruptions.sampler(c, 196, P)(keys(1))
    q = matrices(drawn)[0]
    eigenvalues = np.linalg.eigvalsh(q)
    np.testing.assert_allclose(eigenvalues[-28:], 0.98, atol=1e-5)
    np.testing.assert_allclose(eigenvalues[:-28], 0.0, atol=1e-5)
    assert np.linalg.norm(q @ q - q) == pytest.approx(0.1037, abs=1e-3)


def test_mask_keeps_the_patches_with_the_smallest_noise():
    noise = jnp.asarray([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.6]])
    masking = Masking.from_noise(noise, 1, False)
    np.testing.assert_array_equal(masking.removed_BN, [[1, 0, 1, 1], [0, 1, 1, 1]])
    assert masking.complement_share() == 0.75


def test_dropped_tokens_return_to_their_places():
    drawn = make("mask", mask_fill="drop", mask_ratio=0.75)(keys(3))
    x = jax.random.normal(jax.random.key(1), (3, N, P))
    fill = jnp.full((P,), 7.0)
    short = drawn.corrupt_tokens(x, None)
    assert short.shape == (3, 6, P)
    np.testing.assert_array_equal(drawn.restore(short, fill), jnp.where(drawn.removed_BN[..., None] > 0, 7.0, x))
    table = jax.random.normal(jax.random.key(2), (N, P))
    np.testing.assert_array_equal(drawn.select(table), drawn.corrupt_tokens(jnp.broadcast_to(table, x.shape), None))


def test_dropped_tokens_select_their_pairs_of_a_bias():
    drawn = make("mask", mask_fill="drop")(keys(2))
    bias = jax.random.normal(jax.random.key(0), (3, N + 1, N + 1))
    pairs = np.asarray(drawn.select_pairs(bias))
    for image in range(2):
        kept = [0, *(np.asarray(drawn.order_BN[image, :6]) + 1)]
        np.testing.assert_array_equal(pairs[image], np.asarray(bias)[:, kept][:, :, kept])


def test_noise_has_the_deviation_asked_for_and_leaves_the_loss_whole():
    drawn = make("noise", noise_std=0.5)(keys(400))
    x = jnp.ones((400, N, P))
    assert float(jnp.std(drawn.corrupt_pixels(x) - x)) == pytest.approx(0.5, rel=0.02)
    np.testing.assert_array_equal(drawn.complement(x), x)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_draws_per_image_and_keeps_shapes(name):
    """One key per image: a part of the batch sees what it sees in the whole batch."""
    sample = make(name)
    x = jax.random.normal(jax.random.key(1), (6, N, P))

    @jax.jit
    def run(keys, x):
        corruption = sample(keys)
        y = corruption.corrupt_tokens(corruption.corrupt_pixels(x), jnp.ones(P))
        return y, corruption.complement(x), corruption.view(x)

    outputs = run(keys(6), x)
    for a, b in zip(outputs, run(keys(6)[2:5], x[2:5]), strict=True):
        assert a.shape == x.shape
        np.testing.assert_array_equal(a[2:5], b)
    assert jax.eval_shape(run, keys(6), x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16
