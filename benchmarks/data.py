"""Measures the input pipeline alone: images per second for numbers of worker processes and threads.

    python -m benchmarks.data                          # all three settings, on images that it makes
    python -m benchmarks.data --folder DIR             # the photo setting on your own images
    python -m benchmarks.data --settings memory --threads 1,2,4

Settings:
  memory  32 px images, decoded and held in memory; whole batches are augmented at once (no workers)
  small   32 px images, streamed: each file is opened, decoded and augmented; one thread per process
          (config.data.threads=1) and several processes read such small files fastest
  photo   224 px random resized crops of large JPEGs (500 x 375, about 100 kB each)

Each line of output is one JSON object with the setting, workers, threads, the median images per second
over `--repeats` timings of `--seconds` each, and their range. The first batches, which start the
workers and fill the queues, are not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import config as config_lib
from crate_jax.data import TrainPipeline, open_split

SETTINGS = ("memory", "small", "photo")


def write_images(folder: Path, count: int, size: tuple[int, int], quality: int, noise: float) -> None:
    """Writes JPEGs of (width, height) with smooth shapes and noise, which give their files realistic sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        low = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(low) + rng.normal(0, noise, (size[1], size[0], 1))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.jpg", quality=quality)


def configured(folder: str, setting: str, batch_size: int, workers: int, threads: int) -> ConfigDict:
    """Returns the configuration of one measurement."""
    config = config_lib.base()
    side = 224 if setting == "photo" else 32
    config.batch_size = batch_size
    config.data.update(
        source=f"folder:{folder}",
        image_size=(side, side),
        memory_mb=1024 if setting == "memory" else 0,
        workers=workers,
        threads=threads,
    )
    return config


def measure(config: ConfigDict, seconds: float, repeats: int) -> list[float]:
    """Returns the images per second of each repeat."""
    pipeline = TrainPipeline(config, open_split(config, "train"))
    try:
        batches = pipeline.batches(0)
        for _ in itertools.islice(batches, max(3, 2 * config.data.workers)):
            pass
        return [rate(batches, config.batch_size, seconds) for _ in range(repeats)]
    finally:
        pipeline.close()


def rate(batches: Iterator[dict[str, np.ndarray]], batch_size: int, seconds: float) -> float:
    """Draws batches for about `seconds`; returns images per second."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of memory,small,photo (default: all)")
    parser.add_argument("--folder", default="", help="images for the photo setting (default: it makes some)")
    parser.add_argument("--workers", type=numbers, default=[0, 1, 2, 4], help="numbers of processes, such as 0,2,4")
    parser.add_argument("--threads", type=numbers, default=[1, 4], help="numbers of threads per process, such as 1,4")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--images", type=int, default=512, help="images to make for photo; 8 times as many of 32 px")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each timing")
    parser.add_argument("--repeats", type=int, default=5, help="number of timings; the median is reported")
    args = parser.parse_args(argv)
    settings = args.settings.split(",")
    if unknown := set(settings) - set(SETTINGS):
        parser.error(f"--settings: unknown {', '.join(sorted(unknown))}; must be of {', '.join(SETTINGS)}")

    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: str(Path(temporary) / name) for name in ("small", "photo")}
        if {"memory", "small"} & set(settings):
            write_images(Path(folders["small"]), 8 * args.images, (32, 32), 90, 8)
        if args.folder:
            folders["photo"] = args.folder
        elif "photo" in settings:
            write_images(Path(folders["photo"]), args.images, (500, 375), 92, 12)
        for setting in settings:
            folder = folders["photo" if setting == "photo" else "small"]
            for workers, threads in itertools.product([0] if setting == "memory" else args.workers, args.threads):
                config = configured(folder, setting, args.batch_size, workers, threads)
                rates = measure(config, args.seconds, args.repeats)
                line = {
                    "setting": setting,
                    "workers": workers,
                    "threads": threads,
                    "images_per_sec": round(statistics.median(rates)),
                    "range": [round(min(rates)), round(max(rates))],
                    "batch_size": args.batch_size,
                    "cpus": os.cpu_count(),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
