"""Judging a checkpoint: frozen protocols with their cache, fine-tuning, and what is said when it cannot be done."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import crate_jax
from configs import evaluate, quickstart
from crate_jax import data
from crate_jax.convert import __main__ as command, pretrained, weights
from crate_jax.errors import CheckpointError, ConfigError, DataError, UserError
from crate_jax.jobs import evaluate as job, finetune, train
from crate_jax.models import autoencoder, representation
from crate_jax.models.layers import layer_norm
from crate_jax.parallel import sharding
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from crate_jax.workdir import checkpoint, checkpoint_files
from tests.test_cli import one_line_error

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory, one_device) -> Path:
    """A finished pre-training run on digits, with averaged weights."""
    c = quickstart.get_config("debug")
    c.optimizer.ema, c.batch_size = 0.9, 32
    c.steps, c.log.pictures, c.log.report, c.log.tensorboard = 30, 0, False, False
    workdir = tmp_path_factory.mktemp("pretraining") / "run"
    train.run(c, str(workdir))
    return workdir


def configured(arg: str, pretraining: Path, **values):
    c = evaluate.get_config(arg)
    c.checkpoint, c.data.source, c.log.report, c.log.tensorboard = str(pretraining), "digits", False, False
    c.data.crop_scale, c.data.flip, c.data.eval_crop = (0.9, 1.0), 0.0, 1.0
    c.evaluation.pool, c.evaluation.batch_size = "mean", 64
    for key, value in values.items():
        *section, leaf = key.split("__")
        (c[section[0]] if section else c)[leaf] = value
    return c


def results(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_protocols_share_features_that_are_computed_once(pretraining, tmp_path, monkeypatch):
    calls = []
    encode_split = job.encode_split
    monkeypatch.setattr(job, "encode_split", lambda *args: calls.append(1) or encode_split(*args))
    first = job.run(configured("protocol=knn", pretraining), str(tmp_path))
    computed = len(calls)
    second = job.run(configured("protocol=logreg", pretraining), str(tmp_path))
    assert computed > 0 and len(calls) == computed
    assert [r["protocol"] for r in results(tmp_path)] == ["knn", "logreg"]
    assert results(tmp_path)[1] == json.loads(json.dumps(second))
    assert 0.3 < first["top1"] <= 1 and 0.5 < second["top1"] <= 1
    for record in (first, second):
        assert record["version"] == 2 and record["checkpoint_sha256"] == pretrained.load(str(pretraining), "").sha256
        assert record["versions"]["jax"] == jax.__version__ and record["seed"] == 0
        assert record["versions"]["crate-jax"] == crate_jax.__version__
        assert (record["train_images"], record["test_images"], record["classes"]) == (1437, 360, 10)
        assert (record["train_split"], record["eval_split"]) == ("train", "eval")  # what was taken, not 'auto'
        assert record["eval_crop"] == 1.0  # the checkpoint's; the record's config holds only what is not the default
    job.run(configured("protocol=knn", pretraining, evaluation__pool="cls"), str(tmp_path))
    assert len(calls) > computed  # other tokens, other features
    computed = len(calls)
    job.run(configured("protocol=knn,scratch", pretraining), str(tmp_path))
    assert len(calls) > computed and "random" in results(tmp_path)[-1]["checkpoint"]


def test_an_older_checkpoint_of_a_run_is_named_by_its_path(pretraining, tmp_path, capsys):
    newest, *_, oldest = checkpoint_files.steps(pretraining / "checkpoints")
    path, name = f"{pretraining}/checkpoints/{oldest}", f"step {oldest} of {pretraining}"
    assert newest > oldest and crate_jax.load(pretraining).name == f"step {newest} of {pretraining}"
    record = job.run(configured("protocol=knn", path), str(tmp_path / "w"))
    assert record["checkpoint"] == name == crate_jax.load(path).name
    assert record["checkpoint_sha256"] not in ("", pretrained.load(str(pretraining), "").sha256)
    assert command.main(["inspect", path]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")
    assert command.main(["export", path, "--format=torch", f"--out={tmp_path / 'out'}"]) == 0
    read = pretrained.load(str(tmp_path / "out"), "").params["encoder"]["norm"]["scale"]
    np.testing.assert_array_equal(read, crate_jax.load(path).params["encoder"]["norm"]["scale"])
    for arguments in (["inspect"], ["export", "--format=torch", f"--out={tmp_path / 'out'}"]):
        assert command.main([arguments[0], f"{pretraining}/checkpoints/7", *arguments[1:]]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {pretraining}/checkpoints: holds no checkpoint of step 7; it holds {newest}, ")
        assert line.count("\n") == 1


def test_scores_of_few_images_say_how_many(capsys):
    """Seen: a single top-1, and nothing told that it is the one with ten images per class."""
    shots = [{"shots": n, "top1": share, "trials": 5} for n, share in ((1, 0.256), (5, 0.302), (10, 0.312))]
    job.show({"protocol": "fewshot", "checkpoint": "c", "data": "d", "fewshot": shots, "top1": 0.312})
    assert capsys.readouterr().out.splitlines()[1:4] == [
        f"top1                   {share}%, {n} training images per class"
        for share, n in ((25.6, 1), (30.2, 5), (31.2, 10))
    ]
    job.show({"protocol": "logreg", "checkpoint": "c", "data": "d", "top1": 0.9})
    assert capsys.readouterr().out.splitlines()[1] == "top1                   90.0%"


def test_features_are_kept_under_all_that_they_depend_on():
    encoder = pretrained.Pretrained("", {}, {}, "some digest")

    def key(arg: str = "train", digest: str = "some digest", n: int = 20, **values) -> str:
        c = configured("", Path("unused"), **{"data__image_size": (8, 8), **values})
        source = data.open_split(c, arg)
        return job.cache_key(c, dataclasses.replace(encoder, sha256=digest), source, np.arange(n))

    others = [key("eval"), key(digest="another"), key(n=21), key(data__source="synthetic"), key(dtype="bfloat16")]
    for name, value in (
        ("data__image_size", (16, 16)), ("data__mean", (0.1, 0.2, 0.3)), ("data__std", (1.0, 1.0, 1.0)),
        ("data__eval_crop", 0.5), ("data__interpolation", "bilinear"), ("evaluation__pool", "cls"),
        ("evaluation__layer", 1), ("encoder__heads", 2), ("encoder__lam", 0.2),
    ):  # fmt: skip
        others.append(key(**{name: value}))
    assert key() == key(evaluation__batch_size=3, protocol__scratch=True)  # neither changes a feature
    assert len({key(), *others}) == 1 + len(others)


def test_a_damaged_cache_is_computed_again(pretraining, tmp_path):
    c = configured("protocol=knn", pretraining, evaluation__train_images=100, evaluation__test_images=50)
    before = job.run(c, str(tmp_path))
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert job.run(c, str(tmp_path))["top1"] == before["top1"]
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(b"")
    assert job.run(c, str(tmp_path))["top1"] == before["top1"]


def test_a_full_disk_costs_the_cache_and_not_the_features(pretraining, tmp_path, monkeypatch, caplog):
    c = configured("protocol=knn", pretraining, evaluation__train_images=100, evaluation__test_images=50)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "a.npz.4711.crate_jax.tmp").touch()  # of a process that was killed

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        score = job.run(c, str(tmp_path))["top1"]
    lines = [r.getMessage() for r in caplog.records if "features are not kept" in r.getMessage()]
    assert len(lines) == 2 and all(line.endswith("cannot be written (No space left on device)") for line in lines)
    assert not list((tmp_path / "features").iterdir())
    assert job.run(c, str(tmp_path))["top1"] == score and len(list((tmp_path / "features").iterdir())) == 2


def test_features_without_an_image_that_was_left_out_are_not_kept(tmp_path):
    """The next run reads it again; features of all images are kept."""
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), (ord(label), 0, 0)).save(tmp_path / "set" / label / "0.png")
    good = (tmp_path / "set" / "b" / "0.png").read_bytes()
    c = configured("", Path("unused"), data__source=f"folder:{tmp_path / 'set'}", data__image_size=(8, 8))
    c.data.max_undecodable = 0.6
    source, mesh = data.open_split(c, "train"), sharding.make_mesh(1, 1)
    mean = jax.jit(lambda x: x.mean((1, 2)).astype(jnp.float32), out_shardings=sharding.split(mesh))
    encoder = pretrained.Pretrained("", {}, {}, "some digest")

    def cached() -> list[float]:
        return job._cached(c, encoder, source, np.arange(2), mean, mesh, tmp_path)[0][:, 0].tolist()

    (tmp_path / "set" / "b" / "0.png").write_bytes(b"x" * len(good))
    assert cached() == [97.0] and not list(tmp_path.glob("features/*"))
    (tmp_path / "set" / "b" / "0.png").write_bytes(good)
    assert cached() == [97.0, 98.0]
    (kept,) = tmp_path.glob("features/*")
    np.savez(kept, features=np.full((2, 3), 7.0), labels=np.zeros(2, np.int32))
    assert cached() == [7.0, 7.0]


def test_features_are_of_the_tokens_asked_for():
    """After the last block, normalised, is the encoder's output; cls_mean is both, one after the other."""
    c = quickstart.get_config("debug")
    params = jax.jit(lambda key: autoencoder.init_params(c, key))(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, *c.data.image_size, 3)), jnp.float32)
    norm = params["encoder"]["norm"]

    @jax.jit  # one program for all: they share most of it
    def features(params, x) -> dict[str, jax.Array]:
        found = {}
        for pool, layer in (("cls_mean", 0), ("cls", 0), ("mean", 0), ("cls", 1), ("cls", 2)):
            c.evaluation.pool, c.evaluation.layer = pool, layer
            found[f"{pool} {layer}"] = representation.build(c)(params, x)
        return found

    found = jax.device_get(features(params, x))
    assert c.encoder.depth == 2
    np.testing.assert_array_equal(found["cls_mean 0"], np.concatenate([found["cls 0"], found["mean 0"]], axis=1))
    np.testing.assert_allclose(layer_norm(found["cls 2"], norm["scale"], norm["bias"], 1e-6), found["cls 0"], atol=1e-5)
    assert np.abs(found["cls 1"] - found["cls 2"]).max() > 1e-3


