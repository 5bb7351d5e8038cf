"""Each joint-embedding method makes the first steps of solo-learn's own classes: losses, states, gradients."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests.conftest import ROOT
from tests.parity_joint import joint_steps, load

pytestmark = pytest.mark.one_python

FILES = sorted((ROOT / "tests" / "golden").glob("steps_*.npz"))
LIMIT, GRADIENT_LIMIT = 2e-5, 1e-4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("steps_"))
def test_the_first_steps_are_those_of_solo_learn(path: Path):
    """Losses relative, states and scalars absolute, gradients relative to the largest of their layer."""
    with jax.default_matmul_precision("highest"):
        outputs, gradients = joint_steps(load(path))
    assert any("/state/" in name for name in outputs) and any("/total_loss" in name for name in outputs) and gradients
    assert {name: error for name, error in outputs.items() if not error <= LIMIT} == {}
    assert {name: error for name, error in gradients.items() if not error <= GRADIENT_LIMIT} == {}
