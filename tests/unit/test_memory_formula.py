"""The closed form of training state against the seed's table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cost.memory import held_parameters, state_memory
from shardwright.record.records import MemoryRecord, Origin
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.model import ModelSpec
from shardwright.spec.presets import PRESETS

P = 8 * 9 * 5 * 7 * 1000  # divides by every number of owners below


def state(zero: int, owners: int, **fields: Any) -> MemoryRecord:
    settings = {"dtype": "bf16", "grad_dtype": "bf16", "optimizer": "adamw"} | fields
    return state_memory(P, zero=zero, owners=owners, **settings)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_bf16_adam_is_the_seeds_column(n: int) -> None:
    per_parameter = [state(zero, n).total / P for zero in range(4)]
    assert per_parameter == [16, 4 + 12 / n, 2 + 14 / n, 16 / n]
    with_fp32_gradients = [state(zero, n, grad_dtype="fp32").total / P for zero in range(4)]
    assert with_fp32_gradients == [18, 6 + 12 / n, 2 + 16 / n, 18 / n]


def test_categories() -> None:
    record = state(2, 4)
    assert record.origin is Origin.ESTIMATED and record.padding == 0
    assert (record.parameters, record.gradients, record.optimizer) == (2 * P, 2 * P / 4, 12 * P / 4)
    assert record.communication == 0


@pytest.mark.parametrize(
    ("dtype", "optimizer", "state_bytes"),
    [("bf16", "adamw", 12), ("bf16", "sgd", 8), ("fp32", "adamw", 8), ("fp32", "sgd", 4), ("fp64", "adamw", 16)],
)
def test_masters_exist_under_bf16_alone(dtype: str, optimizer: str, state_bytes: int) -> None:
    grad = "fp64" if dtype == "fp64" else "fp32"
    assert state(1, 4, dtype=dtype, grad_dtype=grad, optimizer=optimizer).optimizer == state_bytes * P / 4


def test_saving_communication_holds_whole_tensors_on_top() -> None:
    assert [state(zero, 4, per_microbatch=False).communication / P for zero in range(4)] == [0, 0, 2, 4]
    assert state(3, 1, per_microbatch=False).communication == 0
    assert state(2, 4, grad_dtype="fp32", per_microbatch=False).communication == 4 * P


@given(st.integers(0, 3), st.integers(1, 64), st.integers(1, 10**12))
def test_more_owners_and_higher_stages_never_cost_more(zero: int, owners: int, parameters: int) -> None:
    def total(stage: int, n: int) -> int:
        return state_memory(parameters, zero=stage, owners=n, dtype="bf16", grad_dtype="fp32", optimizer="adamw").total

    assert total(zero, owners + 1) <= total(zero, owners) + 3  # each category rounds
    assert total(min(zero + 1, 3), owners) <= total(zero, owners) + 3


def architecture(preset: str, **fields: Any) -> Architecture:
    return resolve_architecture(ModelSpec(preset=preset, **fields), sequence_length=512, tokenizer_vocab=257)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_rank_holds_the_model(preset: str) -> None:
    a = architecture(preset)
    assert held_parameters(a, 1, 0) == a.num_parameters


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_tied_matrix_counts_once_where_one_rank_has_both_ends(preset: str, tp: int) -> None:
    a = architecture(preset)
    if a.heads % tp:
        return
    for index in range(tp):
        whole = held_parameters(a, tp, index)
        first = held_parameters(a, tp, index, layers=1, head=False)
        middle = held_parameters(a, tp, index, layers=a.layers - 2, embedding=False, head=False)
        last = held_parameters(a, tp, index, layers=1, embedding=False)
        words = (a.vocab * (index + 1) // tp - a.vocab * index // tp) * a.hidden
        assert first + middle + last == whole + (words if a.tied_embeddings else 0)
