"""What every entry of METHODS keeps to, so that the step, checkpoints and `init_from` can rely on it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.methods import METHODS
from crate_jax.methods.method import Progress
from crate_jax.parallel.parameters import names
from tests.methods.test_segment import write

pytestmark = pytest.mark.one_python

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), np.uint8),
    "label": np.arange(6, dtype=np.int32) % 5,
    "mask": np.random.default_rng(1).integers(0, 2, (6, 8, 12), np.int16),
    "index": np.arange(6, dtype=np.int32),
    "views": np.random.default_rng(2).integers(0, 256, (6, 2, 8, 12, 3), np.uint8),
}
OWN = {  # keys without which so small a run would not fit
    "wmse": {"wmse.slice": 6},
    "all4one": {"joint.out": 16},
    "deepclusterv2": {"deepclusterv2.prototypes": (5, 4)},
}
JOB_OF_METHOD = {"classify": "finetune", "segment": "segment"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of images with masks of two classes."""
    folder = tmp_path_factory.mktemp("pairs")
    mask = np.tile(np.array([[0, 1]], np.uint8), (8, 6))
    for split in ("train", "test"):
        write(folder / split, BATCH["image"][0], mask, "a")
    return folder


@pytest.fixture(scope="module", params=METHODS)
def method(request, pairs):
    """A method of the table, built for a tiny config."""
    c = configs.base()
    c.job, c.steps, c.batch_size = JOB_OF_METHOD.get(request.param, "pretrain"), 4, 6
    if c.job == "pretrain":
        c.method = request.param
    c.data.source = f"folder:{pairs}" if request.param == "segment" else "digits"
    c.data.image_size = (8, 12)
    c.encoder.update(dict(patch_size=4, width=16, depth=2, heads=2))
    c.decoder.update(dict(depth=1, heads=2))
    c.joint.update(dict(hidden=8, out=4, predictor_hidden=8, queue=12))
    c.update_from_flattened_dict(OWN.get(request.param, {}))
    configs.validate(c)
    return METHODS[request.param].build(c, data.open_split(c, "train"))


def marked(params):
    """Parameters that no random draw gives."""
    return jax.tree.map(lambda x: jnp.full_like(x, 0.25), params)


@pytest.fixture(scope="module")
def initial(method):
    """What `init` returns, in one program: op by op it takes three times as long."""
    return jax.jit(lambda: method.init(jax.random.key(3), marked))()


def test_init_begins_with_what_start_returns(initial):
    """Else a run that starts from another one would train random weights, and its targets would be random."""
    params, carried = initial
    assert all((np.asarray(x) == 0.25).all() for x in jax.tree.leaves(params))
    ours = names(params)
    for entry in carried.values():
        for name, x in names(entry).items() if isinstance(entry, dict) else ():
            assert name not in ours or (np.asarray(x) == 0.25).all(), f"carried {name} is not copied from start's"


def test_what_is_carried_keeps_its_arrays(method, initial):
    """Names, shapes and types, through the loss and `after`: they are what a checkpoint and the compiled step have.

    A weak type that only the later steps have would compile the step a second time.
    """
    params, carried = initial
    inputs = {name: BATCH[name] for name in method.inputs}
    keys = jax.random.split(jax.random.key(4), 6)
    value, (new, scalars) = jax.eval_shape(method.loss, params, carried, inputs, keys)
    assert value.shape == () and value.dtype == jnp.float32
    assert all(x.shape == () for x in scalars.values())
    moved = jax.eval_shape(lambda p, c: method.after(p, c, Progress(jnp.int32(0), 4, 2.0)), params, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, (params, carried))
    assert not any(x.weak_type for x in jax.tree.leaves(moved))
    assert all(x is carried[name] for name, x in method.averaged(carried).items())


def test_judged_selects_and_holds_an_encoder(method, initial):
    """Checkpoints record where each of its arrays lies."""
    params, carried = initial
    judged = method.judged(params, carried)
    known = {id(x) for x in jax.tree.leaves((params, carried))}
    assert "encoder" in judged and all(id(x) in known for x in jax.tree.leaves(judged))
    jax.eval_shape(method.features, judged, BATCH["image"])
