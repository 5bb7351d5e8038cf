"""The data sets: what is found, how it is split and labelled, and what is said when it is not there."""

from __future__ import annotations

import os
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.data import folder, scenes
from crate_jax.data.sources import digits
from crate_jax.data.undecodable import Undecodable
from crate_jax.errors import ConfigError, DataError
from tests.conftest import ROOT


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


LOOSE = ["a/1.png", "b/2.png", "3.png", "4.png"]  # as many images beside the folders as in them


@pytest.mark.parametrize("found", [LOOSE, ["a/1.png", "a/2.png"], ["1.png", "2.png"]])
def test_trees_without_classes_have_no_labels(tmp_path, found):
    source = data.open_split(configured(tree(tmp_path, found)), "train")
    assert len(source) == len(found) and source.labels is None and source.class_names is None
    assert source.labels_of([0]) is None
    with pytest.raises(DataError, match="needs labels"):
        data.open_split(configured(f"folder:{tmp_path}"), "train", labels_required=True)


def test_images_without_labels_beside_class_folders_are_said_to_take_the_labels_away(tmp_path, caplog):
    data.open_split(configured(tree(tmp_path, LOOSE)), "train")
    assert "no labels, as 2 images lie beside the folders of the classes" in caplog.text


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_stray_image_is_named_and_left_out(tmp_path, split, caplog):
    found = [f"{part}/{name}" for part in ("train", "test") for name in ("b/1.png", "c/2.png", "a/3.png", "logo.png")]
    source = data.open_split(configured(tree(tmp_path, found)), split)
    assert names(source) == ["a/3.png", "b/1.png", "c/2.png"] and source.labels.tolist() == [0, 1, 2]
    assert "left out images beside the folders of the classes: logo.png" in caplog.text
    caplog.clear()
    data.open_split(configured(f"folder:{tmp_path}"), split)
    assert "logo.png" not in caplog.text, "said once"


def test_strays_may_be_many_if_they_are_a_small_share(tmp_path):
    source = data.open_split(configured(tree(tmp_path, LOOSE[:2] + [f"{i}.png" for i in range(7)])), "train")
    assert source.labels is None
    tree(tmp_path, [f"a/more{i}.png" for i in range(68)])
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert source.labels is None, "7 of 77 are not below a tenth of the others"
    source = data.open_split(configured(tree(tmp_path, ["a/last.png"])), "train")
    assert len(source) == 71 and source.class_names == ["a", "b"]


