"""Methods that compare images: their losses by hand, their queues, and the edges where such losses break."""

from __future__ import annotations

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crate_jax.methods as methods
from crate_jax import config as configs
from crate_jax.errors import ConfigError
from crate_jax.methods import contrast, joint
from crate_jax.models import batch_norm, representation
from crate_jax.models.batch_norm import BatchNorm
from crate_jax.models.resnet import draw_groups
from crate_jax.training.groups import FOREVER, groups
from tests.parity_joint import Source

pytestmark = pytest.mark.one_python

B, P, ROWS = 5, 7, 15
COMPARING = ("simclr", "supcon", "mocov2plus", "mocov3", "nnclr")  # by joint.temperature
QUEUED = ("mocov2plus", "nnclr", "nnbyol", "nnsiam", "ressl")
OURS = (*COMPARING, "nnbyol", "nnsiam", "simsiam", "ressl")


def config_of(name: str, **changes):
    """A run of a method whose projections have P numbers."""
    c = configs.base()
    c.method, c.batch_size, c.steps = name, B, 6
    c.joint.update(dict(hidden=6, out=P, predictor_hidden=4, queue=ROWS, temperature=0.3))
    c.update_from_flattened_dict(changes)
    configs.validate(c)
    return c


def algorithm(c, width: int = P) -> joint.Algorithm:
    return getattr(methods, c.method).algorithm(c, width, Source(40))


# Heads that let projections through and predict by a fixed matrix, so that losses are functions of projections.
MATRIX = jnp.asarray(np.random.default_rng(5).normal(size=(P, P)), jnp.float32)
HEADS = {
    "projector": lambda tree, x, keys: (x, tree),
    "predictor": lambda tree, x, keys: (jnp.matmul(x, MATRIX, precision="highest"), tree),
}


def loss_of(c, projected, slow, own, label=None, index=None):
    """What a method's loss returns for projections of student and target of two views, each (B, P)."""
    step = joint.Step(
        joint.Networks(HEADS, dict.fromkeys(HEADS), False),
        joint.Networks(HEADS, dict.fromkeys(HEADS), False),
        list(projected),
        list(slow),
        jnp.arange(B) if label is None else jnp.asarray(label),
        jnp.arange(B) if index is None else jnp.asarray(index),
        own,
        jax.random.split(jax.random.key(3), B),
    )
    return algorithm(c).loss(step)


def vectors(seed: int, count: int = 2, rows: int = B) -> list[jax.Array]:
    return list(jnp.asarray(np.random.default_rng(seed).normal(size=(count, rows, P)), jnp.float32))


def start(c):
    return algorithm(c).state(jax.random.key(2))


