"""Batches are a function of (seed, step), however many hosts, workers and threads make them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import sources
from crate_jax import config as config_lib, data
from crate_jax.errors import ConfigError, DataError
from tests.conftest import ROOT

IMAGES = 37
BATCH = 16


def photo(seed, size):
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)


def write_set(root, size_of, count=IMAGES):
    root.mkdir(exist_ok=True)
    for i in range(count):
        photo(i, size_of(i)).save(root / f"{i:03d}.{'jpg' if i % 2 else 'png'}")
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Images of many sizes: streamed."""
    return write_set(tmp_path_factory.mktemp("mixed"), lambda i: (20 + 3 * i, 70 - i))


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Images of one size: held in memory."""
    return write_set(tmp_path_factory.mktemp("equal"), lambda i: (24, 20))


@pytest.fixture(scope="module")
def in_classes(tmp_path_factory):
    """Images of one size in folders of classes."""
    root = tmp_path_factory.mktemp("in_classes")
    for k in range(3):
        write_set(root / str(k), lambda i, k=k: (24, 20), count=10 + k)
    return root


@pytest.fixture(scope="module", params=sources.KINDS)
def other(request, in_classes, tmp_path_factory):
    """The same images in each other kind of set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield sources.KINDS[request.param](sources.samples(in_classes), tmp_path_factory.mktemp("other"))


def configured(root, batch_size=BATCH, seed=0, **options):
    config = config_lib.base()
    config.batch_size, config.seed = batch_size, seed
    source = root if ":" in str(root) else f"folder:{root}"
    config.data.update({"source": source, "image_size": (16, 12), "threads": 2} | options)
    return config


def take(config, count, start=0, **host):
    pipeline = data.TrainPipeline(config, data.open_split(config, "train"), **host)
    try:
        return list(itertools.islice(pipeline.batches(start), count))
    finally:
        pipeline.close()


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.fixture(params=["mixed", "equal"])
def root(request):
    return request.getfixturevalue(request.param)


def test_shapes_and_types(root):
    (batch,) = take(configured(root), 1)
    assert batch["image"].shape == (BATCH, 16, 12, 3) and batch["image"].dtype == np.uint8
    assert batch["index"].shape == (BATCH,) and batch["index"].dtype == np.int32
    assert batch["undecodable"].shape == () and batch["undecodable"].dtype == np.int32


@pytest.mark.parametrize("small", [0, 3])
def test_shapes_are_told_without_the_images(equal, small):
    config = configured(equal)
    config.method, config.views.small, config.views.small_size = "byol", small, (8, 6)
    for views in (False, True):
        (batch,) = take(config, 1, views=views)
        names = batch.keys() - {"undecodable"}
        shapes = data.batch_shapes(config, (*names, "label"))
        assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
            **{name: (batch[name].shape, batch[name].dtype) for name in names}, "label": ((BATCH,), np.int32)
        }  # fmt: skip


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_every_kind_of_set_gives_the_batches_and_labels_of_a_folder(other, in_classes, memory_mb):
    theirs, folder = (configured(source, memory_mb=memory_mb) for source in (other, in_classes))
    assert_same(take(theirs, 3), take(folder, 3))
    np.testing.assert_array_equal(*(data.open_split(config, "train").labels for config in (theirs, folder)))


