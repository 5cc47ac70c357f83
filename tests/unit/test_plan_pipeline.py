"""The pipeline of a plan: where its stages lie, its schedule and its bubble; what its ranks hold."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from shardwright.plan.describe import describe
from shardwright.plan.memory import estimated_memory, parameters_of_rank, parameters_of_stage
from shardwright.plan.pipeline import bubble_in_units, placement_of, schedule_of, stage_costs, totals_of
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.schedule.action import Kind
from shardwright.spec.load import build


def plan(model: dict | None = None, **parallel) -> Plan:
    train = {"sequence_length": 512, "global_batch_size": 8, "micro_batch_size": 1}
    sections = {"model": {"preset": "small-25m"} | (model or {}), "train": train, "parallel": parallel}
    return resolve(build(sections), world_size=None, device="cpu", native_bf16=True, tokenizer_vocab=None)


def test_placement() -> None:
    assert placement_of(plan()) == (0,)
    assert placement_of(plan(pp=2, pipeline_schedule="zbv")) == (0, 1, 1, 0)
    assert placement_of(plan(pp=2, pipeline_schedule="interleaved", virtual_stages=2)) == (0, 1, 0, 1)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"])
def test_schedule_has_transfers_and_is_made_once(name: str) -> None:
    made = plan(pp=2, pipeline_schedule=name)
    schedule = schedule_of(made)
    assert (schedule.name, schedule.num_microbatches, schedule.placement) == (name, 8, placement_of(made))
    assert schedule_of(plan(pp=2, pipeline_schedule=name)) is schedule
    assert any(action.kind is Kind.SEND_OUTPUT for action in schedule.actions[0])
    assert schedule_of(made, 3).num_microbatches == 3


def test_one_stage_is_a_schedule_too() -> None:
    schedule = schedule_of(plan())
    assert {action.kind for actions in schedule.actions for action in actions} == {Kind.FORWARD, Kind.BACKWARD}
    assert totals_of(plan()).bubble == 0


def test_costs_scale_with_the_microbatch() -> None:
    assert len(stage_costs(plan(pp=2))) == 2
    assert stage_costs(plan(pp=2))[0].weight == 5 * 2 * 512 * plan().architecture.layer_matrix_parameters


def test_balanced_stages_come_close_to_equal_ones() -> None:
    equal = bubble_in_units(plan(pp=2))
    assert equal == pytest.approx(1 / 9)
    bubble = totals_of(plan(pp=2)).bubble
    assert equal < bubble < equal + 0.03
    assert bubble < totals_of(plan(pp=2, stages=[4, 4])).bubble


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("tp", [1, 4])
def test_ranks_hold_the_model_together(tied: bool, schedule: str, tp: int) -> None:
    made = plan({"tied_embeddings": tied}, pp=2, pipeline_schedule=schedule, tp=tp)
    held = sum(parameters_of_rank(made, rank) for rank in range(made.world_size))
    a = made.architecture
    norms = (tp - 1) * (2 * a.layers + 1) * a.norm_parameters  # replicated over tp
    twice = a.vocab * a.hidden if tied and schedule == "1f1b" else 0  # zbv has both ends on one rank
    assert held == a.num_parameters + norms + twice


def test_stages_without_ends_hold_layers_alone() -> None:
    made = plan({"tied_embeddings": True, "positions": "learned"}, pp=4)
    a = made.architecture
    first, second, _, last = (parameters_of_stage(made, stage) for stage in range(4))
    assert second == made.layers_per_stage[1] * a.layer_parameters
    assert first == made.layers_per_stage[0] * a.layer_parameters + a.vocab * a.hidden + 512 * a.hidden
    assert last == made.layers_per_stage[3] * a.layer_parameters + a.vocab * a.hidden + a.norm_parameters


def test_estimates_follow_the_coordinate() -> None:
    made = plan(pp=2, tp=2, dp=2)
    a = made.architecture
    by_pp: dict[int, set[int]] = {0: set(), 1: set()}
    for rank in range(made.world_size):
        by_pp[made.topology.coordinate(rank).pp].add(estimated_memory(made, rank).parameters)
    first, last = by_pp[0].pop(), by_pp[1].pop()
    assert by_pp == {0: set(), 1: set()}
    assert first - last == 2 * (2 * (a.layer_matrix_parameters // 2 + 2 * a.hidden) - a.hidden)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"pp": 2, "stages": [4, 4]}, "1f1b over 2 stages of 4 + 4 layers"),
        ({"pp": 8}, "1f1b over 8 stages of 1 layer"),
        ({"pp": 2, "pipeline_schedule": "zbv"}, "zbv over 2 ranks x 2 stages of 2 + 2 + 3 + 1 layers"),
    ],
)
def test_in_words(parallel: dict, said: str) -> None:
    words = dict(describe(plan(**parallel)))["pipeline"]
    assert re.fullmatch(re.escape(said) + r", 8 microbatches: bubble \d+ % estimated", words)
    assert "pipeline" not in dict(describe(plan()))


def test_many_stages_in_words() -> None:
    words = dict(describe(plan({"layers": 34}, pp=17)))["pipeline"]
    assert words.startswith("1f1b over 17 stages of 1 to 3 layers, ")


def test_none_of_it_needs_torch() -> None:
    probe = "import sys, shardwright.plan.memory, shardwright.plan.describe; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "False"
