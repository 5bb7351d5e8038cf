"""Closed forms first, then the frozen reference, then the contract every penalty keeps."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from crate_jax import config as config_lib
from crate_jax.errors import ConfigError
from crate_jax.parallel import parameters
from crate_jax.training import orthogonality
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "orthogonality.npz"
KEY = jax.random.key(0)
SHAPES = [(24, 24), (40, 16), (16, 40)]  # square, tall, wide


def configured(name, **options):
    config = config_lib.base()
    config.penalty.name = name
    config.penalty.weight = 1.0
    config.penalty.include = (".*kernel",)
    config.penalty.update(options)
    return config


def dense(kernel):
    return {"encoder": {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}}


def built(name, params, **options):
    penalty = orthogonality.build(configured(name, **options), params)
    return penalty, penalty.init(KEY)


def value_of(name, params, **options):
    penalty, state = built(name, params, **options)
    return float(jax.jit(penalty.apply)(params, state, KEY)[0])


def random_kernel(shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])


def with_singular_values(singular_values, m, seed=0):
    """A kernel [n, m] with the given n singular values."""
    rng = np.random.default_rng(seed)
    n = len(singular_values)
    u = np.linalg.qr(rng.standard_normal((n, n)))[0]
    v = np.linalg.qr(rng.standard_normal((m, n)))[0]
    return u @ np.diag(singular_values) @ v.T


def residual_eigenvalues(kernel, gram):
    """Eigenvalues of G - I in float64; `kernel` is in x out."""
    g = {"in": kernel @ kernel.T, "out": kernel.T @ kernel}
    chosen = g[gram] if gram != "smaller" else min(g.values(), key=len)
    return np.linalg.eigvalsh(chosen) - 1


def mixed_params(seed=0):
    """Stacked and single, dense and convolution, with two oriented shapes, 8x12 (6 matrices) and 4x6."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)

    return {
        "encoder": {
            "blocks": {"up": {"kernel": draw(3, 8, 12)}, "norm": {"scale": draw(3, 8)}},
            "down": {"kernel": draw(12, 8)},
            "conv": {"kernel": draw(2, 3, 2, 8)},
            "small": {"kernel": draw(4, 6), "bias": draw(6)},
            "blocks_conv": {"blocks": {"kernel": draw(1, 2, 2, 3, 8)}},
        }
    }


def mixed_matrices(params):
    """The same weights as a plain list of float64 matrices, in x out."""
    out = []
    for name, leaf in parameters.names(params).items():
        if name.endswith("kernel"):
            layers = leaf if parameters.is_stacked(name) else leaf[None]
            out += [np.asarray(layer, np.float64).reshape(-1, layer.shape[-1]) for layer in layers]
    return out


# -- closed forms --------------------------------------------------------------------------------


@pytest.mark.one_python
@pytest.mark.parametrize("name", ["so", "srip"])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_on_orthonormal_weights(name, shape):
    kernel = with_singular_values(np.ones(min(shape)), max(shape))
    assert value_of(name, dense(kernel if shape[0] <= shape[1] else kernel.T)) < 1e-5


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("shape", "gram"),
    [
        pytest.param(shape, gram, marks=() if gram == "smaller" or shape == SHAPES[1] else pytest.mark.slow)
        for shape, gram in itertools.product(SHAPES, ("smaller", "in", "out"))
    ],
)
def test_values_are_those_of_the_eigenvalues(shape, gram):
    kernel = random_kernel(shape)
    eigenvalues = residual_eigenvalues(kernel, gram)
    params = dense(kernel)
    np.testing.assert_allclose(value_of("so", params, gram=gram), np.sum(eigenvalues**2), rtol=1e-5)
    sigma = np.abs(eigenvalues).max()
    np.testing.assert_allclose(value_of("srip", params, gram=gram, iterations=300), sigma, rtol=1e-5)
    np.testing.assert_allclose(value_of("srip", params, gram=gram, iterations=300, power=2), sigma**2, rtol=1e-5)


def test_srip_finds_a_dominant_negative_eigenvalue():
    kernel = with_singular_values(np.linspace(0.1, 1.2, 16), 24)
    eigenvalues = residual_eigenvalues(kernel, "smaller")
    assert eigenvalues.min() < -0.98 and eigenvalues.max() < 0.5
    np.testing.assert_allclose(value_of("srip", dense(kernel), iterations=300), -eigenvalues.min(), rtol=1e-5)


