"""All4One by hand: the table of sines, the feature term, the transformer's dropout, the neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.errors import ConfigError
from crate_jax.methods import all4one, joint
from crate_jax.models.post_norm import PostNorm
from tests.methods.test_batch_statistics import algorithm, bare_step, finite, random
from tests.methods.test_joint import config_of

pytestmark = pytest.mark.one_python


def test_the_table_of_sines():
    table = all4one.positions(5, 7)
    assert table.shape == (5, 7)
    assert table[0, 3] == pytest.approx(np.sin(3)) and table[1, 3] == pytest.approx(np.cos(3))
    assert table[2, 6] == pytest.approx(np.sin(6 * 10000 ** (-2 / 6)))
    assert table[4, 6] == pytest.approx(np.sin(6 * 10000 ** (-4 / 6)))


def test_the_feature_term_of_known_correlations():
    """Channels that agree and are orthogonal: 0, with a finite slope; opposite ones: a root mean square of 2."""
    z = jnp.asarray(np.eye(4)[:, :3], jnp.float32)
    value, grads = jax.value_and_grad(lambda y: all4one.redundancy([z, z], [y, y]))(z)
    assert float(value) < 1e-5 and finite(grads)
    assert float(all4one.redundancy([z, z], [-z, -z])) == pytest.approx(1.0, abs=1e-5)
    # C_0 = I, C_1 = 0: the root is of the mean over both
    away = jnp.roll(jnp.eye(6)[:, :3], 3, axis=0)
    apart = jnp.eye(6)[:, :3]
    assert float(all4one.redundancy([apart, apart], [away, apart])) == pytest.approx(np.sqrt(0.5) / 2, abs=1e-5)


def test_neighbours_are_the_five_nearest_of_the_queue_before_the_push():
    """With networks that return their input, and no transformer: NNCLR's term from the first neighbour."""
    made = algorithm("all4one")
    own = made.state(jax.random.key(0))
    z, y, slow = random(16, 16), random(16, 16, seed=1), [random(16, 16, seed=2), random(16, 16, seed=3)]
    first = [np.asarray(own["queue"])[np.argmax(np.asarray(s @ own["queue"].T), 1)] for s in slow]

    step = bare_step([z, y], own, slow)
    identity = step.student
    pooled = lambda name, x, keys=None: [t[:, 0] for t in x] if name == "transformer" else identity(name, x)  # noqa: E731
    value, new, scalars = made.loss(joint.Step(**{**vars(step), "student": pooled}))

    def nce(a, b, T):
        logits = np.float64(joint.unit(a) @ joint.unit(b).T) / T
        return -(np.diag(logits) - np.log(np.exp(logits).sum(1))).mean()

    neighbour = (nce(first[0], y, 0.2) + nce(first[1], z, 0.2)) / 2
    assert float(scalars["neighbour"]) == pytest.approx(neighbour, rel=1e-4)
    table = np.float32(all4one.positions(5, 16))[0]
    attention = (nce(first[0] + table, y + table, 0.1) + nce(first[1] + table, z + table, 0.1)) / 2
    assert float(scalars["attention"]) == pytest.approx(attention, rel=1e-4)
    expected = (scalars["attention"] + scalars["neighbour"] + 10 * scalars["feature"]) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(new["queue"][:16], joint.unit(slow[0]), rtol=1e-6)
    assert new["queue_label"][:16].tolist() == list(range(16)) and int(new["queue_place"]) == 16


def test_dropout_belongs_to_an_image():
    """Its key decides, so that no layout changes it; none at rest, without keys, or at 0."""
    net, x = PostNorm(depth=1, heads=2, hidden=12, dropout=0.4), random(6, 5, 8)
    params = net.init(jax.random.key(0), x, False)
    keys = jax.random.split(jax.random.key(1), 6)
    plain, dropped = net.apply(params, x, True), net.apply(params, x, True, keys)
    assert np.abs(np.asarray(dropped - plain)).max(1).min() > 1e-3
    back = net.apply(params, x[::-1], True, keys[::-1])[::-1]
    np.testing.assert_allclose(back, dropped, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(net.apply(params, x, False, keys), plain)
    kept = PostNorm(depth=1, heads=2, hidden=12, dropout=0.0)
    np.testing.assert_array_equal(kept.apply(params, x, True, keys), plain)


def test_the_width_must_fit_the_heads():
    with pytest.raises(ConfigError, match=r"config\.joint\.out=20: must be a multiple of 8"):
        config_of("all4one", **{"joint.out": 20})
