"""The step compiled for GPUs without one: what library calls cost, by hand; compiled programs where it is possible."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.hlo_cost import Program
from benchmarks.roofline import GPUS, chip_of
from crate_jax.errors import UserError
from tests.conftest import ROOT

# Programs compiled for an H100 by jax 0.10.2, CUDA 12.9, without metadata: the calls of several programs in one text,
# their operands as parameters; and a scan of seven products (48, 96) x (96, 96).
CALLS, SCAN = (ROOT / "tests" / "golden" / f"gpu_{name}.hlo" for name in ("calls", "scan"))

# Without products with padding: 22 of 24 rows of taps and 31 of 33 columns lie on the image of 15 x 21.
CONVOLUTION = 2 * 8 * 40 * 24 * 22 * 31
MAPS = 2 * (8 * 15 * 21 * 24 + 3 * 3 * 24 * 40 + 8 * 8 * 11 * 40)  # bytes of x, kernel and y in bfloat16
WEIGHTS, TOKENS = 6 * 4 * 200 * 200, 2 * 6 * 200 * 4 * 64  # numbers of all weights, bytes of one of q, k, v
STATISTICS, BIAS = 4 * 6 * 4 * 200, 2 * 4 * 200 * 200  # bytes
ADDED = 3 * 4 * 64 * 128  # bytes


@pytest.mark.parametrize(
    "name, flops, moved",
    [
        ("matmul32.custom-call.1", 2 * 333 * 515 * 129, 4 * (333 * 515 + 515 * 129 + 333 * 129)),
        ("conv.cudnn-conv.1", CONVOLUTION, MAPS),
        ("conv.cudnn-conv-bw-input.1", CONVOLUTION, MAPS),
        ("conv.cudnn-conv-bw-filter.1", CONVOLUTION, MAPS),
        ("fmha.dot_product_attention_fwd.5", 2 * 2 * WEIGHTS * 64, 4 * TOKENS + STATISTICS),
        ("fmha.dot_product_attention_bwd.8", 5 * 2 * WEIGHTS * 64, 8 * TOKENS + STATISTICS),
        ("fmhabias.dot_product_attention_fwd.5", 2 * 2 * WEIGHTS * 64, 4 * TOKENS + STATISTICS + BIAS),
        ("fmhabias.dot_product_attention_bwd.9", 5 * 2 * WEIGHTS * 64, 8 * TOKENS + STATISTICS + 2 * BIAS),
        ("meta.pallas_call.1", 8192, ADDED),  # Triton; the kernel tells its FLOPs
        ("mosaic.pallas_call.1", 0, ADDED),
        ("misc.cholesky.0", 0, 2 * 4 * 32 * 32 + 4),
    ],
)
def test_a_call_costs_its_flops_its_operands_and_its_results(name, flops, moved):
    (line,) = [line for line in Program(CALLS.read_text()).cost().lines if line.instruction.name == name]
    assert (line.flops, line.bytes, line.hbm_bytes) == (flops, moved, moved)


def test_calls_of_unknown_flops_are_named():
    cost = Program(CALLS.read_text()).cost()
    assert cost.not_counted == {"mosaic_gpu_v2": 1, "cusolver_potrf_ffi": 1}
    named = CALLS.read_text().replace('serialized_metadata = "{\\22flops', 'serialized_metadata = "{\\22other')
    assert Program(named).cost().not_counted["__gpu$xla.gpu.triton adder"] == 1


def test_calls_in_a_loop_count_with_each_run():
    cost = Program(SCAN.read_text()).cost()
    product = 2 * (48 * 96 + 96 * 96 + 48 * 96)
    layer = 2 * 2 * 96 * 96 + 4  # a slice of the weights, copied, and its index
    tanh = 2 * 2 * 48 * 96
    start = 2 * 2 * 48 * 96 + 2 * 4  # copies of x and of the counter
    assert cost.bytes == start + 7 * (product + layer + tanh + 8)  # 8: the counter
    assert cost.flops == 7 * (2 * 48 * 96 * 96 + 1)
    assert cost.not_counted == {}
    (calls,) = [line for line in cost.lines if line.instruction.call]
    assert (calls.instruction.call, calls.runs) == ("__cublas$lt$matmul", 7)


COLLECTIVES = """
ENTRY %main (a: bf16[96,24], b: f32[16,24]) -> () {
  %a = bf16[96,24]{1,0} parameter(0)
  %b = f32[16,24]{1,0} parameter(1)
  %r = ((bf16[96,24], f32[16,24]), (bf16[12,24], f32[2,24])) reduce-scatter-start(%a, %b), dimensions={0}
  %s = (bf16[12,24]{1,0}, f32[2,24]{1,0}) reduce-scatter-done(%r)
  %t = f32[2,24]{1,0} get-tuple-element(%s), index=1
  %u = (f32[2,24]{1,0}, f32[16,24]{1,0}) all-gather-start(%t), dimensions={0}
  %v = f32[16,24]{1,0} all-gather-done(%u)
}
"""  # as XLA for GPUs writes them: what ends a collective costs nothing


def test_collectives_that_start_and_end_are_counted_once():
    cost = Program(COLLECTIVES).cost()
    assert cost.collective_bytes == {"reduce-scatter": 2 * 96 * 24 + 4 * 16 * 24, "all-gather": 4 * 2 * 24}
    assert cost.collectives == {"reduce-scatter": 1, "all-gather": 1}
    assert cost.bytes == 9 / 8 * cost.collective_bytes["reduce-scatter"] + 4 * (2 + 16) * 24


CHANGED_IN_PLACE = """
%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

