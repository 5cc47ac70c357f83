"""Learning-rate schedules at their corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.optim.schedule import learning_rate
from shardwright.spec.train import TrainSpec

KINDS = ("cosine", "linear", "wsd", "constant")


def rates(steps: int = 100, **fields: Any) -> list[float]:
    spec = TrainSpec(steps=steps, lr=1.0, **{"warmup_steps": 10, "min_lr_ratio": 0.1} | fields)
    return [learning_rate(spec, step) for step in range(steps + 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_reaches_the_rate_and_begins_above_zero(kind: str) -> None:
    found = rates(lr_schedule=kind)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_whole_rate(kind: str) -> None:
    assert rates(lr_schedule=kind, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_reached_at_the_horizon_and_kept(kind: str) -> None:
    end = 1.0 if kind == "constant" else 0.1
    assert rates(lr_schedule=kind)[100:] == pytest.approx([end] * 5)


def test_halfway() -> None:
    assert rates(lr_schedule="cosine")[55] == pytest.approx(0.55)
    assert rates(lr_schedule="linear")[55] == pytest.approx(0.55)
    quarter = 10 + 90 / 3
    assert rates(lr_schedule="cosine")[int(quarter)] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    assert rates(lr_schedule="linear")[int(quarter)] == pytest.approx(0.1 + 0.9 * 2 / 3)


def test_wsd_stays_and_falls_over_the_last_share_of_all_steps() -> None:
    found = rates(lr_schedule="wsd", decay_fraction=0.2)
    assert found[10:81] == pytest.approx([1.0] * 71)
    assert found[81] < 1.0
    assert found[90] == pytest.approx(0.55)


def test_the_floor_may_be_zero_or_the_rate_itself() -> None:
    assert rates(lr_schedule="cosine", min_lr_ratio=0.0)[100] == pytest.approx(0.0, abs=1e-12)
    assert rates(lr_schedule="linear", min_lr_ratio=1.0)[10:] == pytest.approx([1.0] * 95)


def test_runs_shorter_than_their_warmup_or_decay() -> None:
    assert rates(steps=3, lr_schedule="cosine")[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates(steps=10, lr_schedule="wsd", decay_fraction=1.0, warmup_steps=0)[0] == 1.0
    assert rates(steps=10, lr_schedule="wsd", decay_fraction=0.0, warmup_steps=0)[:10] == [1.0] * 10
    assert rates(steps=1, lr_schedule="linear", warmup_steps=1)[0] == 1.0


@given(
    st.sampled_from(KINDS), st.integers(1, 60), st.integers(0, 70), st.floats(0, 1), st.floats(0, 1), st.integers(0, 90)
)
def test_rates_stay_between_zero_and_the_rate_and_never_rise_after_warmup(
    kind: Any, steps: int, warmup: int, floor: float, decay: float, step: int
) -> None:
    spec = TrainSpec(
        steps=steps, lr=3.0, lr_schedule=kind, warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=decay
    )
    rate, after = learning_rate(spec, step), learning_rate(spec, step + 1)
    assert 0 <= rate <= 3.0 + 1e-12
    if step >= warmup:
        assert 3.0 * floor - 1e-12 <= after <= rate + 1e-12
