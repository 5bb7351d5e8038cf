"""What a method carries from step to step: through the step, the averages, checkpoints and other runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.convert import pretrained
from crate_jax.errors import ConfigError
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.jobs import evaluate, train
from crate_jax.methods import METHODS, Row, reconstruction
from crate_jax.parallel import sharding
from crate_jax.parallel.parameters import names
from crate_jax.training import step as train_step
from crate_jax.workdir import checkpoint
from tests.training.test_loop import host, images, small

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]

TAU = 0.9


def with_target(config, source=None):
    """Reconstruction that carries a slow copy of its encoder, a mean of pixels, and what `after` saw."""
    method = reconstruction.build(config, source)

    def init(key, start):
        params, _ = method.init(key, start)
        seen = {"done": jnp.int32(-1), "total": jnp.int32(0), "per_epoch": jnp.float32(0)}
        return params, {"target": jax.tree.map(jnp.copy, params["encoder"]), "mean": jnp.float32(0), "seen": seen}

    def loss(params, carried, batch, keys_B):
        value, (_, scalars) = method.loss(params, {}, batch, keys_B)
        mean = 0.25 * carried["mean"] + jnp.mean(batch["image"].astype(jnp.float32))
        return value, ({**carried, "mean": mean}, scalars)

    def after(params, carried, progress):
        target = jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, carried["target"], params["encoder"])
        seen = {"done": progress.done, "total": jnp.int32(progress.total), "per_epoch": jnp.float32(progress.per_epoch)}
        return params, {**carried, "target": target, "seen": seen}

    def judged(params, carried):
        return {**params, "encoder": carried["target"]}

    return dataclasses.replace(method, init=init, loss=loss, after=after, judged=judged)


@pytest.fixture
def in_the_table(monkeypatch):
    """For runs whose states are looked at, not their scores."""
    monkeypatch.setattr(FrozenEvaluation, "final_scores", lambda *_: {"knn_top1": None})
    monkeypatch.setitem(METHODS, "reconstruction", Row(with_target, METHODS["reconstruction"].parts))


def run_steps(c, method, batches, devices: int = 1):
    """The states before and after each step, on the host."""
    mesh = sharding.make_mesh(c.batch_size, c.accumulate, jax.devices()[:devices])
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    step, state = train_step.make_train_step(c, method, recipe, mesh), train_step.make_init(c, method, recipe, mesh)()
    states = [host(state)]
    for batch in batches:
        state, _ = step(state, sharding.put_batch({"image": batch}, mesh))
        states.append(host(state))
    return states


def shared_config():
    c = small(decoder="linear")
    c.optimizer.ema, c.nonfinite.skip = 0.8, 1
    return c


def averaging(c):
    """The method with a target; of what it carries only the mean is averaged, and white images make its loss NaN."""
    method = with_target(c)

    def loss(params, carried, batch, keys_B):
        value, aux = method.loss(params, carried, batch, keys_B)
        return jnp.where(jnp.all(batch["image"] == 255), jnp.nan, value), aux

    return dataclasses.replace(method, loss=loss, averaged=lambda carried: {"mean": carried["mean"]})


@functools.cache
def states():
    """Those before and after two steps on one device, and after a third one that is not finite."""
    c = shared_config()
    white = np.full((c.batch_size, 12, 8, 3), 255, np.uint8)
    return run_steps(c, averaging(c), [images(0, c.batch_size), images(1, c.batch_size), white])


def test_after_is_given_the_new_parameters_once_per_update():
    first, second, third, _ = states()
    for before, now in ((first, second), (second, third)):
        expected = jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, before.carried["target"], now.params["encoder"])
        chex.assert_trees_all_close(now.carried["target"], expected, rtol=1e-6, atol=1e-7)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params["encoder"], now.params["encoder"])
        assert any(jax.tree.leaves(moved))  # the update reaches the state through `after`
    assert [s.carried["seen"]["done"] for s in (first, second, third)] == [-1, 0, 1]
    assert (third.carried["seen"]["total"], third.carried["seen"]["per_epoch"]) == (shared_config().steps, 10.0)


def test_carried_goes_through_the_micro_batches_in_order():
    """The mean is a recursion over micro-batches, of all devices; the update and `after` happen once."""
    c = small(decoder="linear")
    c.accumulate = 2
    state = run_steps(c, with_target(c), [images(0, c.batch_size)], devices=2)[-1]
    parts = images(0, c.batch_size).reshape(-1, 2, 12, 8, 3).swapaxes(0, 1)  # interleaved, as the step cuts it
    expected = 0.25 * parts[0].mean() + parts[1].mean()
    assert state.carried["mean"] == pytest.approx(expected, rel=1e-6)
    assert state.carried["mean"] != pytest.approx(0.25 * parts[1].mean() + parts[0].mean(), rel=1e-4)
    assert state.carried["seen"]["done"] == 0
    chex.assert_trees_all_close(state.carried["target"], states()[1].carried["target"], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_a_mean_over_images_refuses_micro_batches():
    c = small()
    c.accumulate = 2
    method = dataclasses.replace(reconstruction.build(c), mean_over_images=False)
    with pytest.raises(ConfigError, match="accumulate=2.*must be 1.*'reconstruction'.*not a mean over the images"):
        train_step.make_recipe(c, method, 160)
    c.accumulate = 1
    train_step.make_recipe(c, method, 160)


def test_only_what_is_declared_is_averaged():
    c, (_, second, *_) = shared_config(), states()
    assert set(second.ema_carried) == {"mean"}
    assert second.ema_carried["mean"] == pytest.approx(0.2 * second.carried["mean"], rel=1e-6)
    read = dataclasses.replace(averaging(c), judged=lambda params, carried: {**params, "mean": carried["mean"]})
    judged = second.judged(read)
    assert judged["mean"] is second.ema_carried["mean"] and judged["encoder"] is second.ema["encoder"]
    c.optimizer.ema = 0.0
    method = averaging(c)
    recipe = train_step.make_recipe(c, method, 160)
    assert jax.eval_shape(lambda: train_step.init_state(c, method, recipe)).ema_carried == {}


def test_a_step_that_is_not_finite_leaves_what_is_carried():
    *_, before, after = states()
    chex.assert_trees_all_equal(after.carried, before.carried)
    assert (before.step, after.step) == (2, 3)


def test_an_empty_carried_adds_nothing_to_a_checkpoint():
    c = small(penalty="srip")
    method = reconstruction.build(c)
    state = jax.eval_shape(lambda: train_step.init_state(c, method, train_step.make_recipe(c, method, 160)))
    assert {name.split("/")[0] for name in names(state.rest())} == {"step", "opt_state", "penalty"}


def tiny(**changes):
    c = small(penalty="srip", decoder="linear")
    c.data.source, c.steps, c.save.every, c.log.every, c.log.pictures = "synthetic", 4, 2, 2, 0
    c.log.report = c.log.tensorboard = False
    c.evaluation.train_images = c.evaluation.test_images = 16
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def counted(tmp_path_factory, one_device):
    """A run of four steps that carries a target, its summary, and how often Python ran the method's `init`.

    The folder `old` beside it has the checkpoint of the second step as version 0.1 wrote it.
    """
    folder = tmp_path_factory.mktemp("trained") / "run"
    traces = []
    save = checkpoint.Checkpoints.save

    def save_twice(self, step, params, rest, meta):
        save(self, step, params, rest, meta)
        if step == 2:
            old = checkpoint.Checkpoints(folder.parent / "old", 1)
            old.run = self.run
            rest = {("objective" if name == "penalty" else name): x for name, x in rest.items()}
            save(old, step, params, rest, {name: x for name, x in meta.items() if name != "judged"})
            old.close()

    def counting(config, source=None):
        method = with_target(config, source)

        def init(key, start):
            traces.append(key)
            return method.init(key, start)

        return dataclasses.replace(method, init=init)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_twice)
        patch.setitem(METHODS, "reconstruction", Row(counting, METHODS["reconstruction"].parts))
        summary = train.run(tiny(), str(folder))
    return folder, summary, len(traces)


@pytest.fixture(scope="module")
def trained(counted):
    """The folder of that run; tests read it."""
    return counted[0]


def test_a_run_traces_the_initialisation_once(counted):
    """For the recipe, the restore, the fresh state, the step and the untrained scores: tracing a model takes long."""
    _, summary, traces = counted
    assert summary["knn_top1_untrained"] is not None
    assert traces == 1


def test_a_schedule_that_does_not_fit_is_found_before_the_model_is_traced():
    c = small()
    c.optimizer.warmup_steps = 5

    def init(key, start):
        raise AssertionError("traced")

    with pytest.raises(ConfigError, match="the warm-up takes 5 steps, the run has only 4"):
        train_step.make_recipe(c, dataclasses.replace(reconstruction.build(c), init=init), 160)


def test_judged_is_what_others_read(trained):
    """Of a checkpoint: the target, not the encoder that gradients train. Its arrays have checksums."""
    online = checkpoint.read_params(trained)[0]
    judged, about = checkpoint.read_params(trained, judged=True)
    loaded = pretrained.load(str(trained), "config.init_from")
    chex.assert_trees_all_equal(loaded.params, judged)
    chex.assert_trees_all_equal(judged["decoder"], online["decoder"])
    kernel = "encoder/embedding/patch_embed/kernel"
    assert not np.allclose(names(online)[kernel], names(judged)[kernel])
    assert about["judged"][kernel] == "rest/carried/target/embedding/patch_embed/kernel"
    assert any(name.startswith("carried/target/") and e["checksum"] for name, e in about["arrays"]["rest"].items())


def test_a_run_that_starts_from_another_copies_its_encoder_to_the_target(in_the_table, trained, tmp_path, caplog):
    """Through the whole job: after one step without effect the target is what the first run's was."""
    caplog.set_level("INFO")
    c = tiny(init_from=str(trained), seed=3, steps=1)
    c.optimizer.lr, c.optimizer.weight_decay = 1e-30, 0.0
    summary = train.run(c, str(tmp_path / "second"))
    first, second = (checkpoint.read_params(path, judged=True)[0] for path in (trained, tmp_path / "second"))
    chex.assert_trees_all_close(second["encoder"], first["encoder"], rtol=1e-6, atol=1e-8)
    assert summary["checkpoint"] == f"step 4 of {trained}"
    (said,) = (line for line in caplog.messages if line.startswith("attention"))
    tokens = 1 + math.prod(c.data.image_size) // c.encoder.patch_size**2
    assert said == f"attention is computed by XLA ({tokens} tokens, 2 heads of {c.encoder.width // 2})"


