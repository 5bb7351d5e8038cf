"""Orthogonality penalties on weight matrices: SO and SRIP.

He et al., "Preventing Dimensional Collapse in Self-Supervised Learning via Orthogonality
Regularization" (arXiv 2411.00392), adds one of them to a self-supervised loss; both come from
Bansal et al., "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?" (2018):

    SO:    sum over weights of ||G - I||_F^2
    SRIP:  sum over weights of sigma_max(G - I)

with G a Gram matrix of the weight. The papers write W for PyTorch's weight, out x in, and G = W^T W
(in x in). If W is wide, the rank of this G is below its side and G cannot be I, so our default is the
smaller of W^T W and W W^T. Our kernels are in x out, the transpose of W; a convolution's kernel
(h, w, in, out) is read as (h*w*in, out).

Letters: L layers, M matrices of one shape, n the side of the Gram matrix, m the other side.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax.errors import ConfigError
from crate_jax.parallel import parameters
from crate_jax.validation import IF_FITS, RECORDED, Key, Section, anything, at_least, one_of, patterns, positive

__all__ = ["Penalty", "build", "frobenius_squared", "spectral_norm"]

log = logging.getLogger(__name__)

FRESH_ERROR = 0.1  # relative error of sigma below which vectors that are new in each step need no warning
HIGHEST = jax.lax.Precision.HIGHEST  # TF32 or bfloat16 products would drown G - I near orthonormality
State = dict[str, jax.Array]


class Penalty(Protocol):
    """The interface of the penalties that the entries of :data:`PENALTIES` build."""

    names: tuple[str, ...]  # the parameters that the penalty acts on

    def init(self, key: jax.Array) -> State:
        """Returns the state of step 0 (an empty dict if there is none)."""
        ...

    def apply(self, params: Any, state: State, key: jax.Array) -> tuple[jax.Array, State]:
        """Returns the penalty summed over the weights (float32 scalar, without gamma) and the next state."""
        ...


def flatten_kernel(kernel: jax.Array, stacked: bool = False) -> jax.Array:
    """Reads a dense kernel (in, out) or a convolution's (h, w, in, out) as a matrix (h*w*in, out).

    A stacked kernel keeps its leading layer axis: (L, ...) -> (L, h*w*in, out).

    >>> flatten_kernel(jnp.zeros((3, 3, 16, 32))).shape
    (144, 32)
    """
    layers = kernel.shape[:1] if stacked else ()
    return kernel.reshape(*layers, -1, kernel.shape[-1])


def _gram_on_inputs(inputs: int, outputs: int, gram: str) -> bool:
    return gram == "in" or (gram == "smaller" and inputs <= outputs)


def orient(w_Lio: jax.Array, gram: str) -> jax.Array:
    """Turns matrices (..., in, out) into w (..., n, m), so that w w^T is the chosen Gram matrix.

    Args:
      w_Lio: kernels (..., in, out).
      gram: "in" (n = in: W^T W of PyTorch's out x in weight W), "out" (n = out: W W^T), or
        "smaller" (n = min(in, out)).

    >>> orient(jnp.zeros((12, 64, 16)), "smaller").shape
    (12, 16, 64)
    """
    inputs, outputs = w_Lio.shape[-2:]
    return w_Lio if _gram_on_inputs(inputs, outputs, gram) else jnp.swapaxes(w_Lio, -1, -2)


def gram_residual(w_Lnm: jax.Array) -> jax.Array:
    """Returns w w^T - I, (..., n, n) in float32, for matrices (..., n, m).

    >>> gram_residual(2 * jnp.eye(2)).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    w_Lnm = w_Lnm.astype(jnp.float32)
    gram_Lnn = jnp.einsum("...nm,...km->...nk", w_Lnm, w_Lnm, precision=HIGHEST)
    return gram_Lnn - jnp.eye(gram_Lnn.shape[-1], dtype=jnp.float32)


@jax.custom_jvp
def frobenius_squared(w_Mnm: jax.Array) -> jax.Array:
    """Returns the sum of ||w w^T - I||_F^2 over M matrices (M, n, m), a float32 scalar.

    The derivative 4 (w w^T - I) w is written out: since the residual is symmetric, it takes one
    matrix product, while the derivative of the Gram matrix would take two.

    >>> float(frobenius_squared(2 * jnp.eye(2)[None]))
    18.0
    """
    return jnp.sum(jnp.square(gram_residual(w_Mnm)))


@frobenius_squared.defjvp
def _frobenius_squared_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (w_Mnm,), (dw_Mnm,) = primals, tangents
    residual_Mnn = gram_residual(w_Mnm)
    gradient_Mnm = 4 * jnp.einsum("Mnk,Mkm->Mnm", residual_Mnn, w_Mnm, precision=HIGHEST)
    return jnp.sum(jnp.square(residual_Mnn)), jnp.sum(gradient_Mnm * dw_Mnm)


def _residual_times(w_Mnm: jax.Array, v_Mn: jax.Array) -> jax.Array:
    """(w w^T - I) v without forming the Gram matrix: 4nm operations instead of 2n^2 m."""
    y_Mm = jnp.einsum("Mnm,Mn->Mm", w_Mnm, v_Mn, precision=HIGHEST)
    return jnp.einsum("Mnm,Mm->Mn", w_Mnm, y_Mm, precision=HIGHEST) - v_Mn


def _direction(x_Mn: jax.Array, otherwise_Mn: jax.Array) -> jax.Array:
    """Scales x to unit length; where x is zero (an exactly orthonormal weight), returns `otherwise_Mn`."""
    norm_M1 = optax.safe_norm(x_Mn, 0.0, axis=-1, keepdims=True)
    return jnp.where(norm_M1 > 0, x_Mn / jnp.where(norm_M1 > 0, norm_M1, 1.0), otherwise_Mn)


def spectral_norm(w_Mnm: jax.Array, v_Mn: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Estimates sigma_max(A), A = w w^T - I, for M matrices by power iteration.

    A is indefinite and may have eigenvalues of nearly equal size and opposite sign. Then the vector v
    does not converge, and v^T A v tends to a number below sigma_max. But ||A v|| always tends to
    sigma_max, since ||A v||^2 is the Rayleigh quotient of A^2, whose largest eigenvalue is sigma_max^2.
    The gradient of ||A v|| with v held fixed is then a convex combination of the gradients of the two
    eigenvalues' absolute values.

    Args:
      w_Mnm: matrices (M, n, m); the gradient flows through them in the last product only.
      v_Mn: unit vectors (M, n) to start from.
      iterations: the number of products with A before the last one.

    Returns:
      sigma (M,), float32, which up to rounding is not above sigma_max, and the next step's unit vectors (M, n).

    >>> sigma, _ = spectral_norm(2 * jnp.eye(2)[None], jnp.array([[1.0, 0.0]]), iterations=2)
    >>> sigma.tolist()
    [3.0]
    """
    w_Mnm = w_Mnm.astype(jnp.float32)
    fixed_Mnm = jax.lax.stop_gradient(w_Mnm)
    v_Mn = jax.lax.stop_gradient(v_Mn)
    v_Mn = jax.lax.fori_loop(0, iterations, lambda _, v_Mn: _direction(_residual_times(fixed_Mnm, v_Mn), v_Mn), v_Mn)
    image_Mn = _residual_times(w_Mnm, v_Mn)
    return optax.safe_norm(image_Mn, 0.0, axis=-1), _direction(jax.lax.stop_gradient(image_Mn), v_Mn)


def iterations_for(n: int) -> int:
    """Products with A from a random vector after which sigma_max(A), A (n, n), is expected within a relative error.

    Kuczynski and Wozniakowski 1992, theorem 3.1: for any spectrum, k steps on a semi-definite matrix leave an expected
    error of at most 0.871 ln(n) / (k - 1). Ours are on A^2: a step takes two products, and its error is twice that of
    sigma. The gradient's error has no such bound: where eigenvalues are close, it may be that of a neighbour.

    >>> iterations_for(384)
    52
    """
    return math.ceil(0.871 * math.log(n) / FRESH_ERROR)


def random_directions(key: jax.Array, count: int, n: int) -> jax.Array:
    """Draws `count` unit vectors (count, n), uniform on the sphere, float32."""
    x_Mn = jax.random.normal(key, (count, n), jnp.float32)
    return x_Mn / jnp.linalg.norm(x_Mn, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Batch:
    """All weights of one shape n x m after :func:`orient`; one batched product computes them together."""

    names: tuple[str, ...]
    count: int  # number of matrices; each layer of a stacked weight counts
    n: int
    m: int
    gram: str

    @property
    def label(self) -> str:
        """The batch's name in the state, such as ``384x1536``."""
        return f"{self.n}x{self.m}"

    def key(self, key: jax.Array) -> jax.Array:
        """The batch's own random key, which does not depend on the other batches."""
        return jax.random.fold_in(jax.random.fold_in(key, self.n), self.m)

    def gather(self, leaves: dict[str, jax.Array]) -> jax.Array:
        """Returns the weights (M, n, m), name by name, layer by layer."""
        parts = [flatten_kernel(leaves[name], parameters.is_stacked(name)) for name in self.names]
        return jnp.concatenate([orient(p if p.ndim == 3 else p[None], self.gram) for p in parts])


def batches(params: Any, selected: tuple[str, ...], gram: str) -> tuple[Batch, ...]:
    """Groups the selected weights by their shape after :func:`orient`, in increasing order of the shapes.

    Args:
      params: tree of arrays or of shapes.
      selected: the weights' names.
      gram: "in", "out" or "smaller", see :func:`orient`.

    Raises:
      ConfigError: a selected parameter is neither a dense kernel nor a convolution's kernel.
    """
    leaves = parameters.names(params)
    groups: dict[tuple[int, int], dict[str, int]] = {}
    for name in selected:
        leaf = leaves[name]
        stacked = parameters.is_stacked(name)
        if parameters.unstacked_ndim(name, leaf) not in (2, 4):
            raise ConfigError(
                f"config.penalty.include: selects {name} of shape {tuple(leaf.shape)}, which is not a matrix or a "
                "convolution's kernel; match kernels only, or list it in config.penalty.exclude"
            )
        layers = leaf.shape[0] if stacked else 1
        outputs = leaf.shape[-1]
        inputs = math.prod(leaf.shape[stacked:-1])
        shape = (inputs, outputs) if _gram_on_inputs(inputs, outputs, gram) else (outputs, inputs)
        groups.setdefault(shape, {})[name] = layers
    return tuple(Batch(tuple(group), sum(group.values()), n, m, gram) for (n, m), group in sorted(groups.items()))


class NoPenalty:
    """The penalty 0 on weights, which costs nothing."""

    def __init__(self, config: ConfigDict, params: Any):
        del config, params
        self.names: tuple[str, ...] = ()

    def init(self, key: jax.Array) -> State:
        """Returns an empty state."""
        del key
        return {}

    def apply(self, params: Any, state: State, key: jax.Array) -> tuple[jax.Array, State]:
        """Returns 0 and the unchanged state."""
        del params, key
        return jnp.zeros((), jnp.float32), state


class _KernelPenalty:
    """Selects the weights that config.penalty names, and groups them by shape."""

    def __init__(self, config: ConfigDict, params: Any):
        options = config.penalty
        self.names = parameters.select(params, options.include, options.exclude, "penalty")
        if not self.names:
            raise ConfigError("config.penalty.exclude: takes out every parameter that config.penalty.include selects")
        self.batches = batches(params, self.names, options.gram)


class SoftOrthogonality(_KernelPenalty):
    """SO: the sum of ||G - I||_F^2 (Bansal et al. 2018). It has no state."""

    def init(self, key: jax.Array) -> State:
        """Returns an empty state."""
        del key
        return {}

    def apply(self, params: Any, state: State, key: jax.Array) -> tuple[jax.Array, State]:
        """Returns the penalty and the unchanged state."""
        del key
        leaves = parameters.names(params)
        return sum((frobenius_squared(b.gather(leaves)) for b in self.batches), jnp.zeros((), jnp.float32)), state


class SpectralRestrictedIsometry(_KernelPenalty):
    """SRIP: the sum of sigma_max(G - I) ** power (Bansal et al. 2018).

    The formula has power 1; some released code sums squares (power 2). With `keep_vector` the state holds
    the last step's vectors, {"384x1536": v (M, n), ...}, from which the power iteration continues, so that it
    converges over the steps. Without `keep_vector` each step starts from new random vectors, and there is no state.
    """

    def __init__(self, config: ConfigDict, params: Any):
        super().__init__(config, params)
        self.power = config.penalty.power
        self.iterations = config.penalty.iterations
        self.keep_vector = config.penalty.keep_vector
        needed = iterations_for(max(b.n for b in self.batches))
        if not self.keep_vector and self.iterations < needed:
            log.warning(
                "config.penalty.keep_vector=False: %d iterations from a new random vector may miss sigma_max, and the "
                "gradient then belongs to other directions; config.penalty.iterations=%d finds it within %d %% on "
                "average, keep_vector=True over the steps", self.iterations, needed, round(100 * FRESH_ERROR),
            )  # fmt: skip

    def init(self, key: jax.Array) -> State:
        """Draws the starting vectors."""
        return self._draw(key) if self.keep_vector else {}

    def apply(self, params: Any, state: State, key: jax.Array) -> tuple[jax.Array, State]:
        """Returns the penalty and the next step's vectors."""
        leaves = parameters.names(params)
        start = state if self.keep_vector else self._draw(key)
        total, vectors = jnp.zeros((), jnp.float32), {}
        for b in self.batches:
            sigma_M, vectors[b.label] = spectral_norm(b.gather(leaves), start[b.label], self.iterations)
            total += jnp.sum(sigma_M**self.power)
        return total, vectors if self.keep_vector else state

    def _draw(self, key: jax.Array) -> State:
        return {b.label: random_directions(b.key(key), b.count, b.n) for b in self.batches}


PENALTIES: dict[str, Callable[[ConfigDict, Any], Penalty]] = {
    "none": NoPenalty,
    "so": SoftOrthogonality,
    "srip": SpectralRestrictedIsometry,
    "whiten": NoPenalty,  # on features, which the method adds: crate_jax.methods.whitening
}


def build(config: ConfigDict, params: Any) -> Penalty:
    """Builds the penalty config.penalty.name.

    Args:
      config: the whole configuration.
      params: the parameter tree, or its shapes from jax.eval_shape.

    Raises:
      ConfigError: a pattern matches no parameter, or the patterns select a parameter that is not a kernel or none.
    """
    return PENALTIES[config.penalty.name](config, params)


def penalty_term(
    config: ConfigDict, penalty: Penalty
) -> Callable[..., tuple[jax.Array, tuple[State, dict[str, jax.Array]]]]:
    """Returns the loss term (params, state, key) -> (weight * penalty, (new state, scalars to log))."""

    def term(params: Any, state: State, key: jax.Array) -> tuple[jax.Array, tuple[State, dict[str, jax.Array]]]:
        value, state = penalty.apply(params, state, key)
        return config.penalty.weight * value, (state, {"penalty": value} if penalty.names else {})

    return term


def _check_penalty(c: ConfigDict) -> None:
    if c.penalty.name != "none" and not c.penalty.weight:
        raise ConfigError(f"config.penalty.weight=0: config.penalty.name={c.penalty.name!r} needs a weight above 0")
    if c.penalty.name == "whiten" and c.job in ("finetune", "segment"):
        raise ConfigError(f"config.penalty.name='whiten': is for pre-training, job {c.job} takes so, srip or none")
    if c.penalty.name == "whiten" and c.batch_size < 2:
        raise ConfigError(
            f"config.batch_size={c.batch_size}: config.penalty.name='whiten' needs the covariance of at least 2 images"
        )


ON_WEIGHTS, SRIP, WHITEN = ("penalty.name", "so", "srip"), ("penalty.name", "srip"), ("penalty.name", "whiten")

PENALTY = Section(
    "penalty",
    "A term of the loss that makes weights more orthogonal, or features whiter (docs/orthogonality.md).",
    of_the_run=True,
    resume=RECORDED,
    check=_check_penalty,
    keys=dict(
        name=Key("none", one_of(*PENALTIES), "penalty", resume=IF_FITS),
        weight=Key(0.0, at_least(0), "factor gamma of the penalty", read_by=(*ON_WEIGHTS, "whiten")),
        include=Key(
            (r"encoder/.*kernel",),
            patterns,
            "whole names of the weights that it acts on",
            read_by=ON_WEIGHTS,
            resume=IF_FITS,
        ),
        exclude=Key(
            (),
            patterns,
            "whole names of weights that it does not act on",
            read_by=ON_WEIGHTS,
            items=str,
            resume=IF_FITS,
        ),
        gram=Key(
            "smaller",
            one_of("smaller", "in", "out"),
            "in: W^T W of torch's W (out x in); out: W W^T",
            read_by=ON_WEIGHTS,
            resume=IF_FITS,
        ),
        power=Key(1, one_of(1, 2), "sigma ** power: 1 (formula), 2 (some released code)", read_by=SRIP),
        iterations=Key(2, positive, "power iterations per step", read_by=SRIP),
        variance=Key(25.0, at_least(0), "whiten: weight of deviations below 1 beside the covariances", read_by=WHITEN),
        keep_vector=Key(
            True, anything, "start from the last step's vector; False: from a new one", read_by=SRIP, resume=IF_FITS
        ),
    ),
)
