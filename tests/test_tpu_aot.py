"""The step compiled for TPUs without one: what the HLO counter says, and the roofline."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.aot import lower_step
from benchmarks.hlo_cost import Program
from benchmarks.roofline import TPUS, chip_of, roofline
from configs import joint
from crate_jax import data
from crate_jax.config import validate
from crate_jax.errors import UserError
from crate_jax.methods import byol, joint as joint_methods, reconstruction
from crate_jax.models import batch_norm, layers, resnet
from crate_jax.parallel import parameters, sharding, target
from crate_jax.parallel.sharding import BATCH, DATA
from crate_jax.training import step as train_step
from tests.conftest import ROOT
from tests.training.test_loop import small

pytestmark = pytest.mark.one_python

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


IN_FUSIONS = """
%piece (p: bf16[2,64]) -> bf16[8,64] {
  %p = bf16[2,64]{1,0} parameter(0)
  ROOT %g = bf16[8,64]{1,0} all-gather(%p), channel_id=5, dimensions={0}
}

%piece.1 (p.1: bf16[2,64]) -> bf16[8,64] {
  %p.1 = bf16[2,64]{1,0} parameter(0)
  ROOT %g.1 = bf16[8,64]{1,0} all-gather(%p.1), channel_id=5, dimensions={0}
}

%all-reduce-scatter.1 (q: f32[8,64]) -> f32[2,64] {
  %q = f32[8,64]{1,0} parameter(0)
  %r = f32[8,64]{1,0} all-reduce(%q), channel_id=1, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %s = f32[2,64]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={2,64}
}

%body (t: (bf16[2,64], f32[8,64])) -> (bf16[2,64], f32[8,64]) {
  %t = (bf16[2,64]{1,0}, f32[8,64]{1,0}) parameter(0)
  %a = bf16[2,64]{1,0} get-tuple-element(%t), index=0
  %b = f32[8,64]{1,0} get-tuple-element(%t), index=1
  %c = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece
  %d = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece.1
  %e = f32[2,64]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %f = f32[2,64]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %u = (bf16[2,64]{1,0}, f32[8,64]{1,0}) tuple(%a, %b)
}

