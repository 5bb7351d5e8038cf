"""DINO, SwAV and DeepCluster v2 by hand: projections compared with prototypes, schedules by epoch, the memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.errors import ConfigError
from crate_jax.methods import deepclusterv2, dino, joint, swav
from crate_jax.methods.method import Progress
from crate_jax.models.prototypes import Prototypes
from tests.methods.test_batch_statistics import algorithm, bare_step, finite, random
from tests.methods.test_joint import config_of

pytestmark = pytest.mark.one_python

PER_EPOCH = 2.5  # updates: 40 images, 16 a batch


def progress(done: int, total: int = 20, per_epoch: float = PER_EPOCH) -> Progress:
    return Progress(jnp.int32(done), total, per_epoch)


@pytest.mark.parametrize(("images", "batch"), [(50_000, 256), (50_000, 192), (1000, 7), (40, 16), (30, 100)])
def test_epochs_are_counted_exactly(images, batch):
    """As in whole numbers; in float32 the quotient is off by a step for some of these."""
    total = 400 * images // batch
    updates = np.arange(total + 1)
    found = progress(0, total, images / batch).epochs(jnp.asarray(updates))
    np.testing.assert_array_equal(found, updates * batch // images)


@pytest.mark.parametrize(("images", "batch"), [(1_281_167, 4096), (14_197_122, 65_536), (1_073_741_789, 2**20 - 1)])
def test_epochs_of_long_runs_need_no_table(images, batch):
    """Around the ends of epochs, where updates * batch needs more than 32 bits; the program has no large constant."""
    ends = np.arange(1, 2**31 // images * batch, max(1, 2**31 // images * batch // 999)) * images // batch
    updates = np.concatenate([ends - 1, ends, ends + 1, np.arange(3)])
    updates = updates[updates < 2**31]
    assert (updates * batch > 2**33).any()
    long = progress(0, 10**9, images / batch)
    np.testing.assert_array_equal(long.epochs(jnp.asarray(updates, jnp.int32)), updates * batch // images)
    program = jax.make_jaxpr(long.epochs)(jnp.int32(0))
    assert sum(np.size(constant) for constant in program.consts) < 9


def test_an_epoch_ends_with_the_batch_that_completes_it():
    epochs = [int(progress(done).epochs(jnp.int32(done))) for done in range(9)]
    assert np.diff(epochs).tolist() == [0, 0, 1, 0, 1, 0, 0, 1]


# -- prototypes


def test_weight_norm_ignores_the_length_of_a_column():
    z, net = random(6, 4), Prototypes(5)
    tree = net.init(jax.random.key(0), z, False)["params"]
    scaled = {"kernel": tree["kernel"] * jnp.arange(1.0, 6.0)}
    found = net.apply({"params": tree}, z, False)
    np.testing.assert_allclose(net.apply({"params": scaled}, z, False), found, rtol=1e-5)
    expected = z @ (tree["kernel"] / np.linalg.norm(tree["kernel"], axis=0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_lengths_are_trained_on_request():
    z, net = random(6, 4), Prototypes(5, lengths=True)
    tree = net.init(jax.random.key(0), z, False)["params"]
    assert (tree["lengths"] == 1).all()
    longer = {**tree, "lengths": jnp.arange(1.0, 6.0)[None]}
    once, more = (net.apply({"params": t}, z, False) for t in (tree, longer))
    np.testing.assert_allclose(more, once * jnp.arange(1.0, 6.0), rtol=1e-5)


# -- DINO


def test_the_loss_of_dino_at_uniform_distributions_is_log_k():
    zeros = [jnp.zeros((4, 20))] * 2
    own = {"centre": jnp.zeros(20), "temperature": jnp.float32(0.07)}
    value, _, scalars = algorithm("dino").loss(bare_step(zeros, own, zeros))
    assert float(value) == pytest.approx(math.log(20)) == pytest.approx(float(scalars["teacher_entropy"]))


def dino_by_hand(students, teachers, centre, temperature):
    """The mean over all pairs of different views, in float64."""
    unit = lambda x: np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731

    def softmax(x):
        return np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)

    terms = []
    for a, t in enumerate(teachers):
        for b, s in enumerate(students):
            if a != b:
                terms.append(
                    -(softmax((unit(t) - centre) / temperature) * np.log(softmax(unit(s) / 0.1))).sum(1).mean()
                )
    return np.mean(terms)


@pytest.mark.parametrize("views", [2, 5])
def test_every_view_predicts_the_large_ones(views):
    """Also small views, each as one more view; the centre moves by both teachers."""
    students = [random(4, 20, seed=v) for v in range(views)]
    teachers = [random(4, 20, seed=10 + v) + 1 for v in range(2)]
    centre = np.asarray(random(20, seed=3)) * 0.1
    own = {"centre": jnp.asarray(centre), "temperature": jnp.float32(0.09)}
    value, new, _ = algorithm("dino", **{"dino.centre": 0.8}).loss(bare_step(students, own, teachers))
    assert float(value) == pytest.approx(dino_by_hand(students, teachers, centre, 0.09), rel=1e-5)
    mean = np.mean([joint.unit(t).mean(0) for t in teachers], 0)
    np.testing.assert_allclose(new["centre"], 0.8 * centre + 0.2 * mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dino", {"dino.student_temperature": 1e-6, "dino.temperature": 1e-8}),
        ("swav", {"joint.temperature": 1e-6, "swav.epsilon": 1e-6, "swav.queue": 0}),
        ("deepclusterv2", {"joint.temperature": 1e-6}),
    ],
)
def test_tiny_temperatures_are_finite(name, changes):
    made = algorithm(name, **changes)
    own = made.state(jax.random.key(0))
    if name == "deepclusterv2":
        centres = {head: joint.unit(random(*c.shape, seed=8)) for head, c in own["centres"].items()}
        own |= {"assignments": own["assignments"] + 3, "centres": centres}
    views = [random(16, 20 if name == "dino" else 12, seed=v) for v in range(2)]
    value, grads = jax.jit(jax.value_and_grad(lambda z: made.loss(bare_step([z, views[1]], own, views))[0]))(views[0])
    assert value > 0 and finite((value, grads))


@pytest.mark.parametrize(("warm", "expected"), [(0, [0.07]), (1, [0.04, 0.07]), (3, [0.04, 0.055, 0.07, 0.07])])
def test_the_teachers_temperature_rises_by_epoch(warm, expected):
    """np.linspace(0.04, 0.07, warm), then 0.07."""
    options = config_of("dino", **{"dino.warm_epochs": warm}).dino
    found = [float(dino.teacher_temperature(options, jnp.int32(e))) for e in range(len(expected))]
    assert found == pytest.approx(expected)


def test_after_sets_the_temperature_of_the_next_step():
    made = algorithm("dino", **{"dino.warm_epochs": 3})
    own = made.state(jax.random.key(0))
    assert float(own["temperature"]) == pytest.approx(0.04)
    found = []
    for done in range(5):
        _, own = made.after({}, own, progress(done))
        found.append(float(own["temperature"]))
    assert found == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07])


def test_the_last_layer_is_held():
    assert algorithm("dino", **{"dino.hold_epochs": 1.5}).held == (("prototypes/.*", 1.5),)
    assert algorithm("dino", **{"dino.hold_epochs": 0.0}).held == ()
    assert algorithm("swav", **{"swav.hold_epochs": 2.5}).held == (("prototypes/.*", 2.5),)
    assert algorithm("swav", **{"swav.hold_epochs": 0.0}).held == ()


def test_dinos_head_begins_as_torch_does():
    """A normal of 0.02; JAX's truncated normal of 0.02 has a deviation of 0.0176."""
    module, width = algorithm("dino", **{"joint.hidden": 200}).heads["projector"]
    kernel = module.init(jax.random.key(3), jnp.zeros((2, width)), train=False)["params"]["layer1"]["kernel"]
    assert kernel.shape == (200, 200)
    assert jnp.std(kernel) == pytest.approx(0.02, rel=0.01)


