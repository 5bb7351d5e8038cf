"""The train step: the same on any number of devices, micro-batches and calls."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.errors import ConfigError
from crate_jax.methods import reconstruction
from crate_jax.parallel import sharding
from crate_jax.training import step as train_step
from crate_jax.training.optimizer import OPTIMIZERS


def small(encoder: str = "crate", corruption: str = "mask", penalty: str = "none"):
    c = configs.base()
    c.steps, c.batch_size = 4, 16
    c.data.image_size = (12, 8)
    c.encoder.name, c.encoder.patch_size = encoder, 2
    c.encoder.width, c.encoder.depth, c.encoder.heads = 24, 2, 2
    if encoder == "vit":  # no key bias: its gradient is rounding noise, which Adam blows up to the learning rate
        c.encoder.drop_path, c.encoder.qkv_bias = 0.3, "qv"
    c.decoder.depth, c.decoder.heads = 1, 2
    c.corruption.name = corruption
    c.penalty.name, c.penalty.weight = penalty, 1e-2
    c.optimizer.lr, c.optimizer.lr_batch = 1e-4, 0
    validate(c)
    return c


def images(step: int, batch: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (batch, 12, 8, 3), np.uint8)


def steps(c, devices: int, count: int = 3):
    """Losses of `count` steps and the last state, on the first `devices` virtual devices."""
    mesh = sharding.make_mesh(c.batch_size, c.accumulate, jax.devices()[:devices])
    method = reconstruction.build(c)
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    step = train_step.make_train_step(c, method, recipe, mesh)
    state = train_step.make_init(c, method, recipe, mesh)()
    losses = []
    for i in range(count):
        batch = sharding.put_batch({"image": images(i, c.batch_size)}, mesh)
        state, scalars = step(state, batch)
        losses.append(jax.device_get(scalars))
    return losses, state, step


METHODS = [("crate", "mask", "srip"), ("vit", "rop", "so"), ("vit", "noise", "none")]


@pytest.mark.parametrize(
    ("encoder", "corruption", "penalty", "smallest_split"),
    [(*METHODS[0], 1), pytest.param(*METHODS[1], 2**14, marks=pytest.mark.one_python)]
    + [
        pytest.param(*method, split, marks=pytest.mark.slow)
        for method, split in [(METHODS[0], 2**14), (METHODS[1], 1), (METHODS[2], 1), (METHODS[2], 2**14)]
    ],
)
def test_eight_devices_equal_one(encoder, corruption, penalty, smallest_split, monkeypatch):
    """Losses to 1e-6 over three steps, drop path, corruption and penalty included; optimiser split or not."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", smallest_split)
    c = small(encoder, corruption, penalty)
    one, state_one, _ = steps(c, 1)
    eight, state_eight, _ = steps(c, 8)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    chex.assert_trees_all_close(state_one.params, jax.device_get(state_eight.params), atol=1e-5)