ENTRY %main (x: (bf16[2,64], f32[8,64])) -> (bf16[2,64], f32[8,64]) {
  %x = (bf16[2,64]{1,0}, f32[8,64]{1,0}) parameter(0)
  ROOT %w = (bf16[2,64]{1,0}, f32[8,64]{1,0}) while(%x), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # as libtpu writes them: one gather in two pieces, and two reduce-scatters, in a loop of three


def test_collectives_inside_fusions_are_counted_once_and_as_often_as_their_loop_runs():
    cost = Program(IN_FUSIONS).cost()
    assert cost.collectives == {"all-gather": 3, "reduce-scatter": 6}
    assert cost.collective_bytes == {"all-gather": 3 * 2 * 64 * 2, "reduce-scatter": 6 * 8 * 64 * 4}


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("ENTRY nothing")


def test_the_roofline_takes_the_larger_time():
    chip = TPUS.chips["v5e"]
    by_bytes = roofline(chip, flops=197e9, moved=1638e6, images=128)  # 1 ms of FLOPs, 2 ms of bytes
    assert by_bytes["bytes_time_over_flop_time"] == pytest.approx(2)
    assert by_bytes["roofline_images_per_sec"] == pytest.approx(128 / 2e-3)
    assert by_bytes["bound_by"] == "bytes"
    by_flops = roofline(chip, flops=197e9, moved=81.9e6, images=128)
    assert by_flops["roofline_images_per_sec"] == pytest.approx(128 / 1e-3)
    assert by_flops["bound_by"] == "FLOPs"


def test_topologies_name_a_chip_and_a_shape():
    assert chip_of("v5e:16x16", TPUS) == (TPUS.chips["v5e"], 256)
    assert chip_of("v5p:2x2x2", TPUS) == (TPUS.chips["v5p"], 8)
    for bad in ("v5e", "v9:2x2", "v5e:4", "v5e:4xx4", "v5e:0x4"):
        with pytest.raises(UserError, match=bad):
            chip_of(bad, TPUS)


def test_tokens_stay_split_over_the_images_behind_the_axis_of_one():
    mesh = sharding.make_mesh(8, 1, jax.devices()[:4], 2, 2)
    for shape, spec in (((8, 3, 2), PartitionSpec(BATCH)), ((1, 8, 3, 2), PartitionSpec(None, BATCH))):
        keep = jax.jit(sharding.on_mesh(mesh, sharding.keep_split_by_batch), in_shardings=sharding.replicated(mesh))
        out = keep(jnp.zeros(shape))
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape))


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (5.0, 0.5), (3.0, 0.0)])
def test_the_norm_in_one_pass_is_the_one_in_two(monkeypatch, mean, deviation):
    """Statistics to float32's digits, values and gradients to bfloat16's; also where all numbers are equal."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = (mean + deviation * jax.random.normal(keys[0], (3, 7, 96))).astype(jnp.bfloat16)
    g = jax.random.normal(keys[1], x.shape).astype(jnp.bfloat16)
    scale, bias = (jax.random.normal(key, (96,)) for key in keys[2:])

    def run(one_pass):
        monkeypatch.setattr(target, "is_tpu", lambda: one_pass)
        y, pull = jax.vjp(lambda *a: layers.layer_norm(*a, 1e-5), x, scale, bias)
        return layers.layer_norm_forward(x, scale, bias, 1e-5)[1][2:], (y, *pull(g))

    (statistics, values), (expected_statistics, expected) = run(True), run(False)
    for a, b in zip(statistics, expected_statistics, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(values, expected, strict=True):
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7 * np.abs(b).max())
    if deviation:
        assert any(np.any(a != b) for a, b in zip(statistics, expected_statistics, strict=True))  # two ways, not one


def test_the_norm_of_float32_takes_two_passes_everywhere(monkeypatch):
    """Its digits would be lost: a mean of 1000 leaves none of a variance of 1e-2."""
    x = 1000 + 0.1 * jax.random.normal(jax.random.key(0), (4, 256))
    monkeypatch.setattr(target, "is_tpu", lambda: True)
    y = layers.layer_norm(x, jnp.ones(256), jnp.zeros(256), 1e-6)
    np.testing.assert_allclose(jnp.std(y, axis=-1), 1.0, rtol=1e-3)


@pytest.mark.slow
def test_a_chip_sends_as_much_on_more_chips(monkeypatch):
    """Data parallel, two images a chip: every gradient is summed once, and each chip's share of the weights sent on."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    sent = {}
    for chips in (2, 8):
        config = small()
        config.batch_size = 2 * chips
        mesh = sharding.make_mesh(config.batch_size, 1, jax.devices()[:chips])
        method = reconstruction.build(config)
        recipe = train_step.make_recipe(config, method, 10 * config.batch_size)
        state = jax.eval_shape(functools.partial(train_step.init_state, config, method, recipe))
        batch = {"image": jax.ShapeDtypeStruct((config.batch_size, *config.data.image_size, 3), jnp.uint8)}
        step = train_step.make_train_step(config, method, recipe, mesh).lower(state, batch).compile()
        sent[chips] = Program(step.as_text()).cost().collective_bytes
        assert set(sent[chips]) == {"all-reduce", "all-gather"}
        weights = 4 * parameters.count(state.params)
        assert weights < sent[chips]["all-reduce"] < 1.25 * weights  # and sums of the penalty, the loss and metrics
        assert chips * sent[chips]["all-gather"] == pytest.approx(weights, rel=0.01)
    assert sent[2]["all-reduce"] == pytest.approx(sent[8]["all-reduce"], rel=0.01)


