"""Shards of WebDataset: what makes a sample, random access by the index, what is kept, damage in one line."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.data import decoding, tar
from crate_jax.data.folder import say_once
from crate_jax.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (7, 5), (value, 0, 255 - value)).save(out, "PNG")
    return out.getvalue()


def shard(path, files):
    """A tar file of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(first, count):
    """Images of the colours `first` ... with the class i % 3, as WebDataset's writer orders them."""
    files = {}
    for i in range(first, first + count):
        files |= {f"a/{i:04d}.cls": b"%d" % (i % 3), f"a/{i:04d}.png": png(i), f"a/{i:04d}.txt": b"a text"}
    return files


def two_splits(root):
    shard(root / "train-000000.tar", samples(0, 4))
    shard(root / "train-000001.tar", samples(4, 3))
    shard(root / "val-000000.tar", samples(7, 2))


def opened(path, split="train", **options):
    config = config_lib.base()
    config.data.update({"source": f"webdataset:{path}", "image_size": (16, 16)} | options)
    return data.open_split(config, split)


def values(source):
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("pattern", ["", "{train-000000,train-000001,val-000000}.tar", "*.tar"])
def test_shards_of_two_splits(tmp_path, pattern):
    two_splits(tmp_path)
    train, test = (opened(tmp_path / pattern, split) for split in ("train", "eval"))
    assert (values(train), values(test)) == (list(range(7)), [7, 8])
    assert train.class_names == test.class_names == ["0", "1", "2"]
    np.testing.assert_array_equal(train.labels, np.arange(7) % 3)
    np.testing.assert_array_equal(test.labels_of([1]), [8 % 3])
    assert [train.name(i) for i in (0, 3, 4)] == [
        "train-000000.tar/a/0000.png", "train-000000.tar/a/0003.png", "train-000001.tar/a/0004.png"
    ]  # fmt: skip
    assert values(pickle.loads(pickle.dumps(train))) == list(range(7))


def test_a_link_to_a_folder_is_entered(tmp_path):
    (tmp_path / "set").mkdir()
    two_splits(tmp_path / "else")
    (tmp_path / "else" / "train-000001.tar").rename(tmp_path / "set" / "train-000001.tar")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    train, test = opened(tmp_path / "set"), opened(tmp_path / "set", "eval")
    assert (sorted(values(train)), values(test)) == (list(range(7)), [7, 8])


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_what_macos_leaves_beside_a_shard_is_not_read(tmp_path, pattern):
    two_splits(tmp_path)
    (tmp_path / "._train-000000.tar").write_bytes(bytes(range(256)) * 2)
    assert values(opened(tmp_path / pattern)) == list(range(7))


def test_the_last_word_of_a_name_tells_the_split(tmp_path):
    """What stands before it belongs to the name of the set."""
    two_splits(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_name(f"dev-kit-{path.name}"))
    train, test = opened(tmp_path), opened(tmp_path, "eval")
    assert (values(train), values(test)) == (list(range(7)), [7, 8])
    for path in tmp_path.glob("*train*"):
        path.rename(path.with_name(path.name.replace("train", "Train_Val")))
    assert len(opened(tmp_path)) == 7


def test_a_range_of_shards(tmp_path, caplog):
    two_splits(tmp_path)
    assert values(opened(tmp_path / "train-{000000..000001}.tar")) == list(range(7))
    assert not caplog.records
    assert values(opened(tmp_path / "train-000001.tar")) == [4, 5, 6]  # what a shell makes of it without quotes
    assert "train-000001.tar: only this one of 3 shards is read" in caplog.text
    for pattern, message in (("{1..0}.tar", "names no shard"), ("{0..9999}{0..9999}.tar", "names more than 1000000")):
        with pytest.raises(DataError, match=message):
            opened(tmp_path / pattern)
    with pytest.raises(DataError, match="train-000002.tar: no such shard"):
        opened(tmp_path / "train-{000000..000002}.tar")


def test_labels_of_json_files(tmp_path):
    named = {"0.jpg": png(0), "0.json": json.dumps({"label": "dog", "n": 2}).encode()}
    shard(tmp_path / "a.tar", named | {"1.jpg": png(1), "1.json": json.dumps({"label": "cat", "n": 0}).encode()})
    assert opened(tmp_path).class_names == ["cat", "dog"] and opened(tmp_path).labels.tolist() == [1, 0]
    assert opened(tmp_path, label_column="n").labels.tolist() == [2, 0]
    assert opened(tmp_path, label_column="").labels is None


