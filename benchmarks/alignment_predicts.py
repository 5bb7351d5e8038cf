"""Does alignment predict the probe? Compares closed-form gains of corruptions with accuracies of finished runs.

    python -m benchmarks.alignment_predicts --folder DIR/train RUN RUN ... [--widths 64 384]

RUN is the workdir of a pre-training run on the images of DIR; the runs may differ in corruption, ratio, patch size and
seed only. A sweep's folder stands for all its finished runs. Prints a Markdown table with one line per corruption (mean
over seeds), and Spearman's rank correlation of gain and accuracy with a 95 % bootstrap interval over corruptions, for
each width and each patch size.

Gains are exact for the corruptions that training draws: they use all principal components, and masks that keep a fixed
number of patches. Noise and no corruption have gain 0 by the corollary of Theorem 3 (Balestriero & LeCun, ICML 2024). A
resample in which all ranks tie has no correlation and is left out. Theorem 3 holds for a squared loss over all patches
(--config.loss.region=all --config.loss.norm=l2).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

from crate_jax import config as config_lib
from crate_jax.analysis.alignment import corrupted, moments
from crate_jax.analysis.alignment.closed_form import Aligner
from crate_jax.analysis.alignment.grid import Setting
from crate_jax.data.evaluation import eval_batches
from crate_jax.data.folder import FolderSource
from crate_jax.parallel import sharding
from crate_jax.validation import changed_keys

Key = tuple[str, int, float]  # corruption, side of a patch in pixels, ratio or standard deviation
STRENGTH = {"mask": "mask_ratio", "rop": "rop_ratio", "noise": "noise_std"}
MEASURED = ("probe_top1", "knn_top1")
RESAMPLES = 10_000
MIN_CORRUPTIONS = 4  # fewer corruptions give no rank correlation
# Runs of one comparison may differ in these keys: the corruption, and keys that do not change what a run learns.
MAY_DIFFER = ("seed:", "encoder.patch_size:", "log.", "save.", "report.", "sweep.", "whitebox.", "align.") + tuple(
    f"corruption.{key}:" for key in ("name", *STRENGTH.values())
)


def runs(folders: list[str]) -> list[Path]:
    """The workdirs of finished runs among the folders and the folders in them."""
    found = []
    for folder in map(Path, folders):
        alone = (folder / "summary.json").exists()
        inside = [folder] if alone else sorted(p.parent for p in folder.glob("*/summary.json"))
        if not inside:
            raise SystemExit(f"{folder}: holds no summary.json of a finished run, and no folder in it does")
        found += inside
    return found


def key_of(config: Mapping[str, Any]) -> Key:
    """The part of a run's config on which its gain depends."""
    corruption = config["corruption"]
    name = corruption["name"]
    return name, config["encoder"]["patch_size"], corruption[STRENGTH[name]] if name in STRENGTH else 0.0


def read(folders: list[Path]) -> tuple[dict[str, Any], dict[Key, list[dict[str, float]]]]:
    """The config of one run, and the summaries of all runs by corruption.

    Raises:
      SystemExit: the runs differ in more than their corruption, or a run has no accuracies.
    """
    measured: dict[Key, list[dict[str, float]]] = defaultdict(list)
    first: dict[str, Any] = {}
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        first = first or config
        other = [k for k in changed_keys(first, config) if not k.startswith(MAY_DIFFER)]
        if other:
            raise SystemExit(f"{folder}: differs from {folders[0]} in more than its corruption: {other[0]}")
        if any(summary.get(name) is None for name in MEASURED):
            raise SystemExit(f"{folder}/summary.json: has no {' or '.join(MEASURED)}; the run had no labels to probe")
        measured[key_of(config)].append(summary)
    return first, dict(sorted(measured.items()))