def test_hosts_share_the_batches_of_every_kind_of_set(other):
    check_hosts(configured(other, memory_mb=0), 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_share_the_batch(root, processes):
    check_hosts(configured(root, randaugment_layers=2), processes)


def check_hosts(config, processes):
    whole = take(config, 3, start=5)
    hosts = [take(config, 3, start=5, process_index=p, process_count=processes) for p in range(processes)]
    for step in range(3):
        for key in ("image", "index"):
            np.testing.assert_array_equal(whole[step][key], np.concatenate([host[step][key] for host in hosts]))


def test_batch_must_divide_by_hosts(equal):
    with pytest.raises(ConfigError, match="batch_size=16: must be a multiple of the 3 processes"):
        take(configured(equal), 1, process_count=3)


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_do_not_matter(root, threads):
    assert_same(take(configured(root, threads=threads), 8), take(configured(root), 8))


def test_workers_do_not_matter(mixed):
    check_workers(configured(mixed, batch_size=150, randaugment_layers=1))  # three chunks a batch


@pytest.mark.slow
@pytest.mark.one_python
def test_workers_do_not_matter_for_any_kind_of_set(other):
    check_workers(configured(other, batch_size=150, memory_mb=0))


def check_workers(config):
    expected = take(config, 4, start=2)
    config.data.workers = 2
    assert_same(take(config, 4, start=2), expected)
    assert not multiprocessing.active_children(), "close() left workers behind"


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.one_python
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes live")
def test_workers_end_with_a_killed_run(mixed, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, signal\n"
        "from crate_jax import config, data\n"
        "if __name__ == '__main__':\n"
        "    c = config.base()\n"
        f"    c.data.update(source='folder:{mixed}', image_size=(16, 12), workers=2)\n"
        "    batches = data.TrainPipeline(c, data.open_split(c, 'train')).batches(0)\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    with out.open("w") as stdout:  # a file, as orphans would hold a pipe open
        root = ROOT
        subprocess.run([sys.executable, script], stdout=stdout, env=os.environ | {"PYTHONPATH": str(root)}, timeout=60)
    pids = out.read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    survivors = [pid for pid in pids if alive(pid)]
    for pid in survivors:
        os.kill(int(pid), signal.SIGKILL)
    assert not survivors


def test_a_resumed_run_continues(root):
    config = configured(root)
    assert_same(take(config, 9)[4:], take(config, 5, start=4))


def test_a_resumed_run_continues_with_any_kind_of_set(other):
    config = configured(other, memory_mb=0)
    assert_same(take(config, 5)[2:], take(config, 3, start=2))


def test_the_seed_matters(root):
    a, b = take(configured(root), 1)[0], take(configured(root, seed=1), 1)[0]
    assert (a["index"] != b["index"]).any()


def test_each_epoch_covers_each_image_once(root):
    epochs = np.concatenate([batch["index"] for batch in take(configured(root), 3 * IMAGES)])
    epochs = epochs[: len(epochs) // IMAGES * IMAGES].reshape(-1, IMAGES)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(IMAGES), (len(epochs), 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == len(epochs), "every epoch has an order of its own"


def test_each_epoch_covers_each_image_once_also_if_the_processes_change(root):
    """A run that is stopped and continued by 1, 2, 4 and 1 processes; a life goes further than its checkpoint."""
    config, seen = configured(root), []
    for processes, start, stop in ((1, 0, 3), (2, 2, 5), (4, 5, 6), (4, 5, 9), (1, 8, IMAGES)):
        hosts = [take(config, stop - start, start, process_index=i, process_count=processes) for i in range(processes)]
        steps = [np.concatenate([batch["index"] for batch in parts]) for parts in zip(*hosts, strict=True)]
        seen = seen[:start] + steps
    epochs = np.concatenate(seen).reshape(-1, IMAGES)
    assert len(epochs) == BATCH
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(IMAGES), (BATCH, 1)))


def test_an_image_looks_different_in_each_epoch(root):
    batches = take(configured(root, batch_size=IMAGES), 2)
    first, second = ({int(i): x for i, x in zip(b["index"], b["image"], strict=True)} for b in batches)
    assert sum((first[i] != second[i]).any() for i in range(IMAGES)) > IMAGES - 3


@pytest.mark.parametrize("layers", [0, 2])
def test_both_paths_make_the_same_images(equal, layers):
    # They may differ by a level in rounding, which operations on histograms can amplify. 150: several chunks.
    held = take(configured(equal, batch_size=150, randaugment_layers=layers), 2)
    streamed = take(configured(equal, batch_size=150, randaugment_layers=layers, memory_mb=0), 2)
    for a, b in zip(held, streamed, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        difference = np.abs(a["image"].astype(int) - b["image"])
        assert difference.max() <= 1 if layers == 0 else (difference <= 1).mean() > 0.97


def test_one_odd_size_among_many_is_streamed(tmp_path, caplog):
    # Headers of some images only are read beforehand; number 2 is none of them.
    write_set(tmp_path, lambda i: (24, 21 if i == 2 else 20), count=100)
    with caplog.at_level(logging.INFO):
        (batch,) = take(configured(tmp_path, batch_size=100), 1)
    assert "streaming" in caplog.text and 2 in batch["index"]


def test_large_equal_images_are_held_too(tmp_path):
    # Sides above 64 px have no weight table: Pillow resizes the held images.
    write_set(tmp_path, lambda i: (150, 140), count=6)
    held = take(configured(tmp_path, batch_size=6, image_size=(112, 112)), 1)
    streamed = take(configured(tmp_path, batch_size=6, image_size=(112, 112), memory_mb=0), 1)
    assert_same(held, streamed)


def test_without_augmentation_the_images_are_the_files(equal):
    config = configured(equal, crop_scale=(1.0, 1.0), flip=0.0, image_size=(20, 24))
    source = data.open_split(config, "train")
    (batch,) = take(config, 1)
    for index, image in zip(batch["index"], batch["image"], strict=True):
        np.testing.assert_array_equal(image, source.read(int(index)))


def test_flip(equal):
    config = configured(equal, crop_scale=(1.0, 1.0), flip=1.0, image_size=(20, 24))
    for memory_mb in (0, 100):
        config.data.memory_mb = memory_mb
        (batch,) = take(config, 1)
        expected = data.open_split(config, "train").read(int(batch["index"][0]))[:, ::-1]
        np.testing.assert_array_equal(batch["image"][0], expected)


def damage(root, numbers):
    files = sorted(root.iterdir())
    for i in numbers:
        files[i].write_bytes(files[i].read_bytes()[:100])
    return [files[i].name for i in numbers]


@pytest.mark.parametrize("sizes", ["mixed", "equal"])
def test_undecodable_files_are_named_counted_and_replaced(tmp_path, caplog, sizes):
    root = write_set(tmp_path / "set", lambda i: (24 + i * (sizes == "mixed"), 20))
    bad = damage(root, [3, 11])
    config = configured(root, max_undecodable=0.06)
    with caplog.at_level(logging.WARNING):
        batches = take(config, 5)
    for name in bad:
        assert caplog.text.count(name) == 1, "named once"
    indices = np.concatenate([batch["index"] for batch in batches])
    assert not {3, 11} & set(indices.tolist())
    assert (np.concatenate([b["image"].reshape(BATCH, -1).std(axis=1) for b in batches]) > 0).all()
    # The first two epochs meet both files twice; replacements may meet them again.
    assert sum(int(batch["undecodable"]) for batch in batches) >= 4
    assert_same(take(config, 3, start=2), batches[2:])
    halves = [take(config, 5, process_index=p, process_count=2) for p in range(2)]
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate([h[s]["image"] for h in halves]) for s in range(5)]),
        np.concatenate([batch["image"] for batch in batches]),
    )


