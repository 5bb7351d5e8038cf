"""Sections of a report about the layers: measures (:mod:`.measures`), pictures (:mod:`.pictures`), Theorem 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Plot

from crate_jax import data
from crate_jax.analysis.whitebox import measures as whitebox, pictures as draw, theory
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.models import ENCODERS
from crate_jax.report.section import Absent, Figure, Section, Subject, Table
from crate_jax.report.style import tidy

BATCH = 64
SHOWN = 8  # images in a picture
RATIOS = {"mask": (0.25, 0.5, 0.75, 0.9), "rop": (0.5, 0.25, 0.14, 0.05), "noise": (0.25, 0.5, 1.0, 2.0)}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a plot: a number per layer, with a band of one standard deviation over images."""

    label: str
    mean: np.ndarray
    std: np.ndarray | None
    colour: str
    decoder: bool


# (measure in the encoder or None, measure in the decoder or None, label of the axis, caption)
PLOTS: tuple[tuple[str | None, str | None, str, str], ...] = (
    (
        "subspace_rate", "subspace_rate", "$R^c$ (nats)",
        "Compression: coding rate Rᶜ(Z | U) of the patch tokens Z in the layer's own subspaces U, right after "
        "its attention step (eq. 2.5; the quantity of the paper's Figure 5). A lower rate means that the subspaces "
        "describe the tokens better; a layer that only makes tokens longer raises it.",
    ),
    (
        "compression", "compression", "change of $R^c$ (nats)",
        "Effect of one attention step: Rᶜ after the step minus Rᶜ before it, in the same subspaces. By the theory, "
        "encoder layers lie below the line at 0 and decoder layers above it.",
    ),
    (
        "released_rate", None, "$R^c$ of unit tokens (nats)",
        "Compression as the released script computes it: Rᶜ before the attention, with the class token, and with "
        "every token scaled to unit length in every head, so that length does not count.",
    ),
    (
        "rate", "rate", "$R$ (nats)",
        "Expansion: coding rate R(Z) of the tokens after attention, without subspaces (eq. 2.4); "
        "for a decoder, of the layer's output. A small rate means that the tokens are alike; 0, that all are zero.",
    ),
    (
        "nonzero", None, "share of non-zero entries",
        "Sparsity: share of the entries of the tokens that are not 0 after ISTA (Figure 5, right). A ViT's tokens have "
        "no zeros, so its share is 1.",
    ),
    (
        "active", "active", "share of positive hidden units",
        "Activity, the ViT's nearest measure to sparsity: share of the MLP's hidden units that are positive.",
    ),
    (
        "coherence_mean", "coherence_mean", "mean |cos|",
        "Incoherence: mean absolute cosine between columns of different subspaces of one layer. Orthogonal subspaces "
        "have 0; the dotted line is the mean for random directions.",
    ),
    (
        None, "inversion_error_linear", "relative error",
        "Inversion: relative error of the best linear map from the output of decoder layer l to the input of encoder "
        "layer L + 1 - l, on what the corruption removed, without the effect of position; 0: the output holds all, "
        "1: nothing; above 1 the map, fitted on other images, does worse than their mean.",
    ),
)  # fmt: skip
COLUMNS = {  # measure -> column of the table
    "subspace_rate_before": "Rᶜ before",
    "subspace_rate": "Rᶜ after",
    "compression": "change",
    "released_rate": "Rᶜ released",
    "rate": "R",
    "nonzero": "non-zero",
    "released_nonzero": "non-zero released",
    "active": "active",
    "coherence_mean": "mean |cos|",
    "coherence_max": "max |cos|",
    "orthonormality_error": "|U^T U - I|",
    "inversion_error": "inversion",
    "inversion_error_scaled": "inversion scaled",
    "inversion_error_linear": "inversion linear",
}
PLOT = (4.4, 3.0)  # inches; two plots fit side by side on a desktop
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9")


def _transformers(subjects: Sequence[Subject]) -> list[Subject]:
    """The runs whose encoder is made of transformer blocks.

    Raises:
      Absent: there are none.
    """
    found = [s for s in subjects if ENCODERS[s.config.encoder.name].patches]
    if not found:
        raise Absent(f"an encoder {subjects[0].config.encoder.name!r} has no attention and no tokens of patches")
    return found