def test_dinos_options_reach_its_heads():
    heads = algorithm("dino").heads
    assert not heads["prototypes"][0].lengths and not heads["projector"][0].norm
    heads = algorithm("dino", **{"dino.norm_last_layer": False, "dino.batch_norm": True}).heads
    assert heads["prototypes"][0].lengths and heads["projector"][0].norm


# -- SwAV


def test_sinkhorn_is_the_papers_algorithm():
    """In float64, with exponentials and totals as there; rows have the sum 1, prototypes almost equal shares."""
    scores = np.asarray(random(12, 5)) * 0.3
    Q = np.exp(np.float64(scores) / 0.2).T
    Q /= Q.sum()
    for _ in range(3):
        Q /= Q.sum(1, keepdims=True) * 5
        Q /= Q.sum(0, keepdims=True) * 12
    found = swav.sinkhorn(jnp.asarray(scores), 0.2, 3)
    np.testing.assert_allclose(found, 12 * Q.T, rtol=1e-4)
    np.testing.assert_allclose(swav.sinkhorn(jnp.asarray(scores), 0.2, 200).sum(0), 12 / 5, rtol=1e-4)


def test_sinkhorn_of_equal_rows_is_uniform():
    np.testing.assert_allclose(swav.sinkhorn(jnp.tile(random(1, 5), (7, 1)), 0.05, 3), 1 / 5, rtol=1e-5)


