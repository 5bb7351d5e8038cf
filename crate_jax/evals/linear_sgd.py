"""Linear probes trained by SGD or LARS on frozen features, with the recipes of MAE, solo-learn and lightly.

All epochs run on the device in one program. Two things differ from the originals: features are computed once, from
central crops, while the originals augment their training images anew in each epoch; and small sets are repeated
(:meth:`Recipe.for_rows`).

Shapes: n rows, D features, C classes, B batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crate_jax.evals.features import check_labelled

BATCH_NORM_EPS = 1e-6  # MAE's value
# Batches of a pass, at least. The recipes were made for ImageNet, where MAE's has 78. With one, the probe hardly leaves
# its initial kernel: LARS moves it by rate x 0.001 of its length, and the rate falls with the batch. On 17,000 rows of
# clusters it had 37 % where logistic regression has 82; with three, 75. 50,000 images fill three batches of 16384.
MIN_BATCHES = 3
BATCH_NORM_RATE = 0.1  # by which running averages move in a step; PyTorch's default, which MAE uses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a linear probe is trained; there is no weight decay.

    Attributes:
      optimizer: ``lars`` (trust ratio on the kernel only, coefficient 0.001) or ``sgd``; both with momentum 0.9.
      lr: peak learning rate per 256 images of a batch.
      batch_size: images per batch, B; that of the whole set, with its repeats, if it is smaller.
      epochs: passes over the training features.
      warmup_epochs: epochs in which the rate grows linearly from 0.
      decay: ``cosine``, to 0, or ``steps``: the rate is divided by 10 after 60 % and after 80 % of the epochs.
      batch_norm: whether features are normalised by the batch's statistics, without scale and bias.
      repeats: how often a pass goes over the training features.
    """

    optimizer: str
    lr: float
    batch_size: int
    epochs: int
    warmup_epochs: int
    decay: str
    batch_norm: bool
    repeats: int = 1

    def for_rows(self, n: int) -> Recipe:
        """Returns the recipe for a training set of n images.

        If n images do not fill MIN_BATCHES batches, the set is repeated until it does. So batch size, learning rate and
        epochs stay those of the recipe.

        >>> RECIPES["mae"].for_rows(1437).repeats, RECIPES["mae"].for_rows(50_000).repeats
        (35, 1)
        """
        return dataclasses.replace(self, repeats=max(1, math.ceil(MIN_BATCHES * self.batch_size / n)))


RECIPES = {
    # arXiv 2111.06377, appendix A.1 and Table 10, and the released main_linprobe.py
    "mae": Recipe("lars", 0.1, 16384, 90, 10, "cosine", True),
    # solo-learn's linear scripts for BYOL on ImageNet; their rate is 0.1 to 30, depending on the method
    "solo": Recipe("sgd", 0.3, 256, 100, 0, "steps", False),
    # lightly's ImageNet benchmarks
    "lightly": Recipe("sgd", 0.1, 256, 90, 0, "cosine", False),
}


def fit(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, num_classes: int, recipe: Recipe, seed: int
) -> tuple[np.ndarray, float]:
    """Trains a probe and computes its class scores on other features.

    Args:
      train_x: training features (n, D).
      train_y: their integer labels (n,) in 0 .. num_classes - 1.
      test_x: test features (m, D).
      num_classes: number of classes, C.
      recipe: how the probe is trained.
      seed: seed of the initial kernel and of the order of the images.

    Returns:
      Class scores of the test features, float32 (m, C), and the mean training loss (in nats) of the last epoch.

    Raises:
      DataError: a label is out of range, or shapes do not match.
      NonFiniteError: a training feature is NaN or infinite.
    """
    check_labelled("train", train_x, train_y, num_classes)
    scores, losses = _train(
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.asarray(test_x, jnp.float32),
        jax.random.key(seed),
        num_classes,
        recipe,
    )
    return np.asarray(scores), float(losses[-1])


def _schedule(recipe: Recipe, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    peak = recipe.lr * batch_size / 256
    total = recipe.epochs * steps_per_epoch
    if recipe.decay == "steps":
        return optax.piecewise_constant_schedule(peak, {int(0.6 * total): 0.1, int(0.8 * total): 0.1})
    warmup = recipe.warmup_epochs * steps_per_epoch
    cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), cosine], [warmup])


@functools.partial(jax.jit, static_argnames=("num_classes", "recipe"))
def _train(
    x: jax.Array, y: jax.Array, test_x: jax.Array, key: jax.Array, num_classes: int, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """Returns the class scores of test_x, (m, C), and the mean loss of each epoch, (epochs,)."""
    D = x.shape[1]
    n = len(x) * recipe.repeats
    B = min(recipe.batch_size, n)
    steps = n // B  # the last n - B * steps images of an epoch's order are dropped, as in the originals
    rate = _schedule(recipe, B, steps)
    if recipe.optimizer == "lars":
        # As in MAE's code and in PyTorch's SGD, the rate is applied after the momentum (optax.lars: before it).
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), {"kernel": True, "bias": False})
        tx = optax.chain(trust, optax.trace(0.9), optax.scale_by_learning_rate(rate))
    else:
        tx = optax.sgd(rate, momentum=0.9)
    init_key, order_key = jax.random.split(key)
    params = {"kernel": 0.01 * jax.random.normal(init_key, (D, num_classes)), "bias": jnp.zeros(num_classes)}

    def normalise(rows: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        return (rows - mean) * jax.lax.rsqrt(variance + BATCH_NORM_EPS) if recipe.batch_norm else rows

    def logits(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        return jnp.matmul(rows, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]

    def step(carry: Any, index_B: jax.Array) -> tuple[Any, jax.Array]:
        params, state, running = carry
        rows = x[index_B]
        batch = (jnp.mean(rows, axis=0), jnp.var(rows, axis=0))

        def loss(params: dict[str, jax.Array]) -> jax.Array:
            scores = logits(params, normalise(rows, *batch))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y[index_B]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        unbiased = (batch[0], batch[1] * B / max(B - 1, 1))
        running = jax.tree.map(lambda old, new: old + BATCH_NORM_RATE * (new - old), running, unbiased)
        return (optax.apply_updates(params, updates), state, running), value

    def epoch(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(jax.random.fold_in(order_key, number), n)[: steps * B]
        carry, values = jax.lax.scan(step, carry, (order % len(x)).reshape(steps, B))
        return carry, jnp.mean(values)

    start = (params, tx.init(params), (jnp.zeros(D), jnp.ones(D)))
    (params, _, running), losses = jax.lax.scan(epoch, start, jnp.arange(recipe.epochs))
    return logits(params, normalise(test_x, *running)), losses
