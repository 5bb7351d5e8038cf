"""Kernels for GPUs: interpreted against plain attention and norms, and where programs take them.

`tests/test_gpu_aot.py` compiles them for a GPU where JAX's CUDA plug-in is installed.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks.accelerator import kernels
from crate_jax.models import corruption, gpu_attention, gpu_norm, layers, tpu_attention
from crate_jax.models.beginning import BEGINNINGS
from crate_jax.models.crate import CrateBlock, norm_mssa
from crate_jax.models.gpu_attention import Tile, Tiles
from crate_jax.models.vit import SelfAttention
from crate_jax.parallel import sharding, target
from crate_jax.parallel.sharding import BATCH

pytestmark = pytest.mark.one_python


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def plain(x, bias, heads, parts):
    """Attention by NumPy's rules in the type of x: (B, N, P * E), (H, N, N) or None -> (B, N, E)."""
    split = x.reshape(*x.shape[:2], parts, heads, -1)
    q, k, v = (split[:, :, min(role, parts - 1)] for role in range(3))
    logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits if bias is None else logits + bias)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, v, precision="highest").reshape(*x.shape[:2], -1)


def gradients(attend, x, bias, g):
    @jax.jit  # one program, not one per operation
    def both(x, bias, g):
        y, pull = jax.vjp(attend, x, bias)
        return [y, *jax.tree.leaves(pull(g))]

    return both(x, bias, g)


# Each kernel has rows, columns and padded tokens of its own.
UNEQUAL = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(64, 16, 4, 2), Tile(16, 64, 4, 2), 1)


def compared(N, heads, width, parts, biased, images=2, scale=1.0, tiles=None):
    """(result, gradient of x, gradient of the bias) of the kernels and of the plain version in float32."""
    x, g = (jnp.float32(draw(images, N, n, seed=seed)) for seed, n in ((1, parts * heads * width), (2, heads * width)))
    bias = jnp.float32(draw(heads, N, N, seed=3)) if biased else None
    ours = gradients(lambda x, b: gpu_attention.attend(x, b, heads, parts, True, tiles), scale * x, bias, g)
    return ours, gradients(lambda x, b: plain(x, b, heads, parts), scale * x, bias, g)


QUICK = ("ViT, bias, 1 x 5 tokens, 3 heads of 32, bfloat16", "MSSA, 1 x 5 tokens, 2 heads of 80, bfloat16")
CASES = [
    # tokens, heads, head width, parts, bias, images, scale
    (5, 2, 16, 1, False, 3, 1.0),
    (70, 1, 20, 3, True, 2, 1.0, UNEQUAL),  # a last block with 6 rows; lanes that hold nothing
    (70, 1, 16, 1, False, 1, 6.0),  # a softmax that saturates
    pytest.param((37, 1, 80, 3, False, 1, 1.0), marks=pytest.mark.slow),  # heads wider than 64
    pytest.param((197, 2, 64, 1, False, 2, 1.0), marks=pytest.mark.slow),
    pytest.param((197, 2, 64, 3, True, 3, 1.0), marks=pytest.mark.slow),
    pytest.param((577, 1, 80, 3, True, 1, 1.0), marks=pytest.mark.slow),
    pytest.param((5, 3, 32, 3, True, 1, 1.0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[:7]))
def test_the_kernels_are_attention(case):
    scale = case[6]
    for ours, theirs in zip(*compared(*case), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * scale * np.abs(theirs).max())


def test_the_gradients_do_not_depend_on_how_y_was_rounded():
    """Queries' kernel reads y for delta, and corrects what y lacks."""
    x, bias, g = (jnp.float32(draw(*shape, seed=7)) for shape in ((2, 37, 96), (2, 37, 37), (2, 37, 32)))
    y, saved = jax.jit(lambda x, bias: gpu_attention._attend_forward(x, bias, 2, 3, True, None))(x, bias)
    backward = jax.jit(lambda saved, g: gpu_attention._attend_backward(2, 3, True, None, saved, g))
    expected = backward(saved, g)
    rounded = (*saved[:-1], y + 0.1 * jnp.float32(draw(*y.shape, seed=9)))
    for ours, theirs in zip(backward(rounded, g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


AWKWARD = [kernels.Attention(*shape, **kind) for shape in (*kernels.FIRST, *kernels.MORE) for kind in kernels.KINDS]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in QUICK else pytest.mark.slow, id=c.name) for c in AWKWARD],
)
def test_in_bfloat16_results_and_gradients_are_within_a_thousandth_of_float64(case):
    """5, 197 and 577 tokens, heads of 32, 64 and 80, also of one image: what benchmarks.accelerator asks of a GPU."""
    found = kernels.compare_attention(case, gpu_attention.attend, True)
    assert found["ok"], found
    for name, error in found["rms_errors"].items():
        assert error <= max(1.5 * found["plain_rms_errors"][name], 1e-4), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_bias_is_read_as_binary_logarithms_without_keys_that_are_no_tokens(dtype):
    bias = jnp.float32(draw(2, 37, 37)).at[0, 3, 5].set(1e7)
    s = gpu_attention._Shape(1, 37, 3, 2, 16, UNEQUAL, True, UNEQUAL.bias)
    made, turned = (
        np.asarray(gpu_attention._prepared(s, bias, jnp.dtype(dtype), t), np.float64) for t in (False, True)
    )
    assert made.shape == (2, 64, 64) and np.all(made[:, :, 37:] == -np.inf) and np.isfinite(made[:, :, :37]).all()
    np.testing.assert_array_equal(turned, made.swapaxes(1, 2))
    error = np.abs(made[1, :37, :37] / np.log2(np.e) - bias[1]) / np.abs(bias[1])
    assert error.max() < (2e-7 if dtype == "float32" else 2**-11)


