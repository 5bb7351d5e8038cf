"""Schedules at their ends, the update rules against NumPy, and the parameters they act on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import config as config_lib
from crate_jax.errors import ConfigError
from crate_jax.parallel import parameters
from crate_jax.training import optimizer

STEPS = 20


def configured(name="adamw", **options):
    config = config_lib.base()
    config.optimizer.name = name
    config.optimizer.update(dict(lr=0.1, lr_batch=0, weight_decay=0.1) | options)
    return config


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def toy(seed=0):
    return {
        "encoder": {
            "patch_embed": {"kernel": draw(6, 4, seed=seed), "bias": draw(4, seed=seed)},
            "cls_token": draw(1, 1, 4, seed=seed),
            "positions": draw(1, 9, 4, seed=seed),
            "blocks": {
                "mssa": {"kernel": draw(3, 4, 4, seed=seed), "bias": draw(3, 4, seed=seed)},
                "relative_bias": draw(3, 5, 2, seed=seed),
            },
        }
    }


DECAYED = ("encoder/blocks/mssa/kernel", "encoder/patch_embed/kernel")


def run(config, params, steps=5):
    """Parameters after some updates with gradients that differ from step to step."""
    tx, _ = optimizer.build(config, params, STEPS, 10)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(toy_gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params


def toy_gradients(params, step):
    return jax.tree.map(lambda p: draw(*p.shape, seed=100 + step), params)


def reference(config, params, rule, steps=5):
    """The same with `rule(param, gradient, memory, lr, step, decayed) -> param` in NumPy float64."""
    _, rate = optimizer.build(config, params, STEPS, 10)
    out = {}
    for name, leaf in parameters.names(params).items():
        p, memory = np.asarray(leaf, np.float64), {}
        for i in range(steps):
            g = np.asarray(parameters.names(toy_gradients(params, i))[name], np.float64)
            p = rule(p, g, memory, float(rate(i)), i + 1, name in DECAYED)
        out[name] = p
    return out


def assert_same(params, expected, rtol=2e-5):
    for name, leaf in parameters.names(params).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=rtol, atol=1e-5, err_msg=name)


# -- schedule ------------------------------------------------------------------------------------


def test_cosine_schedule_at_its_ends_and_middle():
    config = configured(lr=1.0, warmup_lr=0.1, min_lr=0.2, warmup_steps=10)
    rate = optimizer.schedule(config, 110, 10)
    for step, expected in [(0, 0.1), (5, 0.55), (10, 1.0), (60, 0.6), (110, 0.2), (500, 0.2)]:
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    rates = np.array([rate(i) for i in range(111)])
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)


def test_constant_schedule_stays_at_the_peak_after_the_warm_up():
    rate = optimizer.schedule(configured(lr=1.0, schedule="constant", warmup_steps=4), 100, 10)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 50, 100)], [0, 0.5, 1, 1, 1])


def test_no_warm_up_starts_at_the_peak():
    rate = optimizer.schedule(configured(lr=1.0), 100, 10)
    assert float(rate(0)) == 1.0 and abs(float(rate(100))) < 1e-7


def test_all_rates_are_scaled_with_the_batch():
    config = configured(lr=1e-3, warmup_lr=1e-4, min_lr=1e-5, warmup_steps=1, lr_batch=256)
    config.batch_size = 1024
    rate = optimizer.schedule(config, 10, 10)
    np.testing.assert_allclose([rate(0), rate(1), rate(10)], [4e-4, 4e-3, 4e-5], rtol=1e-5)


def test_warm_up_in_epochs_is_rounded_to_steps():
    rate = optimizer.schedule(configured(lr=1.0, warmup_epochs=0.5), 100, 7.9)  # 3.95 -> 4 steps
    np.testing.assert_allclose(rate(2), 0.5)
    np.testing.assert_allclose(rate(4), 1.0)


def test_a_warm_up_that_fills_the_run_reaches_the_peak_at_its_end():
    rate = optimizer.schedule(configured(lr=1.0, warmup_steps=10), 10, 10)
    np.testing.assert_allclose([rate(9), rate(10)], [0.9, 1.0], rtol=1e-6)


@pytest.mark.parametrize("options, word", [
    (dict(warmup_steps=11), "config.optimizer.warmup_steps=11"),
    (dict(warmup_epochs=2.0), "config.optimizer.warmup_epochs=2.0"),
    (dict(min_lr=0.2), "config.optimizer.min_lr=0.2"),
    (dict(warmup_lr=0.2), "config.optimizer.warmup_lr=0.2"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_is_an_error(options, word):
    with pytest.raises(ConfigError, match=word):
        optimizer.schedule(configured(**options), 10, 10)


# -- which parameters ----------------------------------------------------------------------------


def test_decay_leaves_out_vectors_stacked_vectors_tokens_and_position_tables():
    assert optimizer.decayed(configured(), toy()) == DECAYED
    assert optimizer.decayed(configured(), jax.eval_shape(toy)) == DECAYED
    everything = optimizer.decayed(configured(decay_exclude=()), toy())
    assert set(everything) - set(DECAYED) == {
        "encoder/cls_token",
        "encoder/positions",
        "encoder/blocks/relative_bias",
    }


def test_a_decay_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"config\.optimizer\.decay_exclude: pattern 'encoder/nothing'"):
        optimizer.build(configured(decay_exclude=(".*cls_token", "encoder/nothing")), toy(), STEPS, 10)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_decay_moves_only_the_decayed_parameters(name):
    params = toy()
    plain = parameters.names(run(configured(name, weight_decay=0.0), params))
    moved = parameters.names(run(configured(name, weight_decay=0.5), params))
    assert tuple(n for n in plain if not np.allclose(plain[n], moved[n], rtol=1e-4)) == DECAYED


# -- update rules --------------------------------------------------------------------------------


def test_adamw_is_the_documented_update_with_two_parameter_groups():
    config = configured("adamw", warmup_steps=2, b1=0.8, b2=0.95)

    def rule(p, g, memory, lr, t, decayed):
        p = p * (1 - lr * 0.1) if decayed else p
        m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
        v = memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
        return p - lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)

    assert_same(run(config, toy()), reference(config, toy(), rule))


def test_adamw_eps_is_pytorchs():
    params, gradient = {"w": jnp.zeros((1, 2))}, {"w": jnp.asarray([[1e-8, 1.0]])}
    tx, _ = optimizer.build(configured(decay_exclude=(), weight_decay=0.0), params, STEPS, 10)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-0.05, -0.1]], rtol=1e-4)  # g / (|g| + 1e-8), times lr = 0.1


def test_lion_is_the_published_update():
    config = configured("lion", warmup_steps=2, b1=0.9, b2=0.99)

    def rule(p, g, memory, lr, t, decayed):
        m = memory.get("m", 0)
        memory["m"] = 0.99 * m + 0.01 * g
        return p - lr * (np.sign(0.9 * m + 0.1 * g) + (0.1 * p if decayed else 0))

    assert_same(run(config, toy()), reference(config, toy(), rule))


def test_lars_is_the_published_update_with_one_ratio_per_layer():
    config = configured("lars", lr=10.0, warmup_steps=2, trust_coefficient=0.01, momentum=0.9)

    def rule(p, g, memory, lr, t, decayed):
        if decayed:
            g = g + 0.1 * p
            layer = tuple(range(p.ndim - 2, p.ndim))
            g = 0.01 * g * np.linalg.norm(p, axis=layer, keepdims=True) / np.linalg.norm(g, axis=layer, keepdims=True)
        step = memory["v"] = 0.9 * memory.get("v", 0) + lr * g
        return p - step

    assert_same(run(config, toy()), reference(config, toy(), rule))


def test_lars_on_stacked_layers_equals_lars_on_the_layers_one_by_one():
    scale = jnp.asarray([0.01, 1.0, 100.0])[:, None, None]  # layers of very different size
    kernel = draw(3, 4, 4) * scale
    stacked = {"blocks": {"kernel": kernel}, "cls_token": draw(1, 1, 4)}
    loop = {"layers": {str(i): {"kernel": kernel[i]} for i in range(3)}, "cls_token": draw(1, 1, 4)}
    config = configured("lars", lr=10.0)
    gradient = draw(3, 4, 4, seed=1)
    results = []
    for params, gradients in (
        (stacked, {"blocks": {"kernel": gradient}, "cls_token": draw(1, 1, 4)}),
        (loop, {"layers": {str(i): {"kernel": gradient[i]} for i in range(3)}, "cls_token": draw(1, 1, 4)}),
    ):
        tx, _ = optimizer.build(config, params, STEPS, 10)
        results.append(tx.update(gradients, tx.init(params), params)[0])
    expected = jnp.stack([results[1]["layers"][str(i)]["kernel"] for i in range(3)])
    np.testing.assert_allclose(results[0]["blocks"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(results[0]["cls_token"], results[1]["cls_token"])


def test_the_trust_ratio_says_that_it_needs_the_parameters():
    tx = optimizer.scale_by_layer_trust_ratio(0.01)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(toy(), tx.init(toy()))


@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (1e6, 1.0), (0.5, None)])
def test_gradients_are_clipped_by_their_global_norm_first(clip, factor):
    params = toy()
    gradients = toy_gradients(params, 0)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    factor = factor or clip / norm
    # A vector under LARS moves by plain SGD: -lr * gradient.
    tx, _ = optimizer.build(configured("lars", clip_norm=clip), params, STEPS, 10)
    updates, _ = tx.update(gradients, tx.init(params), params)
    bias = gradients["encoder"]["patch_embed"]["bias"]
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["bias"], -0.1 * factor * bias, rtol=1e-5)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_contract_of_every_optimizer(name):
    params, shapes = toy(), jax.eval_shape(toy)
    tx, rate = optimizer.build(configured(name, clip_norm=1.0), shapes, STEPS, 10)
    state = tx.init(params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    traces = []

    @jax.jit
    def update(updates, state, params):
        traces.append(1)
        return tx.update(updates, state, params)

    updates, new_state = update(toy_gradients(params, 0), state, params)
    updates, new_state = update(toy_gradients(params, 1), new_state, params)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite((updates, new_state))
    assert jnp.asarray(rate(jnp.asarray(3))).dtype == jnp.float32
