"""Steps that are not finite: without effect where config.nonfinite.skip allows it, counted, written down, replayed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import data
from crate_jax.config import validate
from crate_jax.errors import NonFiniteError
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.jobs import train
from crate_jax.methods import METHODS, Row, reconstruction
from crate_jax.parallel import sharding
from crate_jax.training import nonfinite, orthogonality, step as train_step
from crate_jax.workdir import checkpoint, pictures
from tests.training.test_loop import images, small

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


def poisoned(method, where: str):
    """The method, but a batch with an all-white image makes its loss or its gradient NaN."""

    def loss(params, carried, batch, keys_B):
        value, aux = method.loss(params, carried, batch, keys_B)
        white = jnp.any(jnp.all(batch["image"] == 255, axis=(1, 2, 3)))
        zero = jnp.where(white, 0 * params["encoder"]["norm"]["scale"][0], 1.0)
        bad = {"loss": jnp.nan, "gradient": jnp.sqrt(zero), "penalty": 0.0}[where]  # 0, but its slope is inf * 0
        return value + jnp.where(white, bad, 0.0), aux

    return dataclasses.replace(method, loss=loss)


@dataclasses.dataclass(frozen=True)
class PoisonedPenalty:
    """The penalty, but NaN in the second step of the run; its draws say which step it is."""

    penalty: orthogonality.Penalty

    @property
    def names(self):
        return self.penalty.names

    def init(self, key):
        return self.penalty.init(key)

    def apply(self, params, state, key):
        value, state = self.penalty.apply(params, state, key)
        second = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))[1]
        hit = jnp.all(jax.random.key_data(key) == jax.random.key_data(second))
        return value + jnp.where(hit, jnp.nan, 0.0), state


def prepared(c, where: str, devices: int):
    mesh = sharding.make_mesh(c.batch_size, c.accumulate, jax.devices()[:devices])
    method = poisoned(reconstruction.build(c), where)
    recipe = train_step.make_recipe(c, method, 10 * c.batch_size)
    if where == "penalty":
        recipe = dataclasses.replace(recipe, penalty=PoisonedPenalty(recipe.penalty))
    state = train_step.make_init(c, method, recipe, mesh)()
    return train_step.make_train_step(c, method, recipe, mesh), state, mesh


@pytest.mark.parametrize(
    ("where", "encoder", "penalty", "devices", "accumulate"),
    [
        ("gradient", "vit", "none", 2, 4),
        pytest.param("loss", "crate", "srip", 1, 1, marks=pytest.mark.slow),
        pytest.param("penalty", "crate", "so", 8, 1, marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_leaves_everything_but_its_number(where, encoder, penalty, devices, accumulate, monkeypatch):
    """Bit for bit, and the next step takes another batch and draw; nothing is compiled anew or transferred."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 1)
    c = small(encoder, penalty=penalty)
    c.accumulate, c.optimizer.ema, c.nonfinite.skip = accumulate, 0.9, 1
    c.encoder.depth, c.decoder.name = 1, "linear"
    step, state, mesh = prepared(c, where, devices)
    batches = [images(i, c.batch_size) for i in range(3)]
    batches[1][5] = 255
    seen, log = [], []
    for batch in batches:
        placed = sharding.put_batch({"image": batch}, mesh)
        with jax.transfer_guard("disallow"):
            state, scalars = step(state, placed)
        seen.append(jax.tree.map(np.array, state))
        log.append(jax.device_get(scalars))
    assert [int(s["skipped"]) for s in log] == [0, 1, 0] and step._cache_size() == 1
    finite = {name: bool(np.isfinite(log[1][name])) for name in nonfinite.DECISIVE}
    assert finite == {"loss": where == "gradient", "grad_norm": where != "gradient"}  # each counts alone
    chex.assert_trees_all_equal(seen[1].replace(step=seen[0].step), seen[0])
    assert [int(s.step) for s in seen] == [1, 2, 3]
    # The third is that of a run without the second: the optimiser's next rate, its own images and draws.
    assert log[2]["lr"] == pytest.approx(log[1]["lr"]) and log[2]["lr"] != log[0]["lr"]
    before = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), seen[0].replace(step=np.int32(2)), state)
    other, _ = step(before, sharding.put_batch({"image": batches[2]}, mesh))
    chex.assert_trees_all_equal(jax.device_get(other), seen[2])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen[2]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images, the fifth of them white."""
    for i in range(12):
        pixels = images(i, 1)[0] if i != 4 else np.full((12, 8, 3), 255, np.uint8)
        pictures.save_png(tmp_path / "images" / f"{i:02d}.png", pixels)
    return tmp_path / "images"


def configured(folder: Path, steps: int, skip: int):
    c = small()
    c.batch_size, c.steps, c.data.source = 8, steps, f"folder:{folder}"
    c.encoder.depth, c.decoder.name, c.nonfinite.skip = 1, "linear", skip
    c.optimizer.schedule = "constant"  # so that a run may be made longer
    c.log.every, c.log.pictures, c.log.report, c.log.tensorboard, c.save.every = 3, 0, False, False, 2
    validate(c)
    return c


@pytest.fixture
def without_scores(monkeypatch):
    monkeypatch.setattr(FrozenEvaluation, "final_scores", lambda *_: {"knn_top1": None})


@pytest.fixture
def white_is_bad(monkeypatch):
    white = Row(lambda c, source: poisoned(reconstruction.build(c), "loss"), METHODS["reconstruction"].parts)
    monkeypatch.setitem(METHODS, "reconstruction", white)


def logged(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


@pytest.mark.slow
def test_a_bad_image_costs_its_steps_and_is_named(folder, white_is_bad, tmp_path, caplog):
    """In a run that is stopped and continued as in one that is not; means stay finite; any step can be replayed."""
    summary = train.run(configured(folder, 9, skip=2), str(tmp_path / "whole"))
    source = data.open_split(configured(folder, 9, 2), "train")
    pipeline = data.TrainPipeline(configured(folder, 9, 2), source)
    order = [batch["index"] for batch, _ in zip(pipeline.batches(), range(9), strict=False)]
    bad = [step for step, indices in enumerate(order, 1) if 4 in indices]
    assert 3 <= len(bad) < 9 and summary["skipped"] == len(bad)
    written = {int(p.stem): json.loads(p.read_text()) for p in (tmp_path / "whole" / nonfinite.FOLDER).iterdir()}
    assert sorted(written) == bad
    for step, record in written.items():
        replayed = next(pipeline.batches(step - 1))["index"]
        assert record["indices"] == replayed.tolist() and record["scalars"]["loss"] == "nan"
        assert "04.png" in record["images"] and record["images"] == [source.name(i) for i in replayed]
        assert f"step {step} skipped: the loss is nan; its images are named in" in caplog.text
    pipeline.close()
    lines = logged(tmp_path / "whole")
    assert [line["skipped_total"] for line in lines] == [sum(b <= line["step"] for b in bad) for line in lines]
    assert sum(line["skipped"] for line in lines) == len(bad)
    assert all(line.get("loss", 0.0) is not None and np.isfinite(line.get("loss", 0.0)) for line in lines)
    for steps in (bad[1], 9):  # the first life ends with a step that was skipped
        continued = train.run(configured(folder, steps, skip=2), str(tmp_path / "continued"))
    assert continued["params_sha256"] == summary["params_sha256"] and continued["skipped"] == len(bad)
    for step, record in written.items():  # numbers and all, as in a replay from a checkpoint
        again = json.loads((tmp_path / "continued" / nonfinite.FOLDER / f"{step}.json").read_text())
        assert again | {"newest_checkpoint": 0} == record | {"newest_checkpoint": 0}


@pytest.mark.slow
def test_without_skipping_the_run_stops_and_names_the_images(folder, white_is_bad, without_scores, tmp_path):
    """And the same workdir goes on once skipping is allowed."""
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step (\d+); its images are named in (\S+);") as error:
        train.run(configured(folder, 9, skip=0), str(tmp_path / "run"))
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    record = json.loads((tmp_path / "run" / nonfinite.FOLDER / f"{step}.json").read_text())
    assert record["step"] == step and "04.png" in record["images"]
    continued, new = (train.run(configured(folder, 9, skip=9), str(tmp_path / name)) for name in ("run", "new"))
    assert continued["params_sha256"] == new["params_sha256"] and continued["skipped"] == new["skipped"] >= 3


def test_a_streak_ends_the_run_also_across_a_restart(folder, tmp_path):
    """A rate that blows the weights up: three steps are skipped, the fourth stops; so does the first after it."""
    c = configured(folder, 30, skip=3)
    c.optimizer.lr, c.log.every, c.save.every = 1e25, 1, 1
    messages = []
    for _ in range(2):
        with pytest.raises(NonFiniteError) as error:
            train.run(c, str(tmp_path / "run"))
        messages.append(str(error.value))
    step = int(messages[0].split("at step ")[1].split(";")[0])
    assert messages[0] == messages[1] and "as in the 3 steps before (config.nonfinite.skip=3), at step" in messages[0]
    assert f"last finite checkpoint is step {step - 1} in" in messages[0] and "\n" not in messages[0]
    assert sorted(int(p.stem) for p in (tmp_path / "run" / nonfinite.FOLDER).iterdir()) == [*range(step - 3, step + 1)]
    params, meta = checkpoint.read_params(tmp_path / "run")
    assert meta["step"] == step - 1 and meta["record"]["skipped"] == {"streak": 3, "total": 3}
    assert train_step.all_finite(params)