def u(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def nce(a, b, T=0.3):
    return -np.diag(log_softmax(u(a) @ u(b).T / T)).mean()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_are_finite_where_vectors_are_zero_or_all_the_same(name, value):
    """At a temperature of 0.01; exp(1 / 0.01) is above float32's largest number."""
    changes = {"joint.temperature": 0.01}
    if name == "ressl":
        changes = {"ressl.student_temperature": 0.01, "ressl.target_temperature": 0.005}
    c = config_of(name, **changes)
    same = [jnp.full((B, P), value)] * 2
    found, grads = jax.value_and_grad(lambda z: loss_of(c, z, same, start(c))[0])(same)
    assert math.isfinite(found) and all(jnp.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", [name for name in OURS if name != "simsiam"])
def test_no_accelerator_rounds_similarities(name):
    """Every product of a loss asks for float32; GPUs and TPUs would take fewer bits."""
    c = config_of(name)
    text = str(jax.make_jaxpr(lambda z: loss_of(c, z, z, start(c)))(vectors(1)))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_positives_are_the_rows_of_equal_index():
    """SimCLR with two equal images in a batch: their four rows are positives of each other, inside the logarithm."""
    z, index = vectors(1), np.array([4, 0, 4, 2, 1])
    rows, ids = u(np.concatenate(z)), np.tile(index, 2)
    losses = []
    for i in range(2 * B):
        e = [0.0 if a == i else math.exp(rows[i] @ rows[a] / 0.3) for a in range(2 * B)]
        losses.append(-math.log(sum(x for x, k in zip(e, ids, strict=True) if k == ids[i]) / sum(e)))
    value = loss_of(config_of("simclr"), z, [], {}, index=index)[0]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_supcon_takes_all_views_of_a_class(how):
    """By hand, with the sum over positives inside the logarithm or their mean outside of it."""
    z, label, index = vectors(2), np.array([3, 5, 3, 7, 0]), np.array([9, 3, 0, 7, 1])
    rows, ids = u(np.concatenate(z)), np.tile(label, 2)
    losses = []
    for i in range(2 * B):
        logits = rows @ rows[i] / 0.3
        others = [a for a in range(2 * B) if a != i]
        positive = [a for a in others if ids[a] == ids[i]]
        total = math.log(sum(math.exp(logits[a]) for a in others))
        if how == "sum":
            losses.append(total - math.log(sum(math.exp(logits[a]) for a in positive)))
        else:
            losses.append(total - np.mean([logits[a] for a in positive]))
    value = loss_of(config_of("supcon", **{"supcon.positives": how}), z, [], {}, label, index)[0]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)


def test_each_query_of_moco_meets_the_queue_of_its_keys_view():
    """Both terms by hand with queues that differ; then each view's keys are in its own queue."""
    c = config_of("mocov2plus")
    z, k, own = vectors(3), vectors(4), start(c)
    assert own["queue"].shape == (2, ROWS, P) and np.linalg.norm(own["queue"], axis=-1) == pytest.approx(1, abs=1e-5)
    queue = np.asarray(own["queue"], np.float64)

    def term(query, key, Q):
        logits = np.concatenate([(u(query) * u(key)).sum(1, keepdims=True), u(query) @ Q.T], 1) / 0.3
        return -log_softmax(logits)[:, 0].mean()

    value, new, _ = loss_of(c, z, k, own)
    assert float(value) == pytest.approx((term(z[0], k[1], queue[1]) + term(z[1], k[0], queue[0])) / 2, rel=1e-5)
    np.testing.assert_allclose(new["queue"][:, :B], np.stack([u(k[0]), u(k[1])]), atol=1e-6)

    c = config_of("mocov2plus", **{"mocov2plus.symmetric": False})
    one = {"queue": own["queue"][:1], "queue_place": own["queue_place"]}
    assert start(c)["queue"].shape == (1, ROWS, P)
    value, new, _ = loss_of(c, z, k, one)
    assert float(value) == pytest.approx(term(z[0], k[1], queue[0]), rel=1e-5)
    np.testing.assert_allclose(new["queue"][0, :B], u(k[1]), atol=1e-6)


def test_moco_v3_has_the_factor_of_its_algorithm_or_none():
    z, k = vectors(5), vectors(6)
    p = [x @ MATRIX for x in z]
    plain = nce(p[0], k[1]) + nce(p[1], k[0])
    for scale, factor in (("2t", 0.6), ("1", 1.0)):
        value = loss_of(config_of("mocov3", **{"mocov3.scale": scale}), z, k, {})[0]
        assert float(value) == pytest.approx(factor * plain, rel=1e-5)


def test_moco_v3_has_one_layer_more_after_a_vit():
    """Also after any other encoder of patches; the heads can be chosen."""
    small = {"encoder.stem": "cifar", "encoder.name": "resnet18", "evaluation.pool": "mean"}
    for changes, deep in (
        ({"encoder.name": "vit"}, True),
        ({"encoder.name": "crate"}, True),
        (small, False),
        ({**small, "mocov3.heads": "vit"}, True),
        ({"mocov3.heads": "resnet"}, False),
    ):
        heads = algorithm(config_of("mocov3", **changes), 9).heads
        projector, predictor = heads["projector"][0], heads["predictor"][0]
        assert projector.widths == ((6, 6, P) if deep else (6, P)) and projector.last == "plain"
        assert predictor.widths == (4, P) and predictor.last == ("plain" if deep else "none")
        assert not projector.bias and not predictor.bias


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mocov3", {"mocov3.freeze_patch_embedding": True}, "encoder/embedding/patch_embed/(kernel|bias)"),
        ("mocov3", {}, "nothing"),
        ("simsiam", {}, "projector/layer2/bias"),
        ("nnsiam", {}, "projector/layer2/bias"),
    ],
)
def test_what_is_held_for_ever(name, changes, expected):
    """MoCo v3's random patch embedding if asked, and the bias before the last batch norm of SimSiam's projector."""
    c = config_of(
        name, **changes, **{"encoder.name": "vit", "encoder.width": 8, "encoder.heads": 2, "encoder.depth": 1}
    )
    found = algorithm(c, 9)

    def init():
        heads = {
            k: net.init(jax.random.key(0), jnp.zeros((2, n)), True)["params"] for k, (net, n) in found.heads.items()
        }
        return {**representation.init_params(c, jax.random.key(0)), **heads}

    of = groups(c, batch_norm.split(jax.eval_shape(init))[0], 2.5, found.held)
    still = {weight for weight, group in of.items() if group.still}
    assert still == {weight for weight in of if re.fullmatch(expected, weight)}
    assert all(of[weight].still == FOREVER for weight in still)


