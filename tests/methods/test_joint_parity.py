"""Each joint-embedding method makes the first steps of solo-learn's own classes: losses, states, gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import optax
import pytest

from crate_jax.methods import joint
from crate_jax.training import optimizer
from tests.conftest import ROOT
from tests.parity_joint import joint_steps, load

pytestmark = pytest.mark.one_python

# Each differs from a quick one by an option or an encoder, and tests by hand look at the same lines; All4One's three
# transformers take as long to compile as ten other methods, and test_all4one.py has its terms by hand.
SLOW = ("all4one", "dino_options", "mocov3_vit", "nnbyol", "nnsiam", "swav_multicrop")
FILES = sorted((ROOT / "tests" / "golden").glob("steps_*.npz"))
LIMIT, GRADIENT_LIMIT = 2e-5, 1e-4


def file(path: Path):
    name = path.stem.removeprefix("steps_")
    return pytest.param(path, marks=pytest.mark.slow if name in SLOW else (), id=name)


@pytest.mark.parametrize("path", [file(path) for path in FILES])
def test_the_first_steps_are_those_of_solo_learn(path: Path, monkeypatch):
    """Losses relative, states and scalars absolute, gradients relative to the largest of their layer."""
    assemble, build = joint.assemble, optimizer.build

    def assembled(*args):
        method = assemble(*args)
        return dataclasses.replace(method, init=lambda key, start: jax.jit(lambda key: method.init(key, start))(key))

    def built(*args, **options):
        tx, rate = build(*args, **options)
        return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update)), rate

    # Op by op, the first values and the updates take longer than the loss.
    monkeypatch.setattr(joint, "assemble", assembled)
    monkeypatch.setattr(optimizer, "build", built)
    with jax.default_matmul_precision("highest"):
        outputs, gradients = joint_steps(load(path))
    assert any("/state/" in name for name in outputs) and any("/total_loss" in name for name in outputs) and gradients
    assert {name: error for name, error in outputs.items() if not error <= LIMIT} == {}
    assert {name: error for name, error in gradients.items() if not error <= GRADIENT_LIMIT} == {}
