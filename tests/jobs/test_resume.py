"""What a start may change in the run that it continues, and what is written down about it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from crate_jax.analysis import logged, records
from crate_jax.config import KEYS, SECTIONS, base, is_read, validate
from crate_jax.errors import CheckpointError, ConfigError, UserError
from crate_jax.jobs import train
from crate_jax.methods import reconstruction
from crate_jax.parallel.parameters import names
from crate_jax.training import loop, step
from crate_jax.validation import FIXED, FREE, IF_FITS, RECORDED, flatten
from crate_jax.workdir import checkpoint, checkpoint_files, starts
from tests.methods import test_joint
from tests.training.test_loop import small

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


def tiny(**changes):
    """Two steps on images of waves, without evaluation worth the name."""
    c = small()
    c.data.source, c.steps, c.log.every, c.log.pictures, c.log.tensorboard = "synthetic", 2, 1, 0, False
    c.log.report = False
    c.evaluation.train_images = c.evaluation.test_images = 16
    c.update_from_flattened_dict(changes)
    validate(c)
    return c


def test_every_key_says_what_a_start_may_do_with_it():
    """Fixed unless the key or its section says otherwise; what a network computes, and the job, are fixed."""
    assert {key.resume for key in KEYS.values()} == {FREE, RECORDED, IF_FITS, FIXED}
    of = {name: key.resume for name, key in KEYS.items()}
    for name in ("log.every", "steps", "evaluation.every", "save.keep", "mesh.data", "remat", "data.workers"):
        assert of[name] == FREE
    for name in ("optimizer.lr", "batch_size", "penalty.weight", "data.source", "seed", "corruption.mask_ratio"):
        assert of[name] == RECORDED
    for name in ("job", "method", "init_from", "data.image_size", "data.mean", "data.std", "evaluation.pool"):
        assert of[name] == FIXED
    trained_only = {"encoder.drop_path", "encoder.norm_groups"}  # they change nothing that an evaluation computes
    assert {n for n in of if n.startswith(("encoder.", "decoder.")) and of[n] != FIXED} == trained_only
    with_effect = {name for name, key in KEYS.items() if key.effect and key.resume == FREE}
    allowed = ("steps", "epochs", "minutes", "remat", "evaluation.", "nonfinite.", "protocol.metric", "data.max_")
    assert not {name for name in with_effect if not name.startswith(allowed)}
    assert all(section.resume == FIXED for section in SECTIONS if section.name in ("", "encoder", "data", "decoder"))


def test_each_key_that_is_read_is_treated_as_it_says():
    c = small("crate", penalty="srip")
    seen = set()
    for name, key in KEYS.items():
        before = json.loads(json.dumps(c.to_dict()))
        *section, leaf = name.split(".")
        (before[section[0]] if section else before)[leaf] = "another"
        changes: list = []
        chooser, *values = key.read_by or ("",)
        if not is_read(c, name) or (chooser and flatten(c)[chooser] not in values):
            assert train.resume(c, Path("run"), changes, 40, before, False, None) == changes == []
            continue
        seen.add(name)
        if key.resume == FIXED:
            with pytest.raises(ConfigError, match=rf"^run holds a run with config\.{name}='another', not .*={name}$"):
                train.resume(c, Path("run"), changes, 40, before, False, None)
            c.allow_change = ("nonesuch", f"save.keep,{name}")  # a flag gives A,B as one text
            before["allow_change"] = c.allow_change
        entry = {"step": 40, "key": name, "old": "another", "new": flatten(c)[name]}
        assert train.resume(c, Path("run"), changes, 40, before, False, None) == [entry] * (key.resume != FREE), name
        c.allow_change = ()
        assert changes == [entry]
    assert {"encoder.heads", "encoder.lam", "penalty.weight", "log.every"} <= seen
    assert not seen & {"encoder.mlp_ratio", "dino.prototypes"}


def arrays(c, method) -> dict[str, tuple]:
    """Name, shape and type of each array of the training state."""
    recipe = step.make_recipe(c, method, 160)
    state = jax.eval_shape(lambda: step.init_state(c, method, recipe))
    return {name: (x.shape, x.dtype) for name, x in names({"params": state.params, "rest": state.rest()}).items()}


def others(key, value) -> list:
    """Some other values that a key may have: off, on, and others of a table."""
    named = re.fullmatch("must be one of (.*)", key.rule.text)
    if named:
        found = [type(key.default)(name) for name in named[1].split(", ")]
    elif isinstance(value, bool):
        found = [not value]
    elif isinstance(value, int | float):
        found = [0.0, 0.5, 1.0] if isinstance(value, float) else [0, 1]
    else:
        found = [(), (r"encoder/.*kernel",)] if key.rule.text == "must hold regular expressions" else []
    return [x for x in found if x != value]


def with_swav(name: str = "swav"):
    c = test_joint.config_of(name)
    c.penalty.name, c.optimizer.scaled_lr = "srip", (r"projector/.*kernel",)
    return c, test_joint.build


@pytest.mark.parametrize(
    ("make", "prefixes"),
    [
        (with_swav, ("", "online.", "swav.", "joint.", "penalty.", "optimizer.")),
        (functools.partial(with_swav, "dino"), ("dino.",)),
        (lambda: (small(), reconstruction.build), ("optimizer.layer_decay", "corruption.", "loss.", "encoder.")),
    ],
    ids=["swav", "dino", "reconstruction"],
)
def test_only_keys_that_say_so_change_the_arrays_of_the_state(make, prefixes):
    """What is recorded can be restored whatever the change; what is done `if it fits` has a change that does not."""
    c, build = make()
    before, unfit, asked = arrays(c, build(c)), set(), set()
    for name, key in KEYS.items():
        known = any(name.startswith(p) if p else "." not in name for p in prefixes)
        if not known or key.resume not in (RECORDED, IF_FITS) or not is_read(c, name):
            continue
        value = flatten(c)[name]
        for other in others(key, tuple(value) if isinstance(value, list) else value):
            changed = c.copy_and_resolve_references()
            changed.update_from_flattened_dict({name: other})
            if name == "penalty.name":
                changed.penalty.weight = 0.0 if other == "none" else 0.01
            chooser, *values = key.read_by or ("",)
            try:
                validate(changed)
                if chooser and flatten(changed)[chooser] not in values:
                    continue
                unfit |= {name} if arrays(changed, build(changed)) != before else set()
            except ConfigError:
                continue
            asked.add(name)
    assert unfit == {name for name in asked if KEYS[name].resume == IF_FITS}
    assert unfit and len(asked) > len(unfit) or prefixes == ("dino.",)


def test_a_change_that_does_not_fit_names_the_arrays(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    with pytest.raises(CheckpointError) as error:
        train.run(tiny(steps=4, **{"optimizer.ema": 0.9}), str(folder))
    assert "Changed keys: optimizer.ema: 0.0 -> 0.9; steps: 2 -> 4. Arrays that differ: ema/decoder/" in str(
        error.value
    )
    assert str(error.value).endswith("Set back the keys on which these arrays depend, or choose another --workdir")
    assert before == {path: path.read_bytes() for path in folder.glob("*.json*")}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, one_device):
    """The workdir of a run of two steps; tests copy it."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert "changed" not in train.run(tiny(), str(folder))
    return folder


