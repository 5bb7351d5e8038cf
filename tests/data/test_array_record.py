"""ArrayRecord files: which features are images and labels, splits, class names, damage in one line."""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np
import pytest

from crate_jax import config as config_lib, data
from crate_jax.data import array_record, decoding
from crate_jax.errors import DataError
from tests.data.test_webdataset import cache, png, values  # noqa: F401  # cache: a fixture for all tests

pytestmark = pytest.mark.one_python

if sys.platform != "linux":
    pytest.skip("array_record has wheels for Linux alone", allow_module_level=True)


def example(**features):
    """A serialised tf.train.Example; a name's _ stands for a slash."""
    from tensorflow_datasets.proto import tf_example_pb2

    made = tf_example_pb2.Example()
    for name, value in features.items():
        feature = made.features.feature[name.replace("_", "/")]
        found = value if isinstance(value, list) else [value]
        kinds = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}
        kinds[type(found[0])].value.extend(found)
    return made.SerializeToString()


def write(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def samples(first, count):
    return [example(image=png(i), label=i % 3, id=b"%d" % i) for i in range(first, first + count)]


def two_splits(root):
    """As TensorFlow Datasets names and writes them."""
    write(root / "set-train.array_record-00000-of-00002", samples(0, 4))
    write(root / "set-train.array_record-00001-of-00002", samples(4, 3))
    write(root / "set-test.array_record-00000-of-00001", samples(7, 2))
    write(root / "set-unlabelled.array_record-00000-of-00001", samples(9, 2))
    (root / "label.labels.txt").write_text("red\ngreen\nblue\nnone\n")


def opened(path, split="train", **options):
    config = config_lib.base()
    config.data.update({"source": f"array_record:{path}", "image_size": (16, 16)} | options)
    return data.open_split(config, split)


@pytest.mark.parametrize("pattern", ["", "set-*.array_record-*"])
def test_what_tfds_writes(tmp_path, monkeypatch, pattern):
    two_splits(tmp_path)
    train, test = (opened(tmp_path / pattern, split) for split in ("train", "eval"))
    assert (values(train), values(test)) == (list(range(7)), [7, 8])
    assert train.class_names == test.class_names == ["red", "green", "blue", "none"]
    np.testing.assert_array_equal(train.labels, np.arange(7) % 3)
    np.testing.assert_array_equal(test.labels_of([1]), [8 % 3])
    assert [train.name(i) for i in (3, 4)] == [
        "set-train.array_record-00000-of-00002[3]", "set-train.array_record-00001-of-00002[0]"
    ]  # fmt: skip
    copy = pickle.loads(pickle.dumps(train))
    assert values(copy) == list(range(7)) and copy.fingerprint() == train.fingerprint()
    monkeypatch.setattr(array_record, "_read", lambda *_: pytest.fail("labels are read once"))
    assert opened(tmp_path / pattern).fingerprint() == train.fingerprint()
    assert opened(tmp_path / pattern, "eval").fingerprint() != train.fingerprint()


def test_a_link_to_a_folder_is_entered(tmp_path):
    (tmp_path / "set").mkdir()
    two_splits(tmp_path / "else")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    train, test = opened(tmp_path / "set"), opened(tmp_path / "set", "eval")
    assert (values(train), values(test)) == (list(range(7)), [7, 8])


@pytest.mark.parametrize(
    "features,options,labels",
    [
        ({"image_encoded": "png", "image_class_label": 1, "image_class_text": b"dog", "image_format": b"PNG"}, {}, [1]),
        ({"photo": "png", "target": b"dog", "text": b"a dog"}, {}, [0]),
        ({"left": "png", "right": "png", "label": 2}, {"image_column": "left", "label_column": ""}, None),
        ({"left": "png", "right": "png", "age": 2}, {"image_column": "right", "label_column": "age"}, [2]),
        ({"image": "png", "size": 0.5}, {}, None),
    ],
)
def test_usual_names_and_names_of_ones_own(tmp_path, features, options, labels):
    features = {name: png(77) if value == "png" else value for name, value in features.items()}
    write(tmp_path / "a.array_record", [example(**features)])
    source = opened(tmp_path / "a.array_record", **options)
    assert values(source) == [77]
    assert (None if source.labels is None else source.labels.tolist()) == labels


def lost(root):
    two_splits(root)
    (root / "set-train.array_record-00000-of-00002").unlink()


def cut(root):
    write(root / "a.array_record", samples(0, 3))
    os.truncate(root / "a.array_record", 70_000)


def flipped(root):
    write(root / "a.array_record", samples(0, 3))
    content = bytearray((root / "a.array_record").read_bytes())
    content[150] ^= 255
    (root / "a.array_record").write_bytes(content)


def unnamed(root):
    two_splits(root)
    (root / "label.labels.txt").write_text("red\ngreen\n")


def one(*records):
    return lambda root: write(root / "a.array_record", records)


@pytest.mark.parametrize(
    "make,options,message",
    [
        (lambda root: None, {}, "holds no file with .array_record in its name"),
        (lost, {}, "split train: shard 0 of 2 is missing"),
        (cut, {}, "a.array_record: damaged or not an ArrayRecord file .cut short, or another format"),
        (flipped, {}, "a.array_record: damaged or not an ArrayRecord file .*hash mismatch"),
        (unnamed, {}, "label holds class 2, but there are 2 names"),
        (two_splits, {"train_split": "dev"}, "has no split 'dev'; it has .*train"),
        (two_splits, {"image_column": "photo"}, r"no feature 'photo' that .*; its features are id \(bytes\), image"),
        (two_splits, {"label_column": "kind"}, "no feature 'kind', which config.data.label_column names"),
        (one(), {}, "have no features"),
        (one(b"\xff" * 9), {}, "its records are not tf.train.Example"),
        (one(example(size=1, text=b"x")), {}, r"no feature of images .*features are size \(int64\), text \(bytes\)"),
        (one(example(a=png(0), b=png(1))), {}, r"several features of images; .* \['a', 'b'\]"),
        (one(*samples(0, 2), example(image=png(1))), {}, "record 2: its feature label holds , where one label is"),
        (one(*samples(0, 2), example(image=png(1), label=b"x")), {}, "record 2: .* holds b'x'"),
        (one(example(image=png(1), label=0.5)), {}, "label of train: holds float"),
        (one(example(image=png(1), label=[1, 2])), {}, "record 0: its feature label holds 1, 2"),
    ],
)
def test_errors_are_one_line(tmp_path, make, options, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as e:
        opened(tmp_path, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_several_sets_in_one_folder(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "1.0.0" / "set-train.array_record-00000-of-00001", samples(0, 1))
    with pytest.raises(DataError, match="holds several sets; set config.data.source to array_record: and one of"):
        opened(tmp_path)
    assert values(opened(tmp_path / "b")) == [0]


def test_an_image_that_a_record_lost_is_undecodable(tmp_path):
    write(tmp_path / "a.array_record", [*samples(0, 1), example(label=1), example(image=[png(0), png(1)], label=1)])
    source = opened(tmp_path / "a.array_record")
    for index in (1, 2):
        with pytest.raises(decoding.DecodeError, match="its feature image holds no image"):
            source.open(index)
    (tmp_path / "a.array_record").unlink()
    copy = pickle.loads(pickle.dumps(source))
    with pytest.raises(decoding.DecodeError, match="cannot be read"):
        copy.open(0)