def test_a_frozen_patch_embedding_and_a_resnet_do_not_go_together():
    changes = {"encoder.name": "resnet18", "evaluation.pool": "mean", "mocov3.freeze_patch_embedding": True}
    with pytest.raises(
        ConfigError, match=r"config\.mocov3\.freeze_patch_embedding=True: must be False, since.*resnet18"
    ):
        config_of("mocov3", **changes)


@pytest.mark.parametrize("both", [False, True])
def test_nnclr_tells_each_neighbours_prediction_and_the_reverse_if_asked(both):
    c = config_of("nnclr", **{"nnclr.both_axes": both})
    z, own = vectors(7), start(c)
    p, Q = [x @ MATRIX for x in z], np.asarray(own["queue"])
    near = [Q[(u(x) @ Q.T).argmax(1)] for x in z]
    terms = [nce(near[0], p[1]), nce(near[1], p[0])]
    if both:
        terms += [nce(p[1], near[0]), nce(p[0], near[1])]
    assert float(loss_of(c, z, [], own)[0]) == pytest.approx(np.mean(terms), rel=1e-5)


def test_ressl_compares_the_strong_view_with_the_targets_weak_view():
    c = config_of("ressl", **{"ressl.student_temperature": 0.5, "ressl.target_temperature": 0.2})
    z, k, own = vectors(8), vectors(9), start(c)
    Q = np.asarray(own["queue"], np.float64)
    relation, logs = np.exp(log_softmax(u(k[1]) @ Q.T / 0.2)), log_softmax(u(z[0]) @ Q.T / 0.5)
    value, new, _ = loss_of(c, z, k, own)
    assert float(value) == pytest.approx(-(relation * logs).sum(1).mean(), rel=1e-5)
    np.testing.assert_allclose(new["queue"][:B], u(k[1]), atol=1e-6)


def test_ressls_target_must_be_the_sharper_one():
    with pytest.raises(ConfigError, match=r"config\.ressl\.target_temperature=0\.1: must be below .*temperature=0\.1$"):
        config_of("ressl", **{"ressl.target_temperature": 0.1})


