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
ACCURACY = 0.1  # to which Newton's systems are solved near the minimum, in the norm of the preconditioner
# Before a fit counts as converged, its last system is solved until about MEMORY products took less than SLOW of the
# loss, and the residual is SMALL: in directions of little curvature, a small one can hide a long way down.
MEMORY, SLOW, SMALL = 10, 3e-7, 3e-9
EXACT = 1e-30  # a residual below is rounding error, and its square would be 0


class LinearProbe(NamedTuple):
    """A fitted probe, whose scores are (x - mean) / std @ weights + bias.

    Attributes:
      weights: float32 (D, C).
      bias: float32 (C,).
      mean: means of the training features, float32 (D,).
      std: deviations of the training features, float32 (D,); 1 if features are not standardised; infinite for a
        constant feature.
      iterations: number of products with the Hessian; each costs about as much as a gradient.
      converged: whether the loss is at its minimum, up to 1e-4 of its value.
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
    max_iterations: int = 3000,
    tolerance: float = 3e-5,
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
      max_iterations: largest number of products with the Hessian per probe.
      tolerance: how far the loss may be above its minimum, relative to its value, before the last Newton step. After
        that step it is closer: at most 3e-6 on 14 sets for C = 1e-2 to 1e5, also where classes are separable, and 2e-5
        on one whose features have rank 11 of 128.

    Returns:
      The probes, in the order of `strengths`. A warning is logged for each probe that has not converged: its accuracy
      is then not that of its strength.

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
    weights_S, bias_S, mean, std, iterations_S, converged_S, left_S = jax.device_get(fitted)
    probes: list[LinearProbe] = [None] * len(strengths)  # type: ignore[list-item]  # filled below
    for place, i in enumerate(order):
        iterations, converged = int(iterations_S[place]), bool(converged_S[place])
        probes[i] = LinearProbe(weights_S[place], bias_S[place], mean, std, iterations, converged)
        if not converged:
            log.warning(
                "linear probe, C=%g: not converged after %d products with the Hessian; the loss may fall by another "
                "%.1e of its value, bound %.0e", strengths[i], iterations, left_S[place], tolerance,
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


class _Loss(NamedTuple):
    """The cross-entropy of one batch of scores, without cancellation where an image is classified almost surely.

    Attributes:
      value_n: cross-entropy of each row, nats.
      p_nC: the probabilities.
      q_nC: 1 - p.
    """

    value_n: jax.Array
    p_nC: jax.Array
    q_nC: jax.Array


def _cross_entropy(scores_nC: jax.Array, is_label_nC: jax.Array) -> _Loss:
    """With weak penalties all p of the labels go to 1: their logarithm, and 1 - p, would be rounding error in float32.

    So both come from the odds of the other classes, log(1 + sum_j exp(z_j - z_label)), which keep their digits.
    """
    odds_nC = jnp.where(is_label_nC, -jnp.inf, scores_nC - _of_label(scores_nC, is_label_nC))
    value_n = jnp.logaddexp(jax.nn.logsumexp(odds_nC, axis=1), 0.0)
    others_nC = jnp.exp(odds_nC - value_n[:, None])  # 0 at the label
    p_nC = jnp.where(is_label_nC, jnp.exp(-value_n)[:, None], others_nC)
    q_nC = jnp.where(is_label_nC, -jnp.expm1(-value_n)[:, None], 1.0 - others_nC)
    return _Loss(value_n, p_nC, q_nC)


def _of_label(x_nC: jax.Array, is_label_nC: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(is_label_nC, x_nC, 0.0), axis=1, keepdims=True)


class _Carry(NamedTuple):
    """The state of one Newton run; `stuck`: no step makes the loss smaller in float32."""

    params: dict[str, jax.Array]
    value: jax.Array
    products: jax.Array
    left: jax.Array
    converged: jax.Array
    stuck: jax.Array


class _Solution(NamedTuple):
    """The state of one run of conjugate gradients: H step = -gradient.

    Attributes:
      error: r^T M^-1 r of the residual r, with the preconditioner M.
      gain: what the step takes from the quadratic model of the loss.
      recent: what about the last MEMORY products took from the model of the loss.
    """

    step: dict[str, jax.Array]
    residual: dict[str, jax.Array]
    direction: dict[str, jax.Array]
    error: jax.Array
    gain: jax.Array
    recent: jax.Array
    products: jax.Array


class _Problem(NamedTuple):
    """Mean CE + decay / 2 ||W||^2, to be minimised over the parameters, weights (D, C) and bias (C,).

    Attributes:
      x_nD: the features in the basis of their covariance, in which the Hessian is nearly diagonal.
      squared_nD: their squares.
      is_label_nC: whether a class is the row's label.
      decay: the strength of the penalty.
    """

    x_nD: jax.Array
    squared_nD: jax.Array
    is_label_nC: jax.Array
    decay: jax.Array

    def scores(self, params: dict[str, jax.Array]) -> jax.Array:
        """The scores (n, C)."""
        return jnp.matmul(self.x_nD, params["weights"], precision=HIGHEST) + params["bias"]

    def transposed(self, rows_nC: jax.Array, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The gradient at the parameters, if `rows_nC` are n times the gradients of the mean by the scores."""
        weights = jnp.matmul(self.x_nD.T, rows_nC, precision=HIGHEST) / len(self.x_nD)
        return {"weights": weights + self.decay * params["weights"], "bias": jnp.mean(rows_nC, axis=0)}

    def objective(self, scores_nC: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        """The loss of parameters whose scores are known."""
        mean_loss = jnp.mean(_cross_entropy(scores_nC, self.is_label_nC).value_n)
        return mean_loss + 0.5 * self.decay * jnp.sum(jnp.square(params["weights"]))  # rotations keep the norm


class _Model(NamedTuple):
    """The quadratic model of a problem's loss at some parameters.

    Attributes:
      problem: the problem.
      p_nC: the probabilities.
      gradient: the gradient.
      diagonal: the diagonal of the Hessian H.
    """

    problem: _Problem
    p_nC: jax.Array
    gradient: dict[str, jax.Array]
    diagonal: dict[str, jax.Array]

    @classmethod
    def at(cls, problem: _Problem, params: dict[str, jax.Array], scores_nC: jax.Array) -> _Model:
        """The model at parameters whose scores are known."""
        x, is_label = problem.squared_nD, problem.is_label_nC
        _, p, q = _cross_entropy(scores_nC, is_label)
        gradient = problem.transposed(jnp.where(is_label, -q, p), params)
        diagonal = {
            "weights": jnp.matmul(x.T, p * q, precision=HIGHEST) / len(x) + problem.decay,
            "bias": jnp.mean(p * q, axis=0) + jnp.finfo(x.dtype).tiny,
        }
        return cls(problem, p, gradient, diagonal)

    def hessian(self, v: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """H v."""
        # The softmax does not see a common shift; relative to the label nothing cancels.
        u = self.problem.scores(v)
        u = u - _of_label(u, self.problem.is_label_nC)
        out = self.problem.transposed(self.p_nC * (u - jnp.sum(self.p_nC * u, axis=1, keepdims=True)), v)
        # No term of the loss sees a common shift of the biases; this one keeps rounding from moving it.
        return {**out, "bias": out["bias"] + jnp.mean(self.diagonal["bias"]) * jnp.mean(v["bias"])}

    def solve(self, value: jax.Array, tolerance: jax.Array, max_products: jax.Array) -> _Solution:
        """Solves H step = -gradient by conjugate gradients, as exactly as the loss's value is worth it."""

        def unsolved(s: _Solution) -> jax.Array:
            inaccurate = s.error > jnp.square(accuracy) * first.error
            unproven = (s.recent > SLOW * value) | (s.products < MEMORY) | (s.error > SMALL * value)
            wanted = inaccurate | ((s.gain <= tolerance * value) & unproven)
            rounding = jnp.maximum(1e-10 * first.error, EXACT)
            return wanted & (s.error > rounding) & (s.products < max_products)

        def conjugate(s: _Solution) -> _Solution:
            product = self.hessian(s.direction)
            length = s.error / optax.tree.vdot(s.direction, product)
            step = optax.tree.add_scale(s.step, length, s.direction)
            residual = optax.tree.add_scale(s.residual, -length, product)
            preconditioned = jax.tree.map(jnp.divide, residual, self.diagonal)
            error = optax.tree.vdot(residual, preconditioned)
            direction = optax.tree.add_scale(preconditioned, error / s.error, s.direction)
            gain = 0.5 * length * s.error
            recent = (1 - 1 / MEMORY) * s.recent + gain
            return _Solution(step, residual, direction, error, s.gain + gain, recent, s.products + 1)

        residual = jax.tree.map(jnp.negative, self.gradient)
        direction = jax.tree.map(jnp.divide, residual, self.diagonal)
        error, none = optax.tree.vdot(residual, direction), jnp.zeros((), value.dtype)
        first = _Solution(optax.tree.zeros_like(residual), residual, direction, error, none, none, jnp.int32(0))
        # Far from the minimum, the quadratic model is not worth an accurate solution.
        share = error / jnp.maximum(value, jnp.finfo(value.dtype).tiny)
        accuracy = jnp.clip(jnp.sqrt(share), ACCURACY, 0.5)
        return jax.lax.while_loop(unsolved, conjugate, first)


def _newton(problem: _Problem, carry: _Carry, tolerance: jax.Array, max_products: jax.Array) -> _Carry:
    """One step of Newton's method, shortened until it makes the loss smaller."""
    params, value = carry.params, carry.value
    scores_nC = problem.scores(params)
    model = _Model.at(problem, params, scores_nC)
    solved = model.solve(value, tolerance, max_products - carry.products)
    products = carry.products + solved.products
    within = products < max_products

    slope = optax.tree.vdot(model.gradient, solved.step)  # twice the decrement, below 0
    along_nC = problem.scores(solved.step)

    def at(length: jax.Array) -> jax.Array:
        return problem.objective(scores_nC + length * along_nC, optax.tree.add_scale(params, length, solved.step))

    def too_long(search: tuple[jax.Array, jax.Array]) -> jax.Array:
        length, found = search
        rounding = 8 * jnp.finfo(value.dtype).eps * value
        return ~(found <= value + 1e-4 * length * slope + rounding) & (length > 1e-6)

    one = jnp.ones((), value.dtype)
    length, found = jax.lax.while_loop(too_long, lambda s: (s[0] / 2, at(s[0] / 2)), (one, at(one)))
    better = found <= value
    return _Carry(
        optax.tree.add_scale(params, jnp.where(better, length, 0.0), solved.step),
        jnp.where(better, found, value),
        products,
        solved.gain / jnp.maximum(value, jnp.finfo(value.dtype).tiny),
        within & (solved.gain <= tolerance * value),
        ~better,
    )


@functools.partial(jax.jit, static_argnames=("num_classes", "standardise"))
def _fit(
    x: jax.Array,
    y: jax.Array,
    decay_S: jax.Array,
    tolerance: jax.Array,
    max_products: jax.Array,
    num_classes: int,
    standardise: bool,
) -> tuple[jax.Array, ...]:
    """Minimises mean CE + decay / 2 ||W||^2 for each decay, which must be sorted from the strongest to the weakest.

    Newton's method, whose systems are solved by conjugate gradients. Its stopping rule knows the loss's curvature: the
    decrement g^T H^-1 g / 2 estimates how far the loss is above its minimum (Boyd and Vandenberghe, Convex
    Optimization, section 9.5.1). A bound on the gradient does not: with a weak penalty the curvature falls with the
    gradient, and the loss can be a multiple of its minimum where the gradient is 1e-6.

    Returns:
      Weights (S, D, C), bias (S, C), mean and scale (D,); products with the Hessian, convergence, and what the last
      step was expected to take from the loss, relative to it, (S,).
    """
    mean, std = _moments(x, standardise)
    x = (x - mean) / std
    _, directions = jnp.linalg.eigh(jnp.matmul(x.T, x, precision=HIGHEST) / len(x))
    x = jnp.matmul(x, directions, precision=HIGHEST)
    x_squared, is_label = jnp.square(x), y[:, None] == jnp.arange(num_classes)

    def solve(start: dict[str, jax.Array], decay: jax.Array) -> tuple[dict[str, jax.Array], tuple[Any, ...]]:
        problem = _Problem(x, x_squared, is_label, decay)

        def unfinished(carry: _Carry) -> jax.Array:
            return ~carry.converged & ~carry.stuck & (carry.products < max_products)

        value, no = problem.objective(problem.scores(start), start), jnp.zeros((), bool)
        carry = _Carry(start, value, jnp.int32(0), jnp.ones((), x.dtype), no, no)
        end = jax.lax.while_loop(unfinished, lambda c: _newton(problem, c, tolerance, max_products), carry)
        return end.params, (end.params, end.products, end.converged, end.left)

    # JAX_ENABLE_X64 would make these float64.
    zeros = {"weights": jnp.zeros((x.shape[1], num_classes), x.dtype), "bias": jnp.zeros(num_classes, x.dtype)}
    _, (found, products_S, converged_S, left_S) = jax.lax.scan(solve, zeros, decay_S)
    weights_SDC = jnp.matmul(directions, found["weights"], precision=HIGHEST)
    return weights_SDC, found["bias"], mean, std, products_S, converged_S, left_S


@jax.jit
def _logits(x: jax.Array, weights: jax.Array, bias: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return jnp.matmul((x - mean) / std, weights, precision=HIGHEST) + bias