def test_statistics_are_the_checkpoints_unless_set(pretraining):
    encoder = pretrained.load(str(pretraining), "")
    theirs = {key: tuple(encoder.config["data"][key]) for key in ("mean", "std")}
    for given, expected in (
        ({}, theirs),
        ({"std": (1.0, 1.0, 1.0)}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"mean": (0.1, 0.2, 0.3)}, {**theirs, "mean": (0.1, 0.2, 0.3)}),
    ):
        c = configured("", pretraining, **{f"data__{key}": value for key, value in given.items()})
        full = job.inherit(c, encoder)
        assert {key: full.data[key] for key in theirs} == expected


def test_the_crop_is_the_checkpoints_unless_set(pretraining, caplog):
    """On frozen features; a recipe of fine-tuning has its own. A run that is older than the key had its default."""
    caplog.set_level("INFO")
    saved = pretrained.load(str(pretraining), "")
    data = saved.config["data"]
    encoder, old = (
        dataclasses.replace(saved, config={**saved.config, "data": d})
        for d in ({**data, "eval_crop": 0.9}, {k: v for k, v in data.items() if k != "eval_crop"})
    )
    c = evaluate.get_config("protocol=knn")
    assert job.inherit(c, encoder).data.eval_crop == 0.9
    assert "images are cropped to the central 0.9, as in the run of" in caplog.text
    caplog.clear()
    assert job.inherit(c, old).data.eval_crop == 0.875
    c.data.eval_crop = 0.875
    caplog.clear()
    assert job.inherit(c, encoder).data.eval_crop == 0.875 and "cropped" not in caplog.text
    crops = [finetune.resolve(evaluate.get_config(f"protocol=finetune_{x}"), encoder) for x in ("mae", "crate")]
    assert [full.data.eval_crop for full in crops] == [0.875, 1.0]


