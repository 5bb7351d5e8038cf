"""Tests; a package, so that `python -m tests.parity` works."""
