"""What a plan says that its ranks will send is what they send, row by row, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from layouts import GPT2, LLAMA, QWEN, plan_of
from pool import Place, Pool

from shardwright.comm.whereabouts import Call
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.communication import estimated_communication
from shardwright.plan.plan import Plan
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

pytestmark = pytest.mark.world

KV3 = LLAMA | {"layers": 4, "kv_heads": 3}
KV2 = QWEN | {"layers": 4, "kv_heads": 2}
TIED = GPT2 | {"layers": 4, "tied_embeddings": True}
DEEP = LLAMA | {"layers": 4}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # model, [parallel], [memory], [train]
    "one rank": (LLAMA, {}, {}, {}),
    "zero 0": (LLAMA, {"dp": 4, "dp_shard": 2, "zero": 0}, {}, {"micro_batch_size": 1}),
    "zero 1": (TIED, {"dp": 4, "dp_shard": 2, "zero": 1}, {}, {"micro_batch_size": 1}),
    "zero 2": (LLAMA, {"dp": 3, "zero": 2}, {}, {}),
    "zero 2 once": (LLAMA, {"dp": 2, "zero": 2, "zero_pipeline": "save_communication"}, {}, {}),
    "zero 3": (LLAMA, {"dp": 4, "dp_shard": 2, "zero": 3}, {}, {"micro_batch_size": 1}),
    "zero 3 tied": (TIED, {"dp": 2, "zero": 3}, {}, {}),
    "zero 3 once": (TIED, {"dp": 2, "zero": 3, "zero_pipeline": "save_communication"}, {}, {}),
    "tp 2": (GPT2, {"tp": 2}, {}, {}),
    "tp 4, fewer kv heads": (KV3, {"tp": 4}, {}, {}),
    "tp 2, all-reduce form": (GPT2, {"tp": 2, "sequence_parallel": False}, {}, {}),
    "tp 4, norms of heads": (KV2, {"tp": 4, "sequence_parallel": False}, {}, {}),
    "1f1b, tied": (TIED, {"pp": 2, "dp": 2, "zero": 3}, {}, {}),
    "gpipe": (DEEP, {"pp": 2, "dp": 2, "zero": 3, "pipeline_schedule": "gpipe"}, {}, {}),
    "zb-h1": (DEEP, {"pp": 2, "dp": 2, "zero": 2, "pipeline_schedule": "zb-h1"}, {}, {}),
    "interleaved": (TIED, {"pp": 2, "tp": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}, {}, {}),
    "zbv, tied": (TIED, {"pp": 2, "dp": 2, "zero": 3, "pipeline_schedule": "zbv"}, {}, {}),
    "zbv, tied, zero 2": (TIED, {"pp": 2, "dp": 2, "zero": 2, "pipeline_schedule": "zbv"}, {}, {}),
    "zbv, tied, once": (
        TIED,
        {"pp": 2, "dp": 2, "zero": 3, "pipeline_schedule": "zbv", "zero_pipeline": "save_communication"},
        {},
        {},
    ),
    "pp 4, one microbatch": (DEEP, {"pp": 4, "zero": 3}, {}, {"micro_batch_size": 12}),
    "zero 3, one microbatch": (DEEP, {"pp": 2, "dp": 2, "zero": 3}, {}, {"micro_batch_size": 6}),
    "recompute full": (KV3, {"tp": 2, "dp": 2, "zero": 3}, {"recompute": "full"}, {}),
    "recompute full, some": (
        GPT2 | {"layers": 4},
        {"tp": 2, "pp": 2},
        {"recompute": "full", "recompute_layers": [1, 2]},
        {},
    ),
    "recompute full, all-reduce form": (KV3, {"tp": 2, "sequence_parallel": False}, {"recompute": "full"}, {}),
    "recompute selective": (KV2, {"tp": 4}, {"recompute": "selective"}, {}),
    "offload state": (DEEP, {"dp": 2, "tp": 2, "zero": 1}, {"offload": "state"}, {}),
    "offload update": (TIED, {"dp": 2, "pp": 2, "zero": 2}, {"offload": "update"}, {"dtype": "bf16"}),
    "bf16": (QWEN, {"dp": 2, "tp": 2, "zero": 3}, {}, {"dtype": "bf16", "grad_dtype": "bf16"}),
    "fp32 gradients": (GPT2, {"dp": 2, "tp": 2, "zero": 2}, {}, {"dtype": "bf16", "grad_dtype": "fp32"}),
}


Rows = list[dict[str, str | int]]


def measured(place: Place, plan: Plan, fault: Callable[[Runtime, pytest.MonkeyPatch], None] | None = None) -> Rows:
    """In a rank: the ledger of one step. Under offload of the second one, in which the first's update is published."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(runtime, patch)
        for step in range(1 if plan.spec.memory.offload == "none" else 2):
            mesh.ledger.clear()
            train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-3)
    return mesh.ledger.as_records()


def estimated(plan: Plan, rank: int) -> Rows:
    return [record.as_row() for record in estimated_communication(plan, rank)]


def plan_for(name: str) -> Plan:
    model, parallel, memory, train = LAYOUTS[name]
    return plan_of(model, {"dp": 1} | parallel, memory, **train)


@pytest.mark.parametrize("name", LAYOUTS)
def test_estimated_rows_are_the_measured_rows(pool: Pool, name: str) -> None:
    plan = plan_for(name)
    for rank, found in enumerate(pool.run(plan.world_size, measured, plan)):
        assert estimated(plan, rank) == found
        assert bool(found) == (plan.world_size > 1)


def test_words_in_chunks(pool: Pool) -> None:
    model = LLAMA | {"layers": 1, "hidden": 12, "heads": 2, "head_dim": 6, "vocab": 40_000}
    plan = plan_of(model, {"dp": 1, "tp": 2}, sequence_length=40, global_batch_size=8, micro_batch_size=4)
    for rank, found in enumerate(pool.run(2, measured, plan)):
        assert estimated(plan, rank) == found
        assert next(row["calls"] for row in found if row["reason"] == "tensor/loss") == 2 * 2


# What is broken on purpose is seen


def releases_the_last_block(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The head is gathered for its backward again, though that follows its forward at once."""
    forward = runtime.states.forward
    patch.setattr(runtime.states, "forward", lambda stage, *, stays=False: forward(stage))


def counts_twice(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Gathers of activations are counted twice as large."""
    count = runtime.mesh.ledger.count

    def doubled(verb: str, axis: str, reason: str, sent: int) -> Call:
        return count(verb, axis, reason, 2 * sent if reason == "tensor/colwise" else sent)

    patch.setattr(runtime.mesh.ledger, "count", doubled)


def sums_too_little(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """One gradient that is a part of a sum stays one."""
    for unit in runtime.states.units:
        begin, end = unit.layout.partial
        patch.setitem(vars(unit.layout), "partial", (begin, max(begin, end - 1)))


@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("zero 3", releases_the_last_block, "zero/gather"),
        ("tp 2", counts_twice, "tensor/colwise"),
        ("tp 2", sums_too_little, "tensor/replicated"),
    ],
)
def test_a_step_that_sends_something_else_is_seen(pool: Pool, name: str, fault: Any, reason: str) -> None:
    plan = plan_for(name)
    for rank, found in enumerate(pool.run(plan.world_size, measured, plan, fault)):
        differing = [row["reason"] for row, other in zip(found, estimated(plan, rank), strict=True) if row != other]
        assert differing == [reason]