def test_the_pooling_is_that_of_the_run_unless_set(pretraining, caplog):
    """The scores of the run's own evaluations are then those of the job; a ResNet has no class token."""
    caplog.set_level("INFO")
    encoder = pretrained.load(str(pretraining), "")
    cls = dataclasses.replace(
        encoder, config={**encoder.config, "evaluation": {**encoder.config["evaluation"], "pool": "cls"}}
    )
    resnet = dataclasses.replace(cls, config={**cls.config, "encoder": {**cls.config["encoder"], "name": "resnet18"}})
    c = evaluate.get_config("protocol=knn")
    assert [job.inherit(c, x).evaluation.pool for x in (encoder, cls, resnet)] == ["mean", "cls", "mean"]
    assert "features are pooled by mean, as in the run of" in caplog.text
    c.evaluation.pool = "cls"
    assert job.inherit(c, encoder).evaluation.pool == "cls"
    pools = [finetune.resolve(evaluate.get_config(f"protocol=finetune_{x}"), cls) for x in ("mae", "crate")]
    assert [full.evaluation.pool for full in pools] == ["mean", "cls"]


def test_a_checkpoint_with_averaged_weights_is_judged_by_them(pretraining):
    raw = json.loads((pretraining / "summary.json").read_text())["params_sha256"]
    assert checkpoint.params_sha256(checkpoint.read_params(pretraining)[0]) == raw
    judged = pretrained.load(str(pretraining), "config.checkpoint")
    assert judged.sha256 != raw and set(judged.params) == {"encoder", "decoder"}


