"""Convolutions as products of matrices, against XLA's."""

from __future__ import annotations

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models import cpu_convolution
from crate_jax.parallel import sharding

WHOLE = [  # map, channels, taps, stride, padding
    ((2, 2), 5, 3, 1, 1),
    ((1, 1), 5, 3, 1, 1),
    ((4, 3), 5, 3, 2, 1),
    ((1, 4), 7, 3, 1, 1),
]
FEW_CHANNELS = [
    ((10, 14), 3, 7, 2, 3),
    ((9, 11), 3, 7, 2, 3),  # odd sides: the last block is half outside
    ((7, 9), 3, 3, 1, 1),
    ((6, 7), 1, 3, 1, 2),
    ((9, 12), 3, 3, 2, 1),
]
XLA = [((5, 7), 5, 3, 1, 1), ((2, 2), 5, 1, 2, 0), ((4, 4), 5, 3, 1, 1)]


def convolved(convolve: Callable[..., jax.Array], stride: int, padding: int) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of x, w and of the result's gradient over x, to the result and the gradients of x and w."""

    def run(x: jax.Array, w: jax.Array, g_1: jax.Array) -> tuple[jax.Array, ...]:
        def layer(x: jax.Array, w: jax.Array) -> jax.Array:
            return convolve(x, w, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=cpu_convolution.LAYOUT)

        y, pull = jax.vjp(layer, x, w)
        return y, *pull(jnp.cos(g_1 * jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)).astype(y.dtype))

    return run


def arrays(size: tuple[int, int], channels: int, taps: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (6, *size, channels), (taps, taps, channels, 4), (1,)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize(("size", "channels", "taps", "stride", "padding"), WHOLE + FEW_CHANNELS)
def test_result_and_gradients_are_those_of_xla_on_any_devices(size, channels, taps, stride, padding):
    given = arrays(size, channels, taps)
    expected = jax.jit(convolved(jax.lax.conv_general_dilated, stride, padding))(*given)
    mesh = sharding.make_mesh(6, 1, jax.devices()[:2])
    ours = sharding.on_mesh(mesh, convolved(cpu_convolution.convolve, stride, padding))
    places = sharding.split(mesh), sharding.replicated(mesh), sharding.replicated(mesh)
    chex.assert_trees_all_close(jax.jit(ours, in_shardings=places)(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "used"), [(WHOLE[0], 0), (FEW_CHANNELS[0], 1), *((case, 2) for case in XLA)])
def test_xla_convolves_the_rest_and_all_for_other_platforms(case, used):
    """The number of convolutions forwards and in the gradient of the kernel."""
    size, channels, taps, stride, padding = case
    given = arrays(size, channels, taps)
    run = convolved(cpu_convolution.convolve, stride, padding)
    mesh = sharding.make_mesh(6, 1, jax.devices()[:2])

    def count(function: Callable[..., tuple[jax.Array, ...]]) -> int:
        return jax.jit(function).lower(*given).as_text().count("stablehlo.convolution")

    assert count(lambda *a: run(*a)[::2]) == 2  # without a mesh
    assert count(sharding.on_mesh(mesh, lambda *a: run(*a)[::2])) == used


@pytest.mark.parametrize("option", [{"kernel_dilation": 2}, {"input_dilation": 2}, {"feature_group_count": 3}])
def test_dilation_and_groups_are_left_to_xla(option):
    x, w, _ = arrays((3, 4), 3, 3)
    w = w[:, :, : 3 // option.get("feature_group_count", 1), :3]
    plain, ours = (
        nn.Conv(3, (3, 3), 2, [(2, 2), (2, 2)], use_bias=False, conv_general_dilated=convolve, **option)
        for convolve in (None, cpu_convolution.convolve)
    )
    run = sharding.on_mesh(sharding.make_mesh(6, 1, jax.devices()[:2]), ours.apply)
    chex.assert_trees_all_equal(run({"params": {"kernel": w}}, x), plain.apply({"params": {"kernel": w}}, x))


def test_a_kernels_gradient_moves_no_images_between_devices():
    given = arrays((10, 14), 3, 7)
    mesh = sharding.make_mesh(6, 1, jax.devices()[:2])
    run = sharding.on_mesh(mesh, lambda *a: convolved(cpu_convolution.convolve, 2, 3)(*a)[::2])
    places = sharding.split(mesh), sharding.replicated(mesh), sharding.replicated(mesh)
    out = sharding.split(mesh), sharding.replicated(mesh)
    text = jax.jit(run, in_shardings=places, out_shardings=out).lower(*given).compile().as_text()
    assert "all-reduce(" in text and "all-gather(" not in text and "all-to-all(" not in text
