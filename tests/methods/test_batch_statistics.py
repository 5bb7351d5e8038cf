"""Barlow Twins, VICReg, VIbCReg and W-MSE by hand: losses that are statistics of a batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import methods
from crate_jax.errors import ConfigError
from crate_jax.methods import METHODS, barlow_twins, joint, vibcreg, whitening, wmse
from crate_jax.models import batch_norm
from crate_jax.models.iter_norm import IterNorm
from tests.methods.test_joint import BATCH, batch_of, build, config_of
from tests.parity_joint import Source, tiny_encoder

pytestmark = pytest.mark.one_python

OURS = ("barlow_twins", "vicreg", "vibcreg", "wmse", "dino", "swav", "deepclusterv2", "all4one")


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def bare_step(features, own=None, target_features=(), label=None, index=None) -> joint.Step:
    """A step whose networks return what they are given."""
    same = lambda name, inputs, keys=None: list(inputs)  # noqa: E731
    count = len(features[0])
    label, index = (np.arange(count, dtype=np.int32) if x is None else x for x in (label, index))
    keys = jax.random.split(jax.random.key(5), count)
    return joint.Step(same, same, list(features), list(target_features), label, index, own or {}, keys)


def algorithm(name: str, images: int = 40, **changes) -> joint.Algorithm:
    c = config_of(name, **changes)
    return getattr(methods, name).algorithm(c, 16, Source(images))


def finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def collapsed(name: str, **changes):
    """((loss, (carried, scalars)), gradients) of a batch whose images and views are all the same."""
    method = build(config_of(name, **changes))
    batch = batch_of(0)
    batch["views"] = np.broadcast_to(batch["views"][:1, :1], batch["views"].shape)
    args = jax.jit(lambda: method.init(jax.random.key(1), lambda drawn: drawn))()
    keys = jax.random.split(jax.random.key(2), BATCH)
    return jax.jit(jax.value_and_grad(method.loss, has_aux=True))(*args, batch, keys)


# One that divides by a deviation and one that inverts a covariance are quick; prototypes have tests of their edges.
QUICK = ("barlow_twins", "wmse")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OURS])
def test_a_collapse_gives_finite_losses_and_gradients(name):
    assert finite(collapsed(name, **({"wmse.eps": 0.01} if name == "wmse" else {})))


# -- Barlow Twins

SIGNS = np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1], [1, -1, -1], [-1, 1, 1], [-1, 1, -1], [-1, -1, 1], [-1, -1, -1]])


@pytest.mark.parametrize(
    ("z", "y", "expected"),
    [
        (SIGNS, SIGNS, 0.0),  # C = I
        (SIGNS, -SIGNS, 12.0),  # C = -I: (-1 - 1)^2 for each of three channels
        (SIGNS[:, [0, 0]], SIGNS[:, [0, 0]], 2 * 0.3),  # C = 1: two pairs of different channels
        (SIGNS * 0, SIGNS * 0, 3.0),  # C = 0: a collapse
    ],
)
def test_the_redundancy_of_known_correlations(z, y, expected):
    z, y = (barlow_twins.standardised(jnp.asarray(x, jnp.float32) * 7 + 2) for x in (z, y))
    assert float(barlow_twins.redundancy(z, y, 0.3)) == pytest.approx(expected, abs=1e-5)


def test_barlow_twins_scales_its_loss():
    value = [
        float(algorithm("barlow_twins", **{"barlow_twins.scale": s}).loss(bare_step([random(8, 3)] * 2))[0])
        for s in (1.0, 0.25)
    ]
    assert value[1] == pytest.approx(value[0] / 4) and value[1] > 0


# -- VICReg, VIbCReg


def test_the_terms_of_vicreg():
    """Against numpy: invariance, the hinge at a deviation of 1, covariances over P."""
    z, y = random(9, 5), random(9, 5, seed=1) * 0.4
    _, _, scalars = algorithm("vicreg").loss(bare_step([z, y]))
    hinge = [np.maximum(0, 1 - np.sqrt(np.var(x, axis=0, ddof=1) + 1e-4)).mean() for x in (z, y)]
    off = [np.square(np.cov(np.asarray(x).T))[~np.eye(5, dtype=bool)].sum() / 5 for x in (z, y)]
    assert float(scalars["similarity"]) == pytest.approx(np.square(np.asarray(z - y)).mean(), rel=1e-5)
    assert float(scalars["variance"]) == pytest.approx(sum(hinge), rel=1e-5)
    assert float(scalars["covariance"]) == pytest.approx(sum(off), rel=1e-5)


def test_vicreg_weighs_its_terms_and_halves_the_variance_on_request():
    weights = {"vicreg.similarity": 0.3, "vicreg.variance": 0.7, "vicreg.covariance": 1.1}
    found = {}
    for how in ("sum", "mean"):
        step = bare_step([random(9, 5), 0.4 * random(9, 5)])
        value, _, s = algorithm("vicreg", **weights, **{"vicreg.variance_terms": how}).loss(step)
        expected = 0.3 * s["similarity"] + 0.7 * s["variance"] + 1.1 * s["covariance"]
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        found[how] = float(s["variance"])
    assert found["mean"] == pytest.approx(found["sum"] / 2)


def test_vicreg_has_no_gradient_at_a_full_collapse():
    """25 (V + V) = 50 (1 - sqrt(1e-4)) = 49.5, where the variance has no slope."""
    loss = algorithm("vicreg").loss
    value, grads = jax.jit(jax.value_and_grad(lambda z: loss(bare_step([z, z]))[0]))(jnp.full((8, 5), 0.75))
    assert float(value) == pytest.approx(49.5) and (grads == 0).all()


def test_correlations_of_vibcreg():
    """Against numpy; the scale of a channel does not count; VICReg's covariance would see it."""
    z = random(9, 5)
    r = np.corrcoef(np.asarray(z).T)
    assert float(vibcreg.correlation(z)) == pytest.approx((np.square(r).sum() - 5) / 25, rel=1e-4)
    scaled = z * jnp.arange(1.0, 6.0)
    assert float(vibcreg.correlation(scaled)) == pytest.approx(float(vibcreg.correlation(z)), rel=1e-4)
    assert float(whitening.off_diagonal(scaled)) > 2 * float(whitening.off_diagonal(z))


