"""Arrays in .npz files: which are images and labels, what is refused, and no memory taken before that."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from crate_jax import config as config_lib, data
from crate_jax.data import npz
from crate_jax.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 5, 7, 3), np.uint8)
LABELS = np.arange(9) % 4


def opened(path, split="train", **options):
    config = config_lib.base()
    config.data.update({"source": f"npz:{path}", "image_size": (16, 16)} | options)
    return data.open_split(config, split)


LAYOUTS = {
    "medmnist": dict(train_images=IMAGES, train_labels=LABELS[:, None], val_images=IMAGES[:2], val_labels=LABELS[:2]),
    "keras": dict(x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:2], y_test=LABELS[:2].astype(np.uint8)),
    "plain": dict(images=IMAGES, labels=LABELS, test_images=IMAGES[:2], test_labels=LABELS[:2]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_names(tmp_path, layout, save):
    save(tmp_path / "a.npz", **LAYOUTS[layout])
    train, test = (opened(tmp_path / "a.npz", split) for split in ("train", "eval"))
    assert (len(train), len(test)) == (9, 2) and train.class_names == test.class_names == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(train.labels, LABELS)
    np.testing.assert_array_equal(test.labels, LABELS[:2])
    copy = pickle.loads(pickle.dumps(train))
    for source in (train, copy):
        np.testing.assert_array_equal([source.read(i) for i in range(9)], IMAGES)
    assert len(pickle.dumps(train)) < 2000, "a worker process gets the array, not where it is"


@pytest.mark.parametrize(
    "array,expected",
    [
        (IMAGES[..., 0], np.repeat(IMAGES[..., :1], 3, -1)),
        (IMAGES[..., :1], np.repeat(IMAGES[..., :1], 3, -1)),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES),
        (np.asfortranarray(IMAGES), IMAGES),
    ],
)
def test_layouts_of_the_axes(tmp_path, array, expected):
    np.savez(tmp_path / "a.npz", x=array)
    source = opened(tmp_path / "a.npz")
    np.testing.assert_array_equal([source.read(i) for i in range(9)], expected)
    assert source.labels is None and opened(tmp_path / "a.npz", "eval") is None


def test_a_file_for_each_split_and_names_of_ones_own(tmp_path):
    names = np.array(["dog", "cat", "Eel"])
    pickled = np.array([None, 1], object)  # and not used
    np.savez(tmp_path / "train.npz", pictures=IMAGES, animal=names[LABELS % 3], y=LABELS, z=pickled)
    np.savez(tmp_path / "test.npz", pictures=IMAGES[:2], animal=names[[0, 1]], y=LABELS[:2])
    own = {"image_column": "pictures", "label_column": "animal"}
    train, test = (opened(tmp_path, split, **own) for split in ("train", "eval"))
    assert train.class_names == ["Eel", "cat", "dog"]
    np.testing.assert_array_equal(train.labels[:3], [2, 1, 0])
    np.testing.assert_array_equal(test.labels, [2, 1])
    assert opened(tmp_path, image_column="pictures", label_column="").labels is None


def test_what_macos_leaves_beside_a_file_is_not_read(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "._train.npz").write_bytes(bytes(range(256)))
    assert len(opened(tmp_path)) == 9


def test_labels_in_bytes_are_utf_8(tmp_path):
    """Names with a mark in place of wrong bytes would be one class."""
    for name, encoding in (("utf-8", "utf-8"), ("latin", "latin-1")):
        texts = [name.encode(encoding) for name in ("Bär", "Bör", "Igel")]
        np.savez(tmp_path / f"{name}.npz", images=IMAGES, labels=np.array(texts * 3))
    assert opened(tmp_path / "utf-8.npz").class_names == ["Bär", "Bör", "Igel"]
    with pytest.raises(DataError, match=r"latin.npz: labels: the label b'B\\xe4r' is not UTF-8; write it in UTF-8"):
        opened(tmp_path / "latin.npz")


def test_the_name_of_a_file_may_be_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"B\xe4r.npz")
    np.savez(path, images=IMAGES, labels=LABELS)
    source = opened(path)
    assert len(source) == 9 and source.fingerprint() == opened(path).fingerprint()


def test_a_folder_of_several_sets_is_one_line(tmp_path):
    for name in ("blood", "path"):
        np.savez(tmp_path / f"{name}.npz", **LAYOUTS["medmnist"])
    with pytest.raises(DataError, match="blood.npz and .*path.npz both hold the split train; name one file"):
        opened(tmp_path)


def test_labels_that_are_not_public_are_no_labels(tmp_path):
    np.savez(tmp_path / "a.npz", **LAYOUTS["medmnist"], test_images=IMAGES, test_labels=np.full(9, -1))
    assert len(opened(tmp_path / "a.npz", "eval")) == 2
    assert opened(tmp_path / "a.npz", "eval", eval_split="test").labels is None


def test_the_fingerprint_knows_pixels_labels_and_names(tmp_path):
    changed = IMAGES.copy()
    changed[3, 2, 1, 0] ^= 1
    prints = set()
    for i, arrays in enumerate([{"x": IMAGES}, {"images": IMAGES}, {"x": changed}, {"x": IMAGES, "y": LABELS}]):
        (tmp_path / str(i)).mkdir()
        np.savez(tmp_path / str(i) / "a.npz", **arrays)
        prints.add(opened(tmp_path / str(i) / "a.npz").fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    "arrays,options,message",
    [
        ({"a": IMAGES}, {}, r"no array of images; it holds a uint8 \(9, 5, 7, 3\)"),
        ({"x": IMAGES / 255}, {}, r"x float64 \(9, 5, 7, 3\) must be images, uint8"),
        ({"x": IMAGES[..., :2]}, {}, "must be images"),
        ({"x": IMAGES[:, :3]}, {}, "may be either"),
        ({"x": IMAGES[:0]}, {}, "holds no image"),
        ({"x": IMAGES}, {"max_pixels": 34}, "more than config.data.max_pixels=34"),
        ({"x": IMAGES, "images": IMAGES}, {}, "both x .* and images .* may be meant"),
        ({"x": IMAGES, "y": LABELS[:8]}, {}, "their numbers differ"),
        ({"x": IMAGES, "y": np.eye(9)}, {}, r"y: has the shape \(9, 9\); labels are one class per image"),
        ({"x": IMAGES, "y": LABELS / 2}, {}, "y: holds float64"),
        ({"x": IMAGES, "y": LABELS - 1}, {}, "y: holds numbers from -1 to 2"),
        ({"x": IMAGES, "y": LABELS << 20}, {}, "y: holds numbers from 0 to 3145728"),
        ({"x": IMAGES, "y": LABELS, "y_test": LABELS.astype(str)}, {}, "some labels are texts"),
        ({"x": IMAGES, "y": LABELS.astype(object)}, {}, "y holds Python objects, and pickles are not read"),
        ({"x": IMAGES}, {"label_column": "kind"}, "has no array 'kind'"),
        ({"x": IMAGES}, {"train_split": "fold1"}, "has no split 'fold1'; it has train"),
        ({"x_test": IMAGES}, {}, "has no split 'train'; it has test"),
    ],
)
def test_errors_are_one_line(tmp_path, arrays, options, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as e:
        opened(tmp_path / "a.npz", **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def zipped(header, body, kind=zipfile.ZIP_DEFLATED):
    """An .npz file with an array `x` of this header and these bytes."""
    npy, out = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": header})
    with zipfile.ZipFile(out, "w", kind) as archive:
        archive.writestr("x.npy", npy.getvalue() + body)
    return out.getvalue()


@pytest.mark.parametrize(
    "content,message",
    [
        (b"hello", "not an .npz file, or damaged"),
        (zipped((9, 5, 7), bytes(99)), "must have 315 bytes, but has 99"),
        (zipped((2**40, 5, 7), bytes(99)), "must have 38482906972160 bytes"),
        (zipped((9, 5, 7), bytes(315))[:-40], "not an .npz file, or damaged"),
        (zipped((999, 5, 7), bytes(34965)), "more than half of this machine's memory; save it with numpy.savez"),
    ],
)
def test_damaged_files_and_bombs(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(npz, "machine_memory", lambda: 60_000)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.npz")
    with pytest.raises(DataError, match="cannot be read .No such file"):
        opened(tmp_path / "b.npz")
    with pytest.raises(DataError, match="holds no .npz file"):
        (tmp_path / "empty").mkdir()
        opened(tmp_path / "empty")


def test_a_damaged_array_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (99, 5, 7, 3), np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[-300] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="the array x cannot be read"):
        opened(tmp_path / "a.npz").read(0)
