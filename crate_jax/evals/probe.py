"""Multinomial logistic regression on frozen features, solved to convergence on the device, for many penalties.

The objective is that of scikit-learn's ``LogisticRegression``, c * sum_i CE_i + 1/2 ||W||^2, without a penalty on the
bias. Here it is divided by c n, so that its values, gradients and tolerance do not depend on the size of the set.

Shapes: n rows, D features, C classes, S inverse strengths c of the penalty.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crate_jax.evals.features import check_labelled

log = logging.getLogger(__name__)

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 or bfloat16 products would stall the line search
MAX_FLAT = 5  # after so many iterations without a fall of the loss above float32's rounding, it is at its minimum


class LinearProbe(NamedTuple):
    """A fitted probe, whose scores are (x - mean) / std @ weights + bias.

    Attributes:
      weights: float32 (D, C).
      bias: float32 (C,).
      mean: means of the training features, float32 (D,).
      std: deviations of the training features, float32 (D,); 1 if features are not standardised; infinite for a
        constant feature.
      iterations: number of L-BFGS iterations.
      converged: whether the gradient fell to the tolerance, or the loss to its minimum in float32.
    """

    weights: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    iterations: int
    converged: bool

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Returns the class scores (logits), float32 (m, C), of features (m, D)."""
        return np.asarray(_logits(jnp.asarray(x, jnp.float32), *self[:4]))

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predicts the class of each row, integers (m,), of features (m, D)."""
        return np.argmax(self.scores(x), axis=1)


def fit_all(
    train_x: np.ndarray,
    train_y: np.ndarray,
    num_classes: int,
    strengths: Sequence[float],
    standardise: bool,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> list[LinearProbe]:
    """Fits one probe per inverse strength of the penalty, all in one program.

    The strongest penalty is solved first, and each solution is the start of the next: this takes a fraction of the
    iterations of separate solves.

    Args:
      train_x: training features (n, D).
      train_y: their integer labels (n,) in 0 .. num_classes - 1.
      num_classes: number of classes, C.
      strengths: inverse strength of each probe's penalty, ``C`` of scikit-learn.
      standardise: whether to divide each feature by its standard deviation over the training rows. The L2 penalty
        depends on the scale of each feature, which an encoder sets arbitrarily: with standardised features one strength
        means the same for every encoder. (MAE's BatchNorm without affine before its linear head has the same effect.)
        Constant features get weight 0 in any case.
      max_iterations: largest number of L-BFGS iterations per probe.
      tolerance: bound on the largest entry of the gradient of the mean loss, in the coordinates of :func:`_scale`.

    Returns:
      The probes, in the order of `strengths`. A warning is logged for each probe that has not converged: its accuracy
      is then a lower bound for its strength.

    Raises:
      DataError: a label is out of range, or shapes do not match.
      NonFiniteError: a feature is NaN or infinite.
      ValueError: a strength is not positive.
    """
    if not strengths or not all(c > 0 for c in strengths):
        raise ValueError(f"logistic regression: C={list(strengths)} must be positive numbers")
    check_labelled("train", train_x, train_y, num_classes)
    order = np.argsort(strengths)
    decay_S = jnp.asarray([1.0 / (strengths[i] * len(train_x)) for i in order], jnp.float32)
    x, y = jnp.asarray(train_x, jnp.float32), jnp.asarray(train_y, jnp.int32)
    fitted = _fit(x, y, decay_S, jnp.float32(tolerance), jnp.int32(max_iterations), num_classes, standardise)
    weights_S, bias_S, mean, std, iterations_S, converged_S, gradient_S = jax.device_get(fitted)
    probes: list[LinearProbe] = [None] * len(strengths)  # type: ignore[list-item]  # filled below
    for place, i in enumerate(order):
        iterations, converged = int(iterations_S[place]), bool(converged_S[place])
        probes[i] = LinearProbe(weights_S[place], bias_S[place], mean, std, iterations, converged)
        if not converged:
            log.warning(
                "linear probe, C=%g: stopped after %d iterations with a gradient of %.1e, above %.1e",
                strengths[i], iterations, gradient_S[place], tolerance,
            )  # fmt: skip
    return probes


def probe_top1(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, num_classes: int, c: float
) -> float:
    """Returns the share (0..1) of the test rows whose class a probe on standardised features predicts correctly.

    Args:
      train_x: training features (n, D).
      train_y: their integer labels (n,) in 0 .. num_classes - 1.
      test_x: test features (m, D).
      test_y: their integer labels (m,).
      num_classes: number of classes.
      c: inverse strength of the penalty, ``C`` of scikit-learn.

    Raises:
      DataError: a label is out of range, or shapes do not match.
      NonFiniteError: a feature is NaN or infinite.
      ValueError: `c` is not positive.
    """
    check_labelled("test", test_x, test_y, num_classes)
    (probe,) = fit_all(train_x, train_y, num_classes, [c], standardise=True)
    return float(np.mean(probe.predict(test_x) == test_y))


def _moments(x: jax.Array, standardise: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the scale of each feature, both (D,)."""
    mean = jnp.mean(x, axis=0)
    std = jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=0))
    # If the deviation is within the rounding error of the mean, the feature is constant; we must not divide by noise.
    varies = std > 8 * jnp.finfo(x.dtype).eps * jnp.abs(mean)
    return mean, jnp.where(varies, std if standardise else 1.0, jnp.inf)