def corrupted_moments(key: Key, second_DD: np.ndarray, config: Mapping[str, Any]) -> np.ndarray | None:
    """G of a corruption as training draws it; None if the corruption does not change alignment."""
    name, patch, strength = key
    size, corruption = tuple(config["data"]["image_size"]), config["corruption"]
    if name == "mask":
        patch_D = corrupted.patch_of_number(size, (patch, patch))
        kept = int((int(patch_D[-1]) + 1) * (1 - strength))  # as in crate_jax.models.corruption
        return corrupted.masking_of_count(second_DD, patch_D, kept)
    if name == "rop":
        setting = Setting("rop", (patch, patch), strength, corruption["rop_buckets"], corruption["paper_scale"])
        return setting.second_moments(second_DD, size)
    return None


def spearman(gain_N: np.ndarray, accuracy_N: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation and its 95 % percentile bootstrap interval; NaN if all gains or all accuracies tie."""

    def correlation(rows: np.ndarray) -> float:
        if not (np.ptp(gain_N[rows]) and np.ptp(accuracy_N[rows])):
            return float("nan")
        return float(scipy.stats.spearmanr(gain_N[rows], accuracy_N[rows]).statistic)

    rng, N = np.random.default_rng(0), len(gain_N)
    found = correlation(np.arange(N))
    if np.isnan(found):
        return found, found, found
    low, high = np.nanpercentile([correlation(rng.integers(0, N, N)) for _ in range(RESAMPLES)], [2.5, 97.5])
    return found, float(low), float(high)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="workdirs, or folders of workdirs")
    parser.add_argument("--folder", required=True, help="the training images, one folder per class")
    parser.add_argument("--widths", type=int, nargs="*", default=(), help="more widths k beside the encoder's width")
    args = parser.parse_args(argv)
    sharding.use_cpu_cores(moments.ROWS, 1)
    saved, measured = read(runs(args.runs))
    config = config_lib.base()
    config.data.image_size, config.data.eval_crop = tuple(saved["data"]["image_size"]), 1.0
    D = 3 * int(np.prod(config.data.image_size))
    widths = (saved["encoder"]["width"], *args.widths)
    if not 1 <= min(widths) <= max(widths) <= D:
        parser.error(f"--widths {widths}: must lie in 1..{D}, the numbers per image")
    source = FolderSource(args.folder)
    batches = eval_batches(config, source, np.arange(len(source)), moments.ROWS)
    mesh = sharding.make_mesh(jax.device_count(), 1)
    found = moments.of_images(batches, len(source.class_names), mesh, config.align.noise, args.folder)
    aligner = Aligner(found, max(widths), exact=True)
    clean_K = aligner.clean().alignment_K

    print(f"| corruption | patch | strength | {' | '.join(f'gain at {k}' for k in widths)} | probe | k-NN | runs |")
    print("|" + "---|" * (6 + len(widths)))
    gains, scores = {}, {}
    for key, summaries in measured.items():
        corrupted_DD = corrupted_moments(key, found.second_DD, saved)
        gain_K = 0 * clean_K if corrupted_DD is None else aligner.curve(corrupted_DD).alignment_K - clean_K
        gains[key] = [float(gain_K[k - 1]) for k in widths]
        scores[key] = [float(np.mean([s[m] for s in summaries])) for m in MEASURED]
        cells = [f"{100 * g:+.2f}" for g in gains[key]] + [f"{100 * s:.1f}" for s in scores[key]]
        print(f"| {key[0]} | {key[1]} | {key[2]:.3g} | {' | '.join(cells)} | {len(summaries)} |", flush=True)
    print()
    patches = sorted({patch for _, patch, _ in measured})
    for chosen in ([patches] if len(patches) > 1 else []) + [[p] for p in patches]:
        keys = [key for key in measured if key[1] in chosen]
        where = "all" if len(chosen) > 1 else f"{chosen[0]} px"
        if len(keys) < MIN_CORRUPTIONS:
            print(f"{where}: {len(keys)} corruptions are too few for a rank correlation")
            continue
        for i, k in enumerate(widths):
            for j, score in enumerate(MEASURED):
                rho, low, high = spearman(np.array([gains[n][i] for n in keys]), np.array([scores[n][j] for n in keys]))
                print(f"{where}, k = {k}, {score}: {rho:+.2f} [{low:+.2f}, {high:+.2f}], {len(keys)} corruptions")


if __name__ == "__main__":
    main(sys.argv[1:])
