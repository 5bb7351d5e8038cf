"""The train step: the same on any number of devices, micro-batches and calls."""

from __future__ import annotations

import functools
import itertools
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
from tests.models import drawn_on


def small(encoder: str = "crate", corruption: str = "mask", penalty: str = "none", decoder: str = "crate"):
    c = configs.base()
    c.steps, c.batch_size = 4, 16
    c.data.image_size = (12, 8)
    c.encoder.name, c.encoder.patch_size = encoder, 2
    c.encoder.width, c.encoder.depth, c.encoder.heads = 24, 2, 2
    if encoder == "vit":  # no key bias: its gradient is rounding noise, which Adam blows up to the learning rate
        c.encoder.drop_path, c.encoder.qkv_bias = 0.3, "qv"
    c.decoder.name, c.decoder.depth, c.decoder.heads = decoder, 1, 2
    c.corruption.name = corruption
    c.penalty.name, c.penalty.weight = penalty, 1e-2
    c.optimizer.lr, c.optimizer.lr_batch = 1e-4, 0
    validate(c)
    return c


def images(step: int, batch: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (batch, 12, 8, 3), np.uint8)


def steps(c, devices: int, count: int = 3, draw=lambda *_: None):
    """Scalars of `count` steps, the states before and after them on the host, the last one on devices, the step.

    With x64 off JAX makes every float64 a float32, and only warns: here that is an error.
    """
    mesh = sharding.make_mesh(c.batch_size, c.accumulate, jax.devices()[:devices])
    method = reconstruction.build(c)
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    step = train_step.make_train_step(c, method, recipe, mesh)
    state = train_step.make_init(c, method, recipe, mesh, draw(c, method, recipe, mesh))()
    log, states = [], [host(state)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not available", UserWarning)
        for i in range(count):
            state, scalars = step(state, sharding.put_batch({"image": images(i, c.batch_size)}, mesh))
            log.append(jax.device_get(scalars))
            states.append(host(state))
    return log, states, state, step


def host(tree):
    """A copy that is not deleted when the arrays are donated."""
    return jax.tree.map(np.array, tree)


def first_config():
    """That of the run that most tests look at."""
    c = small(*METHODS[0], decoder="linear")
    c.optimizer.ema, c.optimizer.clip_norm = 0.9, 1.0  # a decay that is not its own complement
    return c


@functools.cache
def run():
    """Three steps on one device; tests must not give its last state to the step."""
    return steps(first_config(), 1)


METHODS = [("crate", "mask", "srip"), ("vit", "rop", "so"), ("vit", "noise", "none")]


@pytest.mark.parametrize(
    ("encoder", "corruption", "penalty", "smallest_split"),
    [
        pytest.param(*method, split, marks=pytest.mark.slow)
        for method, split in itertools.product(METHODS, (1, 2**14))
        if (method, split) != (METHODS[0], 1)  # the next test
    ],
)
def test_eight_devices_equal_one(encoder, corruption, penalty, smallest_split, monkeypatch):
    """Losses to 1e-6 over three steps, drop path, corruption and penalty included; optimiser split or not."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", smallest_split)
    c = small(encoder, corruption, penalty)
    one, states_one, *_ = steps(c, 1)
    eight, states_eight, *_ = steps(c, 8)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    chex.assert_trees_all_close(states_one[-1].params, states_eight[-1].params, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*OPTIMIZERS} - {"adamw"}))]
)
def test_optimiser_state_is_split_over_the_devices(name, monkeypatch):
    """An eighth of every moment on each device, stays so after a step; the parameters whole on all; the same losses."""
    c = first_config()
    c.optimizer.name = name
    one, states_one, *_ = run() if name == "adamw" else steps(c, 1)
    monkeypatch.setattr(sharding, "MIN_SPLIT", 1)
    eight, states_eight, state, step = steps(c, 8)
    moments = [x for x in jax.tree.leaves(state.opt_state) if any(side % 8 == 0 for side in x.shape)]
    assert moments
    for x in moments:
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 8}
    assert all(x.is_fully_replicated for x in jax.tree.leaves(state.params))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    chex.assert_trees_all_close(one, eight, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(states_one[-1].params, states_eight[-1].params, atol=1e-5)
    assert step._cache_size() == 1  # later steps do not compile again


CORES_AND_BATCHES = {  # and the number of devices
    "four cores": (4, 8, 4),
    "fewer for the batch": (8, 6, 6),
    "indivisible batch": (4, 7, 1),
    "two cores": (2, 8, 2),
    "one core": (1, 8, 1),
}


@pytest.mark.parametrize("given", [{}, {"NPROC": "3", "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}])
def test_what_the_devices_need_stays_in_the_environment_only_until_they_exist(given, monkeypatch):
    for name in ("NPROC", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    for _ in range(2):  # a sweep, and its runs
        sharding.use_cpu_cores(8, 1)
    assert int(os.environ["NPROC"]) > 0 and sharding.TIMEOUT_FLAG in os.environ["XLA_FLAGS"]
    sharding.all_devices()
    assert dict(os.environ) == before
    sharding.use_cpu_cores(8, 1)
    monkeypatch.setenv("XLA_FLAGS", "--changed")
    sharding.all_devices()
    assert dict(os.environ) == before | {"XLA_FLAGS": "--changed"}


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("env", "cases"),
    [({}, [*CORES_AND_BATCHES.values()]), ({"JAX_NUM_CPU_DEVICES": "4"}, [(2, 8, 4)])],
    ids=["from the cores", "chosen by the user"],
)
def test_cpu_devices_follow_the_cores_and_the_batch(env, cases):
    """Each case in a fork of a process that has imported JAX, and not used it."""
    program = f"""
import os, jax
from crate_jax.parallel import sharding
for cores, batch, _ in {cases}:
    if os.fork():
        os.wait()
        continue
    os.sched_getaffinity = lambda pid: set(range(cores))
    for times in (1, 5):  # the second time JAX was used
        sharding.use_cpu_cores(times * batch, 1)
        print(jax.device_count(), flush=True)
    os._exit(0)
"""
    inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC")}
    out = subprocess.run(
        [sys.executable, "-c", program], env=inherited | {"JAX_PLATFORMS": "cpu"} | env, capture_output=True, text=True
    )
    assert out.stdout.split() == [str(devices) for *_, devices in cases for _ in range(2)], out.stderr


@pytest.mark.parametrize(
    ("encoder", "corruption", "penalty"),
    [METHODS[1], *(pytest.param(*method, marks=pytest.mark.slow) for method in METHODS[::2])],
)
@pytest.mark.one_python
def test_accumulated_gradients_equal_the_big_batch(encoder, corruption, penalty):
    """Four micro-batches on two devices give the update of the whole batch on one: same draws, penalty once."""
    c = small(encoder, corruption, penalty, decoder="linear")
    whole, states_whole, *_ = steps(c, 1, draw=drawn_on)
    c.accumulate = 4
    micro, states_micro, *_ = steps(c, 2, draw=drawn_on)
    for a, b in zip(whole, micro, strict=True):
        chex.assert_trees_all_close(a, b, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(states_whole[-1].params, states_micro[-1].params, atol=2e-5)


@pytest.mark.one_python
def test_the_loss_is_reconstruction_plus_weighted_penalty():
    scalars = run()[0][0]
    assert scalars["penalty"] > 0
    np.testing.assert_allclose(scalars["loss"], scalars["reconstruction"] + 1e-2 * scalars["penalty"], rtol=1e-6)


@pytest.mark.slow  # its value in the loss and its gradient are quick tests
@pytest.mark.one_python
def test_the_penalty_makes_weights_orthonormal():
    """Sixty steps under a heavy SO penalty at least halve it."""
    with_so = small(penalty="so")
    with_so.penalty.weight, with_so.steps, with_so.optimizer.lr = 1.0, 100, 3e-3
    penalised = steps(with_so, 1, count=60)[0]
    assert penalised[-1]["penalty"] < 0.5 * penalised[0]["penalty"]


@pytest.mark.one_python
def test_srip_keeps_its_vectors_in_the_state():
    _, (fresh, *_, last), *_ = run()
    assert last.penalty.keys() == fresh.penalty.keys() and last.penalty
    assert any(not np.allclose(a, fresh.penalty[name]) for name, a in last.penalty.items())


@pytest.mark.one_python
def test_ema_follows_the_weights():
    _, (start, first, *_), *_ = run()
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start.params, first.params)
    chex.assert_trees_all_close(first.ema, expected, atol=1e-6)
    kernels = [tree["encoder"]["embedding"]["patch_embed"]["kernel"] for tree in (first.ema, first.params)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-5  # the step is not rounding
    judged = first.judged(reconstruction.build(first_config()))
    assert all(a is b for a, b in zip(jax.tree.leaves(judged), jax.tree.leaves(first.ema), strict=True))


@pytest.mark.one_python
def test_every_step_draws_another_corruption_and_donates_its_state():
    """The loss of one batch and one state depends on the number of the step alone."""
    c = first_config()
    _, (_, first, *_), like, step = run()
    batch = sharding.put_batch({"image": images(0, c.batch_size)}, sharding.make_mesh(16, 1, jax.devices()[:1]))
    losses = []
    for number in (1, 2, 1):
        given = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), first.replace(step=np.int32(number)), like)
        losses.append(float(step(given, batch)[1]["loss"]))
        assert given.params["encoder"]["norm"]["scale"].is_deleted()
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(4.0, 96, 60), (2.0, 1000, 3), (1.7, 1000, 2), (0.3, 1000, 1), (1e-6, 96, 1)]
)
def test_epochs_are_rounded_to_steps_and_make_at_least_one(epochs, batch, steps):
    """Of 1,437 images: 59.9, 2.9, 2.4, 0.4 and 0.00001 steps."""
    c = configs.base()
    c.epochs, c.batch_size = epochs, batch
    assert train_step.total_steps(c, 1437) == (steps, 1437 / batch)


@pytest.mark.parametrize("epochs", [1.45e8, 1e16, 1e308])
def test_epochs_of_more_steps_than_an_int32_counts_are_an_error(epochs):
    """Of 1,437 images 1.434e8 epochs are 2^31 - 1 steps; 1e308 are infinitely many."""
    c = configs.base()
    c.epochs, c.batch_size = epochs, 96
    with pytest.raises(ConfigError, match=r"^config.epochs=.*: more than 2147483647 steps .* at most 1.43e\+08 e"):
        train_step.total_steps(c, 1437)
    c.epochs = 1.43e8
    assert train_step.total_steps(c, 1437)[0] <= 2**31 - 1


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
    c = first_config()
    _, (_, first, *_), like, step = run()
    batch = sharding.put_batch({"image": images(1, c.batch_size)}, sharding.make_mesh(16, 1, jax.devices()[:1]))
    given = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), first, like)
    with jax.transfer_guard("disallow"):
        state, _ = step(given, batch)
    assert int(jax.block_until_ready(state).step) == 2


def test_optimizer_state_is_float32():
    last = run()[1][-1]
    floats = [x for x in jax.tree.leaves(last.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
