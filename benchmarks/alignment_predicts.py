"""Does alignment predict the probe? Closed-form gain of each corruption against measured accuracy, over finished runs.

    python -m benchmarks.alignment_predicts --folder DIR/train RUN RUN ...

RUN: workdirs of pre-training runs on the images of DIR that differ in corruption, ratio, patch size or seed only; a
sweep's folder stands for all of its runs. Prints a Markdown table, a line per corruption (mean over seeds), and
Spearman's rank correlation of gain and accuracy with a 95 % bootstrap interval over corruptions, for each width asked
for and each patch size.

Noise and no corruption have gain 0 by the corollary of Theorem 3 (Balestriero & LeCun, ICML 2024). Where ranks of all
resampled corruptions tie the correlation is not defined; such resamples are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import scipy.stats

from crate_jax import config as config_lib, sharding
from crate_jax.alignment import moments
from crate_jax.alignment.closed_form import Aligner
from crate_jax.alignment.grid import Setting
from crate_jax.data.evaluation import eval_batches
from crate_jax.data.folder import FolderSource

Key = tuple[str, int, float]  # corruption, patch in pixels, ratio or standard deviation
MEASURED = ("probe_top1", "knn_top1")
RESAMPLES = 10_000


def runs(folders: list[str]) -> list[Path]:
    """The workdirs with a summary among the folders and their children."""
    found = [p for f in map(Path, folders) for p in ((f,) if (f / "summary.json").exists() else sorted(f.iterdir()))]
    return [p for p in found if (p / "summary.json").exists()]


def key_of(config: dict) -> Key:
    corruption, patch = config["corruption"], config["encoder"]["patch_size"]
    name = corruption["name"]
    strength = {"mask": "mask_ratio", "rop": "rop_ratio", "noise": "noise_std"}.get(name)
    return name, patch, corruption[strength] if strength else 0.0


def spearman(gain_N: np.ndarray, accuracy_N: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation and the ends of its 95 % percentile bootstrap interval."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(gain_N), len(gain_N))
        if np.ptp(gain_N[rows]) and np.ptp(accuracy_N[rows]):
            drawn.append(scipy.stats.spearmanr(gain_N[rows], accuracy_N[rows]).statistic)
    return scipy.stats.spearmanr(gain_N, accuracy_N).statistic, *np.percentile(drawn, [2.5, 97.5])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="workdirs, or folders of workdirs")
    parser.add_argument("--folder", required=True, help="the training images, one folder per class")
    parser.add_argument("--widths", type=int, nargs="*", default=(), help="k, beside the encoder's")
    args = parser.parse_args(argv)
    sharding.use_cpu_cores(moments.ROWS, 1)
    measured: dict[Key, list[dict]] = defaultdict(list)
    for run in runs(args.runs):
        saved = json.loads((run / "config.json").read_text())
        measured[key_of(saved)].append(json.loads((run / "summary.json").read_text()))
    widths = (saved["encoder"]["width"], *args.widths)
    config = config_lib.base()
    config.data.image_size, config.data.eval_crop = tuple(saved["data"]["image_size"]), 1.0
    source, size = FolderSource(args.folder), config.data.image_size
    batches = eval_batches(config, source, np.arange(len(source)), moments.ROWS)
    mesh = sharding.make_mesh(jax.device_count(), 1)
    found = moments.of_images(batches, len(source.class_names), mesh, config.align.noise)
    aligner = Aligner(found, max(1024, *widths))
    clean_K = aligner.clean().alignment_K

    print(
        "| corruption | patch | strength | " + " | ".join(f"gain at {k}" for k in widths) + " | probe | k-NN | runs |"
    )
    print("|" + "---|" * (6 + len(widths)))
    gains, scores = {}, {}
    for key in sorted(measured):
        name, patch, strength = key
        gain_K = np.zeros_like(clean_K)
        if name in ("mask", "rop"):
            setting = Setting(name, (patch, patch), strength)
            gain_K = aligner.curve(setting.second_moments(found.second_DD, size)).alignment_K - clean_K
        gains[key] = [float(gain_K[k - 1]) for k in widths]
        scores[key] = [float(np.mean([s[m] for s in measured[key]])) for m in MEASURED]
        cells = [f"{100 * g:+.2f}" for g in gains[key]] + [f"{100 * s:.1f}" for s in scores[key]]
        print(f"| {name} | {patch} | {strength:.3g} | {' | '.join(cells)} | {len(measured[key])} |")
    print()
    patches = sorted({patch for _, patch, _ in measured})
    for chosen in ([patches] if len(patches) > 1 else []) + [[p] for p in patches]:
        keys = [key for key in sorted(measured) if key[1] in chosen]
        for i, k in enumerate(widths):
            for j, score in enumerate(MEASURED):
                gain_N, score_N = (np.array([d[key][n] for key in keys]) for d, n in ((gains, i), (scores, j)))
                rho, low, high = spearman(gain_N, score_N)
                where = "all" if len(chosen) > 1 else f"{chosen[0]} px"
                print(f"{where}, k = {k}, {score}: {rho:+.2f} [{low:+.2f}, {high:+.2f}], {len(keys)} corruptions")


if __name__ == "__main__":
    main(sys.argv[1:])