@pytest.mark.parametrize("sizes", ["mixed", "equal"])
def test_images_of_too_many_pixels_are_undecodable(tmp_path, caplog, sizes):
    root = write_set(tmp_path / "set", lambda i: (24 + i * (sizes == "mixed"), 20))
    Image.new("RGB", (50, 41)).save(root / "003.png")
    config = configured(root, max_undecodable=0.06, max_pixels=2049)
    batches = take(config, 3)
    assert (
        "skipping undecodable image 003.png: has 50 x 41 pixels, more than config.data.max_pixels=2049" in caplog.text
    )
    source = data.open_split(config, "train")
    bad = [source.name(i) for i in range(len(source))].index("003.png")
    assert bad not in np.concatenate([batch["index"] for batch in batches])
    assert len(data.eval_images(config, source, range(len(source)))[0]) == len(source) - 1
    config.data.max_pixels = 2050
    source = data.open_split(config, "train")
    assert len(data.eval_images(config, source, range(len(source)))[0]) == len(source)


@pytest.mark.one_python
@pytest.mark.parametrize("sizes", ["mixed", "equal"])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_undecodable_files_stop_the_run(tmp_path, sizes, workers):
    root = write_set(tmp_path / "set", lambda i: (24 + i * (sizes == "mixed"), 20))
    bad = damage(root, range(0, 8))
    with pytest.raises(DataError, match="images cannot be decoded .*more than config.data.max_undecodable=0.1") as e:
        take(configured(root, max_undecodable=0.1, workers=workers), 6)
    assert any(name in str(e.value) for name in bad) and "\n" not in str(e.value)


@pytest.mark.parametrize("sizes", ["mixed", "equal"])
def test_nothing_decodable_stops_the_run_at_any_limit(tmp_path, sizes):
    root = write_set(tmp_path / "set", lambda i: (24 + i * (sizes == "mixed"), 20), count=5)
    damage(root, range(5))
    with pytest.raises(DataError, match="decoded"):
        take(configured(root, max_undecodable=1.0), 1)