@pytest.mark.one_python
@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*OPTIMIZERS} - {"adamw"}))]
)
def test_optimiser_state_is_split_over_the_devices(name, monkeypatch):
    """An eighth of every moment on each device, stays so after a step; the parameters whole on all."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 1)
    c = small("vit")
    c.optimizer.name, c.optimizer.clip_norm = name, 1.0
    one, state_one, _ = steps(c, 1)
    eight, state_eight, _ = steps(c, 8)
    moments = [x for x in jax.tree.leaves(state_eight.opt_state) if any(side % 8 == 0 for side in x.shape)]
    assert moments
    for x in moments:
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 8}
    assert all(x.is_fully_replicated for x in jax.tree.leaves(state_eight.params))
    chex.assert_trees_all_close(one, eight, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state_one.params), jax.device_get(state_eight.params), atol=1e-5)


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("env", "cores", "batch", "devices"),
    [
        ({}, 4, 8, 4),
        ({}, 8, 6, 6),
        ({}, 4, 7, 1),
        ({}, 2, 8, 2),
        ({}, 1, 8, 1),
        ({"JAX_NUM_CPU_DEVICES": "4"}, 2, 8, 4),
    ],
    ids=["four cores", "fewer for the batch", "indivisible batch", "two cores", "one core", "chosen by the user"],
)
def test_cpu_devices_follow_the_cores_and_the_batch(env, cores, batch, devices):
    program = (
        f"import os; os.sched_getaffinity = lambda pid: set(range({cores}))\n"
        "import jax; from crate_jax.parallel import sharding\n"
        f"sharding.use_cpu_cores({batch}, 1); print(jax.device_count())\n"
        f"sharding.use_cpu_cores({5 * batch}, 1); print(jax.device_count())"
    )
    inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC")}
    out = subprocess.run(
        [sys.executable, "-c", program], env=inherited | {"JAX_PLATFORMS": "cpu"} | env, capture_output=True, text=True
    )
    assert out.stdout.split() == [str(devices)] * 2, out.stderr


@pytest.mark.parametrize(
    ("encoder", "corruption", "penalty"),
    [METHODS[1], *(pytest.param(*method, marks=pytest.mark.slow) for method in METHODS[::2])],
)
@pytest.mark.one_python
def test_accumulated_gradients_equal_the_big_batch(encoder, corruption, penalty):
    """Four micro-batches on two devices give the update of the whole batch: same draws, penalty once."""
    c = small(encoder, corruption, penalty)
    whole, state_whole, _ = steps(c, 2)
    c.accumulate = 4
    micro, state_micro, _ = steps(c, 2)
    for a, b in zip(whole, micro, strict=True):
        chex.assert_trees_all_close(a, b, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state_whole.params), jax.device_get(state_micro.params), atol=2e-5)


def test_later_steps_do_not_compile_again():
    *_, step = steps(small(penalty="srip"), 2, count=4)
    assert step._cache_size() == 1


def test_the_state_is_donated():
    c = small()
    _, state, step = steps(c, 1, count=1)
    before = state.params["encoder"]["norm"]["scale"]
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[:1])
    step(state, sharding.put_batch({"image": images(1, c.batch_size)}, mesh))
    assert before.is_deleted()


@pytest.mark.one_python
def test_the_loss_is_reconstruction_plus_weighted_penalty():
    scalars = steps(small(penalty="so"), 1, count=1)[0][0]
    assert scalars["penalty"] > 0
    np.testing.assert_allclose(scalars["loss"], scalars["reconstruction"] + 1e-2 * scalars["penalty"], rtol=1e-6)


@pytest.mark.one_python
def test_the_penalty_makes_weights_orthonormal():
    """Sixty steps under a heavy SO penalty at least halve it."""
    with_so = small(penalty="so")
    with_so.penalty.weight, with_so.steps, with_so.optimizer.lr = 1.0, 100, 3e-3
    penalised = steps(with_so, 1, count=60)[0]
    assert penalised[-1]["penalty"] < 0.5 * penalised[0]["penalty"]


@pytest.mark.one_python
def test_srip_keeps_its_vectors_in_the_state():
    _, state, _ = steps(small(penalty="srip"), 1, count=2)
    assert state.penalty
    c = small(penalty="srip")
    method = reconstruction.build(c)
    fresh = train_step.init_state(c, method, train_step.make_recipe(c, method, 160)).penalty
    assert any(not np.allclose(a, b) for a, b in zip(state.penalty.values(), fresh.values(), strict=True))


@pytest.mark.one_python
def test_ema_follows_the_weights():
    c = small()
    c.optimizer.ema, c.optimizer.lr = 0.9, 1e-2  # a decay that is not its own complement, a step that is not rounding
    _, first, _ = steps(c, 1, count=1)
    start = train_step.init_params(c, reconstruction.build(c))[0]
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, first.params)
    chex.assert_trees_all_close(first.ema, expected, atol=1e-6)
    judged = first.judged(reconstruction.build(c))
    assert all(a is b for a, b in zip(jax.tree.leaves(judged), jax.tree.leaves(first.ema), strict=True))


@pytest.mark.one_python
def test_every_step_draws_another_corruption():
    """The loss of one fixed batch under frozen weights differs from step to step."""
    c = small()
    c.optimizer.lr, c.optimizer.weight_decay = 1e-30, 0.0
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[:1])
    _, state, step = steps(c, 1, count=1)
    batch = sharding.put_batch({"image": images(0, c.batch_size)}, mesh)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(4.0, 96, 60), (2.0, 1000, 3), (1.7, 1000, 2), (0.3, 1000, 1), (1e-6, 96, 1)]
)
def test_epochs_are_rounded_to_steps_and_make_at_least_one(epochs, batch, steps):
    """Of 1,437 images: 59.9, 2.9, 2.4, 0.4 and 0.00001 steps."""
    c = configs.base()
    c.epochs, c.batch_size = epochs, batch
    assert train_step.total_steps(c, 1437) == (steps, 1437 / batch)


def test_steps_given_count_as_they_are():
    c = configs.base()
    c.steps, c.epochs, c.batch_size = 7, 0.0, 96
    assert train_step.total_steps(c, 1437)[0] == 7


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="batch_size=12.*8 devices.*multiple of 8"):
        sharding.make_mesh(12, 1, jax.devices())
    with pytest.raises(ConfigError, match="multiple of 16"):
        sharding.make_mesh(24, 2, jax.devices())


def test_no_float64_and_no_transfer_in_the_step():
    """Nothing in the step asks for float64, and running it moves nothing but its arguments."""
    c = small("vit", "rop", "srip")
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[:2])
    with warnings.catch_warnings():  # with x64 off JAX makes every float64 a float32, and only warns
        warnings.filterwarnings("error", ".*not available", UserWarning)
        _, state, step = steps(c, 2, count=1)
    batch = sharding.put_batch({"image": images(1, c.batch_size)}, mesh)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, batch)
    assert int(jax.block_until_ready(state).step) == 2


def test_optimizer_state_is_float32():
    _, state, _ = steps(small(), 1, count=1)
    floats = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