FINETUNE = {
    "epochs": 4.0, "batch_size": 96, "optimizer__lr": 1e-2, "optimizer__lr_batch": 0, "optimizer__warmup_epochs": 0.5,
    "data__randaugment_layers": 0, "log__every": 15,
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["finetune_crate", "finetune_mae"])
@pytest.mark.slow
def test_fine_tuning_learns_and_a_rerun_adds_nothing_but_a_line(recipe, pretraining, tmp_path):
    c = configured(f"protocol={recipe}", pretraining, **FINETUNE)
    record = finetune.run(c, str(tmp_path))
    frozen = job.run(configured("protocol=knn", pretraining), str(tmp_path / "frozen"))
    assert record["top1"] > 0.25 and record["steps"] == 60 and not record["scratch"]
    assert record["config"]["optimizer.lr"] == 1e-2 and record["config"]["encoder.depth"] == 2  # recipes can be changed
    assert "decoder.depth" not in record["config"] and "seed" not in record["config"]
    assert record["params_sha256"] != frozen["checkpoint_sha256"] and record["pool"] == "mean"
    assert (record["train_split"], record["eval_split"]) == ("train", "eval")
    assert record["checkpoint_sha256"] == frozen["checkpoint_sha256"] and record["checkpoint"] == frozen["checkpoint"]
    again = finetune.run(c, str(tmp_path))
    assert {k: v for k, v in again.items() if k != "images_per_sec"} == {
        k: v for k, v in record.items() if k != "images_per_sec"
    }


