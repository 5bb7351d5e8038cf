"""Weights with a constant rate and weights that are held still, against NumPy and against optimisers of their own."""

import dataclasses
import math

import chex
import jax
import numpy as np
import optax
import pytest

from crate_jax.errors import ConfigError
from crate_jax.methods import reconstruction
from crate_jax.parallel import parameters
from crate_jax.training import groups, optimizer, step
from tests.models import drawn
from tests.training.test_loop import small
from tests.training.test_optimizer import configured, draw

pytestmark = pytest.mark.one_python

TOTAL, PER_EPOCH, BATCH = 12, 3.7, 320
HELD = (("last/.*", 0.9), (".*/kernel_v", 0.3))  # 0.9 epochs are 3.33 steps: updates 0 to 3; 0.3 epochs are 1.11
STILL = {"last/kernel_v": 4, "last/kernel_g": 4, "head/kernel_v": 2}
CONSTANT = ("predictor/.*", "last/kernel_g")
RATES = dict(lr=0.3, lr_batch=256, warmup_lr=0.06, min_lr=0.03, warmup_steps=4, weight_decay=0.08)
NO_SCHEDULE = dict(schedule="constant", warmup_steps=0, warmup_lr=0.0, min_lr=0.0)


def toy():
    return {
        "encoder": {"kernel": draw(5, 4), "bias": draw(4)},
        "predictor": {"kernel": draw(4, 3), "bias": draw(3)},
        "head": {"kernel_v": draw(3, 5)},
        "last": {"kernel_v": draw(5, 3), "kernel_g": draw(5, 1)},
    }


def gradients(params, t):
    return jax.tree.map(lambda p: draw(*p.shape, seed=200 + t), params)


def config_of(name, **options):
    c = configured(name, **RATES | dict(decay_exclude=(), momentum=0.9, b1=0.8, b2=0.95) | options)
    c.batch_size = BATCH
    return c


def trained(config, held=(), params=None, steps=8):
    """The parameters after each update."""
    params = toy() if params is None else params
    tx, _ = optimizer.build(config, params, TOTAL, PER_EPOCH, held=held)
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for t in range(steps):
        updates, state = update(gradients(params, t), state, params)
        params = optax.apply_updates(params, updates)
        out.append(parameters.names(params))
    return out


def sgd(p, g, memory, lr, decay):
    g = g + decay * p
    memory["b"] = 0.9 * memory.get("b", 0) + g
    return p - lr * memory["b"]


def adam(p, g, memory, lr, decay):
    g, t = g + decay * p, memory.get("t", 0) + 1
    m, v = 0.8 * memory.get("m", 0) + 0.2 * g, 0.95 * memory.get("v", 0) + 0.05 * g**2
    memory.update(t=t, m=m, v=v)
    return p - lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)


def lars_torch(p, g, memory, lr, decay):
    if p.ndim > 1:
        size, slope = np.linalg.norm(p), np.linalg.norm(g)
        g = min(0.4 * size / (slope + decay * size + 1e-8) / lr, 1) * (g + decay * p)
    memory["b"] = 0.9 * memory.get("b", 0) + g
    return p - lr * memory["b"]


def expected(rule, constant=(), still=(), decay_end=0.0, clip=None):
    """What `trained` should return, weight by weight in float64."""
    scale = BATCH / 256
    out = [{} for _ in range(8)]
    for name, leaf in parameters.names(toy()).items():
        p, memory = np.asarray(leaf, np.float64), {}
        for t in range(8):
            g = np.asarray(parameters.names(gradients(toy(), t))[name], np.float64)
            if clip and name.startswith("encoder/"):
                g = g * min(1, clip / (np.linalg.norm(g) + 1e-6))
            falling = 0.03 + 0.27 * (1 + np.cos(np.pi * (t - 4) / 8)) / 2
            rate = 0.3 if name in constant else 0.06 + 0.24 * t / 4 if t < 4 else falling
            decay = decay_end + (0.08 - decay_end) * (1 + np.cos(np.pi * t / TOTAL)) / 2 if decay_end else 0.08
            if t >= dict(still).get(name, 0):
                p = rule(p, g, memory, scale * rate, decay if p.ndim > 1 else 0.0)
            out[t][name] = p
    return out


def assert_same(ours, theirs):
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-5, err_msg=f"{name}, update {t}")


# Groups treat all optimisers alike: one without and one with a norm per layer are quick tests.
EACH = [
    pytest.param(name, marks=() if name in ("sgd", "lars_torch") else pytest.mark.slow) for name in optimizer.OPTIMIZERS
]
RULES = [("sgd", sgd, {}), ("adam", adam, {}), ("lars_torch", lars_torch, dict(clip_lr=True, trust_coefficient=0.4))]