def test_whitening_is_added_to_the_loss_of_a_method_for_its_large_views():
    """Against numpy, on the features of BYOL's student; the penalty does not move its statistics."""
    c = config_of("byol", **{"penalty.name": "none"})
    plain, batch, keys = build(c), batch_of(0), jax.random.split(jax.random.key(2), BATCH)
    params, carried = jax.jit(lambda: plain.init(jax.random.key(1), lambda drawn: drawn))()
    expected, (_, before) = jax.jit(plain.loss)(params, carried, batch, keys)
    white = build(config_of("byol", **{"penalty.name": "whiten", "penalty.weight": 0.3, "penalty.variance": 7.0}))
    value, (_, after) = jax.jit(white.loss)(params, carried, batch, keys)
    views = np.moveaxis(batch["views"].astype(np.float32) / 64 - 2, 1, 0)
    encoder, tree, terms = tiny_encoder(), batch_norm.whole(params, carried)["encoder"], []
    for view in views:
        z = np.asarray(jax.jit(lambda x: encoder.apply(tree, x, None)[0])(view), np.float64)
        cov, variance = np.cov(z.T), z.var(0, ddof=1)
        c = (np.square(cov).sum() - np.square(variance).sum()) / z.shape[1]
        terms.append(7 * np.maximum(0, 1 - np.sqrt(variance + 1e-4)).mean() + c)
    assert float(value - expected) == pytest.approx(0.3 * np.mean(terms), rel=1e-3)
    assert after.pop("penalty") == pytest.approx(np.mean(terms), rel=1e-3) and after.keys() == before.keys()
    z = random(9, 5) @ np.linalg.inv(np.linalg.cholesky(np.cov(random(9, 5).T)).T)
    assert float(whitening.off_diagonal(z)) < 1e-8 and float(whitening.hinge(z)) == 0


def test_vibcreg_whitens_unless_told_not_to():
    assert "whitening" in algorithm("vibcreg").heads
    assert "whitening" not in algorithm("vibcreg", **{"vibcreg.whitening": False}).heads


