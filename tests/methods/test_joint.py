"""What every joint-embedding method keeps to, with a tiny encoder: devices, restarts, types, penalties, labels."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import crate_jax.methods as methods
from crate_jax import config as configs
from crate_jax.errors import ConfigError, DataError
from crate_jax.methods import METHODS, joint, online
from crate_jax.methods.method import Progress
from crate_jax.parallel import sharding
from crate_jax.parallel.parameters import names
from crate_jax.training import step as train_step
from tests.parity_joint import WIDTH, Source, tiny_encoder

pytestmark = pytest.mark.one_python

JOINT = [name for name, row in METHODS.items() if "joint" in row.parts]
CARRYING = ("byol", "mocov2plus", "dino", "swav", "deepclusterv2", "vibcreg")  # whatever a method carries, one of these
# Every change runs the tests of these; the others are slow.
QUICK = [pytest.param(name, marks=() if name in CARRYING else pytest.mark.slow) for name in JOINT]
ONE = [pytest.param(name, marks=() if name == "byol" else pytest.mark.slow) for name in JOINT]
# The step over devices of a method with a queue and assignments; that of batch norm and of whitening have own tests.
QUICK_DEVICES = [pytest.param(name, marks=() if name == "swav" else pytest.mark.slow) for name in JOINT]
BATCH, IMAGES = 16, 40  # an epoch is two steps and a half
OWN = {  # keys without which a tiny run would not fit
    "wmse": {"wmse.slice": 8, "joint.out": 5},
    "deepclusterv2": {"deepclusterv2.prototypes": (5, 4)},
    "swav": {"swav.prototypes": 10, "swav.queue": 32, "swav.queue_from": 1.0},
    "dino": {"dino.prototypes": 20},
    "all4one": {"joint.out": 16},
}


LEARNS = {  # what a method needs to learn in a few steps, from noise that a random encoder hardly tells apart
    "dino": {"dino.batch_norm": True, "dino.temperature": 0.04, "optimizer.lr": 0.03},
    "vicreg": {"optimizer.lr": 0.01},
}


def config_of(name: str, **changes):
    """A tiny run of a method."""
    c = configs.base()
    c.method, c.batch_size, c.steps = name, BATCH, 6
    c.joint.update(dict(hidden=24, out=12, predictor_hidden=20, queue=48))
    c.optimizer.update(dict(name="sgd", lr=0.05, lr_batch=0, weight_decay=1e-4, schedule="constant", decay_exclude=()))
    c.penalty.update(dict(name="so", weight=0.01))
    c.evaluation.pool = "mean"
    c.update_from_flattened_dict(OWN.get(name, {}))
    c.update_from_flattened_dict(changes)
    configs.validate(c)
    return c


def build(c, labelled: bool = True):
    """The method with the tiny encoder, on views as they are."""
    source = Source(IMAGES)
    if not labelled:
        source.class_names = None
    algorithm = getattr(methods, c.method).algorithm(c, WIDTH, source)
    views = lambda batch, keys: list(jnp.moveaxis(batch["views"].astype(jnp.float32) / 64 - 2, 1, 0))  # noqa: E731
    return joint.assemble(c, algorithm, tiny_encoder(), views, source)


def batch_of(step: int, views: int = 2) -> dict[str, np.ndarray]:
    """Noisy views of images that differ from each other; one image in four has no label."""
    index = (step * BATCH + np.arange(BATCH)) % IMAGES
    images = np.stack([np.random.default_rng(i).integers(40, 200, (8, 8, 3)) for i in index])
    noise = np.random.default_rng(1000 + step).integers(-20, 20, (BATCH, views, 8, 8, 3))
    label = np.where(index % 4 == 3, -1, index % 7).astype(np.int32)
    return {"views": (images[:, None] + noise).astype(np.uint8), "label": label, "index": index.astype(np.int32)}


@functools.cache
def unchanged(name: str):
    """A tiny run of a method and the method, for tests that change neither: they share the compiled steps."""
    c = config_of(name)
    return c, build(c)


PROGRAMS: dict = {}  # of a method, which is kept so that no other gets its id, and a number of devices


def programs(c, method, devices: int):
    """The mesh, the jitted start and the jitted step of a method, which `c` made."""
    if (id(method), devices) not in PROGRAMS:
        mesh = sharding.make_mesh(c.batch_size, c.accumulate, jax.devices()[:devices])
        recipe = train_step.make_recipe(c, method, IMAGES)
        init, step = (make(c, method, recipe, mesh) for make in (train_step.make_init, train_step.make_train_step))
        PROGRAMS[id(method), devices] = method, mesh, init, step
    return PROGRAMS[id(method), devices][1:]


def run(c, method, count: int, devices: int = 1, state=None, first: int = 0):
    """The state after `count` steps, on the host, and the scalars of each; also checks that one program made them."""
    mesh, init, step = programs(c, method, devices)
    state = init() if state is None else jax.device_put(state, jax.tree.map(lambda x: x.sharding, init()))
    log = []
    for i in range(first, first + count):
        state, scalars = step(state, sharding.put_batch(batch_of(i), mesh))
        log.append(jax.device_get(scalars))
    assert step._cache_size() == 1, "the step was compiled again"
    return jax.device_get(state), log


@pytest.mark.parametrize("name", QUICK_DEVICES)
def test_four_devices_make_the_steps_of_one(name):
    """Batch norm, negatives, queues, centres and assignments are those of the whole batch; SO composes."""
    c, method = unchanged(name)
    one, log = run(c, method, 4)
    four, other = run(c, method, 4, devices=4)
    # The root of All4One's feature loss is steep near 0, so its gradient makes rounding larger.
    chex.assert_trees_all_close(log, other, rtol=5e-3 if name == "all4one" else 2e-4, atol=2e-5)
    chex.assert_trees_all_close(one.carried, four.carried, rtol=2e-3, atol=2e-4)
    assert all(math.isfinite(x) for scalars in log for x in scalars.values())
    assert log[0]["penalty"] > 0 and "penalty" not in method_scalars(log[0])


def method_scalars(scalars):
    return {k: v for k, v in scalars.items() if not k.startswith(("penalty", "loss", "lr", "grad_norm", "online"))}


@pytest.mark.parametrize("name", QUICK)
def test_a_run_that_stops_goes_on_with_the_same_bits(name):
    """All that a step needs is in its state: also the place in a queue and what changes with the epoch."""
    c, method = unchanged(name)
    whole, log = run(c, method, 5)
    half, _ = run(c, method, 3)
    rest, end = run(c, method, 2, state=half, first=3)
    chex.assert_trees_all_equal(whole, rest)
    assert end[-1] == log[-1]


@pytest.mark.parametrize("name", [case for case in ONE if case.values != ("supcon",)])
def test_bfloat16_is_finite_and_unlabelled_images_work(name):
    c = config_of(name, dtype="bfloat16")
    method = build(c, labelled=False)
    state, log = run(c, method, 3)
    assert all(math.isfinite(x) for scalars in log for x in scalars.values())
    assert joint.ONLINE not in state.carried and not any(key.startswith("online") for key in log[0])


def test_supcon_refuses_images_without_labels():
    """It would be SimCLR to the bit."""
    with pytest.raises(DataError, match="config.method='supcon' learns from labels, but the training images lack them"):
        build(config_of("supcon"), labelled=False)


@pytest.mark.parametrize("name", ["vicreg", "byol"])
def test_a_batch_of_one_image_is_refused(name):
    with pytest.raises(ConfigError, match=r"config\.batch_size=1: must be at least 2 for joint embedding"):
        config_of(name, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINT)
def test_the_loss_is_the_same_without_jit(name):
    c = config_of(name)
    method = build(c)
    params, carried = method.init(jax.random.key(1), lambda drawn: drawn)
    keys = jax.random.split(jax.random.key(2), BATCH)
    args = (params, carried, batch_of(0), keys)
    compiled = jax.jit(method.loss)(*args)
    with jax.disable_jit():
        eager = method.loss(*args)
    chex.assert_trees_all_close(compiled, eager, rtol=1e-4, atol=1e-5)


class Recorder:
    """A config that collects the whole names of the keys that are read."""

    def __init__(self, config, read: set[str], prefix: str = "") -> None:
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name: str):
        value = getattr(self._config, name)
        if isinstance(value, ConfigDict):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value


@pytest.mark.parametrize("name", JOINT)
def test_a_row_names_what_its_method_reads(name):
    """Of the section `joint`; sweeps refuse another key, and a run that continues does not record its change."""
    read: set[str] = set()
    method = build(Recorder(config_of(name), read))

    def update(batch, keys):
        params, carried = method.init(jax.random.key(1), lambda drawn: drawn)
        _, (carried, _) = method.loss(params, carried, batch, keys)
        return method.after(params, carried, Progress(jnp.int32(2), 8, 2.5))

    jax.eval_shape(update, batch_of(0), jax.random.split(jax.random.key(2), BATCH))
    keys = {key: configs.KEYS[key].read_by for key in configs.KEYS if key.startswith("joint.")}
    assert {key for key in read if key.startswith("joint.")} == {key for key in keys if name in (keys[key] or (name,))}
    assert set(METHODS[name].keys) == {key for key in keys if name in keys[key]}


@pytest.mark.parametrize("name", [name for name in JOINT if "joint.tau" in METHODS[name].keys])
def test_a_target_is_a_slow_copy_and_is_not_trained(name):
    """It starts as the student, moves by 1 - tau towards the new weights, and its gradient is none."""
    c = config_of(name, **{"joint.tau": 0.75, "joint.tau_final": 0.95})
    method = build(c)
    params, carried = jax.jit(lambda: method.init(jax.random.key(1), lambda drawn: drawn))()
    ours, slow = names(params), names(carried[joint.TARGET])
    shared = [n for n in slow if n in ours]
    assert shared and all((slow[n] == ours[n]).all() for n in shared)
    moved = jax.tree.map(lambda x: x + 1.0, params)
    tau = 0.95 - 0.2 * (math.cos(math.pi * 2 / 8) + 1) / 2
    _, after = jax.jit(lambda p, c: method.after(p, c, Progress(jnp.int32(2), 8, 2.5)))(moved, carried)
    for n in shared:
        np.testing.assert_allclose(names(after[joint.TARGET])[n], ours[n] + 1 - tau, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["byol", "simclr"])
def test_the_target_is_judged_if_it_is_asked_for(name):
    """The encoder with its statistics; a method without a target judges its student."""
    method = build(config_of(name, **{"joint.judged": "target"}))
    params, carried = jax.jit(lambda: method.init(jax.random.key(1), lambda drawn: drawn))()
    student = build(config_of(name)).judged(params, carried)
    if name == "simclr":
        return chex.assert_trees_all_equal(method.judged(params, carried), student)
    carried[joint.TARGET] = jax.tree.map(lambda x: x + 1.0, carried[joint.TARGET])
    found = method.judged(params, carried)
    chex.assert_trees_all_equal(found["encoder"], carried[joint.TARGET]["encoder"])
    chex.assert_trees_all_equal_structs(found, student)
    chex.assert_trees_all_equal(found["projector"], student["projector"])


def test_small_views_are_refused_by_methods_of_two_views():
    c = config_of("byol")
    c.views.small = 2
    assert build(c).inputs == ("views", "small_views", "label", "index")
    c = config_of("barlow_twins")
    c.views.small = 2
    with pytest.raises(ConfigError, match=r"config\.views\.small=2: must be 0, since method 'barlow_twins' takes two"):
        build(c)


def test_features_are_trained_at_the_output_whatever_layer_is_judged():
    """Stages of a ResNet differ in width; the heads have that of the last one."""
    c = config_of("simclr", **{"encoder.name": "resnet18", "encoder.stage_width": 3, "evaluation.layer": 2})
    method = METHODS["simclr"].build(c, Source(IMAGES))
    params, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), lambda drawn: drawn))
    assert params["projector"]["layer0"]["kernel"].shape == (24, 24)
    judged = jax.eval_shape(lambda: method.judged(*method.init(jax.random.key(0), lambda drawn: drawn)))
    assert jax.eval_shape(method.features, judged, np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 6)


def test_small_views_are_pooled_apart_from_large_ones():
    """Else a network would see images of two sizes in one call, or its heads other groups than its encoder."""
    calls = []

    def apply(tree, x, key):
        calls.append(x.shape)
        return x.sum(-1), tree

    views = [jnp.full((3, n), float(v)) for v, n in enumerate((7, 7, 5, 5, 5))]
    out = joint.Networks({"encoder": apply}, {"encoder": {}}, pooled=True)("encoder", views)
    assert calls == [(6, 7), (9, 5)]
    assert [x.tolist() for x in out] == [[0.0] * 3, [7.0] * 3, [10.0] * 3, [15.0] * 3, [20.0] * 3]


@pytest.mark.parametrize("name", ONE)
def test_the_loss_falls_on_a_few_images(name):
    """64 updates; the first ones are left out, in which queues fill with harder rows and a memory fills at all."""
    plain = {"penalty.name": "none", "penalty.weight": 0.0, "optimizer.momentum": 0.9}
    c = config_of(name, steps=64, **plain, **LEARNS.get(name, {}))
    _, log = run(c, build(c), 64)
    values = [scalars[name] for scalars in log]
    assert np.mean(values[-8:]) < np.mean(values[8:16]), values


def test_pooled_batch_norm_has_the_statistics_of_all_views():
    """Two views in one call: one move of the running statistics, by the mean of both views."""
    found = {}
    for how in ("view", "pooled"):
        c = config_of("simclr", **{"joint.batch_norm": how})
        method = build(c)
        init = jax.jit(lambda method=method: method.init(jax.random.key(1), lambda drawn: drawn))
        params, carried = init()
        batch = batch_of(0)
        batch["views"][:, 1] = 255 - batch["views"][:, 1]
        _, (carried, _) = jax.jit(method.loss)(params, carried, batch, jax.random.split(jax.random.key(2), BATCH))
        found[how] = carried[joint.STATISTICS]["encoder"]["bn1"]["running_mean"]
    each = [0.0, 0.0]
    for view in (0, 1):
        alone = {**batch, "views": np.repeat(batch["views"][:, view : view + 1], 2, axis=1)}
        _, (carried, _) = jax.jit(method.loss)(*init(), alone, jax.random.split(jax.random.key(2), BATCH))  # fmt: skip  # noqa: E501
        each[view] = carried[joint.STATISTICS]["encoder"]["bn1"]["running_mean"] / 0.1
    np.testing.assert_allclose(found["pooled"], 0.1 * (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["view"], 0.9 * 0.1 * each[0] + 0.1 * each[1], rtol=1e-4, atol=1e-6)


def test_the_online_classifier_leaves_out_images_without_a_label():
    """By hand: the mean cross entropy over the labelled rows, and the share of them in the first and first five."""
    rng = np.random.default_rng(3)
    weights = {"kernel": jnp.asarray(rng.normal(size=(4, 9)), jnp.float32), "bias": jnp.asarray(rng.normal(size=9))}
    x, label = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), np.array([2, -1, 7, 0, -1])
    value, scalars = jax.jit(online.loss)(weights, [x], jnp.asarray(label))
    logits = np.asarray(x @ weights["kernel"] + weights["bias"], np.float64)
    losses = [math.log(np.exp(logits[i]).sum()) - logits[i, label[i]] for i in (0, 2, 3)]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    ranks = [(logits[i] > logits[i, label[i]]).sum() for i in (0, 2, 3)]
    assert float(scalars["online_top1"]) == pytest.approx(np.mean([r < 1 for r in ranks]))
    assert float(scalars["online_top5"]) == pytest.approx(np.mean([r < 5 for r in ranks]))
    value, grads = jax.jit(jax.value_and_grad(lambda w: online.loss(w, [x], jnp.full(5, -1))[0]))(weights)
    assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def test_the_rate_of_the_online_classifier_grows_with_the_batch_as_the_methods_does():
    x, label = jnp.asarray(np.random.default_rng(4).normal(size=(5, 4)), jnp.float32), jnp.arange(5)

    def moved(**options):
        c = config_of("byol", **{"online.lr": 0.3, "batch_size": 640, "optimizer.lr_batch": 256, **options})
        return online.step(online.init(4, 9), [x], label, c)[0]["kernel"]

    np.testing.assert_allclose(moved(), 2.5 * moved(**{"optimizer.lr_batch": 0}), rtol=1e-6)


def test_the_online_classifier_moves_neither_encoder_nor_clipping():
    """The same encoder and the same norm of the gradient, whatever the classifier does."""
    c = config_of("byol", **{"online.lr": 0.0})
    (one, log), (two, other) = run(c, build(c), 2), run(*unchanged("byol"), 2)
    chex.assert_trees_all_equal(one.params, two.params)
    assert [s["grad_norm"] for s in log] == [s["grad_norm"] for s in other]
    assert joint.ONLINE not in one.carried and np.abs(two.carried[joint.ONLINE]["kernel"]).min() > 0
    assert other[0]["online_loss"] == pytest.approx(math.log(7), rel=1e-5)


def test_a_queue_takes_batches_of_another_size_in_turn():
    """A run may go on with another batch: no slice may be moved to another place, or rows would never leave."""
    queue, place = jnp.zeros((48, 2)), jnp.int32(16)  # one batch of 16 was written before
    for i in range(3):
        queue, place = joint.push(queue, place, jnp.full((24, 2), i + 1.0))
    np.testing.assert_array_equal(queue[:, 0], np.repeat([3.0, 2.0], 24))
    assert place == 24


def test_a_tie_of_scores_is_a_hit_of_one_class_and_nan_of_none():
    """An online classifier begins with equal scores."""
    weights = {"kernel": jnp.zeros((3, 7)), "bias": jnp.zeros(7)}
    label = jnp.array([0, 4, 5, 6, -1])
    _, scalars = online.loss(weights, [jnp.ones((5, 3))], label)
    assert (float(scalars["online_top1"]), float(scalars["online_top5"])) == (0.25, 0.5)
    _, scalars = online.loss(weights | {"bias": jnp.full(7, jnp.nan)}, [jnp.ones((5, 3))], label)
    assert (float(scalars["online_top1"]), float(scalars["online_top5"])) == (0.0, 0.0)
