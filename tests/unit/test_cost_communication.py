"""What ranks will send, in closed form: the literature's volumes, the schedules' order, and large plans at once."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cost.communication import Tally, axis_name
from shardwright.cost.units import UnitSize
from shardwright.layout.box import Box, Fill, GlobalTensor, Piece
from shardwright.layout.flat import FlatLayout, Member
from shardwright.layout.mesh import AXES, DATA_AXES, Topology
from shardwright.plan.communication import (
    GROUPS,
    busiest_rank,
    different_ranks,
    estimated_communication,
    group_of,
    most_by_group,
    shares,
    total_sent,
)
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.units import representative
from shardwright.plan.world import crosses_nodes
from shardwright.record.communication import CommunicationRecord
from shardwright.record.records import Origin
from shardwright.schedule.action import Kind
from shardwright.schedule.bounds import backwards_at_once
from shardwright.schedule.build import NAMES, REQUIRED_VIRTUAL_STAGES, build
from shardwright.spec.load import build as build_spec

# Every length divides by 16 x the ranks, so that no buffer has padding.
MODEL = {"layers": 4, "hidden": 256, "heads": 8, "ffn": 512, "vocab": 512, "norm": "rmsnorm"}


def plan_of(parallel: dict[str, Any], model: dict[str, Any] = MODEL, memory: Any = None, **train: Any) -> Plan:
    recipe = {"sequence_length": 64, "global_batch_size": 16, "micro_batch_size": 1, "dtype": "bf16"}
    sections = {"model": model, "train": recipe | train, "parallel": {"dp": 1} | parallel, "memory": memory or {}}
    return resolve(build_spec(sections), world_size=None, device="cuda", native_bf16=True, tokenizer_vocab=None)


def sent(plan: Plan, prefix: str, rank: int = 0) -> int:
    return total_sent(r for r in estimated_communication(plan, rank) if r.reason.startswith(prefix))


# The literature's volumes


def test_a_data_parallel_step_sends_the_gradients_twice() -> None:
    plan = plan_of({"dp": 4, "zero": 0}, grad_dtype="bf16")
    assert sent(plan, "data/reduce") == 2 * 2 * plan.architecture.num_parameters * 3 // 4


@pytest.mark.parametrize(("zero", "volume"), [(1, 2), (2, 2), (3, 3)])
def test_zero_3_sends_half_as_much_again(zero: int, volume: int) -> None:
    """Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the parameters, with one microbatch."""
    plan = plan_of({"dp": 4, "zero": zero}, global_batch_size=4, grad_dtype="bf16")
    # The head's parameters stay whole between its forward and its backward.
    head = (MODEL["hidden"] * (MODEL["vocab"] + 1)) if zero == 3 else 0
    assert sent(plan, "zero/") == 2 * (volume * plan.architecture.num_parameters - head) * 3 // 4


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_layer_sums_its_activations_four_times(sequence_parallel: bool) -> None:
    """Shoeybi et al. 2019: two all-reduces forward and two backward; Korthikanti et al. 2022: the same bytes."""
    deep, shallow = (
        plan_of({"tp": 4, "sequence_parallel": sequence_parallel}, MODEL | {"layers": layers}) for layers in (3, 2)
    )
    all_reduce = 2 * 3 * (64 * 256 * 2) // 4
    # Sharded gradients of what each rank has whole are summed too, here two norms.
    replicated = sent(deep, "tensor/replicated") - sent(shallow, "tensor/replicated")
    assert sent(deep, "tensor/") - sent(shallow, "tensor/") == 16 * 4 * all_reduce + replicated
    assert (replicated > 0) == sequence_parallel


@pytest.mark.parametrize(("setting", "more"), [("none", {}), ("selective", {"tensor/colwise/again": 8})])
def test_recomputation_gathers_again(setting: str, more: dict[str, int]) -> None:
    plan = plan_of({"tp": 2}, memory={"recompute": setting})
    calls = {r.reason: r.calls // 16 for r in estimated_communication(plan, 0)}
    assert {reason: n for reason, n in calls.items() if "again" in reason} == more
    assert (calls["tensor/colwise"], calls["tensor/rowwise"]) == (8, 8)


def test_a_full_recomputation_ends_before_the_last_sum() -> None:
    plan = plan_of({"tp": 2}, memory={"recompute": "full", "recompute_layers": [0, 3]})
    calls = {r.reason: r.calls // 16 for r in estimated_communication(plan, 0)}
    assert (calls["tensor/colwise"], calls["tensor/rowwise"], calls["tensor/colwise/backward"]) == (12, 10, 8)


@pytest.mark.parametrize("offload", ["state", "update"])
def test_offload_changes_nothing(offload: str) -> None:
    parallel = {"dp": 2, "tp": 2, "pp": 2, "zero": 2}
    with_offload = plan_of(parallel, memory={"offload": offload, "host_limit": "1 TiB"})
    assert estimated_communication(with_offload, 3) == estimated_communication(plan_of(parallel), 3)


def test_a_group_of_one_rank_sends_nothing() -> None:
    assert estimated_communication(plan_of({"zero": 3}), 0) == ()


# Sizes


def test_only_axes_of_several_ranks_count() -> None:
    tally = Tally(Topology(shard=3, tp=2))
    tally.all_reduce(8, ("replicate",), "a")
    tally.all_gather(8, (), "b")
    tally.send(8, "c")
    assert tally.rows == {}
    tally.all_reduce(8, ("tp", "shard"), "d", calls=0)
    assert tally.rows == {}
    tally.all_reduce(8, ("shard",), "e", calls=3)  # every call rounds down alone
    tally.all_reduce(8, ("shard",), "e")
    assert tally.rows == {("all_reduce", "shard", "e"): (4, 4 * 10)}


def test_axes_are_called_as_the_mesh_calls_them() -> None:
    assert [axis_name(axes) for axes in (("tp",), DATA_AXES, AXES)] == ["tp", "replicatexshard", "world"]


@given(
    st.lists(st.integers(1, 70), max_size=4),
    st.lists(st.integers(1, 70), max_size=4),
    st.lists(st.integers(1, 70), max_size=4),
    st.integers(1, 5),
)
def test_units_are_as_long_as_their_layout(matrices: list[int], parts: list[int], rest: list[int], n: int) -> None:
    def member(size: int, dims: int, partial: bool = False) -> Member:
        shape = (size,) if dims == 1 else (size, 1)
        box = Box(GlobalTensor("w", shape, Fill.ZEROS, 0.0), (0,) * dims, shape)
        return Member(shape, (Piece(box, 0),), partial)

    members = [member(size, 1) for size in rest] + [member(size, 1, True) for size in parts]
    layout = FlatLayout.of([*members, *(member(size, 2) for size in matrices)], n)
    unit = UnitSize.of([*matrices, *parts, *rest], n, parts)
    assert (unit.length, unit.partial) == (layout.length, layout.partial[1] - layout.partial[0])


# The order of actions


@pytest.mark.parametrize("name", NAMES)
def test_backwards_at_once_are_those_of_the_schedule(name: str) -> None:
    for ranks in range(1, 6):
        for virtual in (1, 2, 3):
            if REQUIRED_VIRTUAL_STAGES[name] not in (None, virtual):
                continue
            for microbatches in (*range(1, 14), 23):
                schedule = build(name, ranks, virtual, microbatches)
                for rank, actions in enumerate(schedule.actions):
                    at_once = [
                        first.stage
                        for first, second in pairwise(actions)
                        if first.kind is Kind.FORWARD
                        and second.kind in (Kind.BACKWARD, Kind.INPUT)
                        and (first.stage, first.microbatch) == (second.stage, second.microbatch)
                    ]
                    last = max(s for s, place in enumerate(schedule.placement) if place == rank)
                    assert set(at_once) <= {last}
                    assert len(at_once) == backwards_at_once(name, ranks, virtual, microbatches, rank)


# Many ranks


def test_ranks_that_are_alike_are_worked_out_once() -> None:
    plan = plan_of({"dp": 4, "tp": 4, "pp": 2, "zero": 3}, MODEL | {"vocab": 509, "heads": 8, "kv_heads": 2})
    kinds = different_ranks(plan)
    # 127, 127, 127 and 128 words
    assert [representative(plan, tp) for tp in range(4)] == [0, 0, 0, 3]
    assert len(kinds) == 2 * 2
    found = {total_sent(estimated_communication(plan, rank)) for rank in range(plan.world_size)}
    assert found == {total_sent(estimated_communication(plan, rank)) for rank in kinds}
    assert total_sent(estimated_communication(plan, busiest_rank(plan))) == max(found)


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zbv", 2)])
def test_sixteen_thousand_ranks_take_no_time(schedule: str, virtual: int) -> None:
    parallel = {"dp": 32, "tp": 8, "pp": 64, "zero": 3, "pipeline_schedule": schedule, "virtual_stages": virtual}
    model = MODEL | {"layers": 128, "hidden": 16384, "heads": 128, "ffn": 53248, "vocab": 128256}
    plan = plan_of(parallel, model, global_batch_size=32 * 512)
    assert (plan.world_size, plan.num_microbatches) == (16384, 512)
    begin = time.process_time()
    rows = most_by_group(plan, 8)
    assert time.process_time() - begin < 0.2
    assert {row.group for row in rows} == set(GROUPS)
    crossing = {row.axis: row.crosses_nodes for row in rows}
    assert crossing == {"shard": True, "tp": False, "pp": True, "replicatexshard": True, "world": True}


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.permutations(AXES), st.integers(1, 9)
)
def test_groups_cross_nodes_as_their_ranks_do(
    replicate: int, pp: int, shard: int, tp: int, order: list[str], local: int
) -> None:
    topology = Topology(replicate, pp, shard, tp, tuple(order))
    for axes in (*((axis,) for axis in AXES), DATA_AXES, AXES, ()):
        groups = [topology.group(axes, rank) for rank in range(topology.world_size)]
        assert crosses_nodes(topology, axes, local) == any(len({r // local for r in group}) > 1 for group in groups)


# For people


def test_shares_add_up_to_a_ranks_rows() -> None:
    plan = plan_of({"dp": 4, "dp_shard": 2, "tp": 2, "pp": 2, "zero": 2})
    records = estimated_communication(plan, 1)
    rows = shares(records, plan.topology, 4)
    assert sum(row.sent for row in rows) == total_sent(records)
    assert sum(row.calls for row in rows) == sum(record.calls for record in records)
    assert [(row.group, row.axis, row.crosses_nodes) for row in rows] == [
        ("gradients", "shard", False),  # of every microbatch
        ("gradients", "replicate", True),
        ("parameters", "shard", False),
        ("tensor parallelism", "tp", False),
        ("pipeline", "pp", True),
        ("other", "world", True),
        ("other", "replicatexshard", True),
    ]
    assert {row.crosses_nodes for row in shares(records, plan.topology)} == {None}


def test_the_most_of_each_group_is_the_busiest_ranks() -> None:
    plan = plan_of({"dp": 2, "pp": 4, "zero": 1}, MODEL | {"vocab": 50_000})
    for row in most_by_group(plan):
        records = [estimated_communication(plan, rank) for rank in range(plan.world_size)]
        of_ranks = [
            sum(r.sent for r in own if (group_of(r.reason), r.axis) == (row.group, row.axis)) for own in records
        ]
        assert row.sent == max(of_ranks) == of_ranks[row.rank]


def test_a_record_is_its_ledgers_row() -> None:
    record = estimated_communication(plan_of({"dp": 2}), 1)[0]
    assert (record.origin, record.rank) == (Origin.ESTIMATED, 1)
    row = {"verb": "all_gather", "axis": "shard", "reason": "zero/publish", "calls": 6, "sent_bytes": record.sent}
    assert record.as_row() == row
    assert CommunicationRecord.of_row(row, 1, Origin.ESTIMATED) == record
    assert CommunicationRecord.of_row(row, 1).origin is Origin.MEASURED
