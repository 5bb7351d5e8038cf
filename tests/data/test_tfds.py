"""A data set prepared by TFDS as ArrayRecord is read, without TensorFlow; all else is one clear line."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.data.tfds_source import TfdsSource
from crate_jax.errors import DataError
from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.parallel import sharding

tfds = pytest.importorskip("tensorflow_datasets")


class TinyColours(tfds.core.GeneratorBasedBuilder):
    """Twelve plain PNGs for training, four for testing; the label is the parity of the number."""

    VERSION = tfds.core.Version("1.0.0")
    IMAGES = {"train": 12, "test": 4}

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["even", "odd"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in self.IMAGES.items()}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (7, 9 + i), (20 * i, 0, 0)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}


class TinyNumbers(TinyColours):
    """The same without images."""

    def _info(self):
        features = {"number": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"number": i}


class TinyHidden(TinyColours):
    """The labels of the test split are not public, as with imagenet2012."""

    IMAGES = {"train": 12, "test": 6, "validation": 4}

    def _split_generators(self, dl_manager):
        return super()._split_generators(dl_manager) | {"test": self._unlabelled(self.IMAGES["test"])}

    def _unlabelled(self, count):
        return ((i, example | {"label": -1}) for i, example in self._generate_examples(count))


class TinyNames(TinyColours):
    """The training split has another usual name."""

    IMAGES = {"Training": 10, "Valid": 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyColours, TinyNumbers, TinyHidden, TinyNames):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def configured(name, data_dir, **options):
    config = config_lib.base()
    config.data.update({"source": f"tfds:{name}", "data_dir": data_dir, "image_size": (16, 16)} | options)
    return config


def test_reads_a_prepared_set(prepared):
    config = configured("tiny_colours", prepared)
    source = data.open_split(config, "train", labels_required=True)
    numbers = [int(source.read(i)[0, 0, 0]) // 20 for i in range(len(source))]
    assert sorted(numbers) == list(range(12)), "TFDS shuffles when it prepares"
    assert source.read(3).shape == (9 + numbers[3], 7, 3)
    assert source.class_names == ["even", "odd"]
    np.testing.assert_array_equal(source.labels, np.array(numbers) % 2)
    np.testing.assert_array_equal(source.labels_of([5, 1]), source.labels[[5, 1]])
    assert source.name(3) == "tiny_colours/train[3]"
    assert len(data.open_split(config, "eval")) == 4
    assert data.open_split(configured("tiny_colours", prepared, eval_split=""), "eval") is None
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(3), source.read(3))


def test_a_test_split_without_labels_is_not_evaluated_on(prepared):
    assert len(data.open_split(configured("tiny_hidden", prepared), "eval")) == 4
    test = data.open_split(configured("tiny_hidden", prepared, eval_split="test"), "eval")
    assert len(test) == 6 and test.class_names is None and test.labels is None


@pytest.mark.parametrize(
    "given,split,count",
    [
        ("train", "Training", 10),
        ("", "Training", 10),
        ("Training", "Training", 10),
        ("train[:80%]", "Training[:80%]", 8),
        ("train[:20%]+ train[5:]", "Training[:20%]+ Training[5:]", 7),
    ],
)
def test_the_training_split_may_have_another_usual_name(prepared, given, split, count):
    config = configured("tiny_names", prepared, train_split=given)
    source = data.open_split(config, "train")
    assert (source.split, len(source)) == (split, count)
    assert data.open_split(config, "eval").split == "Valid"


def test_parts_and_sums_of_splits(prepared):
    config = configured(
        "tiny_hidden", prepared, train_split="train[:50%]+validation[1:]", eval_split="validation[:2] + test"
    )
    train, test = (data.open_split(config, split) for split in ("train", "eval"))
    assert (train.split, len(train)) == ("train[:50%]+validation[1:]", 9)
    assert (test.split, len(test)) == ("validation[:2] + test", 8)


def test_an_evaluation_reads_only_the_labels_of_its_sample(prepared):
    config = configured("tiny_hidden", prepared, eval_crop=1.0)
    config.evaluation.train_images, config.evaluation.knn_k = 6, 1
    train = data.open_split(config, "train")
    evaluation = FrozenEvaluation(config, lambda params, x: x, train, sharding.make_mesh(16, 1))
    assert evaluation.pixel_scores()[0].keys() == {"knn_top1", "probe_top1"}
    assert train._labels is None, "all labels were read, and with them all images"


def test_a_record_is_read_once_for_image_and_label(prepared):
    source = data.open_split(configured("tiny_colours", prepared), "train")
    labels, records, read = source.labels_of(range(12)).tolist(), source._data, []

    class Counted:
        def __len__(self):
            return len(records)

        def __getitem__(self, i):
            read.append(i)
            return records[i]

    source = TfdsSource("tiny_colours", "train", Counted(), source.class_names)
    for i in (7, 2):
        source.open(i)
    assert source.labels_of([2, 11, 7]).tolist() == [labels[i] for i in (2, 11, 7)]
    assert source.labels_of([11, 7]).tolist() == [labels[i] for i in (11, 7)]
    assert read == [7, 2, 11]


@pytest.mark.one_python
def test_batches_come_from_worker_processes_too(prepared):
    batches = []
    for workers in (0, 1):
        config = configured("tiny_colours", prepared, workers=workers)
        config.batch_size = 8
        pipeline = data.TrainPipeline(config, data.open_split(config, "train"))
        batches.append(next(pipeline.batches(3)))
        pipeline.close()
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


def test_tensorflow_is_not_imported(prepared):
    code = (
        "import sys; from crate_jax import config, data; c = config.base();"
        f"c.data.source, c.data.data_dir = 'tfds:tiny_colours', {prepared!r};"
        "assert data.open_split(c, 'train').read(0).shape[2] == 3; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("mnist", {}, "is not prepared.*array_record"),
        ("no_such_set", {}, "no such data set"),
        ("tiny_colours", {"train_split": "trian"}, "no split 'trian'; it has train, test; set config.data.train_split"),
        ("tiny_colours", {"train_split": "train[:9%]+trian"}, r"no split 'train\[:9%\]\+trian'; it has train, test"),
        ("tiny_colours", {"train_split": "train+"}, r"no split 'train\+'; it has train, test"),
        ("tiny_names", {"train_split": "training"}, "no split 'training'; it has Training, Valid"),
        ("tiny_numbers", {}, "no feature 'image'; it has number"),
    ],
)
def test_errors_are_one_line(prepared, name, options, message):
    with pytest.raises(DataError, match=message) as e:
        data.open_split(configured(name, prepared, **options), "train")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_set_in_another_format_names_the_format(prepared, tmp_path):
    # What a set prepared with TFDS's default looks like from here: the same folder, another format in its info.
    import json
    import shutil

    shutil.copytree(prepared, tmp_path / "tfrecord")
    (info,) = (tmp_path / "tfrecord" / "tiny_colours").rglob("dataset_info.json")
    content = json.loads(info.read_text())
    content["fileFormat"] = "tfrecord"
    for split in content["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    info.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is stored as tfrecord.*array_record"):
        data.open_split(configured("tiny_colours", str(tmp_path / "tfrecord")), "train")