def test_litter_is_left_out(tmp_path, caplog):
    litter = ["__MACOSX/a/._1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", "$RECYCLE.BIN/x.png", "lost+found/y.png"]
    hidden = [".ipynb_checkpoints/1.png", "a/._1.png"]
    source = data.open_split(configured(tree(tmp_path, ["a/1.png", "b/2.png", *litter, *hidden])), "train")
    for name in (".DS_Store", "a/Thumbs.db", "b/desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["a/1.png", "b/2.png"] and source.class_names == ["a", "b"]
    assert len(caplog.messages) == 1
    assert "folders that are not part of the set: $RECYCLE.BIN, __MACOSX, a/@eaDir, lost+found" in caplog.text


def test_workdirs_among_the_images_are_not_read(tmp_path, caplog):
    """A run's pictures are not photos: the next run, and the same run's next start, would have more images."""
    photos = ["a/1.png", "b/2.png"]
    run = ["runs/one/pictures/3.png", "runs/one/curve.png", "runs/one/checkpoints/1/x", "pictures/4.png"]
    tree(tmp_path, [*photos, "c/5.png"])
    (tmp_path / "c" / ".lock").touch()  # by itself it is another program's
    for name in run:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a" / "1.png", tmp_path / name)
    (tmp_path / "runs" / "one" / ".lock").touch()
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["a/1.png", "b/2.png", "c/5.png", "pictures/4.png"]
    for name in (".lock", "starts.jsonl"):  # the images' folder is a workdir itself
        (tmp_path / name).touch()
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["a/1.png", "b/2.png", "c/5.png"]
    assert "folders that are not part of the set: pictures, runs/one" in caplog.text


def test_other_files_are_counted_and_a_class_without_an_image_is_named(tmp_path, caplog):
    tree(tmp_path, ["a/1.png", "c/2.png"])
    for name in ("b/1.heic", "b/2.HEIC", "a/notes.txt", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert data.open_split(configured(f"folder:{tmp_path}"), "train").class_names == ["a", "c"]
    assert len(caplog.messages) == 1
    assert "left out 4 other files: 2 .heic, 1 without ending, 1 .txt" in caplog.text
    assert "folders without a readable image, which are not classes: b" in caplog.text


def test_what_counts_as_an_image(tmp_path):
    kinds = ["jpg", "jpeg", "jpe", "jfif", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"]
    for kind in kinds:
        write(tmp_path / "any.png")
        Image.open(tmp_path / "any.png").convert("L").save(tmp_path / f"{kind}.{kind}")
        (tmp_path / "any.png").unlink()
    (tmp_path / "notes.txt").write_text("no image")
    write(tmp_path / ".hidden.png")
    write(tmp_path / ".cache" / "thumbnail.png")
    write(tmp_path / "folder.png" / "inside.png")
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == sorted([f"{kind}.{kind}" for kind in kinds] + ["folder.png/inside.png"])
    assert all(source.read(i).shape == (8, 8, 3) for i in range(len(source)))
    (tmp_path / "pgm.pgm").rename(tmp_path / "pgm.PGM")
    assert "pgm.PGM" in names(data.open_split(configured(f"folder:{tmp_path}"), "train"))


def test_links_that_lead_nowhere_are_undecodable_files(tmp_path):
    write(tmp_path / "good.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nowhere.png").symlink_to("missing.png")
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["good.png", "itself.png", "nowhere.png"]
    for index in (1, 2):
        with pytest.raises(data.DecodeError):
            source.open(index)


def test_links_that_lead_back_are_not_followed(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "set"
    write(root / "a" / "0.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    assert names(data.open_split(configured(f"folder:{root}"), "train")) == ["a/0.png", "b/1.png"]


def test_both_splits_number_the_same_classes(tmp_path):
    """Folders that hold no image of the training split are not classes of the evaluation split, either."""
    root = tmp_path / "set"
    tree(root, [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(3)])
    (root / "train" / "aaa").symlink_to(".")  # leads back
    tree(root / "train", ["a_run/curve.png", "pictures/4.png"])
    for run in (root / "train" / "a_run", root / "train"):
        (run / ".lock").touch()
        (run / "starts.jsonl").touch()
    train, test = (data.open_split(configured(f"folder:{root}"), split) for split in ("train", "eval"))
    assert train.class_names == test.class_names == ["cat", "dog"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "theirs,message", [(["cat", "emu"], "class 1 is dog in one and emu in the other"), (["cat"], "are 2 and 1 classes")]
)
def test_splits_of_different_classes_are_not_compared(theirs, message):
    train, test = digits("train"), digits("eval")
    data.require_same_classes(train, test)
    train.class_names, test.class_names = ["cat", "dog"], theirs
    with pytest.raises(
        DataError, match=f"training split 'train' and of the evaluation split 'eval' differ: .*{message}"
    ):
        data.require_same_classes(train, test)
    test.class_names = None
    data.require_same_classes(train, test)


def test_the_classes_of_training_are_known_without_listing_its_images(tmp_path, monkeypatch):
    path = tree(tmp_path, [f"{split}/{name}/0.png" for split in ("train", "test") for name in ("cat", "dog")])
    for i in range(300):
        (tmp_path / "train" / "cat" / f"{i:03d}.png").touch()
    seen = []
    is_dir = folder._is_dir
    monkeypatch.setattr(folder, "_is_dir", lambda entry: seen.append(entry.name) or is_dir(entry))
    assert data.open_split(configured(path), "eval").class_names == ["cat", "dog"]
    assert len(seen) < 30


@pytest.mark.parametrize("link,target", [("a", "b"), ("b", "a")])
def test_a_class_that_is_a_link_to_another_one_stays_a_class(tmp_path, link, target):
    """Whichever of the two the file system lists first."""
    write(tmp_path / target / "0.png")
    write(tmp_path / "c" / "1.png")
    (tmp_path / link).symlink_to(target)
    (tmp_path / "c" / "more").symlink_to(tmp_path / target)
    source = data.open_split(configured(f"folder:{tmp_path}"), "train")
    assert names(source) == ["a/0.png", "b/0.png", "c/1.png", "c/more/0.png"]
    assert source.class_names == ["a", "b", "c"] and source.labels_of(np.arange(4)).tolist() == [0, 1, 2, 2]


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


OTHER_NAMES = [
    ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("training_set", "test_set"), ("train", "valid"),
    ("Train Images", "Validation Images"), ("train2017", "val2017"), ("train", "dev"), ("train", "test1"),
    ("seg_train", "seg_test"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
]  # fmt: skip


@pytest.mark.parametrize("train,test", OTHER_NAMES)
def test_splits_by_other_names(tmp_path, train, test, caplog):
    caplog.set_level("INFO")
    config = configured(tree(tmp_path, [f"{part}/{name}" for part in (train, test) for name in ("a/1.png", "b/2.png")]))
    sources = [data.open_split(config, split, labels_required=True) for split in ("train", "eval")]
    assert [source.root for source in sources] == [str(tmp_path / train), str(tmp_path / test)]
    assert [source.split for source in sources] == [train, test]
    assert all(source.class_names == ["a", "b"] for source in sources)
    assert train == "train" or f"training on the sub-folder {train}" in caplog.text
    assert f"the evaluation split is {test}" in caplog.text


def test_folders_beside_the_training_split_are_said_to_be_left_out(tmp_path, caplog):
    """``train`` may be the class of trains."""
    path = tree(tmp_path, [f"{name}/{i}.png" for name in ("train", "plane", "bus") for i in range(3)])
    (tmp_path / "empty").mkdir()
    assert len(data.open_split(configured(path), "train")) == 3
    assert f"{tmp_path}: trains on train only; other folders with images are left out: bus, plane;" in caplog.text
    source = data.open_split(configured(path, train_split=""), "train")
    assert len(source) == 9 and source.class_names == ["bus", "plane", "train"]
    shutil.rmtree(tmp_path / "plane")
    tree(tmp_path, ["val/a/0.png", "Testing/a/0.png"])
    caplog.clear()
    data.open_split(configured(path, eval_split="bus"), "train")
    data.open_split(configured(path, train_split="bus"), "train")
    assert not caplog.records


def test_a_split_may_lie_in_a_folder_of_its_own_name(tmp_path):
    found = [
        f"{part}/{name}" for part in ("seg_train/seg_train", "seg_test/Seg_Test") for name in ("a/1.png", "b/2.png")
    ]
    config = configured(tree(tmp_path, [*found, "seg_pred/seg_pred/1.png"]))
    train, test = (data.open_split(config, split, labels_required=True) for split in ("train", "eval"))
    assert names(train) == names(test) == ["a/1.png", "b/2.png"]
    write(tmp_path / "seg_train" / "1.png")
    assert len(data.open_split(config, "train")) == 3, "not an archive's folder, if something lies beside it"


@pytest.mark.parametrize(
    "unlabelled", [["test/5.png", "test/6.png"], ["test/unknown/5.png"], ["test/a/5.png", "test/x/6.png"], []]
)
def test_the_evaluation_split_is_the_first_with_labels(tmp_path, unlabelled, caplog):
    tree(tmp_path, SPLITS + unlabelled)
    (tmp_path / "test").mkdir(exist_ok=True)
    source = data.open_split(configured(f"folder:{tmp_path}"), "eval")
    assert source.root == str(tmp_path / "val") and source.class_names == ["a", "b"] and source.split == "val"
    assert "the evaluation split is val; passed over: " in caplog.text and "test" in caplog.text


def test_an_evaluation_split_without_labels_is_taken_if_there_is_no_other(tmp_path):
    source = data.open_split(configured(tree(tmp_path, [*SPLITS[:2], "valid/3.png", "val/4.png"])), "eval")
    assert source.root == str(tmp_path / "val") and source.class_names is None


@pytest.mark.parametrize("found,labels", [(["a/1.png", "c/2.png"], [0, 2]), (["b/1.png", "b/2.png"], [1, 1])])
def test_labels_go_by_the_classes_of_training(tmp_path, found, labels, caplog):
    train = [f"train/{name}/1.png" for name in "abc"]
    source = data.open_split(configured(tree(tmp_path, train + [f"val/{name}" for name in found])), "eval")
    assert source.class_names == ["a", "b", "c"] and source.labels.tolist() == labels
    absent = [name for k, name in enumerate("abc") if k not in labels]
    assert f"has no image of {len(absent)} of 3 classes: {', '.join(absent)}" in caplog.text


@pytest.mark.parametrize("other", ["cat", "Cat ", "\uff23at"])
def test_classes_of_almost_one_name_are_told(tmp_path, other, caplog):
    source = data.open_split(
        configured(tree(tmp_path, ["train/Cat/1.png", f"train/{other}/2.png", "train/d/3.png"])), "train"
    )
    assert len(source.class_names) == 3
    assert f"names that differ only in case or encoding are classes of their own: Cat, {other}" in caplog.text


def test_splits_are_no_classes(tmp_path, caplog):
    tree(tmp_path, ["Test/a/1.png", "valid/a/2.png"])
    with pytest.raises(DataError, match="Test, valid are names of splits, not of classes"):
        data.open_split(configured(f"folder:{tmp_path}"), "train")
    whole = configured(f"folder:{tmp_path}", train_split="")
    source = data.open_split(whole, "train")
    assert len(source) == 2 and source.class_names is None
    assert "training on all of it, Test, valid included, without labels" in caplog.text
    with pytest.raises(DataError, match="Test, valid are names of splits"):
        data.open_split(
            configured(tree(tmp_path / "one", ["all/Test/1.png", "all/valid/2.png"]), train_split="all"), "train"
        )


def test_a_tree_without_splits_has_no_evaluation_split(tmp_path):
    config = configured(tree(tmp_path, ["a/1.png", "b/2.png"]))
    assert len(data.open_split(config, "train")) == 2 and data.open_split(config, "eval") is None


def test_training_on_a_tree_that_holds_a_test_split_is_announced(tmp_path, caplog):
    assert len(data.open_split(configured(tree(tmp_path, ["a/1.png", "test/2.png"])), "train")) == 2
    assert "test included" in caplog.text
    data.open_split(configured(tree(tmp_path / "below", ["a/Test/1.png", "a/x/1.png", "b/dev/2.png"])), "train")
    assert "training on all of it, a/Test, b/dev included" in caplog.text


def test_names_of_other_files_and_classes_are_escaped(tmp_path, caplog):
    bad = "\x1b[31m\n\udcff\u202e"
    shown = "\\x1b[31m\\n\\udcff\\u202e"
    config = configured(
        tree(tmp_path, [f"{part}/{name}" for part in ("train", "test") for name in ("a/1.png", f"{bad}/2.png")])
    )
    assert data.open_split(config, "train").class_names == [shown, "a"]
    write(tmp_path / "train" / f"stray{bad}.png")
    (tmp_path / "train" / "a" / f"x.{bad}").write_bytes(b"")
    (tmp_path / "train" / "a" / f"{bad}.png").write_bytes(b"")
    source = data.open_split(config, "train")
    record = Undecodable(source, 0.9)
    record.add([(1, f"why{bad}")], 3)
    assert (
        f"stray{shown}.png" in caplog.text
        and f"1 .{shown}" in caplog.text
        and f"image train/a/{shown}.png: why{shown}" in caplog.text
    )
    (tmp_path / "test" / bad).rename(tmp_path / "test" / f"x{bad}")
    with pytest.raises(DataError) as e:
        data.open_split(config, "eval")
    assert f"adds x{shown}" in str(e.value)
    for text in (*caplog.messages, str(e.value), record.named()):
        assert text.isprintable()


@pytest.mark.parametrize(
    "found,options,split,message",
    [
        ([], {}, "train", "there is no folder"),
        (["train/notes.txt"], {}, "train", "no images found"),
        (["train/a/1.png", "val/notes.txt"], {}, "eval", "no images found"),
        (["a/1.png"], {"train_split": "trian"}, "train", "no sub-folder 'trian'"),
        (["train/1.png"], {"eval_split": "tset"}, "eval", "no sub-folder 'tset'"),
        (["a/1.png", "test/1.png"], {"eval_split": "test"}, "eval", "no 'train'"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], {}, "eval", "lacks b and adds c"),
        (
            ["train/caf\xe9/1.png", "train/b/1.png", "val/cafe\u0301/1.png", "val/b/1.png"],
            {},
            "eval",
            "differ from them only in case, spaces or the encoding of letters, .*: cafe\u0301; rename",
        ),
        (
            ["train/Cat/1.png", "train/b/1.png", "val/cat/1.png", "val/c/1.png"],
            {},
            "eval",
            "lacks Cat, b and adds c, cat",
        ),
        (["train/1.png"], {"train_split": "trian"}, "train", "no sub-folder 'trian', .*; there is train"),
        (["Train/1.png", "training/1.png"], {}, "train", "has the splits Train, training; set config.data.train_split"),
        (["all/train/1.png", "all/test/1.png"], {}, "train", "the splits test, train lie one folder deeper; .*/all"),
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


def test_scenes():
    """A digit of any colour on a piece of a photograph, the same each time, none of them in both splits."""
    config = configured("scenes", image_size=(28, 36))
    train, test = (data.open_split(config, split, labels_required=True) for split in ("train", "eval"))
    images = np.stack([train.read(i) for i in range(40)])
    assert images.shape == (40, 28, 36, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[13], data.open_split(config, "train").read(13))
    assert len({x.tobytes() for x in images} | {test.read(i).tobytes() for i in range(40)}) == 80
    for source, count in ((train, 6000), (test, 1000)):
        assert len(source) == count and source.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(source.labels), np.full(10, count // 10))
    assert train.fingerprint() == data.open_split(config, "train").fingerprint() != test.fingerprint()
    assert train.fingerprint() != data.open_split(configured("scenes", image_size=(28, 28)), "train").fingerprint()
    with pytest.raises(IndexError):
        test.read(1000)


def test_a_digit_stands_out_from_its_background_as_lighter_or_darker(monkeypatch):
    """Here all digits are squares without a gap, on a plain background."""
    monkeypatch.setattr(scenes, "digits", lambda split: shaded(split, lambda labels: 255 + 0 * labels))
    monkeypatch.setattr(scenes, "DETAIL", 1)
    source = data.open_split(configured("scenes", image_size=(20, 28)), "train")
    sides, lighter, places = set(), 0, set()
    for i in range(60):
        image = source.read(i).astype(np.float32)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        digit = np.abs(image - np.median(corners, 0)).sum(-1) > 40
        colour, background = np.median(image[digit], 0), np.median(corners, 0)
        difference = float((colour - background) @ scenes.LUMINANCE)
        assert abs(difference) > scenes.CONTRAST - 3
        lighter += difference > 0
        sides.add(int(np.sqrt(digit.sum())))
        places.add(int(np.flatnonzero(digit.any(0))[0]))
    assert 8 < lighter < 52 and len(sides) >= 3 and len(places) >= 6


def test_a_scene_holds_the_digit_of_its_class(monkeypatch):
    """Here the digits of a class are squares of one opacity; the colour is white and the background black."""
    monkeypatch.setattr(scenes, "digits", lambda split: shaded(split, lambda labels: 10 * (1 + labels)))
    monkeypatch.setattr(scenes.SceneSource, "_background", lambda self, rng: np.zeros((*self._size, 3), np.float32))
    monkeypatch.setattr(scenes.SceneSource, "_colour", lambda self, rng, background: np.full(3, 255, np.float32))
    source = data.open_split(configured("scenes"), "eval")
    for i in (3, 8, 19):
        assert source.read(i).max() == pytest.approx(1.5 * 10 * (1 + i % 10), abs=1)


def shaded(split, opacity):
    """Digits of one opacity, which is a function of their labels."""
    source = digits(split)
    source._images[...] = opacity(source.labels)[:, None, None, None]
    return source


@pytest.mark.parametrize("name", ["digits", "scenes", "synthetic", "folder"])
def test_sources_are_picklable(name, tmp_path):
    kind = tree(tmp_path, ["a/1.png", "b/2.png"]) if name == "folder" else name
    source = data.open_split(configured(kind), "train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(1), source.read(1))
    assert (copy.fingerprint(), copy.name(1)) == (source.fingerprint(), source.name(1))


def test_short_forms_are_written_out(tmp_path, monkeypatch):
    """A bare folder and one side of a square; the names of our own sets stay theirs, whatever lies beside them."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "digits", "a:b"):
        (tmp_path / name).mkdir()
    for given, source in (("photos", "folder:photos"), (str(tmp_path), f"folder:{tmp_path}"), ("digits", "digits")):
        c = configured(given, image_size=(48,))
        c.steps = 1
        config_lib.validate(c)
        assert (c.data.source, c.data.image_size) == (source, (48, 48))
    for given in ("nothing", "a:b"):
        with pytest.raises(
            ConfigError, match=f"config.data.source='{given}': must be one of .*, or the path of a folder"
        ):
            config_lib.validate(configured(given))


@pytest.mark.parametrize("text", ["cifar", "cifar:x", "", ":x", "folder", "folder:", "digits:", "digits:x"])
def test_a_text_that_has_the_form_of_no_source(text):
    assert not data.is_source(text)
    with pytest.raises(ConfigError, match="digits, folder:PATH, .*, tfds:NAME, synthetic"):
        data.open_split(configured(text), "train")


def test_the_page_lists_every_source():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/data.md").read_text(), re.MULTILINE)
    listed = {name: bool(rest) for row in rows for name, rest in re.findall(r"`([a-z]\w*)(:\w+)?`", row)}
    assert listed == {name: bool(row.rest) for name, row in data.SOURCES.items()}


def test_unknown_split():
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        data.open_split(configured("digits"), "test")