@pytest.mark.parametrize(("biased", "passes"), [(False, 16), (True, 20)])
def test_the_kernels_say_what_they_move(biased, passes):
    """In arrays of the tokens' size: 4 forward, 6 and 6 backward, 4 for a bias."""
    B, N, H, K = 8, 70, 2, 16
    x, g, bias = (jax.ShapeDtypeStruct(s, d) for s, d in (
        ((B, N, 3 * H * K), jnp.bfloat16), ((B, N, H * K), jnp.bfloat16), ((H, N, N), jnp.float32),
    ))  # fmt: skip
    text = str(jax.make_jaxpr(lambda *a: gradients(lambda x, b: gpu_attention.attend(x, b, H, 3), *a))(
        x, bias if biased else None, g
    ))  # fmt: skip
    moved = sum(int(n) for n in re.findall(r"'bytes_accessed': '(\d+)'", text))
    biases = (2 * 4 * 128 * 128 + 4 * 8 * N * N) * H if biased else 0  # float16; eight sums of float32
    assert moved == passes * 2 * B * N * H * K + (11 if biased else 8) * 4 * B * H * N + biases


@pytest.mark.parametrize(("data", "model"), [(2, 2)])
def test_each_device_attends_to_its_own_images_and_biases_are_summed(data, model):
    mesh = sharding.make_mesh(4, 1, jax.devices()[:4], data, model)
    x, g, bias = (jnp.float32(draw(*s, seed=7)) for s in ((4, 6, 96), (4, 6, 32), (2, 6, 6)))

    def run(x, bias, g):
        return gradients(lambda x, b: gpu_attention.attend(x, b, 2, 3, True), x, bias, g)

    split = jax.jit(sharding.on_mesh(mesh, run), in_shardings=(sharding.split(mesh), None, sharding.split(mesh)))
    expected = gradients(lambda x, b: plain(x, b, 2, 3), x, bias, g)
    for ours, theirs in zip(split(x, bias, g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skipped", [True, False])
def test_the_kernels_are_the_norm(skipped):
    """21 rows of 20 numbers in blocks of 4, which two programs share: the last block has one row."""
    x, g, skip = (jnp.float32(3 + draw(3, 7, 20, seed=seed)) for seed in range(3))
    scale, bias = (jnp.float32(draw(20, seed=seed)) for seed in (4, 5))
    y, pull = jax.vjp(lambda *a: layers.layer_norm(*a, 1e-5), x, scale, bias)
    expected = pull(g)
    np.testing.assert_allclose(gpu_norm.forward(x, scale, bias, 1e-5, True), y, rtol=1e-4, atol=1e-5)
    parts = (g,) if skipped else (g - skip, 0.25 * skip, 0.75 * skip)  # of a sum
    ours = gpu_norm.backward(x, scale, parts, skip if skipped else None, 1e-5, True, gpu_norm.Cut(4, 4, 2))
    for a, b, more in zip(ours, expected, (skip if skipped else 0, 0, 0), strict=True):
        np.testing.assert_allclose(a, b + more, rtol=1e-4, atol=2e-5)


def test_gelu_of_bfloat16_is_right_but_for_its_last_rounding():
    x = jnp.arange(-9, 9, 1 / 64, jnp.bfloat16)
    y, slope = layers._narrow_gelu(x), jax.grad(lambda x: layers._narrow_gelu(x).astype(jnp.float32).sum())(x)
    wide = np.asarray(x, np.float64)
    below = scipy.special.ndtr(wide)
    bell = np.exp(-np.square(wide) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(np.float64(y), wide * below, rtol=2**-8, atol=4e-7)
    np.testing.assert_allclose(np.float64(slope), below + wide * bell, rtol=2**-8, atol=1e-6)
    for device, dtype, narrow in ((H100, x.dtype, True), (H100, jnp.float32, False), (("cpu", "cpu"), x.dtype, False)):
        with jax.sharding.use_abstract_mesh(mesh_of(*device)):
            assert ("_narrow_gelu" in str(jax.make_jaxpr(layers.gelu)(x.astype(dtype)))) == narrow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sketch_on_a_gpu_is_a_product(monkeypatch, dtype):
    """Its gradient too; 13 tokens in 3 buckets."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, 3, (2, 13)), rng.choice((-1.0, 1.0), (2, 13)))
    projection = corruption.Projection.exact(*map(jnp.asarray, drawn), buckets=3)
    x, g = (jnp.asarray(draw(2, 13, 5, seed=seed), dtype) for seed in (1, 2))

    def run(x, g):
        y, pull = jax.vjp(projection.project, x)
        return y, *pull(g)

    expected = jax.jit(lambda *a: run(*a))(x, g)  # so that `run` is traced anew below
    monkeypatch.setattr(target, "is_nvidia", lambda: True)
    assert "scatter" not in str(jax.make_jaxpr(run)(x, g))
    for ours, theirs in zip(jax.jit(lambda *a: run(*a))(x, g), expected, strict=True):
        np.testing.assert_allclose(*map(np.float64, (ours, theirs)), **tolerance(dtype))


def tolerance(dtype):
    return {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}


def mesh_of(platform, kind):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((4, 2), BATCH, axis_types=(AxisType.Auto,) * 2, abstract_device=device)


H100 = ("cuda", "NVIDIA H100 80GB HBM3")
NORM, MSSA, BIASED = (1, 1), (1, 2), (1, 3)  # kernels of a forward and of a backward pass


@pytest.mark.parametrize(
    ("platform", "images", "heads", "dtype", "kernels"),
    [
        (H100, 16, 2, "bfloat16", MSSA),
        (H100, 12, 2, "bfloat16", (0, 0)),  # not the same number on each of 8 devices
        (H100, 16, 16, "bfloat16", (0, 0)),  # heads of 4 numbers
        (H100, 16, 2, "float32", (0, 0)),
        (("rocm", "AMD Instinct MI300X"), 16, 2, "bfloat16", (0, 0)),
        (("cpu", "cpu"), 16, 2, "bfloat16", (0, 0)),
    ],
)
def test_programs_for_gpus_take_the_kernels_that_fit(platform, images, heads, dtype, kernels):
    """The norm's kernels need no heads and no type, so they stay where those of attention do not fit."""

    def loss(x, scale, bias, U):
        x, y = norm_mssa(x, scale, bias, U, heads)
        return jnp.sum(x + y)

    x = jax.ShapeDtypeStruct((images, 5, 64), dtype)
    shapes = [x, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64,), (64,), (64, 64)))]
    normed = platform == H100 and images % 8 == 0
    with jax.sharding.use_abstract_mesh(mesh_of(*platform)):
        forward, both = (
            str(jax.make_jaxpr(f)(*shapes)).count("pallas_call[") for f in (loss, jax.grad(loss, argnums=(0, 1, 2, 3)))
        )
    assert forward == kernels[0] + normed
    # The norm is computed again for the gradient of U.
    assert both == sum(kernels) + 3 * normed