def test_a_fine_tuning_that_went_on_with_another_rate_is_finished_once(pretraining, tmp_path, monkeypatch):
    """config.json stays what the run began with, which tells the next start that nothing is left to do."""
    values = {"log__pictures": 0, "evaluation__test_images": 8}
    for rate, steps in ((1e-3, 1), (2e-3, 2)):
        c = configured("protocol=finetune_crate,debug", pretraining, **values, optimizer__lr=rate)
        c.epochs, c.steps = 0.0, steps
        last = finetune.run(c, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["lr"] == 1e-3
    monkeypatch.setattr(train, "Loop", train.Loop)
    monkeypatch.setattr(train.Loop, "run", lambda *_: pytest.fail("the run was finished"))
    again = finetune.run(c, str(tmp_path))
    assert again["top1"] == last["top1"] and again["params_sha256"] == last["params_sha256"]


def test_an_evaluation_leaves_a_runs_workdir_alone(pretraining):
    with pytest.raises(UserError, match="holds a training run, whose config.json an evaluation would replace"):
        job.run(configured("protocol=knn,debug", pretraining), str(pretraining))


def test_a_signal_of_a_sweep_ends_an_evaluation_between_its_splits(pretraining, tmp_path, monkeypatch):
    """What is computed by then is kept."""
    encode = job.encode_split

    def then_signal(*args):
        found = encode(*args)
        if not Interrupt.came():  # a second signal would end the tests
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(job, "encode_split", then_signal)
    with Interrupt(), pytest.raises(Interrupted, match="stopped by SIGTERM before the features of 'eval'"):
        job.run(configured("protocol=knn,debug", pretraining), str(tmp_path))
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_workdir_is_of_one_fine_tuning(pretraining, tmp_path, monkeypatch):
    """A score must not be written down under another checkpoint, seed or data set than it was learnt from.

    Nor may another command enter the workdir between the training and the record.
    """
    values = {"log__pictures": 0, "evaluation__test_images": 8}
    locked = []
    for module in (train, finetune):
        monkeypatch.setattr(module, "lock", lambda workdir, lock=module.lock: locked.append(1) or lock(workdir))
    first = finetune.run(configured("protocol=finetune_crate,debug", pretraining, **values), str(tmp_path / "w"))
    assert locked == [1]
    for arg, changed, words in (
        ("", {"seed": 1}, "seed: 0 -> 1"),
        ("", {"data__source": "synthetic"}, "other training images"),
        ("", {"checkpoint": str(shutil.copytree(pretraining, tmp_path / "copy"))}, "init_from"),
    ):
        with pytest.raises(ConfigError, match=f"holds a run that started differently .*{words}"):
            finetune.run(
                configured(f"protocol=finetune_crate,debug{arg}", pretraining, **values, **changed), str(tmp_path / "w")
            )
    assert len(results(tmp_path / "w")) == 1 and results(tmp_path / "w")[0]["params_sha256"] == first["params_sha256"]


def test_the_same_weights_with_other_heads_are_another_encoder(pretraining, tmp_path):
    """Nothing in the weights tells their number: the cache must not hand out the others' features."""
    encoder = pretrained.load(str(pretraining), "")
    found = {}
    for heads in (encoder.config["encoder"]["heads"], 1):
        c = json.loads(json.dumps(encoder.config))
        c["encoder"]["heads"] = heads
        weights.save(tmp_path / f"{heads}.safetensors", c, encoder.params)
        values = {"evaluation__train_images": 200, "evaluation__test_images": 20}
        found[heads] = job.run(
            configured("protocol=knn", tmp_path / f"{heads}.safetensors", **values), str(tmp_path / "w")
        )
    assert len({r["checkpoint_sha256"] for r in found.values()}) == 1 and len(found) == 2
    assert len(list((tmp_path / "w" / "features").iterdir())) == 4


def test_scratch_starts_from_a_random_encoder(pretraining, tmp_path):
    """Without `scratch` it starts from the checkpoint: see the test of a frozen encoder."""
    c = configured("protocol=finetune_crate,scratch,debug", pretraining, optimizer__lr=1e-30)
    record = finetune.run(c, str(tmp_path))
    start = checkpoint.read_params(tmp_path)[0]["encoder"]
    assert record["scratch"] and record["checkpoint"] is None
    ours = pretrained.load(str(pretraining), "").params["encoder"]
    kernel = ours["blocks"]["mssa"]["subspaces"]["kernel"]
    assert np.abs(start["blocks"]["mssa"]["subspaces"]["kernel"] - kernel).max() > 1e-3


def test_a_frozen_encoder_keeps_its_bits(pretraining, tmp_path):
    c = configured("protocol=finetune_crate,debug", pretraining, finetune__freeze=True, optimizer__lr=1e-2)
    record = finetune.run(c, str(tmp_path))
    assert not record["scratch"] and record["checkpoint"] is not None
    before = pretrained.load(str(pretraining), "").params["encoder"]
    after = checkpoint.read_params(tmp_path)[0]
    for name in ("blocks", "norm"):
        jax.tree.map(np.testing.assert_array_equal, after["encoder"][name], before[name])
    assert np.abs(after["head"]["linear"]["bias"]).max() > 0


def test_a_classifier_predicts_what_its_record_says(pretraining, tmp_path):
    c = configured("protocol=finetune_crate", pretraining, **FINETUNE | {"epochs": 1.0}, evaluation__test_images=0)
    record = finetune.run(c, str(tmp_path))
    test = data.open_split(c, "eval")
    classifier = crate_jax.load(tmp_path)
    found = classifier.predict([test.read(i) for i in range(len(test))])
    assert classifier.classes == tuple(test.class_names) and found.shape == (len(test), len(classifier.classes))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert np.mean(found.argmax(axis=1) == test.labels) == pytest.approx(record["top1"])
    with pytest.raises(ConfigError, match="lacks a head that predicts classes; give the workdir of a fine-tuning"):
        crate_jax.load(pretraining).predict(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.fixture
def unlabelled(tmp_path) -> Path:
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_what_cannot_be_judged_is_said_in_one_line(pretraining, unlabelled, tmp_path):
    work = str(tmp_path / "work")
    with pytest.raises(ConfigError, match="config.checkpoint is empty"):
        job.run(configured("", ""), work)
    with pytest.raises(CheckpointError, match="no such folder"):
        job.run(configured("", tmp_path / "nothing"), work)
    with pytest.raises(DataError, match="label"):
        job.run(configured("", pretraining, data__source=f"folder:{unlabelled}"), work)
    with pytest.raises(DataError, match="label"):
        finetune.run(configured("protocol=finetune_crate", pretraining, data__source=f"folder:{unlabelled}"), work)
    with pytest.raises(ConfigError, match="evaluation.layer=9: the encoder has 2 blocks"):
        job.run(configured("", pretraining, evaluation__layer=9), work)
    with pytest.raises(ConfigError, match="must be one of knn, logreg"):
        job.run(configured("", pretraining, protocol__name="svm"), work)
    with pytest.raises(ConfigError, match="config.encoder.depth=7: the encoder is that of step 30"):
        finetune.run(configured("protocol=finetune_crate", pretraining, encoder__depth=7), work)
    with pytest.raises(ConfigError, match="lacks its options k, temperature"):
        job.run(configured("", pretraining, protocol__name="knn"), work)
    with pytest.raises(ConfigError, match="config.protocol.metric='miou'"):
        job.run(configured("", pretraining, protocol__metric="miou"), work)
    with pytest.raises(ConfigError, match="not one of"):
        evaluate.get_config("protocol=svm")
    damaged = shutil.copytree(pretraining, tmp_path / "damaged")
    for file in (damaged / "checkpoints").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        job.run(configured("", damaged), work)


def test_other_classes_in_the_test_folder_are_named(pretraining, tmp_path):
    for split, classes in (("train", "ab"), ("test", "abc")):
        for name in classes:
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(folder / f"{i}.png")
    with pytest.raises(DataError, match="adds c"):
        job.run(configured("", pretraining, data__source=f"folder:{tmp_path / 'set'}"), str(tmp_path / "work"))


def test_a_run_from_before_a_key_came_goes_on():
    """Its config lacks the key, which had no other value than its default."""
    c = evaluate.get_config("protocol=finetune_crate")
    before = json.loads(json.dumps(c.to_dict()))
    del before["method"]
    train.require_same_task(c, Path("run"), before, other_images=False)
    before["protocol"]["scratch"] = True
    with pytest.raises(
        ConfigError, match=r"run holds a run that started differently \(protocol.scratch: True -> False\)"
    ):
        train.require_same_task(c, Path("run"), before, other_images=False)


@pytest.mark.slow
def test_relative_positions_of_another_grid_are_named(tmp_path):
    c = quickstart.get_config("debug")
    c.encoder.name, c.encoder.positions, c.log.pictures = "vit", "relative", 0
    c.decoder.name = "linear"
    train.run(c, str(tmp_path / "run"))
    other = configured("", tmp_path / "run", data__image_size=(16, 16))
    with pytest.raises(CheckpointError, match="encoder/relative_bias: checkpoint"):
        job.run(other, str(tmp_path / "work"))


@pytest.mark.slow
def test_commands(run_cli, pretraining, tmp_path):
    """From the command line, and an error as one line."""
    flags = [f"--config.checkpoint={pretraining}", "--config.data.source=digits", f"--workdir={tmp_path}"]
    found = run_cli(["--config=configs/evaluate.py:protocol=logreg,debug", "--config.protocol.select=test", *flags])
    assert found.returncode == 0, found.stderr[-2000:]
    assert "chosen on the test split, which is optimistic" in found.stdout and "top1" in found.stdout
    wrong = run_cli(["--config=configs/evaluate.py", "--config.data.source=digits", f"--workdir={tmp_path}"])
    assert "config.checkpoint is empty" in one_line_error(wrong)


@pytest.mark.slow
def test_fine_tuning_from_the_command_line(run_cli, pretraining, tmp_path):
    flags = [f"--config.checkpoint={pretraining}", "--config.data.source=digits"]
    tuned = run_cli(["--config=configs/evaluate.py:protocol=finetune_ropim,debug", *flags, f"--workdir={tmp_path}"])
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    assert "finetune_ropim of step 30" in tuned.stdout
