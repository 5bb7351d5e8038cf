"""Where things lie on a mesh: losses do not depend on it, memory does."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.errors import ConfigError
from crate_jax.methods import joint, reconstruction
from crate_jax.models import autoencoder
from crate_jax.parallel import parameters, sharding, target
from crate_jax.training import step as train_step
from tests.models import drawn_on
from tests.training.test_loop import images, small

MESHES = {"fully sharded": (1, 8), "hybrid": (2, 4)}  # (data, model)


def train_on(encoder: str, data: int, model: int):
    """Losses of two steps, the last state and the compiled step; srip keeps vectors in the state."""
    c = small(encoder, *(("mask", "srip") if encoder == "crate" else ("rop", "none")))
    c.decoder.name = "linear"
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[: data * model], data, model)
    method = reconstruction.build(c)
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    state = train_step.make_init(c, method, recipe, mesh, drawn_on(c, method, recipe, mesh))()
    batches = [sharding.put_batch({"image": images(i, c.batch_size)}, mesh) for i in range(2)]
    step = train_step.make_train_step(c, method, recipe, mesh).lower(state, batches[0]).compile()
    losses = []
    for batch in batches:
        state, scalars = step(state, batch)
        losses.append(jax.device_get(scalars))
    return losses, state, step


alone = functools.cache(lambda encoder: train_on(encoder, 1, 1)[0])


@pytest.mark.parametrize(
    ("encoder", "mesh"),
    [
        ("crate", "hybrid"),
        pytest.param("vit", "fully sharded", marks=pytest.mark.slow),
        pytest.param("crate", "fully sharded", marks=pytest.mark.slow),
        pytest.param("vit", "hybrid", marks=pytest.mark.slow),
    ],
)
def test_sharded_parameters_give_the_losses_of_one_device(encoder, mesh, monkeypatch):
    """To 1e-6, penalty and drop path included; and each device holds its part of every kernel alone."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    data, model = MESHES[mesh]
    losses, state, step = train_on(encoder, data, model)
    for a, b in zip(losses, alone(encoder), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    for tree, parts in ((state.params, model), (state.opt_state, 8)):
        kernels = [x for name, x in parameters.names(tree).items() if "kernel" in name]
        assert kernels
        for x in kernels:
            assert {shard.data.size for shard in x.addressable_shards} == {x.size // parts}
    # Weights move to the images' device, never images to the weights'.
    assert "all-to-all" not in step.as_text()


@pytest.mark.parametrize("name", ["crate_mae", "vit_mae", "rop_vitb"])
def test_memory_for_parameters_falls_with_the_devices(name):
    """Of the papers' models, at their real size: to 1 % of 1/n, and the optimiser's 1/n in every mesh."""
    c = importlib.import_module(f"configs.{name}").get_config("")
    shapes = jax.eval_shape(lambda: autoencoder.init_params(c, jax.random.key(0)))
    total = 4 * parameters.count(shapes)
    for model in (1, 2, 4, 8):
        mesh = sharding.make_mesh(8, 1, data=0, model=model)
        held = sharding.bytes_per_device(shapes, sharding.parameter_shardings(shapes, mesh))
        assert total / model <= held < 1.01 * total / model + 2e6
        updated = sharding.bytes_per_device(shapes, sharding.update_shardings(shapes, mesh))
        assert total / 8 <= updated < 1.01 * total / 8 + 2e6
        assert bool(sharding.layouts(shapes, mesh)) == (model > 1)


def test_an_update_is_split_along_its_layers_only_if_nothing_else_can_be():
    """Twelve layers on two or four devices: XLA for GPUs sent gradients three times where it split the layers."""

    def place(mesh: jax.sharding.Mesh, *shape: int, name: str = "0/mu/encoder/blocks/dictionary/kernel") -> tuple:
        return tuple(sharding.update_shardings({name: jax.ShapeDtypeStruct(shape, np.float32)}, mesh)[name].spec)

    four = sharding.make_mesh(8, 1, jax.devices()[:4])
    assert place(four, 12, 770, 768) == (None, None, ("data", "model"))
    assert place(four, 12, 770, 770) == (("data", "model"),)
    assert place(four, 768, 770, name="encoder/embedding/kernel") == (("data", "model"),)
    hybrid = sharding.make_mesh(8, 1, data=4, model=2)
    assert place(hybrid, 12, 772, 778) == (None, "data", "model")
    assert place(hybrid, 12, 770, 778) == ("data", None, "model")


def test_the_first_rule_that_matches_counts():
    mesh = sharding.make_mesh(8, 1, data=1, model=8)

    def place(name: str, *shape: int) -> tuple:
        return tuple(sharding.parameter_shardings({name: jax.ShapeDtypeStruct(shape, np.float32)}, mesh)[name].spec)

    assert place("encoder/blocks/mlp_in/kernel", 16, 768, 3072) == (None, None, "model")
    assert place("encoder/blocks/mlp_out/kernel", 16, 3072, 768) == (None, "model")
    assert place("0/mu/encoder/blocks/dictionary/kernel", 16, 768, 768) == (None, "model")
    assert place("decoder/head/kernel", 770, 768) == (None, "model")  # the larger side does not divide
    assert place("decoder/head/kernel", 770, 770) == ()
    assert place("decoder/head/kernel", 64, 64) == ()  # too small
    assert place("encoder/embedding/positions", 200, 768) == ()
    assert place("encoder/blocks/mlp_in/bias", 1600, 3072) == ()
    assert place("carried/queue", 2, 65536, 256) == place("carried/memory", 2, 50000, 128) == (None, "model")
    assert place("carried/queue_label", 65536) == place("carried/memory", 2, 50001, 129) == ()


@pytest.mark.parametrize("mesh", list(MESHES.values()))
def test_rows_are_pushed_into_a_split_queue_exactly(mesh, monkeypatch):
    """Two views' queues, written at a place that wraps around, and a memory, written by image number."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    mesh = sharding.make_mesh(16, 1, jax.devices(), *mesh)
    rng = np.random.default_rng(0)
    carried = {
        "queue": rng.normal(size=(2, 48, 6)).astype(np.float32),
        "memory": rng.normal(size=(2, 72, 6)).astype(np.float32),
        "queue_place": np.int32(0),
    }
    place = sharding.parameter_shardings({"carried": carried}, mesh)["carried"]
    by_batch = sharding.split(mesh)

    def step(carried, rows_B2P, index_B):
        rows_2BP = rows_B2P.swapaxes(0, 1)
        pushed = [
            joint.push(queue, carried["queue_place"], rows)
            for queue, rows in zip(carried["queue"], rows_2BP, strict=True)
        ]
        memory = carried["memory"].at[:, index_B].set(rows_2BP)
        return {"queue": jnp.stack([q for q, _ in pushed]), "memory": memory, "queue_place": pushed[0][1]}

    push = jax.jit(sharding.on_mesh(mesh, step), in_shardings=(place, by_batch, by_batch), out_shardings=place)
    now, expected = jax.device_put(carried, place), jax.tree.map(np.copy, carried)
    for t in range(5):  # three steps fill the queue
        rows_B2P, index_B = rng.normal(size=(16, 2, 6)).astype(np.float32), rng.permutation(72)[:16]
        now = push(now, jax.device_put(rows_B2P, by_batch), jax.device_put(index_B, by_batch))
        expected["queue"][:, 16 * (t % 3) : 16 * (t % 3) + 16] = rows_B2P.swapaxes(0, 1)
        expected["memory"][:, index_B] = rows_B2P.swapaxes(0, 1)
        np.testing.assert_array_equal(now["queue"], expected["queue"])
        np.testing.assert_array_equal(now["memory"], expected["memory"])
    parts = mesh.shape[sharding.MODEL]
    for name in ("queue", "memory"):
        assert {s.data.size for s in now[name].addressable_shards} == {carried[name].size // parts}


def devices(slices: int, each: int, per_process: int = 1) -> list:
    kind = {"platform": "cpu", "device_kind": "cpu"}
    return [
        SimpleNamespace(id=i, slice_index=i // each, process_index=i // per_process, **kind)
        for i in range(slices * each)
    ]


@pytest.mark.parametrize(("data", "model"), [(4, 2), (2, 4), (8, 1), (1, 8)])
def test_rows_of_the_mesh_stay_inside_a_slice_where_they_fit(data, model):
    array = sharding.arrange(devices(2, 4), data, model)
    assert array.shape == (data, model) and {d.id for d in array.flat} == set(range(8))
    for row in array:
        assert len({d.slice_index for d in row}) == max(1, model // 4)


def test_meshes_that_cannot_be_are_refused():
    for data, model in ((3, 0), (2, 2), (16, 1), (0, 16)):
        with pytest.raises(ConfigError, match=f"mesh.data={data}, config.mesh.model={model}: 8 devices do not form"):
            sharding.make_mesh(8, 1, data=data, model=model)


def test_a_key_goes_with_its_image_whatever_the_order_of_the_devices():
    """Processes fill the rows of their own devices in turn; on an interleaved mesh those are not in order."""
    mesh = SimpleNamespace(devices=np.array(devices(1, 4, per_process=2)).reshape(4, 1), size=4)
    assert sharding.row_order(mesh, 8) is None
    mesh.devices = mesh.devices[[0, 2, 1, 3]]
    np.testing.assert_array_equal(sharding.row_order(mesh, 8), [0, 1, 4, 5, 2, 3, 6, 7])
    mesh.devices = mesh.devices[[1, 3, 0, 2]]
    np.testing.assert_array_equal(sharding.row_order(mesh, 8), [4, 5, 6, 7, 0, 1, 2, 3])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("", {target.LEVEL: 1}), ("--xla_backend_optimization_level=2", {})],
    ids=["default", "chosen"],
)
def test_a_program_of_one_call_compiles_quickly_unless_the_user_chose(given, wanted, monkeypatch):
    """And XLA takes the options."""
    monkeypatch.setenv("XLA_FLAGS", given)
    options = target.options_of_one_call(sharding.make_mesh(8, 1))
    assert options == wanted
    assert jax.jit(lambda x: 0.9 * x, compiler_options=options)(7.0) == pytest.approx(6.3)


def test_the_first_parameters_are_drawn_by_a_program_of_one_call(monkeypatch):
    monkeypatch.setattr(target, "options_of_one_call", lambda mesh: {"xla_not_an_option": 1})
    c = small("vit", "mask", "none")
    method, mesh = reconstruction.build(c), sharding.make_mesh(8, 1)
    draw = train_step.make_draw(c, method, train_step.make_recipe(c, method, 10 * c.batch_size), mesh)
    with pytest.raises(Exception, match="xla_not_an_option"):
        draw()


def test_only_what_an_encoder_leaves_open_is_drawn(monkeypatch):
    """To the bit as a fresh run draws it, laid out as parameters are, by a program of one call."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    c = small("vit")
    c.seed = 3
    method, mesh = reconstruction.build(c), sharding.make_mesh(8, 1, data=4, model=2)
    draw = functools.partial(train_step.drawn_params, c, method)
    fresh, shapes = jax.device_get(jax.jit(draw)()), jax.eval_shape(draw)
    taken = {"encoder": jax.tree.map(lambda x: np.full(x.shape, 0.9, x.dtype), fresh["encoder"])}
    params = train_step.completed(c, method, method.adopt(shapes, taken, "test", (6, 4)), mesh)
    chex.assert_trees_all_equal(jax.device_get(params), {**fresh, **taken})
    place = sharding.parameter_shardings(params, mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == place
    assert any(not at.is_fully_replicated for at in jax.tree.leaves(place))
    monkeypatch.setattr(target, "options_of_one_call", lambda mesh: {"xla_not_an_option": 1})
    with pytest.raises(Exception, match="xla_not_an_option"):
        train_step.completed(c, method, shapes, mesh)


def test_the_step_is_compiled_with_the_options_of_its_platform(monkeypatch):
    monkeypatch.setattr(target, "compiler_options", lambda mesh: {"xla_not_an_option": 1})
    c = small("vit", "mask", "none")
    method, mesh = reconstruction.build(c), sharding.make_mesh(16, 1)
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    state = train_step.state_shapes(c, method, recipe, mesh)
    batch = {"image": jax.ShapeDtypeStruct((c.batch_size, *c.data.image_size, 3), np.uint8)}
    with pytest.raises(Exception, match="xla_not_an_option"):
        train_step.make_train_step(c, method, recipe, mesh).lower(state, batch).compile()