@pytest.mark.parametrize("size", [5.0, 1e4])
def test_sinkhorn_does_not_overflow(size):
    """exp(5 / 0.05) is too large for float32; 200,000 for any type."""
    found = swav.sinkhorn(size * random(12, 5), 0.05, 3)
    assert finite(found) and np.allclose(found.sum(1), 1, atol=1e-4)


@pytest.mark.parametrize(("start", "enters"), [(0.0, [False, True, True]), (2.0, [False, False, True])])
def test_the_queue_holds_the_newest_rows_first_and_enters_at_its_epoch(start, enters):
    """But not before two batches have filled it."""
    made = algorithm("swav", **{"swav.queue_from": start})
    own = made.state(jax.random.key(0))
    assert (own["queue"] == 0).all() and own["queue"].shape == (2, 32, 12) and not own["queue_enters"]
    batches = [[random(16, 12, seed=2 * t + v) for v in range(2)] for t in range(3)]
    entered = []
    for done, features in enumerate(batches):
        _, own, _ = made.loss(bare_step(features, own))
        _, own = made.after({}, own, progress(done + 2))
        entered.append(bool(own["queue_enters"]))
    for v in range(2):
        expected = np.concatenate([joint.unit(batches[t][v]) for t in (2, 1)])
        np.testing.assert_allclose(own["queue"][v], expected, rtol=1e-6)
    assert entered == enters  # two passes end with the fifth update


def test_rows_of_the_queue_share_the_prototypes_once_they_enter():
    """By hand: the assignments of the batch among batch and queue."""
    made = algorithm("swav", **{"joint.temperature": 0.5, "swav.epsilon": 0.3})
    features = [joint.unit(random(16, 12, seed=v)) for v in range(2)]
    queue = joint.unit(random(2, 32, 12, seed=7))
    log = [jax.nn.log_softmax(z / 0.5) for z in features]
    for enters in (False, True):
        rows = [jnp.concatenate([z, q]) if enters else z for z, q in zip(features, queue, strict=True)]
        q = [swav.sinkhorn(x, 0.3, 3)[:16] for x in rows]
        expected = -(jnp.sum(q[0] * log[1]) + jnp.sum(q[1] * log[0])) / 32
        own = {"queue": queue, "queue_enters": jnp.asarray(enters)}
        assert float(made.loss(bare_step(features, own))[0]) == pytest.approx(float(expected), rel=1e-5)


