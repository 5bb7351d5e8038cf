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
    tolerance: float = 1e-5,
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
      tolerance: on the largest entry of the gradient of the mean loss.

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
    *arrays, iterations, gradient = jax.device_get(fitted)
    probe = LinearProbe(*arrays, int(iterations), bool(gradient <= tolerance))
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
    """Minimises mean CE + decay / 2 ||W||^2; returns weights, bias, mean, std, iterations, largest gradient entry."""
    x, mean, std = _standardise(x)

    def objective(params: dict[str, jax.Array]) -> jax.Array:
        logits = jnp.matmul(x, params["weights"], precision=HIGHEST) + params["bias"]
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
        return loss + 0.5 * decay * jnp.sum(jnp.square(params["weights"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)
    zeros = {"weights": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}

    def step(carry):
        params, state, i, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        params = optax.apply_updates(params, updates)
        new_grad = optax.tree_utils.tree_get(state, "grad")
        return params, state, i + 1, optax.tree_utils.tree_norm(new_grad, ord=jnp.inf)

    def unfinished(carry):
        _, _, i, gradient = carry
        return (i < max_iterations) & (gradient > tolerance)

    params, _, i, gradient = jax.lax.while_loop(
        unfinished, step, (zeros, solver.init(zeros), jnp.int32(0), jnp.float32(jnp.inf))
    )
    return params["weights"], params["bias"], mean, std, i, gradient


@jax.jit
def _predict(x: jax.Array, weights: jax.Array, bias: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    logits = jnp.matmul((x - mean) / std, weights, precision=HIGHEST) + bias
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