@pytest.mark.parametrize(("rows", "kernels"), [(1, sum(BIASED)), (16, 0), (None, sum(MSSA))])
def test_a_bias_of_its_own_for_each_image_does_not_fit(rows, kernels):
    module = SelfAttention(BEGINNINGS["xavier"], 2, "qv", jnp.bfloat16)
    x = jax.ShapeDtypeStruct((16, 5, 32), jnp.float32)
    bias = None if rows is None else jax.ShapeDtypeStruct((rows, 2, 5, 5), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x, bias)

    def loss(params, x, bias):
        return jnp.sum(module.apply(params, x, bias))

    with jax.sharding.use_abstract_mesh(mesh_of(*H100)):
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if rows is None else (0, 1, 2)))(params, x, bias))
    assert program.count("pallas_call[") == kernels


@pytest.mark.parametrize(("platform", "unrolled"), [(H100, True), (("tpu", "TPU v5e"), False)])
def test_without_a_loop_a_recomputed_block_is_kept_apart_from_its_forward_pass(platform, unrolled):
    """Else XLA takes the one for the other, and config.remat saves no memory."""
    x = jax.ShapeDtypeStruct((16, 5, 32), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh_of(*platform)):
        blocks = layers.scan_blocks(CrateBlock, 3, "nothing", 2, 0.1, 0.1, 0, False, jnp.float32)
        params = jax.eval_shape(blocks.init, jax.random.key(0), x, None)
        program = str(jax.make_jaxpr(lambda params, x: blocks.apply(params, x, None))(params, x))
    assert program.count(f"prevent_cse={unrolled}") == 1
    assert program.count(f"prevent_cse={not unrolled}") == 0
    assert program.count("unroll=3\n") == unrolled


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (H100, {"xla_allow_excess_precision": False, "xla_gpu_enable_triton_gemm": False}),
        (("tpu", "TPU v5e"), target.TPU_OPTIONS),
        (("cpu", "cpu"), {}),
    ],
)
def test_gpus_get_xlas_options_of_their_platform(platform, expected):
    device = types.SimpleNamespace(platform=platform[0], device_kind=platform[1])
    assert target.compiler_options(types.SimpleNamespace(devices=np.array([[device]]))) == expected


