"""The one pool of ranks that all world tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks, started by the first test that needs them and ended with the session."""
    with Pool() as ranks:
        yield ranks


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What a test computes itself is tiny, and the cores are the ranks'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