def test_a_run_does_not_begin_in_a_folder_of_weights(tmp_path):
    (tmp_path / "config.json").write_text(text := '{"model_type": "vit"}')
    with pytest.raises(UserError, match="config.json is that of a model .model_type: 'vit'., and a training run would"):
        train.run(tiny(), str(tmp_path))
    assert (tmp_path / "config.json").read_text() == text and not (tmp_path / "starts.jsonl").exists()


def test_what_the_weights_mean_stays(begun, tmp_path):
    """One line with the keys and both values; nothing is written."""
    folder = shutil.copytree(begun, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    with pytest.raises(ConfigError) as error:
        train.run(tiny(steps=4, **{"encoder.heads": 4, "encoder.lam": 5.0, "data.std": (0.2, 0.2, 0.3)}), str(folder))
    assert str(error.value) == (
        f"{folder} holds a run with config.data.std=[0.229, 0.224, 0.225], not [0.2, 0.2, 0.3], "
        "config.encoder.heads=2, not 4, config.encoder.lam=0.5, not 5.0: its weights would mean something else; set "
        "back what has changed, choose another --workdir, or allow it by "
        "--config.allow_change=data.std,encoder.heads,encoder.lam"
    )
    assert before == {path: path.read_bytes() for path in folder.glob("*.json*")}


def test_what_changes_is_recorded_with_its_step(begun, tmp_path):
    """In checkpoint, summary, report and the record of starts; config.json stays the one that the run began with.

    The first checkpoint and folder are as a version left them that recorded nothing.
    """
    folder = shutil.copytree(begun, tmp_path / "run")
    (first,) = starts.read(folder)
    assert (first["step"], first["changed"], first["devices"]) == (0, [], "1 x cpu")
    assert first["versions"]["jax"] and first["time"]
    (folder / starts.FILE).unlink()
    meta = folder / "checkpoints" / "2" / "meta" / "metadata"
    body = json.loads(meta.read_text())["body"]
    assert body.pop("changed") == [] and body.pop("run") == first["run"]
    assert body.pop("clock")["seconds"]["steps"] > 0
    meta.write_text(json.dumps({"sha256": checkpoint_files._digest(body), "body": body}))

    changes = {"optimizer.lr": 3e-4, "encoder.heads": 4, "log.every": 2, "allow_change": ("encoder.heads",)}
    summary = train.run(tiny(steps=4, **changes), str(folder))
    recorded = [
        {"step": 2, "key": "optimizer.lr", "old": 1e-4, "new": 3e-4},
        {"step": 2, "key": "encoder.heads", "old": 2, "new": 4},
    ]
    by_key = {change["key"]: change for change in summary["changed"]}
    assert by_key == {change["key"]: change for change in recorded}
    assert checkpoint_files.read_meta(folder / "checkpoints" / "4")["changed"] == summary["changed"]
    (second,) = starts.read(folder)
    assert {change["key"] for change in second["changed"]} == {*by_key, "log.every", "steps", "allow_change"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["optimizer"]["lr"], config["encoder"]["heads"], config["steps"]) == (1e-4, 2, 4)
    with (folder / starts.FILE).open("a") as file:
        file.write('{"step": 4, "chan')  # killed in the middle of the line
    summary = train.run(tiny(steps=4, **changes | {"optimizer.lr": 2e-4, "log.report": True}), str(folder))
    assert summary["changed"][2:] == [{"step": 4, "key": "optimizer.lr", "old": 3e-4, "new": 2e-4}]
    assert [start["step"] for start in starts.read(folder)] == [2, 4]
    assert json.loads((folder / "config.json").read_text())["optimizer"]["lr"] == 1e-4

    tables = [t for s in json.loads((folder / "report.json").read_text())["sections"] for t in s["tables"]]
    (table,) = (t for t in tables if t["caption"].startswith("Starts"))
    assert [row[1] for row in table["rows"]] == [2, 4] and "optimizer.lr: 0.0003 -> 0.0002" in table["rows"][1][3]
    (wall,) = (t for t in tables if t["caption"].startswith("Wall time"))
    assert sum(wall["rows"][0][2:]) == pytest.approx(100) and wall["columns"][2:4] == ["steps %", "input %"]
    (settings,) = (t for t in tables if t["caption"].startswith("Settings"))
    cells = {row[0]: row[1] for row in settings["rows"]}
    assert cells["optimizer.lr"] == "0.0001; from step 2 on 0.0003; from step 4 on 0.0002"
    assert cells["encoder.heads"] == "2; from step 2 on 4"


def test_another_batch_of_a_run_of_epochs_says_what_becomes_of_its_schedule(tmp_path, caplog):
    old, new = (tiny(steps=0, epochs=3.0, batch_size=size) for size in (8, 24))
    train.resume(new, tmp_path, [], 7, old.to_dict(), False, None)
    assert "config.batch_size=24, not 8: the run counts its 7 updates as if all had had 24 images" in caplog.text
    assert "are 3 times what they were" in caplog.text


def test_a_checkpoint_of_another_run_is_refused_or_recorded(begun, tmp_path):
    """The folder has the run `begun`, and the checkpoint that another run of the same config saved."""
    folder = shutil.copytree(begun, tmp_path / "run")
    (start,) = starts.read(folder)
    (folder / starts.FILE).write_text(json.dumps(start | {"run": "feed"}) + "\n")
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    with pytest.raises(ConfigError) as error:
        train.run(tiny(steps=4), str(folder))
    assert str(error.value) == (
        f"{folder} holds a checkpoint of step 2 of another run ({start['run']}; this run is feed); move it away, "
        "choose another --workdir, or allow it by --config.allow_change=run"
    )
    assert before == {path: path.read_bytes() for path in folder.glob("*.json*")}
    summary = train.run(tiny(steps=4, allow_change=("run",)), str(folder))
    assert summary["changed"] == [{"step": 2, "key": "run", "old": start["run"], "new": "feed"}]
    assert checkpoint_files.read_meta(folder / "checkpoints" / "4")["run"] == "feed"
    assert starts.read(folder)[-1]["run"] == "feed"


def test_images_that_one_process_finds_changed_are_changed_for_all(begun, tmp_path, monkeypatch):
    """Else some would take the run for finished, and the others wait for them."""
    found = []

    def resume(config, folder, changes, step, before, other, runs):
        found.append(other)
        raise ConfigError("seen")

    def of_all(value: int) -> int:
        return 1 if sys._getframe(1).f_code.co_name == "_begin" else value  # another one says so

    monkeypatch.setattr(train, "resume", resume)
    folder = shutil.copytree(begun, tmp_path / "run")
    for expected in (False, True):
        with pytest.raises(ConfigError, match="seen"):
            train.run(tiny(), str(folder))
        assert found.pop() is expected
        monkeypatch.setattr(loop.distributed, "max_over_processes", of_all)


def test_other_images_are_recorded(tmp_path):
    changes: list = []
    recorded = train.resume(tiny(), tmp_path, changes, 7, tiny().to_dict(), True, None)
    assert (
        recorded
        == changes
        == [{"step": 7, "key": "training images", "old": "those of the checkpoint", "new": "others"}]
    )


def test_starts_whose_steps_are_lost_do_not_count():
    lr = [{"step": 40, "key": "optimizer.lr", "old": 0.1, "new": new} for new in (0.2, 0.3)]
    found = [{"step": 0}, {"step": 40, "changed": lr[:1]}, {"step": 60}, {"step": 40, "changed": lr[1:]}]
    log = records.Logged([], {}, [], starts.lineage(found))
    assert logged.told(log) == {"optimizer.lr": "0.1; from step 40 on 0.3"}


def test_a_summary_that_cannot_be_printed_is_computed_again(tmp_path):
    c, params = base(), {"a": np.ones(3, np.float32)}
    c.log.report = False
    state = types.SimpleNamespace(params=params)
    loop = types.SimpleNamespace(start_step=2, total=2, state=state, config=c, changed=[])
    whole = {
        "steps": 2, "loss": 0.5, "params": 3, "params_sha256": checkpoint.params_sha256(params), "knn_top1": None,
        "pictures": None, "report": None,
    }  # fmt: skip
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(whole))
    assert train.finished(loop, tmp_path, ()) is None  # without config.json nobody knows what was computed
    (tmp_path / "config.json").write_text(json.dumps(c.to_dict()))
    assert train.finished(loop, tmp_path, ()) == whole
    for change in (
        {"loss": "x"},
        {"params": None},
        {"knn_top1": 0.5},
        {"rankme": 3.0},
        {"pictures": [1]},
        {"test_images": 0},
    ):
        path.write_text(json.dumps({**whole, **change}))
        assert train.finished(loop, tmp_path, ()) is None, change
    path.write_text("[" * 10**5)
    assert train.finished(loop, tmp_path, ()) is None


@pytest.mark.slow
def test_scores_of_a_start_that_judged_in_another_way_are_not_taken_for_the_run(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    commands = [tiny(), tiny(**{"evaluation.test_images": 9}), tiny(seed=5), tiny()]
    summaries = [train.run(c, str(folder)) for c in commands]
    assert [s["test_images"] for s in summaries] == [16, 9, 16, 16]
    assert ["changed" in s for s in summaries] == [False, False, True, False]
