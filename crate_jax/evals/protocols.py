"""Protocols on frozen features, by name; each docstring names the source of its recipe.

A protocol chooses its settings (k, temperature, C, learning rate) on a part of the training split, which it then
returns to training. With ``select="test"`` it chooses on the test split, as several papers do, and the record states
it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crate_jax.errors import DataError, NonFiniteError
from crate_jax.evals import linear_sgd
from crate_jax.evals.features import check_labelled
from crate_jax.evals.knn import knn_sweep
from crate_jax.evals.metrics import METRICS, accuracies
from crate_jax.evals.probe import fit_all
from crate_jax.validation import Key, anything, at_least, each, one_of, positive, several, within

log = logging.getLogger(__name__)

# Options of every protocol that chooses its settings.
SELECTION = dict(
    select=Key("validation", one_of("validation", "test"), "the images on which the best setting is chosen"),
    validation=Key(0.1, within(0, 1, "()"), "share of the training images on which the setting is chosen"),
)


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of a labelled data set.

    Attributes:
      train_x: training features, float32 (n, D).
      train_y: their integer labels (n,) in 0 .. num_classes - 1.
      test_x: test features, float32 (m, D).
      test_y: their integer labels (m,).
      num_classes: number of classes.

    Raises:
      DataError: a label is out of range, or shapes do not match.
      NonFiniteError: a feature is NaN or infinite.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        check_labelled("train", self.train_x, self.train_y, self.num_classes)
        check_labelled("test", self.test_x, self.test_y, self.num_classes)


@dataclasses.dataclass(frozen=True)
class Tried:
    """What one setting gave on the rows that settings are judged on.

    Attributes:
      predicted: the predicted classes (m,).
      converged: whether the fit is the one that the setting asks for; None: nothing can fail to converge.
    """

    predicted: np.ndarray
    converged: bool | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named recipe.

    Attributes:
      name: the protocol's key in PROTOCOLS.
      version: a number that is raised when the protocol's results change.
      keys: the protocol's options, ``config.protocol.NAME``.
      run: the function (features, options, seed) -> JSON-like results, which hold the metrics of :func:`accuracies`.
        The options must satisfy the rules of `keys`.
    """

    name: str
    version: int
    keys: Mapping[str, Key]
    run: Callable[[Features, ConfigDict, int], dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        """The default values of the options."""
        return {name: key.default for name, key in self.keys.items()}

    def flat(self) -> dict[str, Key]:
        """Returns the options by their full names, such as ``protocol.k``."""
        return {f"protocol.{name}": key for name, key in self.keys.items()}


def knn(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    """Runs k-nearest neighbours, weighted by cosine similarity, for every k and temperature.

    DINO (Caron et al. 2021) reports the best of k = 10, 20, 100, 200 at T = 0.07; solo-learn sweeps both.
    """
    settings = [{"k": k, "temperature": float(t)} for k in options.k for t in options.temperature]

    def judge(g: Features) -> list[Tried]:
        out = knn_sweep(g.train_x, g.train_y, g.test_x, g.num_classes, options.k, options.temperature)
        return [Tried(predicted) for predicted in out.reshape(len(settings), -1)]

    (chosen, *_), table = _select(f, options, seed, settings, judge)
    tried = judge(f)  # one pass over the neighbours gives every setting
    return {
        **{name: metric(tried[chosen].predicted, f.test_y) for name, metric in METRICS.items()},
        "chosen": settings[chosen],
        **table,
        "sweep": _table(settings, tried, f.test_y, options.metric),
    }


def logreg(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    """Runs full-batch logistic regression for every C (by default 10^0 .. 10^5) on features that are not standardised.

    CRATE-MAE (arXiv 2404.02446, appendix B) fits scikit-learn's logistic regression on the class token and keeps the C
    that is best on the test set: that is ``select="test"``. A C whose fit has not converged is not chosen, unless none
    has.
    """
    settings = [{"c": c} for c in options.c]

    def judge(g: Features) -> list[Tried]:
        probes = fit_all(g.train_x, g.train_y, g.num_classes, options.c, options.standardise)
        return [Tried(probe.predict(g.test_x), probe.converged) for probe in probes]

    order, table = _select(f, options, seed, settings, judge)
    for chosen in order:  # the best one whose fit on all images converges too
        (probe,) = fit_all(f.train_x, f.train_y, f.num_classes, [options.c[chosen]], options.standardise)
        if probe.converged:
            break
    final = accuracies(probe.scores(f.test_x), f.test_y)
    return {**final, "chosen": settings[chosen], "converged": probe.converged, **table}


def linear(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    """Trains a linear layer by SGD or LARS with one of :data:`crate_jax.evals.linear_sgd.RECIPES`.

    A training set that is too small for the recipe's batch is repeated
    (:meth:`crate_jax.evals.linear_sgd.Recipe.for_rows`); the record's ``recipe`` says how often.

    Raises:
      DataError: no class has two training images, so that no learning rate can be chosen on a part of the images.
      NonFiniteError: the training diverged.
    """
    recipe = linear_sgd.RECIPES[options.recipe]
    whole = dataclasses.replace(recipe, epochs=options.epochs or recipe.epochs)
    recipe = whole.for_rows(len(f.train_y))
    if recipe.repeats > 1:
        log.info(
            "recipe=%s: %d training images are fewer than %d batches of %d; each pass goes over them %d times",
            options.recipe, len(f.train_y), linear_sgd.MIN_BATCHES, recipe.batch_size, recipe.repeats,
        )  # fmt: skip
    rates = options.lr or (recipe.lr,)
    settings = [{"lr": rate} for rate in rates]

    def fit(g: Features, rate: float) -> tuple[np.ndarray, float]:
        rated = dataclasses.replace(whole, lr=rate).for_rows(len(g.train_y))
        return linear_sgd.fit(g.train_x, g.train_y, g.test_x, g.num_classes, rated, seed)

    (chosen, *_), table = _select(
        f, options, seed, settings, lambda g: [Tried(np.argmax(fit(g, rate)[0], axis=1)) for rate in rates]
    )
    scores, loss = fit(f, rates[chosen])
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"config.protocol.lr={rates[chosen]}: the linear probe diverged; try a lower rate")
    used = dataclasses.asdict(recipe) | settings[chosen]
    return {**accuracies(scores, f.test_y), "train_loss": loss, "chosen": settings[chosen], **table, "recipe": used}


def fewshot(f: Features, options: ConfigDict, seed: int) -> dict[str, Any]:
    """Runs logistic regression on few labelled images per class; reports mean and sample deviation over random draws.

    The main result is the one with the most images per class. The default numbers of images and draws and the default C
    are ours; papers use different ones.

    Raises:
      DataError: a class has fewer training images than ``shots`` asks for.
    """
    counts = np.bincount(f.train_y, minlength=f.num_classes)
    if counts.min() < max(options.shots):
        raise DataError(
            f"config.protocol.shots={tuple(options.shots)}: the class with fewest training images has {counts.min()}"
        )
    result: dict[str, Any] = {"fewshot": []}
    for shot in sorted(options.shots):
        found, converged = [], []
        for trial in range(options.trials):
            rng = np.random.default_rng((seed, shot, trial))
            rows = np.concatenate(
                [rng.choice(np.flatnonzero(f.train_y == c), shot, replace=False) for c in range(f.num_classes)]
            )
            (probe,) = fit_all(f.train_x[rows], f.train_y[rows], f.num_classes, [options.c], standardise=False)
            found.append(accuracies(probe.scores(f.test_x), f.test_y))
            converged.append(probe.converged)
        means = {name: float(np.mean([m[name] for m in found])) for name in found[0]}
        deviation = float(np.std([m[options.metric] for m in found], ddof=1)) if len(found) > 1 else 0.0
        result["fewshot"].append(
            {"shots": shot, "trials": options.trials, **means, "deviation": deviation, "converged": all(converged)}
        )
        result.update(means)
    return result


def _table(settings: list[dict], tried: list[Tried], labels: np.ndarray, metric: str) -> list[dict[str, Any]]:
    return [
        {**s, metric: METRICS[metric](t.predicted, labels)}
        | ({} if t.converged is None else {"converged": t.converged})
        for s, t in zip(settings, tried, strict=True)
    ]


def _select(
    f: Features,
    options: ConfigDict,
    seed: int,
    settings: list[dict[str, Any]],
    judge: Callable[[Features], list[Tried]],
) -> tuple[list[int], dict[str, Any]]:
    """Orders the settings by config.protocol.metric; equally good settings keep their order.

    Args:
      f: the features.
      options: the protocol's options.
      seed: seed of the images that the setting is chosen on.
      settings: the settings.
      judge: the function features -> what each setting gives on the test rows.

    Returns:
      The indices of the settings that can be chosen, the best one first, and, if there are several settings,
      ``selected_on`` and the table ``selection``. Settings that have not converged are left out, unless none has.

    Raises:
      DataError: no class has two training images.
    """
    if len(settings) == 1:
        return [0], {}
    if options.select == "test":
        judged, where = f, "the test split, which is optimistic"
    else:
        judged = hold_out(f, options.validation, seed)
        where = f"{len(judged.test_y)} training images set aside"
    tried = judge(judged)
    table = _table(settings, tried, judged.test_y, options.metric)
    order = sorted(range(len(settings)), key=lambda i: -table[i][options.metric])
    converged = [i for i in order if tried[i].converged is not False]
    return converged or order, {"selected_on": where, "selection": table}


def hold_out(f: Features, share: float, seed: int) -> Features:
    """Returns new features, whose test rows are a share of each class's training rows of `f`.

    Of a class with two rows or more at least one is set aside and at least one is kept; a class with one row keeps it.
    The draw is scikit-learn's stratified one wherever that does so, which is the case if no class is small.

    Args:
      f: the features; the test rows are not used.
      share: share of the training rows that become test rows.
      seed: seed of the choice.

    Raises:
      DataError: no class has two rows.
    """
    from sklearn.model_selection import train_test_split  # here: a second that `--help` need not spend

    y, seed = f.train_y, seed % 2**32
    counts = np.bincount(y, minlength=f.num_classes)
    try:
        train, held = train_test_split(np.arange(len(y)), test_size=share, stratify=y, random_state=seed)
        aside = np.bincount(y[held], minlength=f.num_classes)
        even = bool(np.all((aside > 0) & (aside < counts) | (counts == 0)))
    except ValueError:  # a class has one row, or there are fewer rows to set aside than classes
        even = False
    if not even:
        rng = np.random.default_rng(seed)
        numbers = np.minimum(np.maximum(np.rint(share * counts), 1), np.maximum(counts - 1, 0)).astype(int)
        held = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:number] for c, number in enumerate(numbers)])
        train = np.setdiff1d(np.arange(len(y)), held)
    if not len(held):
        raise DataError(
            f"config.protocol.validation={share}: cannot set this share of {len(y)} training images aside, as no class "
            "has two; give one setting only, or config.protocol.select='test'"
        )
    return Features(f.train_x[train], y[train], f.train_x[held], y[held], f.num_classes)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "knn", 2,
            dict(
                k=Key((10, 20, 100, 200), several(positive), "numbers of neighbours"),
                temperature=Key((0.07,), several(positive), "temperatures of the neighbours' weights"),
                **SELECTION,
            ),
            knn,
        ),
        Protocol(
            "logreg", 2,
            dict(
                c=Key((1e0, 1e1, 1e2, 1e3, 1e4, 1e5), several(positive), "inverse L2 strengths"),
                standardise=Key(False, anything, "features of mean 0 and deviation 1"),
                **SELECTION,
            ),
            logreg,
        ),
        Protocol(
            "linear_sgd", 3,
            dict(
                recipe=Key("mae", one_of(*linear_sgd.RECIPES), "whose optimiser, batch, schedule and epochs"),
                lr=Key((), each(positive), "learning rates to choose from; none: the recipe's rate", items=float),
                epochs=Key(0, at_least(0), "passes over the features; 0: the recipe's number"),
                **SELECTION,
            ),
            linear,
        ),
        Protocol(
            "fewshot", 3,
            dict(
                shots=Key((1, 2, 5, 10), several(positive), "images per class"),
                trials=Key(5, positive, "random draws of these images"),
                c=Key(1.0, positive, "inverse L2 strength"),
            ),
            fewshot,
        ),
    )
}  # fmt: skip
