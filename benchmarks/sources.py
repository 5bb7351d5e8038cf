"""Measures reading from each kind of data set, on the same images in the same order.

    python -m benchmarks.sources --folder DIR                  # a folder with one sub-folder per class
    python -m benchmarks.sources --folder DIR --kinds folder,hf:arrow --size 32

The folder's files are put, as they are, into each kind of set: npz has the decoded pixels, and only if all images have
one size. Batches are streamed (config.data.memory_mb=0) by threads of this process. The kinds take turns, `--rounds`
times for `--seconds` each. Each line of output is one JSON object with the kind, the medians of images per second and
of the processor's microseconds per image, the median ratio of the latter to the folder's in the same round with its
range, and the bytes on disk per image. Other programs change the time of the processor less than that of the clock.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import config as config_lib
from crate_jax.data import TrainPipeline, open_split

ROWS = 100  # images of a row group or a record batch, as Hugging Face's `datasets` writes images
Sample = tuple[bytes, int]  # an image's file and its class


def samples(folder: Path) -> list[Sample]:
    """The images of a folder with one sub-folder per class, in the order of the source folder:."""
    source = open_split(configured(f"folder:{folder}", (32, 32)), "train", labels_required=True)
    return [((folder / source.name(i)).read_bytes(), int(label)) for i, label in enumerate(source.labels)]


def in_shards(images: Sequence[Sample], count: int = 2) -> list[Sequence[Sample]]:
    """The images in parts of nearly equal size."""
    edges = [k * len(images) // count for k in range(count + 1)]
    return [images[low:high] for low, high in itertools.pairwise(edges)]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def npz(images: Sequence[Sample], out: Path) -> str:
    """Writes decoded images of one size."""
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in images]
    np.savez(out / "set.npz", x_train=np.stack(pixels), y_train=[label for _, label in images])
    return f"npz:{out / 'set.npz'}"


def table(part: Sequence[Sample]) -> dict[str, list]:
    """Columns as Hugging Face has them."""
    return {"image": [{"bytes": data, "path": None} for data, _ in part], "label": [label for _, label in part]}


def parquet(images: Sequence[Sample], out: Path) -> str:
    """Writes shards with ROWS images to a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = in_shards(images)
    for k, part in enumerate(parts):
        pq.write_table(pa.table(table(part)), out / f"train-{k:05d}-of-{len(parts):05d}.parquet", row_group_size=ROWS)
    return f"hf:{out}"


def arrow(images: Sequence[Sample], out: Path) -> str:
    """Writes streams with ROWS images to a record batch."""
    import pyarrow as pa

    parts = in_shards(images)
    for k, part in enumerate(parts):
        rows = pa.table(table(part))
        with pa.ipc.new_stream(str(out / f"train-{k:05d}-of-{len(parts):05d}.arrow"), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=ROWS)
    return f"hf:{out}"


def webdataset(images: Sequence[Sample], out: Path) -> str:
    """Writes tar files of images and .cls files."""
    numbers = itertools.count()
    for k, part in enumerate(in_shards(images)):
        with tarfile.open(out / f"train-{k:06d}.tar", "w") as tar:
            for data, label in part:
                key = f"{next(numbers):09d}"
                add(tar, f"{key}.cls", str(label).encode())
                add(tar, f"{key}.jpg", data)
    return f"webdataset:{out}"


def array_record(images: Sequence[Sample], out: Path) -> str:
    """Writes tf.train.Example records, one to a chunk, as TensorFlow Datasets does."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    parts = in_shards(images)
    for k, part in enumerate(parts):
        writer = ArrayRecordWriter(str(out / f"set-train.array_record-{k:05d}-of-{len(parts):05d}"), "group_size:1")
        for data, label in part:
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(data)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
    return f"array_record:{out}"


def imagenet(images: Sequence[Sample], out: Path) -> str:
    """Writes a tar file of a tar file for each class."""
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, part in itertools.groupby(images, lambda sample: sample[1]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i, (data, _) in enumerate(part):
                    add(tar, f"n{label:08d}_{i:06d}.JPEG", data)
            add(outer, f"n{label:08d}.tar", inner.getvalue())
    return f"imagenet:{out}"


KINDS: dict[str, Callable[[Sequence[Sample], Path], str]] = {
    "npz": npz,
    "hf:parquet": parquet,
    "hf:arrow": arrow,
    "webdataset": webdataset,
    "array_record": array_record,
    "imagenet": imagenet,
}


def configured(source: str, size: tuple[int, int], batch_size: int = 256, threads: int = 1) -> ConfigDict:
    """Returns the configuration of one measurement."""
    config = config_lib.base()
    config.batch_size = batch_size
    config.data.update(source=source, image_size=size, memory_mb=0, threads=threads)
    return config


def turn(batches: Iterator[dict[str, np.ndarray]], seconds: float) -> tuple[float, float]:
    """Draws batches for about `seconds`; returns images per second, and the processor's microseconds per image."""
    start, spent, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["index"])
    return count / (time.perf_counter() - start), 1e6 * (time.process_time() - spent) / count


def measure(configs: dict[str, ConfigDict], seconds: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Returns what :func:`turn` gives for each kind in each round."""
    pipelines = {kind: TrainPipeline(config, open_split(config, "train")) for kind, config in configs.items()}
    try:
        batches = {kind: pipeline.batches(0) for kind, pipeline in pipelines.items()}
        for each in batches.values():
            next(each)
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in configs}
        for _ in range(rounds):
            for kind, each in batches.items():
                found[kind].append(turn(each, seconds))
        return found
    finally:
        for pipeline in pipelines.values():
            pipeline.close()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="images, with one sub-folder per class")
    parser.add_argument("--kinds", default=",".join(["folder", *KINDS]), help="some of the kinds (default: all)")
    parser.add_argument("--size", type=int, default=32, help="side of the training images in pixels")
    parser.add_argument("--threads", type=int, default=1, help="reading threads")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each timing")
    parser.add_argument("--rounds", type=int, default=5, help="number of timings of each kind")
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - {"folder", *KINDS}:
        parser.error(f"--kinds: unknown {', '.join(sorted(unknown))}; must be of folder, {', '.join(KINDS)}")
    images = samples(args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary  # the indexes of these sets are of no further use
        configs = {}
        for kind in ["folder", *(kind for kind in KINDS if kind in kinds)]:
            out = Path(temporary, kind.replace(":", "_"))
            out.mkdir()
            source = f"folder:{args.folder}" if kind == "folder" else KINDS[kind](images, out)
            configs[kind] = configured(source, (args.size, args.size), args.batch_size, args.threads)
        measured = measure(configs, args.seconds, args.rounds)
        for kind, found in measured.items():
            rates, costs = zip(*found, strict=True)
            ratios = [own / folder for own, (_, folder) in zip(costs, measured["folder"], strict=True)]
            written = sum(path.stat().st_size for path in Path(temporary, kind.replace(":", "_")).iterdir())
            size = written if kind != "folder" else sum(len(data) for data, _ in images)
            line = {
                "kind": kind,
                "images_per_sec": round(statistics.median(rates)),
                "cpu_us_per_image": round(statistics.median(costs)),
                "to_folder": round(statistics.median(ratios), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
                "bytes_per_image": round(size / len(images)),
                "images": len(images),
                "threads": args.threads,
                "cpus": os.cpu_count(),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
