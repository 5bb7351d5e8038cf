"""Attention as TPU kernels: interpreted against plain attention, and where programs take it.

`tests/test_tpu_aot.py` compiles steps with them where libtpu is installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models import tpu_attention
from crate_jax.models.beginning import BEGINNINGS
from crate_jax.models.crate import norm_mssa
from crate_jax.models.vit import SelfAttention, ViTBlock
from crate_jax.parallel import sharding, target
from tests.models.test_gpu_kernels import draw, gradients, mesh_of, plain

pytestmark = pytest.mark.one_python

V5E = ("tpu", "TPU v5e")


def inputs(images, N, heads, width, parts, biased):
    x, g = (jnp.float32(draw(images, N, n, seed=seed)) for seed, n in ((1, parts * heads * width), (2, heads * width)))
    return 2 * x, jnp.float32(draw(heads, N, N, seed=3)) if biased else None, g


CASES = [
    # images, tokens, heads, head width, parts, bias
    (3, 13, 4, 32, 1, False),  # four heads a block of lanes
    (24, 13, 4, 64, 1, False),  # two; several blocks of images and of lanes
    (24, 7, 4, 64, 3, True),  # the bias's gradient is a sum over blocks of images, for each block of lanes
    pytest.param((1, 5, 2, 64, 3, False), marks=pytest.mark.slow),
    pytest.param((1, 5, 4, 32, 3, True), marks=pytest.mark.slow),
    pytest.param((2, 197, 2, 64, 3, True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_attention(case):
    """Result and all gradients; interpreted, in float32. The decoder's w has a leading axis of length one."""
    *_, heads, _, parts, _ = case
    lead = (None,) if parts == 1 else ()

    def attend(x, bias):
        return tpu_attention.attend(x[lead], bias, heads, parts, True)[(0,) * len(lead)]

    ours = gradients(attend, *inputs(*case))
    theirs = gradients(lambda x, b: plain(x, b, heads, parts), *inputs(*case))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("parts", "biased"), [(1, False), (3, True)])
def test_in_bfloat16_the_kernels_are_as_exact_as_the_plain_version(parts, biased):
    x, bias, g = inputs(2, 24, 2, 64, parts, biased)
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    attend = lambda x, b: plain(x, b, 2, parts).astype(x.dtype)  # noqa: E731
    kernels = gradients(lambda x, b: tpu_attention.attend(x, b, 2, parts, True), x, bias, g)
    exact = gradients(attend, x.astype(jnp.float32), bias, g.astype(jnp.float32))
    for ours, other, truth in zip(kernels, gradients(attend, x, bias, g), exact, strict=True):
        error, known = (np.abs(np.asarray(a, np.float32) - truth).max() for a in (ours, other))
        assert error <= 1.2 * known + 1e-3 * np.abs(truth).max()


@pytest.mark.parametrize(("data", "model"), [(2, 2)])
def test_each_device_attends_to_its_own_images_and_biases_are_summed(data, model):
    mesh = sharding.make_mesh(4, 1, jax.devices()[:4], data, model)
    arrays = inputs(4, 6, 2, 64, 3, True)

    def run(x, bias, g):
        found = gradients(lambda x, b: tpu_attention.attend(x, b, 2, 3, True), x, bias, g)
        return found

    split = jax.jit(sharding.on_mesh(mesh, run), in_shardings=(sharding.split(mesh), None, sharding.split(mesh)))
    ours = split(*arrays)
    assert ours[0].sharding.is_equivalent_to(sharding.split(mesh), 3)
    for a, b in zip(ours, gradients(lambda x, b: plain(x, b, 2, 3), *arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("fit", "images", "tokens", "heads", "width", "dtype", "biases"),
    [
        (True, 1024, 197, 12, 768, "bfloat16", 1),
        (True, 64, 577, 16, 1024, "bfloat16", 1),
        (True, 64, 5, 4, 128, "float32", 0),
        (False, 1024, 197, 12, 576, "bfloat16", 0),  # 48 numbers a head
        (False, 1024, 197, 16, 1280, "bfloat16", 0),  # 80
        (False, 96, 197, 12, 768, "bfloat16", 0),  # 12 images on each of 8 devices
        (False, 1020, 197, 12, 768, "bfloat16", 0),  # not the same number on each
        (False, 4, 197, 12, 768, "bfloat16", 0),  # fewer than devices: pictures of a run
        (False, 1024, 197, 12, 768, "bfloat16", 1024),
        (False, 1024, 1601, 12, 768, "bfloat16", 0),  # more tokens than scratch memory holds
    ],
)
def test_what_fills_tiles_and_scratch_memory_fits(fit, images, tokens, heads, width, dtype, biases):
    bias = jax.ShapeDtypeStruct((biases, heads, tokens, tokens), jnp.float32) if biases else None
    for device, expected in ((V5E, fit), (("cpu", "cpu"), False), (("cuda", "NVIDIA H100"), False)):
        with jax.sharding.use_abstract_mesh(mesh_of(*device)):
            assert tpu_attention.fits(images, tokens, heads, width, 3, dtype, bias) == expected
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", "TPU v4")):  # it has less scratch memory
        fit = fit and tokens < 577
        assert tpu_attention.fits(images, tokens, heads, width, 3, dtype, bias) == fit


@pytest.mark.parametrize(("images", "kernels"), [(64, 2), (68, 0)])  # forward and backward
def test_programs_for_tpus_take_the_kernels_that_fit(images, kernels):
    x, D = jax.ShapeDtypeStruct((images, 5, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128,), jnp.float32)
    U = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    module, bias = (
        SelfAttention(BEGINNINGS["xavier"], 2, "qv", jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 2, 5, 5), jnp.float32),
    )
    params = jax.eval_shape(module.init, jax.random.key(0), x, bias)
    mssa = jax.grad(lambda x, *a: jnp.sum(norm_mssa(x, *a, 2)[1].astype(jnp.float32)))
    vit = jax.grad(lambda p, x, bias: jnp.sum(module.apply(p, x, bias).astype(jnp.float32)), argnums=(1, 2))
    with jax.sharding.use_abstract_mesh(mesh_of(*V5E)):
        for gradient, arrays in ((mssa, (x, D, D, U)), (vit, (params, x, bias))):
            assert str(jax.make_jaxpr(gradient)(*arrays)).count("pallas_call[") == kernels


def test_a_vit_block_for_tpus_computes_the_same(monkeypatch):
    """Layer scale stands at the weights there, and GELU's backward pass computes it again."""
    block = ViTBlock(BEGINNINGS["xavier"], 2, 2.0, "qv", 0.3, jnp.float32)
    x, scales = jnp.float32(draw(3, 5, 20)), jnp.array([[1.5, 0.0, 1.5], [0.0, 1.25, 1.25]])
    params = jax.jit(block.init)(jax.random.key(0), x, None, scales)
    params = jax.tree.map(lambda a: a + 0.1 * draw(*a.shape, seed=5).astype(np.float32), params)

    def run():
        loss = lambda p, x: jnp.sum(jnp.sin(block.apply(p, x, None, scales)[0]))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    expected = run()
    monkeypatch.setattr(target, "is_tpu", lambda: True)
    monkeypatch.setenv("CRATE_JAX_KERNELS", "0")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), run(), expected)
