"""ImageNet's tar files: tar files in a tar file, the development kit's labels, damage in one line."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import scipy.io

from crate_jax import config as config_lib, data
from crate_jax.errors import DataError
from tests.data.test_webdataset import cache, png, shard, values  # noqa: F401  # cache: a fixture for all tests

pytestmark = pytest.mark.one_python

WORDNET = {"n01440764": 449, "n01443537": 450, "n02119789": 1}  # the kit numbers them in another order
VALIDATION = ["n02119789", "n01440764", "n02119789", "n01443537"]


def packed(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def training(root):
    """Two images of each class, the classes and images in no order."""
    classes = {}
    for k, number in enumerate(sorted(WORDNET)):
        classes[f"{number}.tar"] = packed({f"{number}_{i}.JPEG": png(10 * k + i) for i in (1, 0)})
    shard(root / "ILSVRC2012_img_train.tar", dict(reversed(classes.items())))


def validation(root):
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": png(100 + i) for i in (2, 1, 3, 4)}
    shard(root / "ILSVRC2012_img_val.tar", files)


def kit(root, truth=None):
    """The kit's layout: synsets with the leaves first, then nodes above them."""
    rows = [*((number, name) for name, number in WORDNET.items()), (1001, "n00001740")]
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    synsets = np.array([[(float(number), name, 0.0)] for number, name in rows], dtype=fields)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    lines = "".join(f"{WORDNET[name]}\n" for name in VALIDATION) if truth is None else truth
    base = "ILSVRC2012_devkit_t12/data"
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        contents = {"ILSVRC2012_validation_ground_truth.txt": lines.encode(), "meta.mat": meta.getvalue()}
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{base}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def everything(root):
    training(root)
    validation(root)
    kit(root)


def opened(path, split="train", **options):
    config = config_lib.base()
    config.data.update({"source": f"imagenet:{path}", "image_size": (16, 16)} | options)
    return data.open_split(config, split)


def test_the_layout_of_the_download(tmp_path):
    everything(tmp_path)
    train, val = (opened(tmp_path, split) for split in ("train", "eval"))
    assert train.class_names == val.class_names == sorted(WORDNET)
    assert values(train) == [0, 1, 10, 11, 20, 21], "the order of a folder of the unpacked images"
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert values(val) == [101, 102, 103, 104] and val.labels.tolist() == [2, 0, 2, 1]
    assert train.name(2) == "ILSVRC2012_img_train.tar/n01443537_0.JPEG"
    assert values(pickle.loads(pickle.dumps(train))) == values(train)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(VALIDATION),
        "ImageId,PredictionString\n"
        + "\n".join(f"ILSVRC2012_val_{i:08d},{VALIDATION[i - 1]} 1 2 3 4" for i in (4, 3, 1, 2)),
    ],
)
def test_labels_in_a_text(tmp_path, text):
    validation(tmp_path)
    (tmp_path / "val.txt").write_text(text)
    source = opened(tmp_path, "eval", label_column="val.txt")
    assert [source.class_names[k] for k in source.labels] == VALIDATION


def test_without_labels(tmp_path, caplog):
    training(tmp_path)
    validation(tmp_path)
    assert opened(tmp_path, "eval").labels is None
    assert "the validation images have no labels, which ILSVRC2012_devkit_t12.tar.gz would tell" in caplog.text
    assert opened(tmp_path).labels is not None and opened(tmp_path, label_column="").labels is None


def test_one_archive_is_enough(tmp_path):
    training(tmp_path)
    assert len(opened(tmp_path)) == 6 and opened(tmp_path, "eval") is None


def within(root):
    """A class's tar file that has no end: what follows it is not its own."""
    part = packed({"n01440764_0.JPEG": png(0)})
    shard(root / "ILSVRC2012_img_train.tar", {"n01440764.tar": part[:1024], "n01443537.tar": part})


def cut(root):
    everything(root)
    os.truncate(root / "ILSVRC2012_img_train.tar", 9_000)


def cut_after_a_class(root):
    training(root)
    path = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset)


def damaged_kit(root):
    everything(root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x" * 100)


def other_classes(root):
    everything(root)
    part = packed({"n01440764_0.JPEG": png(0)})
    shard(root / "ILSVRC2012_img_train.tar", {"n01440764.tar": part})


def few(root):
    everything(root)
    kit(root, "1\n449\n")


def many(root):
    everything(root)
    kit(root, "1\n" * 9)


@pytest.mark.parametrize(
    "make,options,message",
    [
        (lambda root: None, {}, "holds neither ILSVRC2012_img_train.tar nor ILSVRC2012_img_val.tar"),
        (validation, {"label_column": ""}, "has no split 'train'; it has val"),
        (cut, {}, "ILSVRC2012_img_train.tar: damaged or cut short at offset"),
        (cut_after_a_class, {}, "ILSVRC2012_img_train.tar: cut short, as it lacks the zeros"),
        (damaged_kit, {}, "ILSVRC2012_devkit_t12.tar.gz: damaged, or without data/ILSVRC2012_validation_ground_truth"),
        (other_classes, {}, "lacks classes of the validation images: n01443537, n02119789"),
        (few, {}, "tells the class.* of 2 images, not that of ILSVRC2012_val_00000003.JPEG"),
        (many, {}, "tells the class.* of 9 images, but there are 4 in"),
        (everything, {"label_column": "nothing.txt"}, "nothing.txt: cannot be read .No such file"),
        (lambda root: shard(root / "ILSVRC2012_img_train.tar", {"a.JPEG": b""}), {}, "holds a.JPEG, where only tar"),
        (lambda root: shard(root / "ILSVRC2012_img_train.tar", {}), {}, "holds no image"),
        (lambda root: shard(root / "ILSVRC2012_img_val.tar", {"a.JPEG": b""}), {"train_split": "val"}, "no image such"),
    ],
)
def test_errors_are_one_line(tmp_path, make, options, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as e:
        opened(tmp_path, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_class_ends_where_its_tar_file_ends(tmp_path):
    within(tmp_path)
    assert [opened(tmp_path).name(i) for i in range(2)] == ["ILSVRC2012_img_train.tar/n01440764_0.JPEG"] * 2
