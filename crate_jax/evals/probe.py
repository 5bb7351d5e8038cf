"""Linear probe: multinomial logistic regression on frozen features, solved to convergence on the device.

The objective is that of scikit-learn's ``LogisticRegression``, C * sum_i CE_i + 1/2 ||W||^2 with an unpenalised bias,
here divided by C n so that its values, gradients and tolerance do not depend on the size of the set.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crate_jax.evals.features import check_labelled

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 or bfloat16 products would stall the line search
FLAT = 10  # iterations without a fall of the loss that float32 can show, after which it is at its minimum


class LinearProbe(NamedTuple):
    """A fitted probe; `weights` act on standardised features (x - mean) / std."""

    weights: np.ndarray  # float32 [D, C]
    bias: np.ndarray  # float32 [C]
    mean: np.ndarray  # float32 [D]
    std: np.ndarray  # float32 [D]; 1 where a feature is constant
    iterations: int
    converged: bool

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predicts the class of each row of features [m, D] -> int32 [m]."""
        return np.asarray(_predict(jnp.asarray(x, jnp.float32), *self[:4]))


def fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    num_classes: int,
    c: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fits a linear probe.

    Features are standardised with the training mean and standard deviation first: the L2 penalty depends on the scale
    of each feature, which is an accident of the encoder, so that one C would otherwise mean something else for every
    encoder compared. (MAE's BatchNorm without affine before its linear head does the same.) Constant features become 0
    and get weight 0.

    Args:
      train_x: features [n, D].
      train_y: integer labels [n] in 0 .. num_classes - 1.
      num_classes: C.
      c: inverse strength of the L2 penalty, as scikit-learn's.
      max_iterations: of L-BFGS.
      tolerance: on the largest entry of the gradient of the mean loss, in the coordinates of :func:`_preconditioner`.

    Returns:
      The probe. If it has not converged, a warning is logged: the accuracy is then a lower bound on what this C gives.

    Raises:
      DataError: labels out of range, or shapes that do not match.
      NonFiniteError: NaN or infinite features.
      ValueError: `c` is not positive.
    """
    if not c > 0:
        raise ValueError(f"probe: c={c} must be positive")
    check_labelled("train", train_x, train_y, num_classes)
    fitted = _fit(
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.float32(1.0 / (c * len(train_x))),
        jnp.float32(tolerance),
        jnp.int32(max_iterations),
        num_classes=num_classes,
    )
    weights, bias, mean, std, iterations, converged, gradient = jax.device_get(fitted)
    probe = LinearProbe(weights, bias, mean, std, int(iterations), bool(converged))
    if not probe.converged:
        logging.getLogger(__name__).warning(
            "linear probe: stopped after %d iterations with a gradient of %.1e, above %.1e",
            probe.iterations,
            gradient,
            tolerance,
        )
    return probe


def probe_top1(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, num_classes: int, c: float
) -> float:
    """Share of the test rows (0..1) that a probe fitted on the training rows gets right; errors as :func:`fit`."""
    check_labelled("test", test_x, test_y, num_classes)
    return float(np.mean(fit(train_x, train_y, num_classes, c).predict(test_x) == test_y))


def _standardise(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean = jnp.mean(x, axis=0)
    std = jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=0))
    # A spread within the rounding error of the mean is a constant feature; dividing by it would blow noise up.
    varies = std > 8 * jnp.finfo(x.dtype).eps * jnp.abs(mean)
    std = jnp.where(varies, std, 1.0)
    return jnp.where(varies, (x - mean) / std, 0.0), mean, std


@functools.partial(jax.jit, static_argnames="num_classes")
def _fit(
    x: jax.Array, y: jax.Array, decay: jax.Array, tolerance: jax.Array, max_iterations: jax.Array, *, num_classes: int
) -> tuple[jax.Array, ...]:
    """Minimises mean CE + decay / 2 ||W||^2; returns LinearProbe's fields and the gradient's largest entry."""
    x, mean, std = _standardise(x)
    basis = _preconditioner(x, decay, num_classes)

    def objective(params: dict[str, jax.Array]) -> jax.Array:
        weights = jnp.matmul(basis, params["weights"], precision=HIGHEST)
        logits = jnp.matmul(x, weights, precision=HIGHEST) + params["bias"]
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
        return loss + 0.5 * decay * jnp.sum(jnp.square(weights))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state, i, _, flat = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        params = optax.apply_updates(params, updates)
        # The line search leaves the loss and gradient at the new point in the state.
        gradient = optax.tree_utils.tree_norm(optax.tree_utils.tree_get(state, "grad"), ord=jnp.inf)
        fall = value - optax.tree_utils.tree_get(state, "value")
        flat = jnp.where(fall > 2 * jnp.finfo(x.dtype).eps * value, 0, flat + 1)
        return params, state, i + 1, gradient, flat

    def unfinished(carry):
        _, _, i, gradient, flat = carry
        return (i < max_iterations) & (gradient > tolerance) & (flat < FLAT)

    zeros = {"weights": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    start = (zeros, solver.init(zeros), jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0))
    params, _, i, gradient, flat = jax.lax.while_loop(unfinished, step, start)
    converged = (gradient <= tolerance) | (flat >= FLAT)
    weights = jnp.matmul(basis, params["weights"], precision=HIGHEST)
    return weights, params["bias"], mean, std, i, converged, gradient


def _preconditioner(x: jax.Array, decay: jax.Array, num_classes: int) -> jax.Array:
    """Coordinates [D, D] in which the Hessian at zero weights is the identity.

    At zero every class has probability 1/C and the Hessian is the covariance of the features / C + decay. Features of
    a network are strongly correlated: without this, L-BFGS takes some 20 times the iterations. The minimum is the same.
    """
    covariance = jnp.matmul(x.T, x, precision=HIGHEST) / x.shape[0]
    variance, directions = jnp.linalg.eigh(covariance)
    curvature = jnp.maximum(variance, 0) / num_classes + decay
    # Directions without variance are not stretched further: their gradient is all rounding error.
    return directions * jax.lax.rsqrt(jnp.maximum(curvature, 1e-6 * curvature[-1]))


@jax.jit
def _predict(x: jax.Array, weights: jax.Array, bias: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    logits = jnp.matmul((x - mean) / std, weights, precision=HIGHEST) + bias
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