def test_iter_norm_whitens_each_group():
    """128 channels in 64 groups of 2: no correlation inside a group, mean 0, variance 1; between groups as it was."""
    net, x = IterNorm(), random(300, 128)
    x = x.at[:, 1::2].add(0.8 * x[:, ::2]) * 3 + 5
    tree = jax.jit(lambda: net.init(jax.random.key(0), x, False)["params"])()
    y, moved = jax.jit(lambda tree, x: batch_norm.train(net, tree, x, True))(tree, x)
    cov = np.cov(np.asarray(y).T, bias=True)
    groups = cov.reshape(64, 2, 64, 2)[np.arange(64), :, np.arange(64)]
    np.testing.assert_allclose(groups, np.broadcast_to(np.eye(2), groups.shape), atol=0.02)
    np.testing.assert_allclose(np.asarray(y).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(moved["running_mean"].reshape(-1), 0.1 * np.asarray(x).mean(0), rtol=1e-4)
    scale_bias = {"scale": tree["scale"] * 2, "bias": tree["bias"] + 1}
    at_rest = net.apply({"params": {**tree, **scale_bias}}, x, False)  # the running statistics: 0 and the identity
    np.testing.assert_allclose(at_rest, 2 * x + 1, rtol=1e-5)


# -- W-MSE


def test_whitened_slices_have_the_identity_for_covariance():
    x = random(3, 9, 4) @ random(4, 4, seed=1) + 2
    w = np.asarray(wmse.whitened(x, 0.0))
    for one in w:
        np.testing.assert_allclose(np.cov(one.T), np.eye(4), atol=1e-4)
        np.testing.assert_allclose(one.mean(0), 0, atol=1e-5)
    lower = jnp.tril(jnp.abs(random(4, 4, seed=2))) + jnp.eye(4)  # what Cholesky's factor absorbs
    np.testing.assert_allclose(wmse.whitened(x @ lower.T, 0.0), w, atol=2e-3)


def test_eps_mixes_the_identity_into_the_covariance():
    """A factor L with L L^T = (1 - eps) S + eps I, by hand for one channel."""
    x = random(1, 9, 1) * 3
    variance = float(np.var(np.asarray(x), ddof=1))
    expected = np.asarray(x - x.mean()) / np.sqrt(0.7 * variance + 0.3)
    np.testing.assert_allclose(wmse.whitened(x, 0.3), expected, rtol=1e-5)


def test_slices_do_not_depend_on_the_order_of_the_batch():
    """An image's key decides, so that another layout over devices whitens the same images together."""
    keys = jax.random.split(jax.random.key(0), 24)
    shuffled = keys[np.random.default_rng(1).permutation(24)]
    a, b = (jax.random.key_data(k[wmse.order(k)]) for k in (keys, shuffled))
    np.testing.assert_array_equal(a, b)
    assert not (a == jax.random.key_data(keys)).all()


@pytest.mark.parametrize("which", ["both", "first"])
def test_the_gradient_goes_through_both_views_or_the_first(which):
    loss = algorithm("wmse", **{"wmse.gradient": which}).loss
    grads = jax.jit(jax.grad(lambda z, y: loss(bare_step([z, y]))[0], (0, 1)))(random(16, 5), random(16, 5, seed=1))
    assert (grads[0] != 0).any() and bool((grads[1] != 0).any()) == (which == "both")


def test_several_cuts_are_averaged():
    step = bare_step([random(16, 5), random(16, 5, seed=1)])
    one, three = (float(algorithm("wmse", **{"wmse.iterations": n}).loss(step)[0]) for n in (1, 3))
    terms = []
    for i in range(3):
        order = wmse.order(jax.vmap(functools.partial(jax.random.fold_in, data=i))(step.keys))
        a, b = (wmse.whitened(x[order].reshape(2, 8, 5), 0.0) for x in step.features)
        terms.append(float(jnp.mean(2 - 2 * joint.cosine(a, b))))
    assert one == pytest.approx(terms[0], rel=1e-5) and three == pytest.approx(np.mean(terms), rel=1e-5)
    assert len({round(t, 6) for t in terms}) == 3


def test_a_singular_slice_is_not_finite():
    """So that the run says so, instead of going on with a wrong factor."""
    assert not finite(collapsed("wmse", **{"wmse.eps": 0.0})[0][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wmse.slice": 6}, r"config\.wmse\.slice=6: must exceed config\.joint\.out \+ 1 = 6"),
        ({"wmse.slice": 7}, r"config\.batch_size=16: must be a multiple of config\.wmse\.slice=7"),
    ],
)
def test_slices_must_be_large_enough_and_fit_the_batch(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of("wmse", **changes)


def test_every_method_of_this_page_is_in_the_table():
    assert set(OURS) <= set(METHODS)