Profile = dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]]


def section(subjects: Sequence[Subject]) -> Section:
    """The section with the measures of all runs of transformers, by layer.

    Args:
      subjects: the runs. Each is measured on `config.whitebox.images` images of its evaluation split, or of its
        training split if it has no evaluation split. A run without images has only the measures of its weights.

    Raises:
      Absent: no run has an encoder of transformer blocks.
    """
    subjects = _transformers(subjects)
    images = subjects[0].config.whitebox.images  # a key of the report, so all runs have the same number
    measured = {subject.name: profile(subject, images) for subject in subjects}
    colours = {subject.name: COLOURS[i % len(COLOURS)] for i, subject in enumerate(subjects)}
    figures = []
    for encoder_name, decoder_name, label, caption in PLOTS:
        curves = [
            Curve(f"{name}, {part}", *layers[measure], colours[name], part == "decoder")
            for name, parts in measured.items()
            for part, measure in (("encoder", encoder_name), ("decoder", decoder_name))
            for layers in [parts.get(part, {})]
            if measure in layers
        ]
        if not curves:
            continue
        lines = {"compression": [0.0]}.get(encoder_name or "", [])
        if encoder_name == "coherence_mean":
            lines = sorted({float(np.sqrt(2 / (np.pi * subject.config.encoder.width))) for subject in subjects})
        figures.append(Figure(caption, _plot(curves, label, lines)))
    found = {m for parts in measured.values() for layers in parts.values() for m in layers}
    names = [name for name in COLUMNS if name in found]
    rows = tuple(
        (name, part, layer + 1, *(_at(layers, measure, layer) for measure in names))
        for name, parts in measured.items()
        for part, layers in parts.items()
        for layer in range(max(len(mean) for mean, _ in layers.values()))
    )
    return Section(
        title="What does each layer do?",
        text=(
            "White-box measures after arXiv 2404.02446, section 3: does each encoder layer compress its tokens towards "
            "its subspaces and make them sparse, and does the decoder invert that? Lines are means over at most "
            f"{images} images of the evaluation split (of the training split if there is none), bands are one standard "
            "deviation over images. The encoder gets clean images, the decoder the tokens under the run's own "
            "corruption. Rates are in nats per image, with "
            f"eps^2 = {whitebox.PRECISION} as in the released script; the paper states no value. They grow with the "
            "number of tokens and with the width: compare only runs of one shape." + _compressing(measured)
        ),
        figures=tuple(figures),
        tables=(
            Table(
                "Every measure, layer by layer: means over images. Inversion: relative distance of the decoder's "
                "features from the encoder's, without a map, at the best scale, and after the best linear map. "
                "|U^T U - I|: relative distance of each subspace's basis from orthonormal. Released: as the authors' "
                "script computes it.",
                ("run", "part", "layer", *(COLUMNS[name] for name in names)),
                rows,
            ),
        ),
        numbers={
            name: {
                part: {
                    measure: {"mean": mean.tolist(), "std": None if std is None else std.tolist()}
                    for measure, (mean, std) in layers.items()
                }
                for part, layers in parts.items()
            }
            for name, parts in measured.items()
        },
    )


def _compressing(measured: Mapping[str, Profile]) -> str:
    """A sentence for each run about the layers whose MSSA lowers the coding rate against the subspaces."""
    sentences = []
    for name, parts in measured.items():
        if "compression" in parts.get("encoder", {}):
            change_L = parts["encoder"]["compression"][0]
            falls = int(np.sum(change_L < 0))
            sentences.append(
                f" {name}: {falls} of {len(change_L)} encoder layers compress their tokens towards their subspaces"
                + ("." if falls == len(change_L) else "; by the theory all do.")
            )
    return "".join(sentences)


def _at(layers: dict[str, tuple[np.ndarray, np.ndarray | None]], measure: str, layer: int) -> float | None:
    mean = layers[measure][0] if measure in layers else ()
    return float(mean[layer]) if layer < len(mean) else None


