"""The step compiled for TPUs without one: what the HLO counter says, the roofline, and MSSA's kernel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.hlo_cost import Program
from benchmarks.roofline import CHIPS, chip_of, roofline
from crate_jax import target
from crate_jax.encoders import mssa_kernel
from crate_jax.encoders.crate import attend
from crate_jax.errors import UserError
from crate_jax.sharding import DATA
from tests.conftest import ROOT

# Five layers of MSSA with residual under jax.grad, (128, 197, 256) bfloat16 on v5e:2x2, libtpu 0.0.42, jax 0.10.2.
RECORDED = ROOT / "tests" / "golden" / "mssa_v5e.hlo"
RECORDED_XLA = {"flops": 6947971072.0, "bytes accessed": 121861632.0}  # of cost_analysis(): bodies once


def compiled(function, *shapes) -> str:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_a_product_costs_its_flops_and_its_three_arrays():
    cost = Program(compiled(lambda a, b: a @ b, (64, 96), (96, 32))).cost()
    assert cost.flops == 2 * 64 * 96 * 32
    assert cost.bytes == 4 * (64 * 96 + 96 * 32 + 64 * 32) == cost.hbm_bytes
    assert cost.collective_bytes == {}


def test_loops_are_multiplied_out():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = Program(compiled(layers, (16, 32), (7, 32, 32)))
    product = 2 * 16 * 32 * 32
    assert 7 * product <= program.cost().flops < 7 * product * 1.1
    assert program.cost(loops=False).flops < 2 * product


def test_collectives_are_counted_by_kind():
    mesh = Mesh(np.asarray(jax.devices()[:4]), (DATA,))
    rows, whole = NamedSharding(mesh, PartitionSpec(DATA)), NamedSharding(mesh, PartitionSpec())
    gradient = jax.jit(lambda x: jnp.sum(x, axis=0), in_shardings=rows, out_shardings=whole)
    text = gradient.lower(jax.ShapeDtypeStruct((8, 1000), jnp.float32)).compile().as_text()
    cost = Program(text).cost()
    assert cost.collectives == {"all-reduce": 1}
    assert cost.collective_bytes == {"all-reduce": 4 * 1000}


def test_a_program_for_tpus_is_counted_as_xla_counts_it():
    program = Program(RECORDED.read_text())
    once, cost = program.cost(loops=False), program.cost()
    assert once.flops == pytest.approx(RECORDED_XLA["flops"], rel=0.01)
    assert once.bytes == pytest.approx(RECORDED_XLA["bytes accessed"], rel=0.15)
    assert cost.flops == pytest.approx(5 * once.flops, rel=0.01)
    assert cost.hbm_bytes < cost.bytes
    assert cost.collectives == {"all-reduce": 5}
    assert cost.collective_bytes == {"all-reduce": 5 * 256 * 256 * 2}
    kernels = [line for line in cost.lines if "tpu_custom_call" in line.instruction.rest]
    assert [line.runs for line in kernels] == [5, 5]
    tokens = 32 * 197 * 256 * 2  # of one chip
    assert sorted(line.bytes / line.runs for line in kernels) == [2 * tokens, 3 * tokens]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("ENTRY nothing")


def test_the_roofline_takes_the_larger_time():
    chip = CHIPS["v5e"]
    by_bytes = roofline(chip, flops=197e9, moved=1638e6, images=128)  # 1 ms of FLOPs, 2 ms of bytes
    assert by_bytes["bytes_time_over_flop_time"] == pytest.approx(2)
    assert by_bytes["roofline_images_per_sec"] == pytest.approx(128 / 2e-3)
    assert by_bytes["bound_by"] == "bytes"
    by_flops = roofline(chip, flops=197e9, moved=81.9e6, images=128)
    assert by_flops["roofline_images_per_sec"] == pytest.approx(128 / 1e-3)
    assert by_flops["bound_by"] == "FLOPs"


def test_topologies_name_a_chip_and_a_shape():
    assert chip_of("v5e:16x16") == (CHIPS["v5e"], 256)
    assert chip_of("v5p:2x2x2") == (CHIPS["v5p"], 8)
    for bad in ("v5e", "v9:2x2", "v5e:4", "v5e:4xx4"):
        with pytest.raises(UserError, match=bad):
            chip_of(bad)


@pytest.mark.parametrize("heads, images, width", [(4, 3, 128), (4, 24, 256)])  # four heads a lane block, and two
def test_the_kernel_is_attend(heads, images, width):
    """Forward and backward; the second over several blocks of images and lanes; interpreted, in float32."""
    w, g = (2 * jax.random.normal(jax.random.key(i), (images, 13, width)) for i in range(2))
    y, pull = jax.vjp(lambda w: attend(w, heads), w)
    np.testing.assert_allclose(mssa_kernel.forward(w, heads, interpret=True), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mssa_kernel.backward(w, g, heads, interpret=True), pull(g)[0], rtol=1e-4, atol=1e-4)


def test_the_kernel_in_bfloat16_is_as_exact_as_the_plain_version():
    w, g = (jax.random.normal(jax.random.key(i), (2, 24, 128)).astype(jnp.bfloat16) for i in range(2))
    exact, pull = jax.vjp(lambda w: attend(w, 2), w.astype(jnp.float32))
    (dexact,) = pull(g.astype(jnp.float32))
    plain, pull = jax.vjp(lambda w: attend(w, 2), w)
    for kernel, other, truth in (
        (mssa_kernel.forward(w, 2, interpret=True), plain, exact),
        (mssa_kernel.backward(w, g, 2, interpret=True), pull(g)[0], dexact),
    ):
        error = jnp.abs(kernel.astype(jnp.float32) - truth).max()
        assert error <= 1.2 * jnp.abs(other.astype(jnp.float32) - truth).max() + 1e-3


def test_what_does_not_fill_tiles_does_not_fit():
    assert mssa_kernel.fits(128, 12, 768) and mssa_kernel.fits(8, 16, 1024) and mssa_kernel.fits(16, 6, 384)
    assert not mssa_kernel.fits(128, 12, 576)  # variant S: 48 numbers per head
    assert not mssa_kernel.fits(100, 12, 768)


def test_a_kernel_runs_on_each_devices_own_images():
    mesh = Mesh(np.asarray(jax.devices()[:4]), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.random.normal(jax.random.key(0), (8, 16, 128))

    def run(w):
        with target.tracing_for(mesh):
            assert not target.is_tpu() and target.devices() == 4
            return target.per_device(lambda w: mssa_kernel.forward(w, 2, interpret=True), w)

    rows = NamedSharding(mesh, PartitionSpec(DATA))
    split = jax.jit(run, in_shardings=rows, out_shardings=rows)(w)
    np.testing.assert_allclose(split, attend(w, 2), rtol=1e-5, atol=1e-5)
    assert split.sharding == rows


def command(cli_env, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_aot", *args], cwd=ROOT, env=cli_env, capture_output=True, text=True
    )


def test_an_unknown_chip_is_one_line(cli_env):
    result = command(cli_env, "--config=configs/crate_mae.py:debug", "--topology=v9:2x2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "--topology=v9:2x2: takes a chip (v5e, v5p, v6e) and a shape, such as v5e:4x4"
    ]


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed (extra tpu)"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, topology", [("crate_mae.py:variant=Ti", "v5e:2x2"), ("rop_vitb.py:variant=Ti", "v6e:2x2")]
)
def test_a_real_step_compiles(cli_env, config, topology):
    result = command(cli_env, f"--config=configs/{config}", f"--topology={topology}", "--batch_per_chip=16")
    assert result.returncode == 0, result.stderr[-2000:]
    out = json.loads(result.stdout)
    chip = CHIPS[topology[:3]]
    assert out["chips"] == 4
    assert 0 < out["hbm_bytes_per_chip"] < chip.hbm
    assert out["collective_bytes_per_chip"]["all-reduce"] > 1e6
    assert out["bytes_time_over_flop_time"] == pytest.approx(
        (out["bytes_per_chip"] / chip.bandwidth) / (out["flops_per_chip"] / chip.flops)
    )
    slowest = max(out["bytes_per_chip"] / chip.bandwidth, out["flops_per_chip"] / chip.flops)
    assert out["roofline_images_per_sec"] == pytest.approx(16 / slowest)