@pytest.mark.parametrize("name", QUEUED)
def test_a_full_queue_begins_anew_at_its_first_rows(name):
    """Four batches into a queue of three: the fourth lies where the first lay."""
    c = config_of(name)
    own, batches = start(c), [vectors(20 + i) for i in range(4)]
    for i, slow in enumerate(batches):
        _, own, _ = loss_of(c, slow, slow, own, label=[10 * i + j for j in range(B)])
    assert own["queue_place"] == B
    view = 1 if name == "ressl" else 0
    queue = own["queue"][0] if name == "mocov2plus" else own["queue"]
    np.testing.assert_allclose(queue, u(jnp.concatenate([batches[i][view] for i in (3, 1, 2)])), atol=1e-6)
    if "queue_label" in own:
        assert own["queue_label"].tolist() == [10 * i + j for i in (3, 1, 2) for j in range(B)]


@pytest.mark.parametrize("name", [name for name in QUEUED if name.startswith("nn")])
def test_neighbours_are_older_than_the_batch(name):
    """The first batch finds random rows without a class; the same batch, a step later, finds itself."""
    c = config_of(name)
    z, own = vectors(11), start(c)
    assert (own["queue_label"] == -1).all() and np.linalg.norm(own["queue"], axis=1) == pytest.approx(1, abs=1e-5)
    label = [2, -1, 0, 1, -1]
    _, own, scalars = loss_of(c, z, z, own, label)
    assert scalars["nn_acc"] == 0
    _, own, scalars = loss_of(c, z, z, own, label)
    assert scalars["nn_acc"] == 1  # of the three that have a class
    _, _, scalars = loss_of(c, z, z, own, [2, -1, 1, 1, -1])
    assert scalars["nn_acc"] == pytest.approx(2 / 3)
    assert loss_of(c, z, z, own, [-1] * B)[2]["nn_acc"] == 0


@pytest.mark.parametrize("name", QUEUED)
@pytest.mark.parametrize("rows", [0, 12])
def test_a_queue_holds_whole_batches(name, rows):
    with pytest.raises(
        ConfigError, match=rf"^config\.joint\.queue={rows}: must be above 0 and a multiple of config\.batch_size=5, "
    ):
        algorithm(config_of(name, **{"joint.queue": rows}))


def test_no_image_is_its_own_positive():
    """A row whose own view lies opposite, and another image's near: a loss far above 0."""
    z = jnp.eye(4)[jnp.array([0, 1, 1, 0])]
    assert float(contrast.nt_xent(z, jnp.array([0, 1, 0, 1]), 0.1)) > 9


class Grouped(nn.Module):
    """Linear, then batch norm in random groups."""

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, keys_B: jax.Array) -> jax.Array:
        x = nn.Dense(3)(images_BHWC.reshape(len(images_BHWC), -1))
        return BatchNorm()(x, True, draw_groups(keys_B, 4))


def test_each_network_and_view_draws_its_own_groups():
    """MoCo's guard: the images that share statistics with an image are others in its query than in its key."""
    net = Grouped()
    keys = jax.random.split(jax.random.key(0), 16)
    encoder = joint.Encoder(
        lambda key: net.init(key, jnp.zeros((16, 2, 2, 3)), keys)["params"],
        lambda tree, images, keys: batch_norm.train(net, tree, images, keys),
        3,
    )
    c = config_of("mocov2plus")
    passes = joint.Algorithm(
        {"projector": algorithm(c, 3).heads["projector"]},
        lambda step: (jnp.zeros(()), {}, {"passes": jnp.stack(step.features + step.target_features)}),
        target=("encoder",),
    )
    method = joint.assemble(c, passes, encoder, lambda batch, keys: batch["views"], None)
    params, carried = method.init(jax.random.key(1), lambda drawn: drawn)
    images = jax.random.normal(jax.random.key(2), (16, 2, 2, 3))

    def features(images):
        batch = {"views": [images, images], "label": jnp.zeros(16, int), "index": jnp.arange(16)}
        return method.loss(params, carried, batch, keys)[1][1]["passes"]

    changed = jnp.abs(features(images) - features(images.at[6].add(1.0))).max(-1) > 1e-6
    assert changed.shape == (4, 16) and (changed.sum(1) == 4).all() and changed[:, 6].all()
    assert len({tuple(row) for row in changed.tolist()}) == 4