%fused (p: f32[900,24], q: s32[7,1], u: f32[7,24]) -> f32[900,24] {
  %p = f32[900,24]{1,0} parameter(0)
  %q = s32[7,1]{1,0} parameter(1)
  %u = f32[7,24]{1,0} parameter(2)
  %v = f32[7,24]{1,0} custom-call(%u), custom_call_target="nobody"
  ROOT %s = f32[900,24]{1,0} scatter(%p, %q, %v), to_apply=%add
}

ENTRY %main (a: f32[900,24], i: s32[7,1], b: f32[7,24], m: f32[5,12,12,24]) -> () {
  %a = f32[900,24]{1,0} parameter(0)
  %i = s32[7,1]{1,0} parameter(1)
  %b = f32[7,24]{1,0} parameter(2)
  %m = f32[5,12,12,24]{3,2,1,0} parameter(3)
  %alone = f32[900,24]{1,0} scatter(%a, %i, %b), to_apply=%add
  %fusion = f32[900,24]{1,0} fusion(%alone, %i, %b), kind=kInput, calls=%fused
  %zero = f32[] constant(0)
  %pooled = f32[5,4,6,24]{3,2,1,0} reduce-window(%m, %zero), window={size=1x3x2x1 stride=1x3x2x1}, to_apply=%add
}
"""


def test_a_scatter_costs_what_it_changes_and_a_window_what_it_holds():
    cost = Program(CHANGED_IN_PLACE).cost()
    alone, fusion, pooled = cost.lines
    changed = 3 * 4 * 7 * 24 + 4 * 7  # rows of a that are read and written, their updates; indices
    assert (alone.bytes, fusion.bytes) == (changed, changed)
    assert pooled.flops == 5 * 4 * 6 * 24 * (3 * 2 - 1)
    assert cost.not_counted == {"nobody": 1}  # in the fusion


def test_a_type_of_unknown_size_is_named_not_free():
    with pytest.raises(ValueError, match="the size of the type f4e9 is not known"):
        Program(CHANGED_IN_PLACE.replace("f32", "f4e9")).cost()


def test_topologies_name_a_gpu_and_three_sides():
    assert chip_of("h100:1x8x8", GPUS) == (GPUS.chips["h100"], 64)
    for bad in ("h100:8", "h100:1x8", "h100:1x8x8x2", "v5e:1x1x8", "h100:1x0x8"):
        with pytest.raises(UserError, match=f"{bad}: must be a chip .a100, h100, h200, b200. and a shape"):
            chip_of(bad, GPUS)


def command(cli_env, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=cli_env, capture_output=True, text=True)


HAS_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@pytest.mark.one_python
@pytest.mark.skipif(HAS_PLUGIN, reason="JAX's CUDA plug-in is installed")
def test_a_missing_compiler_is_one_line(cli_env):
    result = command(cli_env, "-m", "benchmarks.gpu_aot", "--config=configs/crate_mae.py:debug")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: JAX's CUDA plug-in is not installed") and "pip install 'crate-jax[cuda12]'" in line


needs_plugin = pytest.mark.skipif(
    not HAS_PLUGIN, reason="JAX's CUDA plug-in, with the compiler for GPUs, is not installed (extra cuda12)"
)

SMALL = """
import json
from benchmarks import gpu_aot
from benchmarks.hlo_cost import Program
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