@pytest.mark.parametrize(("name", "rule", "options"), RULES)
def test_constant_rates_held_weights_and_moving_decay_are_the_documented_updates(name, rule, options):
    config = config_of(name, constant_lr=CONSTANT, weight_decay_end=0.5, **options)
    constant = ("predictor/kernel", "predictor/bias", "last/kernel_g")
    assert_same(trained(config, HELD), expected(rule, constant, STILL, decay_end=0.5))


def test_each_gradient_is_clipped_by_its_own_norm_where_the_patterns_say():
    config = config_of("sgd", clip_each=1.7, clip_each_include=("encoder/.*",))
    assert_same(trained(config), expected(sgd, clip=1.7))
    sizes = [float(optax.tree.norm(gradients(toy(), t)["encoder"]["bias"])) for t in range(8)]
    assert min(sizes) < 1.7 < max(sizes)  # some gradients are within the bound


def test_a_stack_of_layers_is_clipped_layer_by_layer():
    g = {"blocks": {"kernel": draw(3, 4, 2) * np.array([0.01, 1.0, 9.0])[:, None, None]}}
    tx = optimizer.clip_each_by_norm(0.7, {"blocks/kernel"})
    clipped = tx.update(g, tx.init(g))[0]["blocks"]["kernel"]
    np.testing.assert_allclose(clipped[0], g["blocks"]["kernel"][0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(clipped[1:], axis=(1, 2)), 0.7, rtol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_a_group_moves_as_if_it_were_alone_under_its_own_schedule(name):
    """With every optimiser: constant weights as under a constant schedule, the others as before."""
    mixed = trained(config_of(name, constant_lr=("predictor/.*",)), steps=5)
    plain, steady = trained(config_of(name), steps=5), trained(config_of(name, **NO_SCHEDULE), steps=5)
    for t in range(5):
        for key, value in mixed[t].items():
            alone = steady if key.startswith("predictor/") else plain
            np.testing.assert_allclose(value, alone[t][key], rtol=1e-5, atol=1e-6)
    assert not np.allclose(plain[-1]["predictor/bias"], steady[-1]["predictor/bias"], rtol=1e-2)


@pytest.mark.parametrize("name", EACH)
def test_a_scaled_rate_is_that_of_a_run_with_this_rate(name):
    """With every optimiser, also for a weight whose rate is constant."""
    options = dict(constant_lr=("last/.*",), scaled_lr=("predictor/.*", "last/kernel_v"), scaled_lr_by=0.3)
    mixed = trained(config_of(name, **options), steps=5)
    slower = dict(lr=0.09, warmup_lr=0.018, min_lr=0.009)
    plain, slow = trained(config_of(name), steps=5), trained(config_of(name, **slower), steps=5)
    steady = trained(config_of(name, **NO_SCHEDULE | dict(lr=0.09)), steps=5)
    for t in range(5):
        for key, value in mixed[t].items():
            alone = steady if key == "last/kernel_v" else slow if key.startswith("predictor/") else plain
            if key != "last/kernel_g":  # constant and not scaled: the test above
                np.testing.assert_allclose(value, alone[t][key], rtol=1e-5, atol=1e-6)
    assert not np.allclose(plain[-1]["predictor/bias"], slow[-1]["predictor/bias"], rtol=1e-2)


@pytest.mark.parametrize("name", EACH)
def test_a_held_weight_neither_moves_nor_moves_its_state(name):
    params = toy()
    tx, rate = optimizer.build(config_of(name, warmup_steps=0), params, TOTAL, PER_EPOCH, held=HELD)
    state, first, update = tx.init(params), tx.init(params), jax.jit(tx.update)
    for t in range(4):
        updates, state = update(gradients(params, t), state, params)
        np.testing.assert_array_equal(updates["last"]["kernel_v"], 0.0)
        assert np.all(np.asarray(updates["head"]["kernel_v"]) != 0) == (t >= 2)
    still = {n: x for n, x in parameters.names(first).items() if "/last/" in n}
    assert still
    chex.assert_trees_all_equal({n: parameters.names(state)[n] for n in still}, still)
    assert groups.updates_done(state) == 4  # the rate that is logged is the schedule's
    updates, _ = update(gradients(params, 4), state, params)
    assert np.all(np.asarray(updates["last"]["kernel_v"]) != 0)


def test_a_held_weight_does_not_count_in_the_norm_of_the_gradient():
    config, params = config_of("sgd", clip_norm=0.9, weight_decay=0.0), toy()
    tx, _ = optimizer.build(config, params, TOTAL, PER_EPOCH, held=HELD)
    huge = gradients(params, 0) | {"last": jax.tree.map(lambda p: 1e9 * p, params["last"])}
    updates, _ = jax.jit(tx.update)(huge, tx.init(params), params)
    moving = [huge["encoder"], huge["predictor"]]
    lr = 0.06 * BATCH / 256
    np.testing.assert_allclose(
        updates["encoder"]["bias"], -lr * 0.9 / optax.tree.norm(moving) * huge["encoder"]["bias"], rtol=1e-5
    )


def test_a_frozen_encoder_does_not_count_in_the_norm_of_the_gradient():
    """A penalty on its weights has gradients, too; the head then moved by a tenth."""
    config, params = config_of("sgd", clip_norm=0.9, weight_decay=0.0), toy()
    tx, _ = optimizer.build(config, params, TOTAL, PER_EPOCH, frozen=True)
    huge = gradients(params, 0) | {"encoder": jax.tree.map(lambda p: 1e9 * p, params["encoder"])}
    updates, _ = jax.jit(tx.update)(huge, tx.init(params), params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates["encoder"]))
    assert 0.5 < optax.tree.norm(updates) / (0.06 * BATCH / 256 * 0.9) < 1.001


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_without_groups_the_state_is_the_optimisers_own(name):
    """So checkpoints of runs without groups restore."""
    config, params = config_of(name), toy()
    tx, rate = optimizer.build(config, params, TOTAL, PER_EPOCH, held=(("last/.*", 0.0),))
    own = optimizer.OPTIMIZERS[name](config.optimizer, rate, 0.08, lambda tree: jax.tree.map(lambda x: True, tree))
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(own.init(params))


def test_a_weight_that_several_patterns_hold_is_held_for_the_longest_time():
    held = (("last/.*", 0.9), ("last/kernel_v", 0.3), (".*bias", 2.0))
    of = groups.groups(config_of("sgd"), toy(), PER_EPOCH, held)
    assert {n: g.still for n, g in of.items() if g.still} == {
        "last/kernel_v": 4,
        "last/kernel_g": 4,
        "encoder/bias": 8,
        "predictor/bias": 8,
    }


def test_a_weight_that_is_held_for_ever_never_moves():
    held = (("last/kernel_g", math.inf),)
    (*_, last), others = trained(config_of("adam"), held), trained(config_of("adam"))
    np.testing.assert_array_equal(last["last/kernel_g"], toy()["last"]["kernel_g"])
    np.testing.assert_allclose(last["last/kernel_v"], others[-1]["last/kernel_v"], rtol=1e-5, atol=1e-6)


def test_whole_epochs_are_whole_steps_in_spite_of_rounding():
    assert groups.groups(config_of("sgd"), toy(), 30.0, (("last/.*", 0.1),))["last/kernel_g"].still == 3


@pytest.mark.parametrize("epochs", [1e16, 1e308])
def test_more_epochs_than_a_run_can_have_hold_a_weight_for_all_of_it(epochs):
    """This is not FOREVER: the log warns that the weight never moves."""
    still = groups.groups(config_of("sgd"), toy(), 30.0, (("last/.*", epochs),))["last/kernel_g"].still
    assert still == groups.FOREVER - 1


@pytest.mark.parametrize(
    ("options", "held", "line"),
    [
        (dict(constant_lr=("predicter/.*",)), (), r"config\.optimizer\.constant_lr: pattern 'predicter"),
        (dict(scaled_lr=("transformr/.*",)), (), r"config\.optimizer\.scaled_lr: pattern 'transformr"),
        (dict(clip_each=0.1, clip_each_include=("x",)), (), r"config\.optimizer\.clip_each_include: pattern 'x'"),
        ({}, (("prototypes/.*", 1.0),), r"config\.method: pattern 'prototypes"),
        ({}, (("prototypes/.*", 0.0),), r"config\.method: pattern 'prototypes"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(options, held, line):
    with pytest.raises(ConfigError, match=line):
        optimizer.build(config_of("sgd", **options), toy(), TOTAL, PER_EPOCH, held=held)


def test_what_a_method_holds_reaches_the_recipe():
    c = small(decoder="linear")
    method = dataclasses.replace(reconstruction.build(c), held=(("decoder/.*kernel", 0.2),))
    recipe = step.make_recipe(c, method, 10 * c.batch_size)  # 10 steps per epoch: updates 0 and 1
    params = drawn(lambda: step.init_params(c, method)[0])
    state, update, moved = jax.jit(recipe.tx.init)(params), jax.jit(recipe.tx.update), []
    for _ in range(3):
        updates, state = update(jax.tree.map(np.ones_like, params), state, params)
        moved.append({n for n, u in parameters.names(updates).items() if np.any(u)})
    held = set(parameters.match(params, ["decoder/.*kernel"], ""))
    assert moved[0] == moved[1] == set(parameters.names(params)) - held and moved[2] == moved[1] | held