@pytest.mark.slow
def test_each_chip_convolves_its_own_images_whatever_the_layout_of_the_optimiser(monkeypatch):
    """The optimiser splits kernels over the chips by channels; what is sent are weights and their sums, and no maps."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    config = joint.get_config("method=byol,data=cifar10,debug")
    validate(config)
    block = resnet.Block(8, 8, False, 1, True, jnp.float32)

    def apply(tree, x, keys):
        y, tree = batch_norm.train(block, tree, x, None)
        return jnp.mean(y, (1, 2)), tree

    init = lambda key: block.init(key, jnp.zeros((2, 16, 16, 3)), None)["params"]  # noqa: E731
    encoder = joint_methods.Encoder(init, apply, 8)
    algorithm, views = byol.algorithm(config, 8, None), data.views_of(config)
    method = joint_methods.assemble(config, algorithm, encoder, views, None)
    mesh = sharding.make_mesh(16, 1, jax.devices()[:4])
    recipe = train_step.make_recipe(config, method, 160)
    state = jax.eval_shape(functools.partial(train_step.init_state, config, method, recipe))
    step = train_step.make_train_step(config, method, recipe, mesh).lower(
        state, data.batch_shapes(config, method.inputs)
    )
    lines = Program(step.compile().as_text()).cost().lines
    gathers = [line.instruction for line in lines if line.instruction.opcode in ("all-gather", "all-to-all")]
    assert any(g.arrays[0].sides == (3, 3, 8, 8) for g in gathers)
    assert not any("conv" in g.origin for g in gathers)


@pytest.mark.parametrize(  # that the stand-in has as many images as the set is tested in test_benchmarks.py
    "method", [pytest.param("deepclusterv2", marks=pytest.mark.slow), "simclr"]
)
def test_the_step_of_views_lowers_without_the_set(method):
    """The memory of DeepCluster v2 has a row per image of CIFAR-10, and the online classifier a column per class."""
    config = joint.get_config(f"method={method},encoder=vit_tiny,debug")
    config.data.source = "tfds:cifar10"
    config.views.update(dict(small=2, small_size=(12, 8)) if method == "simclr" else {})
    validate(config)
    (state, batch), _ = lower_step(config, jax.devices()[:2]).args_info
    small = {"small_views": (16, 2, 12, 8, 3)} if method == "simclr" else {}
    expected = {"views": (16, 2, 16, 16, 3), **small, "label": (16,), "index": (16,)}
    assert {name: x.shape for name, x in batch.items()} == expected
    assert state.carried["online"]["kernel"].shape == (32, 10)
    if method == "deepclusterv2":
        assert state.carried["memory"].shape == (2, 50_000, 16)


def command(cli_env, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_aot", *args], cwd=ROOT, env=cli_env, capture_output=True, text=True
    )


@pytest.mark.slow  # test_gpu_aot.py has a quick test of a command that ends in one line
@pytest.mark.parametrize(
    "args, line",
    [
        (
            ["--config=configs/crate_mae.py:debug", "--topology=v9:2x2"],
            "--topology=v9:2x2: must be a chip (v5e, v5p, v6e) and a shape, such as v5e:4x4",
        ),
        (["--topology=v5e:4x4"], "--config is missing, such as --config=configs/crate_mae.py:variant=B"),
        (["--config=configs/align.py"], "config.job='align': only the step of pretrain is compiled here"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(cli_env, args, line):
    result = command(cli_env, *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [f"error: {line}"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_is_one_line():
    with mock.patch.dict(os.environ):  # the module sets variables
        from benchmarks import tpu_aot
    with pytest.raises(UserError, match=r"^libtpu is not installed.* pip install 'crate-jax\[tpu\]'$"):
        tpu_aot.topology_devices("v5e:4x4")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed (extra tpu)"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "args, said",
    [
        (["--topology=v5e:3x5"], "--topology=v5e:3x5: libtpu does not know this slice"),
        (["--topology=v5e:2x2", "--batch_per_chip=4000"], "lower --batch_per_chip, or set --config.remat=True"),
    ],
)
def test_what_the_compiler_refuses_is_one_line(cli_env, args, said):
    result = command(cli_env, "--config=configs/crate_mae.py:variant=Ti", *args)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert said in line


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, topology", [("crate_mae.py:variant=Ti", "v5e:2x2"), ("rop_vitb.py:variant=S", "v6e:2x2")]
)
def test_a_real_step_compiles(cli_env, config, topology):
    result = command(cli_env, f"--config=configs/{config}", f"--topology={topology}", "--batch_per_chip=16")
    assert result.returncode == 0, result.stderr[-2000:]
    out = json.loads(result.stdout)
    chip = TPUS.chips[topology[:3]]
    assert out["chips"] == 4
    assert 0 < out["hbm_bytes_per_chip"] < chip.hbm
    assert out["collective_bytes_by_kind"]["all-reduce"] > 1e6
    assert out["collective_bytes_per_chip"] == sum(out["collective_bytes_by_kind"].values())
    assert out["bytes_time_over_flop_time"] == pytest.approx(
        (out["bytes_per_chip"] / chip.bandwidth) / (out["flops_per_chip"] / chip.flops)
    )
    assert out["bytes_per_chip"] > out["hbm_traffic_per_chip"] > 0 and out["flops_per_chip"] > 0
    slowest = max(out["bytes_per_chip"] / chip.bandwidth, out["flops_per_chip"] / chip.flops)
    assert out["roofline_images_per_sec"] == pytest.approx(16 / slowest)
