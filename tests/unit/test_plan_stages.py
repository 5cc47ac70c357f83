"""How the model is cut for the pipeline, and which cuts are refused with which words."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.errors import LayoutError
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.stages import show_stages
from shardwright.spec.load import build


def plan(world_size: int | None = None, layers: int = 6, train: dict[str, Any] | None = None, **parallel) -> Plan:
    model = {"layers": layers, "hidden": 96, "heads": 12}
    spec = build({"model": model, "train": train or {}, "parallel": parallel})
    return resolve(spec, world_size=world_size, device="cpu", native_bf16=True, tokenizer_vocab=257)


def preset(name: str, **parallel) -> Plan:
    train = {"sequence_length": 512, "global_batch_size": 8, "micro_batch_size": 1}
    spec = build({"model": {"preset": name}, "train": train, "parallel": parallel})
    return resolve(spec, world_size=None, device="cpu", native_bf16=True, tokenizer_vocab=None)


def test_balanced_by_cost_and_said_so() -> None:
    made = preset("small-25m", pp=2)
    assert made.layers_per_stage == (5, 3)
    assert made.decisions[-1] == ("parallel.stages = [5, 3]: balanced by cost, the head weighs as much as 1.8 layers")
    assert made.virtual_stages == 1
    assert preset("small-25m").layers_per_stage == (8,)
    assert not any("parallel.stages" in decision for decision in preset("small-25m").decisions)


def test_given_stages_are_taken() -> None:
    made = plan(pp=2, stages=[4, 2])
    assert made.layers_per_stage == (4, 2)
    assert not any("parallel.stages" in decision for decision in made.decisions)


@pytest.mark.parametrize("asked", [1, 2])
def test_zbv_has_two_stages_on_each_rank(asked: int) -> None:
    made = plan(pp=2, pipeline_schedule="zbv", virtual_stages=asked)
    assert (len(made.layers_per_stage), made.virtual_stages) == (4, 2)
    decision = "parallel.virtual_stages = 2: zbv places two stages on each rank"
    assert (decision in made.decisions) == (asked == 1)


def test_interleaved() -> None:
    made = plan(pp=2, pipeline_schedule="interleaved", virtual_stages=3)
    assert (made.layers_per_stage, made.virtual_stages, made.warnings) == ((1,) * 6, 3, ())
    warning = "parallel.virtual_stages = 1: interleaved with one stage on each rank is 1f1b"
    assert plan(pp=2, pipeline_schedule="interleaved").warnings == (warning,)
    assert plan(pipeline_schedule="interleaved").warnings == ()


def test_an_unbalanced_split_is_warned_about() -> None:
    warning = "parallel.stages = [2, 6]: pipeline rank 1 costs 1.55 times what the costliest rank does with [5, 3]"
    assert preset("small-25m", pp=2, stages=[2, 6]).warnings == (warning,)
    assert preset("small-25m", pp=2, stages=[4, 4]).warnings == ()


def test_a_pipeline_across_nodes_is_normal() -> None:
    spec = build({"model": {"layers": 6, "hidden": 96, "heads": 12}, "parallel": {"pp": 4}})
    made = resolve(spec, world_size=4, device="cpu", native_bf16=True, tokenizer_vocab=257, local_size=1)
    assert made.warnings == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pp": 2, "pipeline_schedule": "zbv", "virtual_stages": 3},
            "parallel.virtual_stages: 3, but zbv places two stages on each rank\n"
            '  what works: virtual_stages = 2, or pipeline_schedule = "interleaved"',
        ),
        (
            {"virtual_stages": 2},
            "parallel.virtual_stages: 2, but 1f1b places one stage on each rank\n"
            '  what works: virtual_stages = 1, or pipeline_schedule = "interleaved"',
        ),
        (
            {"pp": 8},
            "parallel.pp: 8 stages are more than model.layers = 6\n"
            "  nearest that works: parallel.pp = 6, or model.layers = 8",
        ),
        (
            {"pp": 8, "world_size": 8},
            "parallel.pp: 8 stages are more than model.layers = 6\n"
            "  nearest that works: parallel.pp = 4, or model.layers = 8",
        ),
        (
            {"pp": 8, "world_size": 8, "train": {"global_batch_size": 3, "micro_batch_size": 3}},
            "parallel.pp: 8 stages are more than model.layers = 6\n"
            "  nearest that works: parallel.pp = 6 in a world of 6, or model.layers = 8",
        ),
        (
            {"pp": 8, "dp": 2, "world_size": 16},
            "parallel.pp: 8 stages are more than model.layers = 6\n"
            "  nearest that works: parallel.pp = 6, or model.layers = 8",
        ),
        (
            {"pp": 4, "pipeline_schedule": "interleaved", "virtual_stages": 3},
            "parallel.virtual_stages: pp x virtual_stages = 4 x 3 = 12 stages are more than model.layers = 6\n"
            "  nearest that works: parallel.pp = 2, or parallel.virtual_stages = 1, or model.layers = 12",
        ),
        (
            {"pp": 4, "pipeline_schedule": "zbv"},
            "parallel.virtual_stages: pp x virtual_stages = 4 x 2 = 8 stages are more than model.layers = 6\n"
            '  nearest that works: parallel.pp = 3, or pipeline_schedule = "zb-h1", or model.layers = 8',
        ),
        (
            {"layers": 1, "pp": 2, "pipeline_schedule": "zbv"},
            "parallel.pp: pp x virtual_stages = 2 x 2 = 4 stages are more than model.layers = 1\n"
            "  nearest that works: model.layers = 4",
        ),
        (
            {"pp": 2, "stages": [2, 2, 2]},
            "parallel.stages: [2, 2, 2] names 3 stages, but pp x virtual_stages = 2\n"
            "  what works: 2 numbers, e.g. stages = [3, 3]",
        ),
        (
            {"pp": 2, "stages": [4, 3]},
            "parallel.stages: [4, 3] adds up to 7, but model.layers = 6\n"
            "  what works: numbers that add up to 6, e.g. stages = [3, 3]",
        ),
        (
            {"pp": 2, "pipeline_schedule": "zbv", "stages": [3, 3]},
            "parallel.stages: [3, 3] names 2 stages, but pp x virtual_stages = 4\n"
            "  what works: 4 numbers, e.g. stages = [2, 1, 2, 1]",
        ),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        plan(**arguments)
    assert str(caught.value) == message


def test_long_splits_are_shown_by_their_runs() -> None:
    assert show_stages([5, 3]) == "[5, 3]"
    assert show_stages([7] + [8] * 15 + [7]) == "[7, 8 (15 times), 7]"