def profile(subject: Subject, images: int) -> Profile:
    """{part: {measure: (mean (L,), deviation over images (L,) or None)}} of one run on at most `images` images."""
    out: Profile = {}
    source = subject.test or subject.train
    if source is not None:
        spread, _ = whitebox.over_images(subject.config, subject.params, _batches(subject, source, images))
        for part, layers in spread.items():
            out[part] = dict(layers)
            if "subspace_rate" in layers:  # without a deviation, which does not follow from those of both rates
                change = layers["subspace_rate"][0] - layers["subspace_rate_before"][0]
                out[part]["compression"] = (change, None)
        if "decoder" in out:
            left = whitebox.linear_inversion_error(subject.config, subject.params, _batches(subject, source, images))
            if len(left):
                out["decoder"]["inversion_error_linear"] = (left, None)
    for part, measures in whitebox.of_weights(subject.params, subject.config).items():
        out.setdefault(part, {}).update({m: (np.asarray(values, np.float64), None) for m, values in measures.items()})
    return {part: out[part] for part in ("encoder", "decoder") if part in out}


def _batches(subject: Subject, source: data.Source, images: int) -> Iterator[np.ndarray]:
    """Normalised images (b, H, W, 3) of a seeded choice; all batches but the last have one size."""
    config = subject.config
    chosen = sample(len(source), images, config.seed)
    size = min(BATCH, -(-len(chosen) // 2))  # at least two batches: one to fit, one to judge
    for batch in data.eval_batches(config, source, chosen, size):
        yield np.asarray(normalise(jnp.asarray(batch["image"]), config))


def _plot(curves: Sequence[Curve], label: str, lines: Sequence[float]) -> Plot:
    rows = -(-len(curves) // 2)  # rows of the legend
    plot = Plot(figsize=(PLOT[0], PLOT[1] + 0.2 * rows), layout="constrained")
    axes = plot.subplots()
    for curve in curves:
        layers = np.arange(1, len(curve.mean) + 1)
        style = "s--" if curve.decoder else "o-"
        axes.plot(layers, curve.mean, style, color=curve.colour, label=curve.label, markersize=4)
        if curve.std is not None:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            axes.fill_between(layers, low, high, color=curve.colour, alpha=0.15, linewidth=0)
    for value in lines:
        axes.axhline(value, color="grey", linestyle=":", linewidth=1)
    axes.set_xticks(range(1, max(len(curve.mean) for curve in curves) + 1))
    axes.set_xlabel("layer")
    tidy(axes, label)
    plot.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return plot


def pictures_section(subjects: Sequence[Subject]) -> Section:
    """The section with reconstructions at several ratios, attention maps and principal components of all transformers.

    Raises:
      Absent: no run has an encoder of transformer blocks.
    """
    subjects = _transformers(subjects)
    figures: list[Figure] = []
    for subject in subjects:
        source = subject.test or subject.train
        if source is not None:
            figures += _pictures(subject, source)
    return Section(
        title="What does the model see?",
        text=(
            "After arXiv 2404.02446, Figures 6 to 11: always the same images of the evaluation split (of the training "
            "split if there is no evaluation split). Attention and components come from the last block but one, as in "
            "the paper. No image and no head was picked by hand."
        ),
        figures=tuple(figures),
    )


def _pictures(subject: Subject, source: data.Source) -> list[Figure]:
    config, params = subject.config, subject.params
    chosen = sample(len(source), BATCH, config.seed)
    images, _ = data.eval_images(config, source, chosen)
    one_class, about = _of_one_class(source, config.seed)
    same, _ = data.eval_images(config, source, one_class)
    figures = []
    if "decoder" in params:
        ratios = RATIOS.get(config.corruption.name, ())
        trained = draw.RATIOS.get(config.corruption.name)
        level = f" It was trained at {trained[1].format(config.corruption[trained[0]])}." if trained else ""
        figures.append(
            Figure(
                f"{subject.name}: reconstructions under more and less corruption; “completed” joins what the input "
                f"kept and the decoder's prediction of the rest.{level}",
                draw.reconstructions(config, params, images[:SHOWN], ratios),
            )
        )
    figures.append(
        Figure(
            f"{subject.name}: attention of the class token, by head; yellow is the largest weight of each map, purple "
            "the smallest. A head with the same map for every image follows position, not content.",
            draw.attention_maps(config, params, images[:SHOWN]),
        )
    )
    figures.append(
        Figure(
            f"{subject.name}, {about}: first three principal components of the object's tokens as red, green and blue; "
            "black tokens are background by the first component of all tokens. “Less position”: the mean over images "
            "of all classes at the same place is subtracted. Colours that repeat in every image encode position.",
            draw.components(config, params, same, images),
        )
    )
    return figures


def _of_one_class(source: data.Source, seed: int) -> tuple[np.ndarray, str]:
    """Indices of at most SHOWN images of one class, and words for that class.

    The class is that of the first image in a seeded order.
    """
    order = sample(len(source), 0, seed)
    if source.class_names is None:
        return order[:SHOWN], "images without labels"
    labels = source.labels_of(order[: 64 * len(source.class_names)])
    assert labels is not None
    return order[: len(labels)][labels == labels[0]][:SHOWN], f"class “{source.class_names[labels[0]]}”"


THEORY = dict(d=256, N=64, K=4)
SIGMAS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def theory_section(seeds: int = 3) -> Section:
    """The section on Theorem 3 and Figure 3 of the paper, with synthetic tokens; it needs no run and no images.

    Args:
      seeds: the number of draws per noise level.
    """
    rows = [[theory.experiment(**THEORY, sigma=sigma, seed=seed) for seed in range(seeds)] for sigma in SIGMAS]

    def means(value: Callable[[theory.Outcome], float]) -> np.ndarray:
        return np.array([np.mean([value(outcome) for outcome in row]) for row in rows])

    columns: dict[str, np.ndarray] = {
        "sigma": np.array(SIGMAS),
        "error": means(lambda x: x.error),
        "bound": means(lambda x: x.bound),
        "noise after the step": means(lambda x: x.compression),
        "noise after denoising": means(lambda x: x.denoising),
        "factor on tokens": means(lambda x: x.shrinkage),
    }
    share = THEORY["N"] / THEORY["d"]
    bound = Plot(figsize=PLOT, layout="constrained")
    axes = bound.subplots()
    axes.loglog(SIGMAS, columns["error"], "o-", label="error of the theorem's formula")
    axes.loglog(SIGMAS, columns["bound"], "s--", label="its bound, without the constant")
    axes.set_xlabel("noise level sigma")
    left = Plot(figsize=PLOT, layout="constrained")
    other = left.subplots()
    other.semilogx(SIGMAS, columns["noise after the step"], "o-", label="one compression step")
    other.semilogx(SIGMAS, columns["noise after denoising"], "s--", label="exact denoiser, projection")
    other.axhline(share, color="grey", linestyle=":", linewidth=1, label="N / d")
    other.set_xlabel("noise level sigma")
    for a, title in ((axes, "operator norm"), (other, "share of the noise outside")):
        tidy(a, title)
        a.legend(frameon=False, fontsize=8)
    numbers: dict[str, Any] = {"setting": THEORY, **{name: values.tolist() for name, values in columns.items()}}
    return Section(
        title="Is compression denoising?",
        text=(
            "Theorem 3 of arXiv 2404.02446 on tokens from its own model: "
            f"{THEORY['N']} tokens of width {THEORY['d']} in {THEORY['K']} orthogonal subspaces, with noise of length "
            "sigma. One gradient step on Rᶜ is compared with the formula that the theorem gives for it, and with the "
            "exact denoiser. The step removes noise outside a token's own subspace, but not all of it: about "
            "N / d of its energy stays, along the directions in which other subspaces hold tokens (eq. A.116)."
        ),
        figures=(
            Figure("Error of the theorem's formula for the step, and the bound on it: both fall with sigma.", bound),
            Figure(
                "Noise outside each token's own subspace that is left after one step, as a share of its energy.", left
            ),
        ),
        tables=(
            Table(
                f"Means of {seeds} draws. Noise: share of its energy outside the tokens' subspaces that is left; "
                "factor: the share of the clean tokens that is left.",
                tuple(columns),
                tuple(tuple(float(values[i]) for values in columns.values()) for i in range(len(SIGMAS))),
            ),
        ),
        numbers=numbers,
    )