def test_an_environment_variable_leaves_all_to_xla(monkeypatch):
    x = jax.ShapeDtypeStruct((16, 5, 64), jnp.float32)
    for value, fit in (("0", False), ("1", True)):
        monkeypatch.setenv("CRATE_JAX_KERNELS", value)
        with jax.sharding.use_abstract_mesh(mesh_of(*H100)):
            assert (gpu_attention.fits(16, 2, 64, "bfloat16"), gpu_norm.fits(x)) == (fit, fit)
        with jax.sharding.use_abstract_mesh(mesh_of("tpu", "TPU v5e")):
            assert tpu_attention.fits(64, 5, 2, 128, 3, "bfloat16") == fit


@pytest.mark.parametrize(("capability", "kernels"), [("7.5", False), ("8.6", True)])
def test_gpus_that_triton_does_not_know_have_no_kernels(monkeypatch, capability, kernels):
    kind = "NVIDIA GeForce RTX 2080 Ti"
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with jax.sharding.use_abstract_mesh(mesh_of("gpu", kind)):
        assert target.is_nvidia() and target.kernels() == kernels
    with jax.sharding.use_abstract_mesh(mesh_of(*H100)):
        assert target.kernels()  # for GPUs of another machine


def test_what_computes_attention_is_noted_call_by_call():
    """MAE's encoder sees other tokens than its decoder, and an image with its own tokens has its own biases."""
    bias = jax.ShapeDtypeStruct((1, 2, 5, 5), jnp.float32)
    own = jax.ShapeDtypeStruct((64, 2, 5, 5), jnp.float32)
    for device, by in ((H100, "Triton kernels"), (("tpu", "TPU v5e"), "Pallas kernels"), (("cpu", "cpu"), "XLA")):
        with layers.attention_noted() as noted, jax.sharding.use_abstract_mesh(mesh_of(*device)):
            layers.attention_kernel(64, 17, 2, 128, 3, "bfloat16")
            layers.attention_kernel(64, 5, 2, 128, 3, "bfloat16", bias)
            layers.attention_kernel(64, 5, 2, 128, 3, "bfloat16", own)
            layers.attention_kernel(63, 17, 2, 128, 1, "bfloat16")
        assert list(noted) == list(dict.fromkeys((
            f"{by} (17 tokens, 2 heads of 64)", f"{by} (5 tokens, 2 heads of 64)",
            "XLA (5 tokens, 2 heads of 64)", "XLA (17 tokens, 2 heads of 64)",
        )))  # fmt: skip
