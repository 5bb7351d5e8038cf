"""Measures our computation of alignment against the plain one, on the same cores and the same images.

    python -m benchmarks.alignment --folder DIR              # DIR/CLASS/*, all images
    python -m benchmarks.alignment --folder DIR --images 10000 --side 16 --exact

The plain computation follows the paper's closed form in NumPy and SciPy. For each setting it takes the products of all
images, the generalised eigenproblem of all D dimensions by scipy.linalg.eigh, a QR of all projected images, and the
label Gram matrix applied to it. Our computation takes streamed second moments and principal components once, and for
each setting one Cholesky factorisation and an eigenproblem within 1.5 K components. Restrict the cores with taskset;
the BLAS of both computations follows.

The noise that keeps X X^T from being singular enters both computations as its expectation, so that both solve one
problem. Noise that is drawn fits the labels by chance where the images have no variance, and the plain denominator
grows by that.

Prints one JSON object per line, and for each setting the largest difference between the two curves up to K.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import jax
import numpy as np
import scipy.linalg

from crate_jax import config as config_lib
from crate_jax.analysis.alignment import moments
from crate_jax.analysis.alignment.closed_form import Aligner
from crate_jax.analysis.alignment.grid import Setting
from crate_jax.data import eval_images
from crate_jax.data.folder import FolderSource
from crate_jax.data.sampling import sample
from crate_jax.parallel import sharding

SETTINGS = (Setting("mask", (4, 4), 0.75), Setting("rop", (4, 4), 1 / 7), Setting("mask", (1, 1), 0.5))


def plain(x_ND: np.ndarray, y_NC: np.ndarray, setting: Setting, size: tuple[int, int]) -> np.ndarray:
    """alignment(1) .. alignment(D) from images (N, D), centred and scaled, and one-hot labels (N, C)."""
    second_DD = x_ND.T @ x_ND
    corrupted_DD = setting.second_moments(second_DD, size)
    through_DD = (x_ND.T @ x_ND) @ (x_ND.T @ x_ND)
    D = len(second_DD)
    _, vectors_DD = scipy.linalg.eigh(through_DD, corrupted_DD, subset_by_index=[0, D - 1])
    basis_ND = np.linalg.qr(x_ND @ vectors_DD[:, ::-1])[0]
    seen_D = np.sum((y_NC @ (y_NC.T @ basis_ND)) ** 2, axis=0)
    return np.cumsum(seen_D) / np.sum(seen_D)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds on the clock, and seconds of all cores, which can be compared on a busy machine too."""
    wall, cpu = (round(b - a, 2) for a, b in zip(start, _now(), strict=True))
    return {"seconds": wall, "core_seconds": cpu}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="one folder of images per class")
    parser.add_argument("--images", type=int, default=0, help="number of images; 0: all")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--latents", type=int, default=1024, help="K, the length of our curves")
    parser.add_argument(
        "--settings", type=int, default=1, help=f"how many of the {len(SETTINGS)} settings the plain way computes"
    )
    parser.add_argument("--drawn", action="store_true", help="draw the noise of the plain way, as the authors do")
    parser.add_argument("--exact", action="store_true", help="also measure ours with all principal components")
    args = parser.parse_args(argv)
    sharding.use_cpu_cores(moments.ROWS, 1)
    config, size = config_lib.base(), (args.side, args.side)
    config.data.image_size, config.data.eval_crop = size, 1.0
    source = FolderSource(args.folder)
    images, labels = eval_images(config, source, np.sort(sample(len(source), args.images, 0)))
    classes = int(labels.max()) + 1
    cores = len(os.sched_getaffinity(0))

    def show(**record: object) -> None:
        print(json.dumps(record | {"images": len(images), "cores": cores, "load": os.getloadavg()[0]}), flush=True)

    start = _now()
    rows = range(0, len(images), moments.ROWS)
    batches = ({"image": images[i : i + moments.ROWS], "label": labels[i : i + moments.ROWS]} for i in rows)
    found = moments.of_images(batches, classes, sharding.make_mesh(jax.device_count(), 1))
    show(what="moments", **_since(start))
    curves = {}
    for exact in (False, True)[: 1 + args.exact]:
        start = _now()
        aligner = Aligner(found, args.latents, exact)
        show(what="principal components", exact=exact, **_since(start))
        for setting in SETTINGS:
            start = _now()
            curve = aligner.curve(setting.second_moments(found.second_DD, size))
            show(what="ours", exact=exact, setting=str(setting), **_since(start), error=curve.error)
            if exact:
                difference = float(np.max(np.abs(curve.alignment_K - curves[setting])))
                show(what="ours, exact against not", setting=str(setting), difference=difference)
            else:
                curves[setting] = curve.alignment_K

    x = images.reshape(len(images), -1).astype(np.float64)
    y = np.eye(classes)[labels]
    std, D = 1e-3 * x.std(), x.shape[1]
    if args.drawn:
        x += np.random.default_rng(0).normal(size=x.shape) * std
    x -= x.mean(axis=0)
    if not args.drawn:  # D more rows, without labels, whose second moments are the noise's expectation
        x = np.concatenate([x, np.sqrt(len(x)) * std * np.eye(D)])
        y = np.concatenate([y, np.zeros((D, classes))])
    x /= x.std()
    for setting in SETTINGS[: args.settings]:
        start = _now()
        curve = plain(x, y, setting, size)
        taken = _since(start)
        difference = float(np.max(np.abs(curve[: args.latents] - curves[setting])))
        show(what="plain", setting=str(setting), **taken, difference=difference)


if __name__ == "__main__":
    main(sys.argv[1:])
