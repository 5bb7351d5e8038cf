"""Parquet and Arrow files as Hugging Face writes them: layouts, columns, random access; one line for what is wrong."""

from __future__ import annotations

import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from crate_jax import config as config_lib, data
from crate_jax.data import decoding, hugging_face
from crate_jax.errors import DataError

pytestmark = pytest.mark.one_python

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "Eel"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (7, 5), (value, 0, 255 - value)).save(out, "PNG")
    return out.getvalue()


def table(first, count, features=True, **columns):
    """Rows `first` ... of a set whose image i is of the colour i and has the class i % 3."""
    numbers = range(first, first + count)
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers], IMAGE)
    rows = pa.table({"img": images, "label": pa.array([i % 3 for i in numbers], pa.int64()), **columns})
    if not features:
        return rows
    described = {"img": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    return rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})


def parquet(path, rows, group=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group)


def arrow(path, rows, group=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, group)


def saved(root, splits):
    """What datasets.save_to_disk writes of a DatasetDict: two files per split."""
    for name, (first, count) in splits.items():
        files = [f"data-0000{k}-of-00002.arrow" for k in range(2)]
        arrow(root / name / files[0], table(first, count - 1))
        arrow(root / name / files[1], table(first + count - 1, 1))
        state = {"_data_files": [{"filename": file} for file in files], "_split": name}
        (root / name / "state.json").write_text(json.dumps(state))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def hub(root, folder="data"):
    parquet(root / folder / "train-00001-of-00002.parquet", table(5, 2))
    parquet(root / folder / "train-00000-of-00002.parquet", table(0, 5))
    parquet(root / folder / "test-00000-of-00001.parquet", table(7, 2))


def converted(root):
    """The Hub's branch of Parquet files."""
    parquet(root / "train" / "0000.parquet", table(0, 7))
    parquet(root / "test" / "0000.parquet", table(7, 2))


def cached(root):
    """What load_dataset leaves in its cache, and what map() adds."""
    arrow(root / "default" / "0.0.0" / "abc" / "numbers-train.arrow", table(0, 7))
    arrow(root / "default" / "0.0.0" / "abc" / "numbers-test.arrow", table(7, 2))
    arrow(root / "default" / "0.0.0" / "abc" / "cache-123.arrow", table(0, 1))


def dictionary(root):
    saved(root, {"train": (0, 7), "test": (7, 2)})


def opened(path, split="train", **options):
    config = config_lib.base()
    config.data.update({"source": f"hf:{path}", "image_size": (16, 16)} | options)
    return data.open_split(config, split)


def values(source):
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("write", [hub, converted, cached, dictionary])
def test_the_usual_layouts(tmp_path, write):
    write(tmp_path)
    train, test = opened(tmp_path), opened(tmp_path, "eval")
    assert (values(train), values(test)) == (list(range(7)), [7, 8])
    assert train.class_names == test.class_names == NAMES
    np.testing.assert_array_equal(train.labels, np.arange(7) % 3)
    np.testing.assert_array_equal(test.labels_of([1]), [8 % 3])
    assert opened(tmp_path, train_split="test").fingerprint() == test.fingerprint() != train.fingerprint()
    copy = pickle.loads(pickle.dumps(train))
    assert values(copy) == list(range(7)) and len(pickle.dumps(train)) < 3000


def test_a_link_to_a_folder_is_entered(tmp_path):
    (tmp_path / "set").mkdir()
    hub(tmp_path / "else")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    train, test = opened(tmp_path / "set"), opened(tmp_path / "set", "eval")
    assert (values(train), values(test)) == (list(range(7)), [7, 8])


def test_names_tell_the_file_and_its_row(tmp_path):
    hub(tmp_path)
    names = [opened(tmp_path).name(i) for i in (0, 4, 5, 6)]
    shards = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names == [f"{shards[0]}[0]", f"{shards[0]}[4]", f"{shards[1]}[0]", f"{shards[1]}[1]"]