def test_a_target_is_judged_by_the_jobs_that_take_an_encoder(trained, tmp_path):
    """An evaluation reads the target: the digest that it records is that of the judged parameters."""
    c = tiny(job="evaluate", checkpoint=str(trained))
    c.data.source, c.protocol.name, c.evaluation.train_images = "digits", "knn", 200
    with c.unlocked():
        c.protocol.update({name: key.default for name, key in PROTOCOLS["knn"].keys.items()})
    record = evaluate.run(c, str(tmp_path / "judged"))
    judged = checkpoint.read_params(trained, judged=True)[0]
    assert record["checkpoint_sha256"] == checkpoint.params_sha256(judged)
    assert record["checkpoint_sha256"] != checkpoint.params_sha256(checkpoint.read_params(trained)[0])


def test_carried_lies_as_the_parameters_do_on_a_model_axis(monkeypatch):
    """A target's kernel is split where its parameter is, at the start, after a step and for a restore."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 1)
    c = small(decoder="linear")
    c.optimizer.ema = 0.8
    method = dataclasses.replace(with_target(c), averaged=lambda carried: {"target": carried["target"]})
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[:2], data=1, model=2)
    recipe = train_step.make_recipe(c, method, 160)
    state = train_step.make_init(c, method, recipe, mesh)()
    step = train_step.make_train_step(c, method, recipe, mesh)
    for _ in range(2):
        ours, targets, averages = (
            names(tree) for tree in (state.params["encoder"], state.carried["target"], state.ema_carried["target"])
        )
        split = [name for name, x in ours.items() if not x.sharding.is_fully_replicated]
        assert any("kernel" in name for name in split)
        for name in split:
            assert targets[name].sharding == averages[name].sharding == ours[name].sharding, name
        state, _ = step(state, sharding.put_batch({"image": images(0, c.batch_size)}, mesh))


def test_the_state_of_the_penalty_is_found_under_its_old_name(in_the_table, trained, tmp_path):
    """Checkpoints of version 0.1 hold it as `objective`; such a run continues to the same bits, with what it carried.

    Also with what the loss does not read.
    """
    shutil.copytree(trained, tmp_path / "run")
    for step in "24":
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    shutil.copytree(trained.parent / "old" / "checkpoints" / "2", tmp_path / "run" / "checkpoints" / "2")
    assert any(name.startswith("objective/") for name in meta(tmp_path / "run", 2)["arrays"]["rest"])
    assert train.run(tiny(), str(tmp_path / "run"))["steps"] == 4
    assert meta(tmp_path / "run", 4)["arrays"] == meta(trained, 4)["arrays"]  # with checksums


def meta(workdir, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"]
