"""The examples in docstrings show what the code does."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import crate_jax

MIN_EXAMPLES = 20


@pytest.mark.one_python
def test_the_examples_of_all_modules_hold():
    """Each example runs on its own; what differs is printed by doctest."""
    names = [crate_jax.__name__, *(m.name for m in pkgutil.walk_packages(crate_jax.__path__, "crate_jax."))]
    results = {name: doctest.testmod(importlib.import_module(name), verbose=False) for name in names}
    assert not {name: result for name, result in results.items() if result.failed}
    assert sum(result.attempted for result in results.values()) >= MIN_EXAMPLES
