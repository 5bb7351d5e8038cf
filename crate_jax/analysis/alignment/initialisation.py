"""Theorem 2 of Balestriero & LeCun (ICML 2024, arXiv 2402.11337) as numerical experiments.

The loss of an encoder f and a decoder g on images X and labels Y is

    ||W^T f(X) - Y||_F^2 + lam ||g(f(X)) - X||_F^2

The theorem says that for an encoder of high capacity it is as with a linear one: always if g is linear, and at
initialisation for any g. An encoder of the highest capacity can give any latents F = f(X), so F itself is free here.

Shapes: N images, D numbers per image, C classes, K latents, M hidden units. As in the paper an image is a column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Plot

from crate_jax.analysis.alignment.closed_form import theorem1
from crate_jax.analysis.alignment.moments import Moments
from crate_jax.report.section import Figure, Section, Table
from crate_jax.report.style import tidy

D, K, M, CLASSES = 24, 4, 64, 3
COUNTS, LAMS = (20, 200), (0.1, 1.0, 10.0, 1000.0)  # N below and above D
SCALES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the latents
RATE, DESCENT, LEAST = 0.05, 4000, 0.01  # rate and steps of gradient descent, and the scale that it starts from
FALLEN = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of what K latents can restore
EPS = 1e-12


def images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws X (D, N), whose standard deviation halves every six components, and one-hot labels Y (C, N).

    The labels depend on a component outside of the first K. The components' directions are random.
    """
    rng = np.random.default_rng(seed)
    source_DN = rng.normal(size=(D, count)) * 0.5 ** (np.arange(D)[:, None] / 6)
    labels = np.digitize(source_DN[K + 1] / source_DN[K + 1].std(), [-0.4, 0.4])
    return np.linalg.qr(rng.normal(size=(D, D)))[0] @ source_DN, np.eye(CLASSES)[labels].T


def free_minimum(x_DN: np.ndarray, y_CN: np.ndarray, latents: int, lam: float) -> float:
    """The minimum of the loss over W, linear decoders and all latents F (K, N).

    The best F spans the leading eigenvectors of Y^T Y + lam X^T X (Eckart and Young), as a linear encoder's does among
    those in the rows of X (Theorem 1).
    """
    values = np.linalg.eigvalsh(y_CN.T @ y_CN + lam * x_DN.T @ x_DN)
    return float(values[: len(values) - latents].sum())


def linear_minimum(x_DN: np.ndarray, y_CN: np.ndarray, latents: int, lam: float) -> float:
    """The same over linear encoders F = V^T X, by Theorem 1."""
    moments = Moments(x_DN @ x_DN.T, x_DN @ y_CN.T, y_CN @ y_CN.T, x_DN.shape[1])
    return theorem1(moments, latents, lam).loss