@pytest.mark.parametrize("ending", ["cls", "json"])
@pytest.mark.parametrize("first", ["images", "labels"])
def test_labels_may_lie_apart_from_their_images(tmp_path, first, ending):
    """The order of ``tar cf set.tar *.png *.cls``, in which labels got lost without a word."""
    images = {f"{i}.png": png(i) for i in range(3)}
    labels = {f"{i}.{ending}": b"%d" % (2 - i) if ending == "cls" else b'{"label": %d}' % (2 - i) for i in range(3)}
    texts = {f"{i}.txt": b"a text" for i in range(3)}
    shard(tmp_path / "a.tar", images | texts | labels if first == "images" else labels | texts | images)
    source = opened(tmp_path)
    assert values(source) == [0, 1, 2] and source.labels.tolist() == [2, 1, 0]


def test_samples_of_one_key_stay_two(tmp_path):
    """Two tar files put together: the second sample does not take the place of the first."""
    lone = {"a/0001.cls": b"2"}  # the label of an image that is missing
    parts = [samples(0, 2), samples(0, 2), {"a/0000.jpg": png(9), "a/0000.cls": b"2"}, lone]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in itertools.chain.from_iterable(part.items() for part in parts):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = opened(tmp_path)
    assert values(source) == [0, 1, 0, 1, 9] and source.labels.tolist() == [0, 1, 0, 1, 2]
    shard(tmp_path / "a.tar", {"0.png": png(1), "1.png": png(2), "0.jpg": png(3)})
    assert values(opened(tmp_path)) == [1, 2, 3]


def test_images_that_are_in_no_sample_are_named(tmp_path, caplog):
    """By the index that was kept, too; what lies beside an image of a sample is left out as always."""
    files = {"cat_1.png": png(1), "v1.2_cat.png": png(2), "d.jpg": png(3), "e.tiff": png(4), "d.seg.png": png(5)}
    for _ in range(2):
        shard(tmp_path / "a.tar", files)
        caplog.clear()
        assert values(opened(tmp_path)) == [1, 3]
        files = {**files, "f.bmp": png(6)}
    assert f"{tmp_path}: left out 3 images of an unknown sample: v1.2_cat.png, e.tiff, f.bmp; " in caplog.text
    assert "ends in jpg or jpeg or png or webp (config.data.image_column)" in caplog.text
    assert values(opened(tmp_path, image_column=".BMP")) == [6]


def test_a_hard_link_is_the_file_that_it_leads_to(tmp_path, caplog):
    """GNU tar writes a file that has two names so."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"./s/{i}.png")
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
        for kind, name, target in (("1", "7.png", "s/1.png"), ("1", "8.png", "s/9.png"), ("2", "9.jpg", "s/1.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind.encode(), target
            tar.addfile(info)
    source = opened(tmp_path)
    assert values(source) == [0, 1, 2, 1] and source.name(3) == "a.tar/7.png"
    assert "left out 2 images of an unknown sample: 8.png, 9.jpg;" in caplog.text


@pytest.mark.parametrize("zeros", [0, 300, 512])
def test_a_shard_that_was_cut_after_a_file_is_named(tmp_path, zeros, caplog):
    two_splits(tmp_path)
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path) as tar:
        text = tar.getmember("a/0002.txt")
    os.truncate(path, text.offset_data + 512 + 3 * 1024)  # with a/0003.cls, .png and .txt
    with path.open("ab") as file:
        file.write(bytes(zeros))
    for _ in range(2):  # the second time the index was kept
        caplog.clear()
        say_once.cache_clear()
        assert values(opened(tmp_path)) == list(range(7))
        told = f"{tmp_path}: without the zeros that end a tar file: train-000000.tar; if a copy" in caplog.text
        assert told == (zeros < 512)


def test_only_the_label_must_be_utf_8(tmp_path):
    """Two Latin-1 labels were one class; a caption in Latin-1 is nobody's business."""
    shard(tmp_path / "a.tar", {"0.png": png(0), "0.json": b'{"label": "B\xc3\xa4r", "caption": "B\xe4r"}'})
    assert opened(tmp_path).class_names == ["Bär"]