def test_a_name_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "hub" / "datasets--us--numbers"
    for revision, first in (("a" * 40, 0), ("b" * 40, 100)):
        parquet(repository / "snapshots" / revision / "small" / "train-00000-of-00001.parquet", table(first, 3))
    parquet(repository / "snapshots" / ("a" * 40) / "large" / "train-00000-of-00001.parquet", table(50, 3))
    os.utime(repository / "snapshots" / ("b" * 40), (2e9, 2e9))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert values(opened("us/numbers/small")) == [0, 1, 2]
    with pytest.raises(DataError, match="several configurations; set .* one of .*large, .*small"):
        opened("us/numbers")
    cached(tmp_path / "datasets" / "us___others")
    assert values(opened("us/others", "eval")) == [7, 8]
    with pytest.raises(DataError, match="neither a path nor a data set in Hugging Face's cache, .*; download it with"):
        opened("us/nothing")


def test_columns_without_metadata_are_known_by_type_and_name(tmp_path):
    kinds = ["b", "a", "b"]
    plain = pa.table({"picture": [png(i) for i in range(3)], "kind": kinds, "label": [2, 0, None]})
    parquet(tmp_path / "a.parquet", plain)
    named = opened(tmp_path / "a.parquet", label_column="kind")
    assert values(named) == [0, 1, 2] and named.class_names == ["a", "b"] and named.labels.tolist() == [1, 0, 1]
    assert opened(tmp_path / "a.parquet", label_column="").labels is None
    with pytest.raises(DataError, match="label of train: holds numbers from -1 to 2"):
        opened(tmp_path / "a.parquet")
    categories = plain.set_column(1, "kind", pa.array(kinds).dictionary_encode())
    parquet(tmp_path / "b.parquet", categories)
    assert opened(tmp_path / "b.parquet", label_column="kind").labels.tolist() == [1, 0, 1]


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    hub(tmp_path)
    source = opened(tmp_path)
    reads = []
    read = hugging_face._row_group
    monkeypatch.setattr(hugging_face, "_row_group", lambda *a: reads.append(a[1]) or read(*a))
    values(source)
    assert len(reads) == 4, "a group is read once for its rows"
    values(source)
    assert len(reads) == 4
    monkeypatch.setattr(hugging_face, "CACHE_BYTES", 1)
    small = opened(tmp_path)
    values(small)
    values(small)
    assert len(reads) == 12 and len(small._opened._held) == 1
    assert small._opened._bytes == next(iter(small._opened._held.values())).nbytes


def test_batches_come_from_worker_processes_too(tmp_path):
    hub(tmp_path)
    batches = []
    for workers in (0, 1):
        config = config_lib.base()
        config.data.update({"source": f"hf:{tmp_path}", "image_size": (16, 16), "workers": workers, "memory_mb": 0})
        config.batch_size = 8
        pipeline = data.TrainPipeline(config, data.open_split(config, "train"))
        batches.append(next(pipeline.batches(3)))
        pipeline.close()
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
    np.testing.assert_array_equal(batches[0]["index"], batches[1]["index"])


def test_rows_without_an_image_are_undecodable(tmp_path):
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"text", "path": None}], IMAGE)
    parquet(tmp_path / "a.parquet", pa.table({"image": images}))
    source = opened(tmp_path)
    for index, message in enumerate(["only the path /etc/passwd", "no image", "not an image"]):
        with pytest.raises(decoding.DecodeError, match=message):
            source.open(index)


def cut(root):
    hub(root)
    path = root / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def cut_arrow(root):
    dictionary(root)
    path = root / "train" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-300])


def lost(root):
    hub(root)
    (root / "data" / "train-00000-of-00002.parquet").unlink()


def lost_saved(root):
    dictionary(root)
    (root / "train" / "data-00001-of-00002.arrow").unlink()


def no_state(root):
    dictionary(root)
    (root / "test" / "state.json").unlink()


def several(root):
    parquet(root / "a.parquet", table(0, 3, features=False, other=[png(1)] * 3))