@pytest.mark.parametrize("gap", [0.0, 1e-4])
def test_srip_converges_when_two_eigenvalues_have_equal_size_and_opposite_sign(gap):
    eigenvalues = np.concatenate([[0.9, -0.9 + gap], np.linspace(-0.5, 0.5, 14)])
    kernel = with_singular_values(np.sqrt(1 + eigenvalues), 24)
    # 15 iterations: a Rayleigh quotient v^T (G - I) v would be anywhere between -0.9 and 0.9.
    np.testing.assert_allclose(value_of("srip", dense(kernel), iterations=15), 0.9, rtol=2e-4)


def test_so_gradient_is_the_closed_form():
    w = random_kernel((16, 40))  # PyTorch's W, out x in; our kernel is its transpose
    params = dense(w.T)
    penalty, state = built("so", params, gram="in")
    gradient = jax.jit(jax.grad(lambda p: penalty.apply(p, state, KEY)[0]))(params)["encoder"]["head"]["kernel"]
    np.testing.assert_allclose(gradient.T, 4 * w @ (w.T @ w - np.eye(40)), rtol=1e-4, atol=1e-4)


@pytest.mark.one_python
def test_so_derivative_written_by_hand_is_that_of_the_value():
    w = jnp.asarray(random_kernel((2, 6, 10)), jnp.float32)

    def plain(w):
        return jnp.sum(jnp.square(orthogonality.gram_residual(w)))

    chex.assert_trees_all_close(jax.grad(orthogonality.frobenius_squared)(w), jax.grad(plain)(w), rtol=1e-5, atol=1e-5)
    dw = jnp.ones_like(w)
    chex.assert_trees_all_close(
        jax.jvp(orthogonality.frobenius_squared, (w,), (dw,)), jax.jvp(plain, (w,), (dw,)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.one_python
@pytest.mark.parametrize("singular_values", [np.linspace(0.8, 1.9, 12), np.linspace(0.1, 1.2, 12)])
@pytest.mark.parametrize("power", [1, 2])
def test_srip_gradient_is_the_derivative_of_sigma_max(singular_values, power):
    kernel = with_singular_values(singular_values, 20)
    params = dense(kernel)
    penalty, state = built("srip", params, iterations=300, power=power)
    gradient = jax.grad(lambda p: penalty.apply(p, state, KEY)[0])(params)["encoder"]["head"]["kernel"]

    def sigma(kernel):
        return np.abs(residual_eigenvalues(kernel, "smaller")).max() ** power

    for seed in range(3):
        direction = np.random.default_rng(seed).standard_normal(kernel.shape)
        numerical = (sigma(kernel + 1e-6 * direction) - sigma(kernel - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numerical, rtol=1e-3, atol=1e-3)


@pytest.mark.one_python
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_kept_vector_converges_over_the_steps_and_a_fresh_one_does_not(iterations):
    kernel = random_kernel((32, 48))
    sigma = np.abs(residual_eigenvalues(kernel, "smaller")).max()
    params = dense(kernel)
    for keep in (True, False):
        penalty, state = built("srip", params, iterations=iterations, keep_vector=keep)
        step = jax.jit(penalty.apply)
        values = []
        for i in range(100):
            value, state = step(params, state, jax.random.fold_in(KEY, i))
            values.append(float(value))
        values = np.array(values)
        assert values.max() <= sigma * (1 + 1e-5)  # never above
        if keep:
            assert np.all(np.diff(values) > -1e-5) and values[0] < 0.98 * sigma
            np.testing.assert_allclose(values[-1], sigma, rtol=1e-4)
        else:
            assert state == {} and values.mean() < 0.99 * sigma and values.std() > 0.005


def test_too_few_iterations_from_new_vectors_are_warned_of(caplog):
    """A cluster of eigenvalues below the largest: two products do not find sigma, and the gradient is another."""
    kernel = with_singular_values(np.sqrt(1 + np.r_[2.0, np.full(39, 1.6)]), 60)
    params, enough = dense(kernel), orthogonality.iterations_for(40)
    errors = {}
    for iterations in (2, enough):
        penalty, _ = built("srip", params, iterations=iterations, keep_vector=False)
        assert ("2 iterations from a new random vector may miss sigma_max" in caplog.text) == (iterations == 2)
        assert (f"config.penalty.iterations={enough} finds it within 10 %" in caplog.text) == (iterations == 2)
        caplog.clear()
        of_key = jax.jit(lambda key, penalty=penalty: penalty.apply(params, {}, key)[0])
        errors[iterations] = 1 - np.mean([float(of_key(jax.random.key(i))) for i in range(20)]) / 2.0
    assert errors[enough] < 0.1 < errors[2]
    built("srip", params, iterations=2)
    assert not caplog.text and enough == 33


def test_convolution_is_read_as_a_matrix_with_one_column_per_output():
    kernel = random_kernel((3, 3, 4, 10))
    params = dense(kernel)
    w_torch = kernel.transpose(3, 2, 0, 1).reshape(10, -1)  # PyTorch: out, in, h, w
    expected = np.sum((w_torch @ w_torch.T - np.eye(10)) ** 2)
    np.testing.assert_allclose(value_of("so", params), expected, rtol=1e-5)
    np.testing.assert_allclose(value_of("so", params, gram="out"), expected, rtol=1e-5)
    assert orthogonality.flatten_kernel(jnp.zeros((5, 3, 3, 4, 10)), stacked=True).shape == (5, 36, 10)
    assert orthogonality.flatten_kernel(jnp.zeros((5, 4, 10)), stacked=True).shape == (5, 4, 10)
    assert orthogonality.flatten_kernel(jnp.zeros((4, 10))).shape == (4, 10)


# -- frozen reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("gram", ["in", "out"])
def test_frozen_reference_numbers(index, gram):
    golden = np.load(GOLDEN)
    params = dense(golden[f"in/{index}"].T)  # ours is in x out
    frobenius, spectral = (golden[f"out/{index}/{kind}_{gram}"] for kind in ("frobenius_sq", "spectral"))
    np.testing.assert_allclose(value_of("so", params, gram=gram), frobenius, rtol=1e-5)
    np.testing.assert_allclose(value_of("srip", params, gram=gram, iterations=500), spectral, rtol=1e-5)


# -- batching, selection, contract ---------------------------------------------------------------


@pytest.mark.one_python
@pytest.mark.parametrize("gram", ["smaller", "in", "out"])
def test_batches_equal_a_loop_over_the_matrices(gram):
    params = mixed_params()
    eigenvalues = [residual_eigenvalues(w, gram) for w in mixed_matrices(params)]
    assert len(eigenvalues) == 7
    so, srip = sum(np.sum(e**2) for e in eigenvalues), sum(np.abs(e).max() for e in eigenvalues)
    np.testing.assert_allclose(value_of("so", params, gram=gram), so, rtol=1e-5)
    np.testing.assert_allclose(value_of("srip", params, gram=gram, iterations=500), srip, rtol=1e-4)


def test_weights_of_one_oriented_shape_share_one_batch():
    penalty, state = built("srip", mixed_params())
    assert {label: v.shape for label, v in state.items()} == {"4x6": (1, 4), "8x12": (6, 8)}
    assert len(penalty.names) == 5
    np.testing.assert_allclose(np.linalg.norm(state["8x12"], axis=-1), 1, rtol=1e-6)


def test_the_starting_vectors_of_a_shape_do_not_depend_on_other_shapes():
    params = mixed_params()
    small = {"encoder": {"small": params["encoder"]["small"]}}
    np.testing.assert_array_equal(built("srip", params)[1]["4x6"], built("srip", small)[1]["4x6"])


def test_shapes_with_equal_grams_start_from_different_vectors():
    state = built("srip", {"a": {"kernel": jnp.zeros((4, 6))}, "b": {"kernel": jnp.zeros((4, 8))}})[1]
    assert not np.allclose(state["4x6"], state["4x8"])


@pytest.mark.one_python
def test_gradient_is_zero_outside_the_selected_weights():
    params = mixed_params()
    penalty, state = built("so", params, exclude=("encoder/blocks/.*",))
    gradient = parameters.names(jax.grad(lambda p: penalty.apply(p, state, KEY)[0])(params))
    moved = tuple(name for name, leaf in gradient.items() if np.any(leaf))
    assert moved == penalty.names and "encoder/blocks/up/kernel" not in moved


@pytest.mark.parametrize("name", orthogonality.PENALTIES)
def test_contract_of_every_penalty(name):
    params = mixed_params()
    penalty = orthogonality.build(configured(name), jax.eval_shape(lambda: params))
    state = penalty.init(KEY)
    traces = []

    def counted(params, state, key):
        traces.append(1)
        return penalty.apply(params, state, key)

    jitted = jax.jit(jax.value_and_grad(counted, has_aux=True))
    (value, new_state), gradient = jitted(params, state, KEY)
    jitted(params, new_state, jax.random.fold_in(KEY, 1))
    assert len(traces) == 1  # the state has kept its form
    assert value.shape == () and value.dtype == jnp.float32
    chex.assert_tree_all_finite((value, gradient, new_state))
    assert jax.tree.map(lambda x: x.dtype == jnp.float32, new_state) == jax.tree.map(lambda _: True, state)
    (eager, _), eager_gradient = jax.value_and_grad(penalty.apply, has_aux=True)(params, state, KEY)
    np.testing.assert_allclose(value, eager, rtol=1e-6)
    chex.assert_trees_all_close(gradient, eager_gradient, rtol=1e-4, atol=1e-5)
    assert (name in ("none", "whiten")) == (penalty.names == ())


def test_none_is_zero_and_computes_nothing():
    params = mixed_params()
    penalty, state = built("none", params, include=("no such weight",))
    assert state == {} and float(penalty.apply(params, state, KEY)[0]) == 0.0
    assert not jax.make_jaxpr(penalty.apply)(params, state, KEY).eqns


@pytest.mark.one_python
@pytest.mark.parametrize("name", ["so", "srip"])
def test_value_and_gradient_are_zero_and_finite_at_exact_orthonormality(name):
    params = dense(np.eye(8)[np.random.default_rng(0).permutation(8)])  # a permutation: G = I in every bit
    penalty, state = built(name, params)
    (value, new_state), gradient = jax.value_and_grad(penalty.apply, has_aux=True)(params, state, KEY)
    assert value == 0 and not np.any(gradient["encoder"]["head"]["kernel"])
    chex.assert_trees_all_equal(new_state, state)


def test_a_vector_in_the_null_space_gives_a_finite_gradient():
    w = jnp.asarray(np.diag([2.0, 1.0, 1.0]), jnp.float32)[None]
    v = jnp.asarray([[0.0, 1.0, 0.0]])  # (w w^T - I) v = 0 though sigma_max = 3
    (value, new_v), gradient = jax.value_and_grad(
        lambda w: (lambda s, v: (s.sum(), v))(*orthogonality.spectral_norm(w, v, 2)), has_aux=True
    )(w)
    assert value == 0
    chex.assert_tree_all_finite((gradient, new_v))


@pytest.mark.parametrize("options, words", [
    (dict(include=("encoder/.*",)), ("config.penalty.include", "encoder/small/bias")),
    (dict(include=("nowhere/.*",)), ("config.penalty.include", "nowhere")),
    (dict(exclude=(".*kernel",)), ("config.penalty.exclude",)),
    (dict(exclude=("nowhere",)), ("config.penalty.exclude", "nowhere")),
])  # fmt: skip
def test_a_selection_that_cannot_be_meant_is_an_error(options, words):
    params = mixed_params()
    del params["encoder"]["blocks"]["norm"]
    with pytest.raises(ConfigError) as error:
        built("so", params, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["so", "srip"])
def test_sharded_parameters_give_the_same_numbers(name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params = {
        "encoder": {
            "blocks": {"a": {"kernel": jax.random.normal(KEY, (2, 8, 16)) / 4}},
            "b": {"kernel": jax.random.normal(KEY, (16, 8)) / 4},
        }
    }
    config = config_lib.base()
    config.penalty.name = name
    penalty = orthogonality.build(config, params)
    step = jax.jit(jax.value_and_grad(penalty.apply, has_aux=True))
    expected = step(params, penalty.init(KEY), KEY)
    for spec in (P(), P(None, "data")):
        shards = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), params)  # noqa: B023
        state = jax.device_put(penalty.init(KEY), NamedSharding(mesh, P()))
        found = step(shards, state, KEY)
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5)
