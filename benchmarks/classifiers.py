"""Measures our classifiers on frozen features against scikit-learn's, on the same features and cores; prints JSON.

    python -m benchmarks.classifiers --features W/features/TRAIN.npz W/features/TEST.npz [--max_iter 1000]

``configs/evaluate.py`` writes such files. Without files, the features are synthetic Gaussian clusters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from crate_jax.evals.knn import knn_sweep
from crate_jax.evals.probe import fit_all

T = TypeVar("T")

STRENGTHS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5)


def clusters(n: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, width) in ten overlapping clusters with a falling spectrum, as networks have it, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(10, width))
    mix = np.random.default_rng(98).normal(size=(width, width)) / np.arange(1, width + 1)
    return ((centres[labels] + 3 * rng.normal(size=(n, width))) @ mix).astype(np.float32), labels


def timed(f: Callable[[], T]) -> tuple[T, float]:
    """The result of `f` and its seconds."""
    start = time.perf_counter()
    out = f()
    return out, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--images", type=int, nargs=2, default=(50_000, 10_000))
    parser.add_argument("--width", type=int, default=384, help="width of the synthetic features")
    parser.add_argument("--solver", default="lbfgs", help="solver of scikit-learn's logistic regression")
    parser.add_argument("--max_iter", type=int, default=1000, help="largest number of its iterations")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--skip", nargs="*", default=(), choices=("logreg", "knn"))
    args = parser.parse_args()
    if args.features:
        (train_x, train_y), (test_x, test_y) = (
            (stored["features"], stored["labels"]) for stored in map(np.load, args.features)
        )
    else:
        (train_x, train_y), (test_x, test_y) = (clusters(n, args.width, i) for i, n in enumerate(args.images))
    classes = int(train_y.max()) + 1
    print(json.dumps({"train": train_x.shape, "test": test_x.shape, "classes": classes}))
    if "logreg" not in args.skip:
        _, first = timed(lambda: fit_all(train_x, train_y, classes, args.strengths, standardise=False))
        probes, again = timed(lambda: fit_all(train_x, train_y, classes, args.strengths, standardise=False))
        ours = [float(np.mean(p.predict(test_x) == test_y)) for p in probes]
        print(json.dumps({"logreg": "crate_jax", "first_s": first, "seconds": again, "top1": ours}), flush=True)
        total, theirs = 0.0, []
        for c in args.strengths:
            model = LogisticRegression(C=c, solver=args.solver, max_iter=args.max_iter)
            fitted, seconds = timed(lambda model=model: model.fit(train_x, train_y))
            total += seconds
            theirs.append(fitted.score(test_x, test_y))
            iterations = int(fitted.n_iter_[0])
            print(json.dumps({"C": c, "seconds": seconds, "iterations": iterations, "top1": theirs[-1]}), flush=True)
        record = {"logreg": "scikit-learn", "solver": args.solver, "seconds": total, "top1": theirs}
        print(json.dumps({**record, "ratio": total / again}))
    if "knn" not in args.skip:
        k, temperature = 20, 0.07
        arguments = (train_x, train_y, test_x, classes, [k], [temperature])
        knn_sweep(*arguments)
        predicted, ours_s = timed(lambda: knn_sweep(*arguments)[0, 0])
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature), n_jobs=-1
        ).fit(train_x, train_y)
        expected, theirs_s = timed(lambda: reference.predict(test_x))
        print(
            json.dumps(
                {
                    "knn": {
                        "crate_jax_s": ours_s,
                        "scikit-learn_s": theirs_s,
                        "same": float(np.mean(predicted == expected)),
                    }
                }
            )
        )


if __name__ == "__main__":
    main()