def other_columns(root):
    hub(root)
    parquet(root / "data" / "train-00001-of-00002.parquet", table(5, 2).drop_columns(["label"]))


def two_labels(root):
    rows = table(0, 3).rename_columns(["img", "fine_label"]).append_column("coarse_label", pa.array([0, 1, 0]))
    kinds = {name: {"names": NAMES, "_type": "ClassLabel"} for name in ("fine_label", "coarse_label")}
    parquet(
        root / "a.parquet",
        rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})}),
    )


def other_names(root):
    """Each split was cast by itself, in the order in which it met the classes."""
    hub(root)
    described = {"label": {"names": NAMES[::-1], "_type": "ClassLabel"}}
    rows = table(7, 2).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})
    parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def deep(root):
    (root / "dataset_dict.json").write_text("[" * 100000)


def latin_texts(root):
    texts = pa.array([b"B\xe4r", b"B\xf6r", b"Igel"], pa.binary())
    parquet(root / "a.parquet", table(0, 3, features=False).drop_columns(["label"]).append_column("label", texts))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()])
def test_labels_in_bytes_are_utf_8(tmp_path, kind):
    texts = pa.array(["Bör", "Bär", "Igel"]).cast(kind)
    rows = table(0, 3, features=False).drop_columns(["label"]).append_column("animal", texts)
    parquet(tmp_path / "a.parquet", rows)
    source = opened(tmp_path, image_column="img", label_column="animal")
    assert source.class_names == ["Bär", "Bör", "Igel"] and source.labels.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "write,options,message",
    [
        (cut, {}, "train-00001-of-00002.parquet: damaged, cut short or not a .parquet file"),
        (cut_arrow, {}, "data-00000-of-00002.arrow: damaged, cut short or not a .arrow file"),
        (lost, {}, "split train: shard 0 of 2 is missing"),
        (lost_saved, {}, "data-00001-of-00002.arrow: .*No such file"),
        (no_state, {}, "not what datasets.save_to_disk writes"),
        (deep, {}, "not what datasets.save_to_disk writes .*RecursionError"),
        (latin_texts, {"image_column": "img"}, r"a.parquet: label: the label b'B\\xe4r' is not UTF-8; write it"),
        (several, {}, r"several columns of images; set config.data.image_column to one of \['img', 'other'\]"),
        (two_labels, {}, r"several columns of labels; .* one of \['fine_label', 'coarse_label'\], or to ''"),
        (
            other_names,
            {},
            "/train-00000-of-00002.parquet and .*/test-00000-of-00001.parquet: the columns label number "
            "different classes: class 0 is cat in one and Eel in the other; cast both",
        ),
        (other_columns, {}, "train-00001-of-00002.parquet: lacks the column label"),
        (hub, {"image_column": "label"}, "no column 'label' whose values are encoded images"),
        (hub, {"label_column": "kind"}, "no column 'kind', which config.data.label_column names; it has img, label"),
        (hub, {"label_column": "img"}, "img of train: holds object"),
        (hub, {"train_split": "dev"}, "has no split 'dev'; it has test, train"),
        (lambda root: None, {}, "holds no .parquet and no .arrow file"),
        (
            lambda root: parquet(root / "a.parquet", pa.table({"a": [1]})),
            {},
            r"no column of images.*columns are a \(int64",
        ),
        (lambda root: parquet(root / "a.parquet", table(0, 3).slice(0, 0)), {}, "has no rows"),
    ],
)
def test_errors_are_one_line(tmp_path, write, options, message):
    write(tmp_path)
    with pytest.raises(DataError, match=message) as e:
        opened(tmp_path, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_damaged_group_is_undecodable_images(tmp_path):
    hub(tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    source = opened(tmp_path)
    with pytest.raises(decoding.DecodeError, match="its group of rows, 0, cannot be read"):
        source.open(1)
    assert int(source.read(5)[0, 0, 0]) == 5
