"""The benchmarks run as their docstrings say and print what they promise."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.step import matmul_flops
from tests.conftest import ROOT


def run(cli_env, *args: str) -> list[dict]:
    result = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=cli_env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_step_prints_speed_and_share_of_the_peak(cli_env):
    (out,) = run(
        cli_env, "benchmarks.step", "--config=configs/quickstart.py:debug", "--batch=8", "--steps=3"
    )  # fmt: skip
    assert out["images_per_sec"] == pytest.approx(8e3 / out["step_ms"], rel=0.01)
    assert 0 < out["fraction_of_peak"] < 1
    assert out["batch"] == 8 and out["steps"] == 3


def test_flops_count_loops_and_gradients():
    """A scan of 3 products of (4 x 5) by (5 x 5): 3 * 2 * 4 * 5 * 5, three times that with gradients."""
    x, w = jnp.ones((4, 5)), jnp.ones((3, 5, 5))

    def run(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    forward = 3 * 2 * 4 * 5 * 5
    assert matmul_flops(jax.make_jaxpr(run)(x, w).jaxpr) == forward
    assert matmul_flops(jax.make_jaxpr(jax.grad(run, (0, 1)))(x, w).jaxpr) == 3 * forward


def test_data_prints_a_line_per_setting(cli_env):
    out = run(cli_env, "benchmarks.data", "--settings", "memory", "--seconds", "0.3", "--repeats", "2")
    assert out and all(line["images_per_sec"] > 0 for line in out)