def test_images_of_one_ending_among_several(tmp_path):
    shard(tmp_path / "a.tar", {"0.Left.png": png(0), "0.right.png": png(1), "notes": b"x", "1.txt": b"x"})
    assert values(opened(tmp_path, image_column="right.png")) == [1]
    assert values(opened(tmp_path, image_column="left.png")) == [0]


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, cache, monkeypatch):
    two_splits(tmp_path)
    reads = []
    read = tar.members
    monkeypatch.setattr(tar, "members", lambda path, **more: reads.append(path.name) or read(path, **more))
    prints = [opened(tmp_path).fingerprint() for _ in range(2)]
    assert len(reads) == 3 and prints[0] == prints[1]
    shard(tmp_path / "train-000001.tar", samples(4, 2))
    assert values(opened(tmp_path)) == list(range(6)) and opened(tmp_path).fingerprint() != prints[0]
    assert len(reads) == 5
    for kept in (cache / "crate_jax").iterdir():
        kept.write_bytes(kept.read_bytes()[:-50])
    assert values(opened(tmp_path)) == list(range(6)), "a damaged index is made anew"


def test_without_a_cache_folder(tmp_path, cache, monkeypatch):
    two_splits(tmp_path)
    (cache / "crate_jax").touch()  # where the folder should be
    assert values(opened(tmp_path)) == list(range(7))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert values(opened(tmp_path)) == list(range(7)) and not (tmp_path / "~").exists()


def test_a_full_disk_costs_the_index_and_not_the_set(tmp_path, cache, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    two_splits(tmp_path)
    monkeypatch.setattr(np, "savez", full)
    assert values(opened(tmp_path)) == list(range(7)) and not list((cache / "crate_jax").iterdir())


def test_an_image_that_a_shard_lost_since_is_undecodable(tmp_path):
    two_splits(tmp_path)
    source = opened(tmp_path)
    os.truncate(tmp_path / "train-000001.tar", 1600)
    with pytest.raises(decoding.DecodeError, match="train-000001.tar: ends within the image at offset"):
        source.open(4)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(decoding.DecodeError, match="cannot be read"):
        source.open(4)


def cut(root):
    two_splits(root)
    os.truncate(root / "train-000001.tar", 1600)


def overwritten(root):
    two_splits(root)
    with (root / "train-000000.tar").open("r+b") as file:
        file.seek(1024)
        file.write(b"x" * 512)


def packed(root):
    (root / "train-000000.tar.gz").touch()


def one_without_label(root):
    shard(root / "a.tar", samples(0, 2) | {"b.png": png(3)})


def one_with_label(root):
    shard(root / "a.tar", {"0.png": png(3)} | samples(0, 2))


@pytest.mark.parametrize(
    "write,options,message",
    [
        (cut, {}, "train-000001.tar: damaged or cut short at offset 1536"),
        (overwritten, {}, "train-000000.tar: damaged at offset 1024, no header"),
        (lambda root: (root / "a.tar").touch(), {}, "a.tar: damaged or cut short at offset 0"),
        (packed, {}, "holds no .tar file, only train-000000.tar.gz: unpack them with gunzip"),
        (one_without_label, {}, "sample b at offset .* has no label, though others have one; .*='' goes without"),
        (one_with_label, {}, "sample a/0000 at offset .* has a label, though others have none"),
        (two_splits, {"train_split": "dev"}, "has no split 'dev'; it has train, val"),
        (two_splits, {"image_column": "jpg"}, "no image in 2 shards; its endings are to be jpg"),
        (lambda root: shard(root / "a.tar", {"0.png": b"", "0.jpg": b""}), {}, "sample 0 has images png and jpg"),
        (lambda root: shard(root / "a.tar", {"0.png": b"", "0.json": b"{"}), {}, "0.json at offset 1024 is damaged"),
        (
            lambda root: shard(root / "a.tar", {"0.png": b"", "0.json": b"[" * 100000}),
            {},
            "0.json at offset 1024 is damaged .*recursion",
        ),
        (lambda root: shard(root / "a.tar", {"0.png": b"", "0.cls": b" \n"}), {}, "0.cls at offset 1024: .* is empty"),
        (
            lambda root: shard(root / "a.tar", {"0.png": b"", "0.cls": b"B\xe4r\n"}),
            {},
            r"a.tar: 0.cls at offset 1024: the label b'B\\xe4r' is not UTF-8; write it in UTF-8, or go without",
        ),
        (
            lambda root: shard(root / "a.tar", {"0.png": b"", "0.json": b'{"label": "B\xe4r"}'}),
            {},
            r"a.tar: 0.json at offset 1024: the label 'B\\udce4r' is not UTF-8",
        ),
        (
            lambda root: shard(root / "a.tar", {"0.png": b"", "0.cls": bytes(2**20 + 1)}),
            {},
            "1048577 bytes are no label",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, write, options, message):
    write(tmp_path)
    with pytest.raises(DataError, match=message) as e:
        opened(tmp_path, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