(device,) = gpu_aot.topology_devices("h100:1x1x1")
sharding = jax.sharding.SingleDeviceSharding(device)

def cost(f, *shapes):
    text = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in shapes)).compile().as_text()
    c = Program(text).cost()
    calls = {line.instruction.call for line in c.lines if line.instruction.call}
    print(json.dumps([c.flops, c.bytes, sorted(calls), c.not_counted]))

def convolution(x, k):
    return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

def both(f):
    def run(g, *x):
        y, pull = jax.vjp(f, *x)
        return y, *pull(g)
    return run

def add(x_ref, y_ref, o_ref):
    o_ref[...] = x_ref[...] + y_ref[...]

def kernel(metadata):
    out = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    return pl.pallas_call(add, out, compiler_params=triton.CompilerParams(), name="adder", metadata=metadata)

f, h = jnp.float32, jnp.bfloat16
cost(lambda a, b: a @ b, ((333, 515), f), ((515, 129), f))
cost(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], ((48, 96), h), ((7, 96, 96), h))
cost(both(convolution), ((8, 8, 11, 40), h), ((8, 15, 21, 24), h), ((3, 3, 24, 40), h))
cost(both(attend), *(((6, 200, 4, 64), h),) * 4)
cost(kernel({"flops": "8192"}), *(((64, 128), f),) * 2)
cost(kernel(None), *(((64, 128), f),) * 2)
"""


@needs_plugin
@pytest.mark.one_python
def test_small_programs_cost_what_a_hand_counts(cli_env):
    result = command(cli_env, "-c", SMALL)
    assert result.returncode == 0, result.stderr[-2000:]
    product, scan, convolution, attention, told, untold = map(json.loads, result.stdout.splitlines())
    lt = ["__cublas$lt$matmul"]
    assert product == [2 * 333 * 515 * 129, 4 * (333 * 515 + 515 * 129 + 333 * 129), lt, {}]
    assert scan[0] == pytest.approx(7 * 2 * 48 * 96 * 96, rel=1e-5) and scan[2:] == [lt, {}]
    assert scan[1] == pytest.approx(7 * 2 * (6 * 48 * 96 + 3 * 96 * 96), rel=0.3)
    assert convolution[0] == 3 * CONVOLUTION
    assert 3 * MAPS < convolution[1] < 3 * MAPS + 5 * 2 * 3 * 3 * 24 * 40  # and the kernel in cuDNN's layout and back
    assert attention[:2] == [7 * 2 * WEIGHTS * 64, 12 * TOKENS + 2 * STATISTICS]
    assert attention[2:] == [["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"], {}]
    assert told[:2] == [8192, ADDED] and told[3] == {}
    assert untold[:2] == [0, ADDED] and list(untold[3].values()) == [1]


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("gpu", list(GPUS.chips))
def test_a_real_step_compiles(cli_env, gpu):
    args = ("--config=configs/crate_mae.py:variant=Ti", f"--topology={gpu}:1x1x2", "--batch_per_chip=16")
    result = command(cli_env, "-m", "benchmarks.gpu_aot", *args)
    assert result.returncode == 0, result.stderr[-2000:]
    out = json.loads(result.stdout)
    chip = GPUS.chips[gpu]
    assert out["chips"] == 2 and out["not_counted"] == {}
    assert 0 < out["hbm_bytes_per_chip"] < chip.hbm
    assert out["collective_bytes_per_chip"] == sum(out["collective_bytes_by_kind"].values()) > 1e6
    assert "all-to-all" not in out["collective_bytes_by_kind"]  # twelve layers on two GPUs: gradients are sent once
    assert out["bytes_per_chip"] == out["hbm_traffic_per_chip"] > 0
    slowest = max(out["bytes_per_chip"] / chip.bandwidth, out["flops_per_chip"] / chip.flops)
    assert out["roofline_images_per_sec"] == pytest.approx(16 / slowest)


KERNELS = """
import json, sys
from benchmarks import gpu_aot
import jax, jax.numpy as jnp, re
from crate_jax.models import gpu_attention, gpu_norm