def test_assignments_have_no_gradient():
    """The gradient of view 0 is that of its prediction alone: with targets as numbers it is the same."""
    made = algorithm("swav", **{"swav.queue": 0})
    z, y = joint.unit(random(16, 12)), joint.unit(random(16, 12, seed=1))
    targets = [swav.sinkhorn(x, 0.05, 3) for x in (z, y)]

    def fixed(z):
        log = [jax.nn.log_softmax(joint.unit(x) / 0.2) for x in (z, y)]
        return -(jnp.sum(targets[0] * log[1]) + jnp.sum(targets[1] * log[0])) / 32

    found = jax.grad(lambda z: made.loss(bare_step([z, y]))[0])(z)
    np.testing.assert_allclose(found, jax.grad(fixed)(z), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["weight", "after"])
def test_prototypes_have_length_one_by_weight_norm_or_after_each_step(how):
    made = algorithm("swav", **{"swav.prototype_norm": how})
    net, z = made.heads["prototypes"][0], random(6, 12)
    tree = net.init(jax.random.key(0), z, False)["params"]
    np.testing.assert_allclose(
        net.apply({"params": tree}, z, False), z @ (tree["kernel"] / np.linalg.norm(tree["kernel"], axis=0)), rtol=1e-4
    )
    longer = {"prototypes": {"kernel": 3 * tree["kernel"]}, "projector": {}}
    params, _ = made.after(longer, made.state(jax.random.key(0)), progress(0))
    lengths = np.linalg.norm(params["prototypes"]["kernel"], axis=0)
    expected = 1.0 if how == "after" else 3 * np.linalg.norm(tree["kernel"], axis=0)
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)


def test_swavs_queue_must_hold_whole_batches():
    with pytest.raises(ConfigError, match=r"config\.swav\.queue=40: must be a multiple of config\.batch_size=16"):
        config_of("swav", **{"swav.queue": 40})


# -- DeepCluster v2


def deep(images: int = 40, **changes):
    made = algorithm("deepclusterv2", images, **changes)
    return made, made.state(jax.random.key(3))


def test_the_first_epoch_only_fills_the_memory():
    """Its loss is 0, without a gradient; rows lie by image."""
    made, own = deep()
    views, index = [random(16, 12, seed=v) for v in range(2)], np.arange(16, dtype=np.int32) * 2 + 3
    loss = lambda z: made.loss(bare_step([z, views[1]], own, index=index))  # noqa: E731
    value, grads = jax.value_and_grad(lambda z: loss(z)[0])(views[0])
    assert float(value) == 0 and (grads == 0).all()
    memory = loss(views[0])[1]["memory"]
    np.testing.assert_allclose(memory[:, index], np.stack([joint.unit(z) for z in views]), rtol=1e-6)
    assert (np.delete(np.asarray(memory), index, axis=1) == 0).all()


def test_an_image_twice_in_a_batch_is_written_once_whatever_the_order():
    keys = jax.random.split(jax.random.key(0), 6)
    index = jnp.array([4, 7, 4, 1, 7, 4])
    written = deepclusterv2.latest(index, keys)
    assert sorted(np.asarray(index)[np.asarray(written)]) == [1, 4, 7]
    back = deepclusterv2.latest(index[::-1], keys[::-1])
    np.testing.assert_array_equal(back[::-1], written)


def lloyd(rows, centres, rounds):
    """Spherical k-means in float64."""
    for _ in range(rounds):
        near = np.argmax(rows @ centres.T, 1)
        for k in set(near):
            centres[k] = rows[near == k].sum(0)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return np.argmax(rows @ centres.T, 1), centres


@pytest.mark.parametrize("piece", [2**24, 6 * 7])
def test_k_means_is_lloyds_whatever_the_pieces(piece, monkeypatch):
    """23 rows at once, or in pieces of 7: the last piece is not full."""
    monkeypatch.setattr(deepclusterv2, "PIECE", piece)
    rows = joint.unit(random(23, 4))
    start = rows[jnp.array([3, 8, 11, 2, 19, 6])]
    expected, centres = lloyd(np.asarray(rows, np.float64), np.asarray(start, np.float64), 4)
    found, moved = deepclusterv2.k_means(rows, jnp.ones(23, bool), start, 4)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(moved, centres, atol=1e-5)


