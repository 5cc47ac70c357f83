"""Splits balanced by cost, against every split there is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.plan.balance import Balance
from shardwright.schedule.build import placement

WEIGHTS = st.floats(0, 12)


def all_splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(end - begin for begin, end in pairwise(ends))


def measure(balance: Balance, stages: tuple[int, ...]) -> tuple[float, float]:
    """What is made least: the largest rank, then the largest stage."""
    return max(balance.rank_costs(stages)), max(balance.stage_costs(stages))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Balance, int]:
    name = draw(st.sampled_from(["1f1b", "interleaved", "zbv"]))
    ranks = draw(st.integers(1, 3))
    virtual = {"1f1b": 1, "zbv": 2}.get(name) or draw(st.integers(1, 2))
    balance = Balance(placement(name, ranks, virtual), draw(WEIGHTS), draw(WEIGHTS))
    return balance, draw(st.integers(ranks * virtual, ranks * virtual + 6))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_split_is_better(case: tuple[Balance, int]) -> None:
    balance, layers = case
    found = balance.split(layers)
    assert sum(found) == layers and min(found) >= 1 and len(found) == len(balance.placement)
    rank, stage = measure(balance, found)
    best_rank = min(measure(balance, split)[0] for split in all_splits(layers, len(found)))
    assert rank == pytest.approx(best_rank)
    alike = [measure(balance, split) for split in all_splits(layers, len(found))]
    assert stage == pytest.approx(min(s for r, s in alike if r <= best_rank + 1e-8))


def test_the_head_takes_layers_off_its_rank() -> None:
    assert Balance((0, 1), 0.02, 1.8).split(8) == (5, 3)
    assert Balance((0, 1), 0.0, 0.0).split(8) == (4, 4)
    assert Balance((0, 1, 2), 0.0, 30.0).split(8) == (3, 4, 1)
    assert Balance((0,), 0.5, 2.0).split(3) == (3,)


def test_of_equal_splits_later_stages_get_more() -> None:
    """They keep the activations of fewer microbatches."""
    assert Balance((0, 1, 2, 3), 0.0, 0.0).split(6) == (1, 1, 2, 2)


def test_zbv_balances_ranks_not_stages() -> None:
    balance = Balance(placement("zbv", 2, 2), 0.02, 1.8)
    split = balance.split(8)
    assert balance.rank_costs(split) == [pytest.approx(4.82), 5.0]
    assert max(balance.stage_costs(split)) == 3


@pytest.mark.parametrize(("ranks", "virtual", "layers"), [(16, 7, 126), (16, 8, 128), (35, 1, 105), (126, 1, 126)])
def test_large_models_take_no_time(ranks: int, virtual: int, layers: int) -> None:
    balance = Balance(placement("interleaved", ranks, virtual), 0.01, 0.6)
    start = time.process_time()
    assert sum(balance.split(layers)) == layers
    assert time.process_time() - start < 0.05
