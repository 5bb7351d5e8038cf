"""One thread for NumPy's linear algebra."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """On a few busy cores the threads of many small products wait for each other, for longer than the products take."""
    with threadpool_limits(1):
        yield