(device,) = gpu_aot.topology_devices(sys.argv[1] + ":1x1x1")
at = jax.sharding.SingleDeviceSharding(device)

def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

def attention(x, bias, g):
    y, pull = jax.vjp(lambda x, bias: gpu_attention.attend(x, bias, HEADS, PARTS), x, bias)
    return y, *pull(g)

def norm(x, scale, bias, g):
    return gpu_norm.forward(x, scale, bias, 1e-6), gpu_norm.backward(x, scale, (g,), g, 1e-6)

def largest(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    sizes = [eval(s.replace(",", "*") or "1") for s in re.findall(r"[a-z0-9]+\\[([0-9,]*)\\]", text)]
    print(json.dumps([text.count('custom_call_target="__gpu$xla.gpu.triton"'), max(sizes)]))

for B, N, HEADS, K, PARTS, biased, dtype in json.loads(sys.argv[2]):
    bias = shaped("float32", HEADS, N, N) if biased else None
    largest(attention, shaped(dtype, B, N, PARTS * HEADS * K), bias, shaped(dtype, B, N, HEADS * K))
    D = HEADS * K
    largest(norm, shaped(dtype, B, N, D), *[shaped("float32", D)] * 2, shaped(dtype, B, N, D))
"""
# images, tokens, heads, head width, parts, bias, type
SHAPES = [
    (9, 197, 12, 64, 1, False, "bfloat16"),
    (9, 197, 12, 64, 3, True, "bfloat16"),
    (1, 5, 2, 32, 3, True, "bfloat16"),
    (1, 577, 3, 80, 1, False, "bfloat16"),
    (2, 197, 2, 128, 3, True, "bfloat16"),
    (2, 50, 4, 16, 1, False, "float32"),
]


@needs_plugin
@pytest.mark.one_python
@pytest.mark.parametrize("gpu", list(GPUS.chips))
def test_our_kernels_compile_and_keep_the_weights_of_attention_on_the_chip(cli_env, gpu):
    result = command(cli_env, "-c", KERNELS, gpu, json.dumps(SHAPES))
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for (B, N, heads, width, parts, biased, _), (kernels, largest), (norms, _) in zip(
        SHAPES, lines[::2], lines[1::2], strict=True
    ):
        assert kernels == (4 if biased else 3) and norms == 2
        # The bias, padded to whole tiles, and a few sums of its gradient; and no more.
        biases = heads * max(min(B, 8) * N * N, (-(-N // 128) * 128) ** 2) if biased else 0
        assert largest <= max(B * N * parts * heads * width, biases)
