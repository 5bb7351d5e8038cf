"""RankMe and LiDAR while a run trains, with and without labels, and what the log says when they fall."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.data.views import augmented_views
from crate_jax.evals import collapse, lidar
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.jobs import train
from crate_jax.methods import METHODS, Row, reconstruction
from crate_jax.parallel import sharding
from tests.training.test_carried import tiny

pytestmark = pytest.mark.one_python

IMAGES, VIEWS = 30, 3


def digits(**options):
    c = configs.base()
    c.data.source, c.data.image_size, c.data.eval_crop = "digits", (8, 8), 1.0
    c.encoder.patch_size, c.evaluation.batch_size = 2, 16
    c.evaluation.update(dict(train_images=300, test_images=200) | options)
    return c


def columns(params, images):
    """Some pixels; `params` (D,) scales them, so that zeros take dimensions away."""
    return images[:, 1:7:2, 1:7, 0].reshape(len(images), -1).astype(jnp.float32) * params / 16.0


D = 18
HEALTHY, COLLAPSED = jnp.ones(D), jnp.zeros(D).at[4].set(1.0)


class Unlabelled:
    """The same images without the names of classes."""

    def __init__(self, source):
        self._source = source

    def __len__(self):
        return len(self._source)

    def __getattr__(self, name):
        return None if name == "class_names" else getattr(self._source, name)


def evaluation(config, devices: int = 1, labelled: bool = True):
    source = data.open_split(config, "train")
    mesh = sharding.make_mesh(16, 1, jax.devices()[:devices])
    return FrozenEvaluation(config, columns, source if labelled else Unlabelled(source), mesh)


def test_a_fall_is_noticed_once_and_again_after_a_recovery():
    fall = collapse.Fall(bound=0.1)
    seen = [fall.begins(share) for share in (0.4, 0.11, 0.09, 0.01, 0.15, 0.02)]
    assert seen == [False, False, True, False, False, True]


def test_a_low_share_that_never_was_higher_is_no_fall():
    fall = collapse.Fall(bound=0.1)
    assert not any(fall.begins(share) for share in (0.02, 0.03, 0.02, 0.016))
    assert fall.begins(0.014)  # less than half of the best


def test_the_untrained_encoder_is_only_asked_where_it_matters():
    def never():
        raise AssertionError

    fall = collapse.Fall(bound=0.1)
    assert not fall.begins(0.3, never) and fall.begins(0.05, never)
    assert collapse.Fall(bound=0.1).begins(0.03, lambda: 0.07)
    assert not collapse.Fall(bound=0.1).begins(0.04, lambda: 0.07)
    assert not collapse.Fall(bound=0.0).begins(0.0, never)  # off


def test_lidar_is_that_of_augmented_views_on_any_devices():
    config = digits(lidar_images=IMAGES, lidar_views=VIEWS)
    one, eight = (evaluation(config, devices).lidar(HEALTHY) for devices in (1, 8))
    source = data.open_split(config, "train")
    indices = data.sampling.sample(len(source), IMAGES, config.seed)
    views = np.stack([views for views, _ in augmented_views(config, source, indices, VIEWS)])
    x = np.asarray(columns(HEALTHY, views.reshape(-1, 8, 8, 3))).reshape(IMAGES, VIEWS, D)
    assert one["lidar"] == pytest.approx(lidar.of_views(x).value, rel=1e-4)
    assert eight["lidar"] == pytest.approx(one["lidar"], rel=1e-4) and one["lidar_limit"] == D
    assert 2 < one["lidar"] < D


def test_lidar_takes_the_views_of_the_recipe_where_training_does(monkeypatch, tmp_path):
    config = digits(lidar_images=IMAGES, lidar_views=VIEWS)
    config.views.update(jitter=(1.0,), brightness=(0.9,), scale_min=(0.3,))
    source = data.open_split(config, "train")
    indices = data.sampling.sample(len(source), IMAGES, config.seed)
    views = np.stack([views for views, _ in augmented_views(config, source, indices, VIEWS, recipe=True)])
    x = np.asarray(columns(HEALTHY, views.reshape(-1, 8, 8, 3))).reshape(IMAGES, VIEWS, D)
    judge = FrozenEvaluation(config, columns, source, sharding.make_mesh(16, 1, jax.devices()[:1]), recipe=True)
    assert judge.lidar(HEALTHY)["lidar"] == pytest.approx(lidar.of_views(x).value, rel=1e-4)

    class Made(Exception):
        pass

    def made(*_, recipe: bool = False):
        raise Made(recipe)

    monkeypatch.setitem(train.EVALUATIONS, "pretrain", made)
    for method, expected in (("byol", True), ("reconstruction", False)):
        with pytest.raises(Made, match=str(expected)):
            train.run(tiny(method=method), str(tmp_path / method))


def test_lidar_is_off_unless_images_are_asked_for():
    assert evaluation(digits()).lidar(HEALTHY) == {}


def test_images_without_labels_have_ranks_and_no_accuracy():
    config = digits(lidar_images=IMAGES, lidar_views=VIEWS)
    found = evaluation(config, labelled=False).final_scores(HEALTHY, lambda: COLLAPSED)
    with_labels = evaluation(config).final_scores(HEALTHY, lambda: COLLAPSED)
    assert found["knn_top1"] is found["probe_top1"] is None and with_labels["knn_top1"] > 0.3
    same = {"rankme", "rankme_limit", "off_diagonal", "lidar", "lidar_limit", "rankme_untrained", "lidar_untrained"}
    assert {name: found[name] for name in same} == {name: with_labels[name] for name in same}
    assert found["rankme"] > 5 > 1.01 > found["rankme_untrained"]


def test_the_log_says_once_that_the_rank_has_fallen(caplog):
    watched = evaluation(digits(), labelled=False).watched_scores
    said = []
    for params in (HEALTHY, HEALTHY, COLLAPSED, COLLAPSED, HEALTHY, COLLAPSED):
        caplog.clear()
        watched(params, lambda: HEALTHY)
        said.append("the representation collapses: RankMe of its features is 1 of at most 18, it was" in caplog.text)
    assert said == [False, False, True, False, False, True]
    assert "config.penalty.name=so" in caplog.text


def test_an_encoder_that_is_born_flat_does_not_collapse(caplog):
    watched = evaluation(digits(), labelled=False).watched_scores
    watched(COLLAPSED, lambda: COLLAPSED)
    assert "collapses" not in caplog.text
    evaluation(digits(), labelled=False).watched_scores(COLLAPSED, lambda: HEALTHY)
    assert "collapses" in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [((17.0, 16.0), COLLAPSED, True), ((17.0, 1.0), COLLAPSED, False), ((1.0,), COLLAPSED, False),
     ((17.0, 1.0), HEALTHY, False), ((), HEALTHY, False)],
)  # fmt: skip
def test_a_run_that_continues_remembers_its_ranks(caplog, before, now, says):
    """As without the stop: the untrained encoder is healthy, so a first rank of 1 was a fall too."""
    watching = evaluation(digits(), labelled=False)
    watching.remember([{"rankme": rank, "rankme_limit": 18.0} for rank in before])
    watching.watched_scores(now, lambda: HEALTHY if before == (1.0,) else COLLAPSED)
    assert ("collapses" in caplog.text) == says
    caplog.clear()
    watching.watched_scores(COLLAPSED, lambda: COLLAPSED)
    assert ("collapses" in caplog.text) == (now is HEALTHY)


def collapsing(config, source=None):
    """A method that pulls all features of a batch to their mean, and logs how far they are spread."""
    method = reconstruction.build(config, source)

    def loss(params, carried, batch, keys_B):
        z = method.features(params, batch["image"])
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        spread = jnp.mean(jnp.std(z, axis=0))
        return jnp.sum(jnp.var(z, axis=0)), (carried, {"z_std": spread})

    return dataclasses.replace(method, loss=loss, healthy={"z_std": config.encoder.width**-0.5})


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_a_run_that_collapses_says_so(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(METHODS, "reconstruction", Row(collapsing, METHODS["reconstruction"].parts))
    open_split = data.open_split
    monkeypatch.setattr(data, "open_split", lambda *args: Unlabelled(open_split(*args)))  # no classifiers to wait for
    c = tiny()
    c.penalty.name, c.penalty.weight = "none", 0.0
    c.steps, c.log.every, c.save.every, c.evaluation.every, c.save.keep = 16, 4, 4, 8, 9
    c.optimizer.lr, c.evaluation.train_images = 0.02, 64

    def continued(step: int) -> list[str]:
        """What the run says when it continues from a step."""
        caplog.clear()
        for saved in (tmp_path / "w").glob("checkpoints/[0-9]*"):
            if int(saved.name) > step:
                shutil.rmtree(saved)
        train.run(c, str(tmp_path / "w"))
        assert f"continuing from step {step} " in caplog.text
        return [r.getMessage() for r in caplog.records if "the representation collapses: " in r.getMessage()]

    train.run(c, str(tmp_path / "w"))
    said = [r.getMessage() for r in caplog.records if "the representation collapses: " in r.getMessage()]
    assert len(said) == 2  # each once, though it stays so
    assert continued(8) == []  # both were said at step 8
    assert continued(4) == said  # though the spread was only higher before
    assert "z_std is 0.00" in said[0] and "0.204 would be an even spread" in said[0]
    assert "RankMe of its features is 1." in said[1] and "of at most 24, it was 12" in said[1]
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rankme" in row] == [8, 16]
