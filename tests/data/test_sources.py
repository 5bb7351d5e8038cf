"""The data sets: what is found, how it is split and labelled, and what is said when it is not there."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.errors import ConfigError, DataError


def configured(source, **options):
    config = config_lib.base()
    config.data.update({"source": str(source), "image_size": (16, 16)} | options)
    return config


def write(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def tree(root, names):
    for value, name in enumerate(names):
        write(root / name, value)
    return f"folder:{root}"


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_image_folder(tmp_path):
    source = data.open_split(configured(tree(tmp_path, ["b/2.png", "a/1.PNG", "a/x/0.jpeg"])), "train")
    assert names(source) == ["a/1.PNG", "a/x/0.jpeg", "b/2.png"]
    assert source.class_names == ["a", "b"]
    np.testing.assert_array_equal(source.labels, np.array([0, 0, 1], np.int32))
    np.testing.assert_array_equal(source.labels_of([2, 0]), [1, 0])
    assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("found", [["a/1.png", "b/2.png", "3.png"], ["a/1.png", "a/2.png"], ["1.png", "2.png"]])
def test_trees_without_classes_have_no_labels(tmp_path, found):
    source = data.open_split(configured(tree(tmp_path, found)), "train")
    assert len(source) == len(found) and source.labels is None and source.class_names is None
    assert source.labels_of([0]) is None
    with pytest.raises(DataError, match="needs labels"):
        data.open_split(configured(f"folder:{tmp_path}"), "train", labels_required=True)


def test_what_counts_as_an_image(tmp_path):
    kinds = ["jpg", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm"]
    tree(tmp_path, [f"{kind}.{kind}" for kind in kinds])
    (tmp_path / "notes.txt").write_text("no image")
    write(tmp_path / ".hidden.png")
    write(tmp_path / ".cache" / "thumbnail.png")
    write(tmp_path / "folder.png" / "inside.png")
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == sorted([f"{kind}.{kind}" for kind in kinds] + ["folder.png/inside.png"])


def test_links_that_lead_nowhere_are_undecodable_files(tmp_path):
    write(tmp_path / "good.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nowhere.png").symlink_to("missing.png")
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["good.png", "itself.png", "nowhere.png"]
    for index in (1, 2):
        with pytest.raises(data.DecodeError):
            source.open(index)


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "set"
    write(root / "a" / "0.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    assert names(data.open_split(configured(f"folder:{root}"), "train")) == ["a/0.png", "b/1.png"]


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"\xff\xe4.png")
    write(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", tmp_path / name)
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == [name] and source.read(0).shape == (8, 8, 3)


SPLITS = ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"]


@pytest.mark.parametrize(
    "extra,options,expected",
    [
        ([], {}, "val"),
        (["test/a/5.png", "test/b/6.png"], {}, "test"),
        (["test/a/5.png", "test/b/6.png"], {"eval_split": "val"}, "val"),
        ([], {"eval_split": ""}, None),
        ([], {"train_split": "val", "eval_split": "train"}, "train"),
    ],
)
def test_splits(tmp_path, extra, options, expected):
    config = configured(tree(tmp_path, SPLITS + extra), **options)
    assert data.open_split(config, "train").root == str(tmp_path / config.data.train_split)
    source = data.open_split(config, "eval")
    assert source is None if expected is None else source.root == str(tmp_path / expected)


def test_a_tree_without_splits_has_no_evaluation_split(tmp_path):
    config = configured(tree(tmp_path, ["a/1.png", "b/2.png"]))
    assert len(data.open_split(config, "train")) == 2 and data.open_split(config, "eval") is None


def test_training_on_a_tree_that_holds_a_test_split_is_announced(tmp_path, caplog):
    assert len(data.open_split(configured(tree(tmp_path, ["a/1.png", "test/2.png"])), "train")) == 2
    assert "test included" in caplog.text


@pytest.mark.parametrize(
    "found,options,split,message",
    [
        ([], {}, "train", "cannot be read .No such file"),
        (["train/notes.txt"], {}, "train", "no images found"),
        (["train/a/1.png", "val/notes.txt"], {}, "eval", "no images found"),
        (["a/1.png"], {"train_split": "trian"}, "train", "no sub-folder 'trian'"),
        (["train/1.png"], {"eval_split": "tset"}, "eval", "no sub-folder 'tset'"),
        (["a/1.png", "test/1.png"], {"eval_split": "test"}, "eval", "no 'train'"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], {}, "eval", "lacks b and adds c"),
    ],
)
def test_folder_errors_are_one_line(tmp_path, found, options, split, message):
    root = tmp_path / "set"
    for name in found:
        if name.endswith(".txt"):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text("")
        else:
            write(root / name)
    with pytest.raises(DataError, match=message) as e:
        data.open_split(configured(f"folder:{root}", **options), split)
    assert "\n" not in str(e.value) and str(root) in str(e.value)


def test_a_file_is_not_a_folder(tmp_path):
    write(tmp_path / "1.png")
    with pytest.raises(DataError, match="not a folder"):
        data.open_split(configured(f"folder:{tmp_path / '1.png'}"), "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(DataError, match="a: cannot be read .Permission denied"):
        data.open_split(configured(f"folder:{tmp_path}"), "train")


def test_fingerprint_notices_changed_data_but_not_a_moved_folder(tmp_path):
    def fingerprint(root):
        return data.open_split(configured(f"folder:{root}"), "train").fingerprint()

    tree(tmp_path / "one", ["a/1.png", "b/2.png"])
    tree(tmp_path / "two", ["a/1.png", "b/2.png"])
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    write(tmp_path / "two" / "b" / "2.png", size=(9, 9))
    assert fingerprint(tmp_path / "two") != first, "another size"
    (tmp_path / "one" / "b" / "2.png").rename(tmp_path / "one" / "b" / "3.png")
    assert fingerprint(tmp_path / "one") != first, "another name"


def test_digits():
    train, test = (data.open_split(configured("digits"), split, labels_required=True) for split in ("train", "eval"))
    assert (len(train), len(test)) == (1437, 360)
    images = {source.read(i).tobytes() for source in (train, test) for i in range(len(source))}
    assert len(images) == 1797, "the splits share no image"
    assert train.read(0).shape == (8, 8, 3) and train.read(0).dtype == np.uint8
    assert max(train.read(i).max() for i in range(50)) == 255
    for source in (train, test):
        assert source.labels.dtype == np.int32 and set(source.labels) == set(range(10))
    assert train.fingerprint() == data.open_split(configured("digits"), "train").fingerprint() != test.fingerprint()


def test_synthetic():
    config = configured("synthetic", image_size=(12, 20))
    train, test = (data.open_split(config, split, labels_required=True) for split in ("train", "eval"))
    assert train.read(5).shape == (12, 20, 3) and train.read(5).dtype == np.uint8
    np.testing.assert_array_equal(train.read(5), data.open_split(config, "train").read(5))
    assert len({source.read(i).tobytes() for source in (train, test) for i in range(100)}) == 200
    assert train.read(5).std() > 10
    np.testing.assert_array_equal(np.unique(train.labels), np.arange(10))


@pytest.mark.parametrize("name", ["digits", "synthetic", "folder"])
def test_sources_are_picklable(name, tmp_path):
    kind = tree(tmp_path, ["a/1.png", "b/2.png"]) if name == "folder" else name
    source = data.open_split(configured(kind), "train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(1), source.read(1))
    assert (copy.fingerprint(), copy.name(1)) == (source.fingerprint(), source.name(1))


def test_unknown_source_and_split():
    with pytest.raises(ConfigError, match="digits, folder:PATH, tfds:NAME or synthetic"):
        data.open_split(configured("cifar"), "train")
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        data.open_split(configured("digits"), "test")