def test_one_bad_file_in_the_first_batch_of_a_large_set_does_not_stop_it(tmp_path):
    root = write_set(tmp_path / "set", lambda i: (24 + i, 20))
    damage(root, [0])
    for copy in range(3, 30):  # 1036 files, most of them links
        for file in sorted(root.glob("0[0-3]?.*")):
            os.link(file if file.name != "000.png" else root / "001.jpg", root / f"{copy}{file.name}")
    config = configured(root, max_undecodable=0.001, batch_size=len(list(root.iterdir())))
    assert config.batch_size > 1000
    take(config, 1)
    config.data.max_undecodable = 0.0
    with pytest.raises(DataError, match="max_undecodable=0 allows"):
        take(config, 1)


def test_a_file_that_vanishes_is_undecodable(tmp_path, caplog):
    root = write_set(tmp_path / "set", lambda i: (24 + i, 20))
    config = configured(root, max_undecodable=0.03)
    source = data.open_split(config, "train")
    (root / source.name(5)).unlink()
    pipeline = data.TrainPipeline(config, source)
    list(itertools.islice(pipeline.batches(0), 3))
    pipeline.close()
    assert "No such file" in caplog.text and source.name(5) in caplog.text


def test_evaluation_images(mixed):
    config = configured(mixed, image_size=(14, 14), eval_crop=0.7)
    source = data.open_split(config, "train")
    images, labels = data.eval_images(config, source, [4, 0, 9])
    assert images.shape == (3, 14, 14, 3) and images.dtype == np.uint8 and labels is None
    # The usual two steps: shorter side to 14 / 0.7 = 20, then the central 14 x 14; index 0 is 20 x 70.
    whole = Image.fromarray(source.read(0))
    assert whole.size == (20, 70)
    expected = np.asarray(whole.crop((3, 28, 17, 42)))
    np.testing.assert_array_equal(images[1], expected)


def test_evaluation_skips_bad_files_and_keeps_labels_aligned(tmp_path):
    for i in range(12):
        folder = tmp_path / "set" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (10 * i, 0, 0)).save(folder / f"{i:02d}.png")
    config = configured(tmp_path / "set", max_undecodable=0.2)
    source = data.open_split(config, "train")
    (tmp_path / "set" / source.name(4)).write_bytes(b"broken")
    batches = list(data.eval_batches(config, source, range(12), 5))
    assert [len(batch["image"]) for batch in batches] == [5, 5, 1], "only the last batch is smaller"
    indices = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(indices, [i for i in range(12) if i != 4])
    images, labels = data.eval_images(config, source, range(12))
    np.testing.assert_array_equal(labels, source.labels[indices])
    np.testing.assert_array_equal(images[:, 0, 0, 0] // 10 % 3, labels)
    config.data.max_undecodable = 0.05
    with pytest.raises(DataError, match="max_undecodable"):
        data.eval_images(config, source, range(12))


def test_no_evaluation_images_at_all(equal):
    config = configured(equal)
    images, labels = data.eval_images(config, data.open_split(config, "train"), [])
    assert images.shape == (0, 16, 12, 3) and labels is None


def test_prefetch_runs_ahead_by_its_size_and_keeps_the_order():
    made, put = [], []

    def numbers():
        for i in range(100):
            made.append(i)
            yield i

    with data.device_prefetch(numbers(), lambda i: put.append(i) or -i, 3) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 5
        while len(put) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == put == [0, 1, 2, 3], "one in use and three ready"
        assert [next(ahead) for _ in range(99)] == [-i for i in range(1, 100)]
        with pytest.raises(StopIteration):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_prefetch_raises_where_the_batch_would_have_come():
    def numbers():
        yield 1
        raise DataError("broken data")

    ahead = data.device_prefetch(numbers(), lambda i: i, 2)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="broken data"):
            next(ahead)
    ahead.close()


def test_prefetch_closes_thread_and_iterator():
    closed = threading.Event()

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    ahead = data.device_prefetch(endless(), lambda i: i, 2)
    next(ahead)
    ahead.close()
    ahead.close()
    assert closed.is_set()
    assert not [t for t in threading.enumerate() if t.name == "device_prefetch"]
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetch_size_must_be_positive():
    with pytest.raises(ValueError, match="size=0"):
        data.device_prefetch(iter([]), lambda i: i, 0)
