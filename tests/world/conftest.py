"""The one pool of ranks that all world tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks, started by the first test that needs them and ended with the session."""
    with Pool() as ranks:
        yield ranks