class _Carry(NamedTuple):
    """The state of one L-BFGS run."""

    params: dict[str, jax.Array]
    state: optax.OptState
    value: jax.Array
    grads: dict[str, jax.Array]
    iteration: jax.Array
    flat: jax.Array


@functools.partial(jax.jit, static_argnames=("num_classes", "standardise"))
def _fit(
    x: jax.Array,
    y: jax.Array,
    decay_S: jax.Array,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    num_classes: int,
    standardise: bool,
) -> tuple[jax.Array, ...]:
    """Minimises mean CE + decay / 2 ||W||^2 for each decay, which must be sorted from the strongest to the weakest.

    Returns:
      Weights (S, D, C), bias (S, C), mean and scale (D,); iterations, convergence and the largest entry of the gradient
      (S,).
    """
    mean, std = _moments(x, standardise)
    x = (x - mean) / std
    covariance = jnp.matmul(x.T, x, precision=HIGHEST) / x.shape[0]
    variance, directions = jnp.linalg.eigh(covariance)
    rotated = jnp.matmul(x, directions, precision=HIGHEST)
    solver = optax.lbfgs()

    def solve(start: dict[str, jax.Array], decay: jax.Array) -> tuple[dict[str, jax.Array], tuple[Any, ...]]:
        scale = _scale(variance, decay, num_classes)[:, None]
        bias_scale = jnp.sqrt(float(num_classes))

        def objective(params: dict[str, jax.Array]) -> jax.Array:
            weights = scale * params["weights"]
            logits = jnp.matmul(rotated, weights, precision=HIGHEST) + bias_scale * params["bias"]
            loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
            return loss + 0.5 * decay * jnp.sum(jnp.square(weights))  # rotations keep the norm

        def unfinished(carry: _Carry) -> jax.Array:
            gradient = optax.tree.norm(carry.grads, ord=jnp.inf)
            return (carry.iteration < max_iterations) & (gradient > tolerance) & (carry.flat < MAX_FLAT)

        def step(carry: _Carry) -> _Carry:
            updates, state = solver.update(
                carry.grads, carry.state, carry.params, value=carry.value, grad=carry.grads, value_fn=objective
            )
            params = optax.apply_updates(carry.params, updates)
            # The line search has evaluated the new point.
            value, grads = (optax.tree.get(state, name) for name in ("value", "grad"))
            fell = carry.value - value > 2 * jnp.finfo(x.dtype).eps * carry.value
            return _Carry(params, state, value, grads, carry.iteration + 1, jnp.where(fell, 0, carry.flat + 1))

        params = {"weights": start["weights"] / scale, "bias": start["bias"] / bias_scale}
        value, grads = jax.value_and_grad(objective)(params)
        carry = _Carry(params, solver.init(params), value, grads, jnp.int32(0), jnp.int32(0))
        end = jax.lax.while_loop(unfinished, step, carry)
        gradient = optax.tree.norm(end.grads, ord=jnp.inf)
        converged = (gradient <= tolerance) | (end.flat >= MAX_FLAT)
        found = {"weights": scale * end.params["weights"], "bias": bias_scale * end.params["bias"]}
        return found, (found, end.iteration, converged, gradient)

    zeros = {"weights": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    _, (found, iterations_S, converged_S, gradient_S) = jax.lax.scan(solve, zeros, decay_S)
    weights_SDC = jnp.matmul(directions, found["weights"], precision=HIGHEST)
    return weights_SDC, found["bias"], mean, std, iterations_S, converged_S, gradient_S


def _scale(variance: jax.Array, decay: jax.Array, num_classes: int) -> jax.Array:
    """Returns the scale (D,) of each principal direction with which the Hessian at zero weights is the identity.

    At zero weights every class has probability 1/C, and the Hessian is the covariance of the features / C + decay. A
    network's features are strongly correlated: without this scaling, L-BFGS needs about 20 times as many iterations for
    the same minimum.
    """
    curvature = jnp.maximum(variance, 0) / num_classes + decay
    # Directions without variance are stretched no further: their gradient is only rounding error.
    return jax.lax.rsqrt(jnp.maximum(curvature, 1e-6 * curvature[-1]))


@jax.jit
def _logits(x: jax.Array, weights: jax.Array, bias: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return jnp.matmul((x - mean) / std, weights, precision=HIGHEST) + bias