def test_k_means_keeps_empty_centres_and_leaves_out_rows_that_are_not_filled():
    rows = jnp.concatenate([jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (4, 1)), jnp.zeros((3, 3))])
    start = jnp.array([[0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    found, centres = deepclusterv2.k_means(rows, jnp.arange(7) < 4, start, 3)
    assert found.tolist() == [0, 0, 0, 0, -1, -1, -1]
    np.testing.assert_allclose(centres, [[1, 0, 0], [0, 0, 1]], atol=1e-6)


def test_k_means_starts_at_different_filled_rows_and_its_key_moves_on():
    _, own = deep()
    filled = jnp.arange(40) % 4 == 0
    key, rows = deepclusterv2.starts(own, filled)
    assert [len(r) for r in rows] == [5, 4]
    for r in rows:
        assert len(set(r.tolist())) == len(r) and all(i % 4 == 0 for i in r.tolist())
    assert rows[0].tolist()[:4] != rows[1].tolist()
    _, later = deepclusterv2.starts({**own, "cluster_key": key}, filled)
    assert later[0].tolist() != rows[0].tolist()


def test_a_clustering_follows_the_last_update_of_an_epoch():
    """Head h clusters the memory of view h mod 2; between two ends of epochs nothing changes."""
    made, own = deep()
    after = jax.jit(lambda own, done: made.after({}, own, Progress(done, 20, PER_EPOCH))[1])
    own["memory"] = joint.unit(random(2, 40, 12)).at[:, 5].set(0)
    states = []
    for done in range(5):
        own = after(own, jnp.int32(done))
        states.append(jax.device_get(own))
    assert (states[1]["assignments"] == -1).all()
    first, third = states[2], states[4]
    for h in range(2):
        rows = np.asarray(own["memory"][h])
        expected = np.where(np.arange(40) == 5, -1, np.argmax(rows @ first["centres"][str(h)].T, 1))
        np.testing.assert_array_equal(first["assignments"][h], expected)
    np.testing.assert_array_equal(states[3]["assignments"], first["assignments"])
    assert (third["cluster_key"] != first["cluster_key"]).any()
    assert (third["assignments"] != first["assignments"]).any()


def test_an_undone_update_at_the_end_of_an_epoch_only_delays_its_clustering():
    """config.nonfinite.skip leaves everything but the number of steps as it was."""
    made, own = deep()
    after = jax.jit(lambda own, done: made.after({}, own, Progress(done, 20, PER_EPOCH))[1])
    own["memory"] = joint.unit(random(2, 40, 12))
    turns = []
    for done in (0, 1, 3, 4, 5):  # that of number 2 would have clustered
        before, own = own, after(own, jnp.int32(done))
        turns.append(bool((before["assignments"] != own["assignments"]).any()))
    assert turns == [False, False, True, True, False]


def test_the_loss_is_the_cross_entropy_of_the_images_that_have_a_cluster():
    """By hand, over both views, a mean over heads."""
    made, own = deep(**{"joint.temperature": 0.5})
    centres = {"0": joint.unit(random(5, 12, seed=8)), "1": joint.unit(random(4, 12, seed=9))}
    assignments = jnp.stack([jnp.arange(40) % 5, jnp.where(jnp.arange(40) < 6, -1, jnp.arange(40) % 4)])
    own = {**own, "centres": centres, "assignments": assignments}
    views = [random(16, 12, seed=v) for v in range(2)]
    value, _, _ = made.loss(bare_step(views, own))
    heads = []
    for h in range(2):
        terms = []
        for z in views:
            scores = np.float64(joint.unit(z) @ centres[str(h)].T) / 0.5
            log = scores - np.log(np.exp(scores).sum(1, keepdims=True))
            terms += [-log[i, k] for i, k in enumerate(np.asarray(assignments)[h, :16]) if k >= 0]
        heads.append(np.mean(terms))
    assert float(value) == pytest.approx(np.mean(heads), rel=1e-5)


def test_more_clusters_than_images_are_refused():
    with pytest.raises(ConfigError, match=r"prototypes=\(41, 5\): must not exceed the number of training images, 40"):
        algorithm("deepclusterv2", 40, **{"deepclusterv2.prototypes": (41, 5)})