@dataclasses.dataclass
class Model:
    """Latents F (K, N) and a decoder B h(A F) with A (M, K) and B (D, M), where h is tanh or nothing.

    Attributes:
      latents: F; None: F = V^T X.
      encoder: V (D, K); None: F is free.
      inner, outer: A and B.
      curved: whether h is tanh.
    """

    latents: np.ndarray | None
    encoder: np.ndarray | None
    inner: np.ndarray
    outer: np.ndarray
    curved: bool

    def output(self, x_DN: np.ndarray) -> np.ndarray:
        """The reconstruction (D, N)."""
        hidden_MN = self.inner @ self.features(x_DN)
        return self.outer @ (np.tanh(hidden_MN) if self.curved else hidden_MN)

    def features(self, x_DN: np.ndarray) -> np.ndarray:
        """The latents F (K, N)."""
        if self.latents is None:
            assert self.encoder is not None
            return self.encoder.T @ x_DN
        return self.latents

    def gradient(self, x_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The derivatives of 1/2 ||output - X||_F^2 in F (K, N), A and B."""
        latents_KN = self.features(x_DN)
        hidden_MN = self.inner @ latents_KN
        if self.curved:
            hidden_MN = np.tanh(hidden_MN)
        error_DN = self.outer @ hidden_MN - x_DN
        slope_MN = self.outer.T @ error_DN * (1 - np.square(hidden_MN) if self.curved else 1.0)
        return self.inner.T @ slope_MN, slope_MN @ latents_KN.T, error_DN @ hidden_MN.T

    def step(self, x_DN: np.ndarray, rate: float) -> None:
        """One step of gradient descent on the loss per image."""
        of_latents, of_inner, of_outer = self.gradient(x_DN)
        rate /= x_DN.shape[1]
        if self.latents is None:
            assert self.encoder is not None
            self.encoder = self.encoder - rate * x_DN @ of_latents.T
        else:
            self.latents = self.latents - rate * x_DN.shape[1] * of_latents  # each image has its own latents
        self.inner, self.outer = self.inner - rate * of_inner, self.outer - rate * of_outer


def model(count: int, scale: float, free: bool, curved: bool, seed: int = 0) -> Model:
    """A model at initialisation; latents and encoder are drawn with the given scale."""
    rng = np.random.default_rng(seed)
    inner, outer = rng.normal(size=(M, K)) / np.sqrt(K), rng.normal(size=(D, M)) / np.sqrt(M)
    latents = scale * rng.normal(size=(K, count)) if free else None
    return Model(latents, None if free else scale * rng.normal(size=(D, K)), inner, outer, curved)


def difference(scale: float, seed: int = 0) -> float:
    """How far the first gradient in F is from that of the linearised decoder, relative to the latter."""
    x_DN, _ = images(COUNTS[1], seed)
    curved, flat = (model(COUNTS[1], scale, free=True, curved=c, seed=seed).gradient(x_DN)[0] for c in (True, False))
    return float(np.linalg.norm(curved - flat) / np.linalg.norm(flat))


def descend(free: bool, curved: bool, seed: int = 0, fallen: Sequence[float] = FALLEN) -> dict[float, float]:
    """Trains a model by gradient descent from small latents.

    Returns:
      {share of what K latents can restore that the loss has fallen by: share of the latents' energy in the first K
      principal components of the images}, as far as it came in DESCENT steps.
    """
    x_DN, _ = images(COUNTS[1], seed)
    _, values, rows_DN = np.linalg.svd(x_DN, full_matrices=False)
    whole, least = np.square(values).sum(), np.square(values[K:]).sum()
    trained = model(COUNTS[1], LEAST, free, curved, seed)
    out: dict[float, float] = {}
    for _ in range(DESCENT):
        output_DN = trained.output(x_DN)
        restored = (whole - np.square(output_DN - x_DN).sum()) / (whole - least)
        reached = [share for share in fallen if share not in out and restored >= share]
        if reached:
            latents_KN = trained.features(x_DN)
            share = np.square(latents_KN @ rows_DN[:K].T).sum() / np.square(latents_KN).sum()
            out |= dict.fromkeys(reached, float(share))
        if len(out) == len(fallen):
            break
        trained.step(x_DN, RATE)
    return out


def section() -> Section:
    """The section on Theorem 2; it needs no run and no images."""
    minima = []
    for count in COUNTS:
        x_DN, y_CN = images(count)
        for lam in LAMS:
            free, linear = (f(x_DN, y_CN, K, lam) for f in (free_minimum, linear_minimum))
            minima.append((count, lam, linear, free, linear / max(free, EPS) - 1))
    differences = [(scale, difference(scale)) for scale in SCALES]
    kinds = {
        "linear encoder, linear decoder": (False, False),
        "free latents, linear decoder": (True, False),
        "free latents, tanh decoder": (True, True),
    }
    found = {name: descend(*kind) for name, kind in kinds.items()}
    plot = Plot(figsize=(5.2, 3.4), layout="constrained")
    ax = plot.subplots()
    for name, shares in found.items():
        ax.plot([100 * s for s in shares], [100 * v for v in shares.values()], "o-", markersize=4, label=name)
    ax.axhline(100 * K / D, color="C7", linestyle=":", label="all components alike")
    ax.set_xlabel(f"restored, % of what {K} latents can")
    ax.legend(frameon=False, fontsize=8)
    tidy(ax, f"% of the latents in the first {K} components")
    return Section(
        title="Is a deep encoder as a linear one?",
        text="After Theorem 2 of Balestriero & LeCun (ICML 2024), on drawn images of "
        f"{D} numbers with {K} latents. A free encoder gives each image any latents. With a linear decoder its least "
        "loss is a linear encoder's, exactly where the images' rows span all latents (fewer images than numbers) and "
        "in the limit of reconstruction alone (large lambda); with more images it can fit labels that no linear map of "
        "the images gives. With a tanh decoder the first gradient is that of the linear problem as the latents become "
        "small. Trained from there by gradient descent, all turn to the principal subspace.",
        figures=(Figure("Where the latents' energy lies while the loss falls.", plot),),
        tables=(
            Table(
                "Least loss with a linear decoder.",
                ("images", "lambda", "linear encoder", "free latents", "linear / free - 1"),
                tuple(minima),
            ),
            Table(
                "Tanh decoder: relative difference of the first gradient from that of the linearised decoder.",
                ("scale of the latents", "difference"),
                tuple(differences),
            ),
            Table(
                f"Share of the latents' energy in the first {K} principal components (all alike: {K / D:.3f}).",
                ("model", *(f"restored {share:.0%}" for share in FALLEN)),
                tuple((name, *(shares.get(share) for share in FALLEN)) for name, shares in found.items()),
            ),
        ),
        numbers={"minima": minima, "differences": differences, "principal": found},
    )
