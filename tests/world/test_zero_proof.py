"""Every ZeRO stage on every replicate x shard split computes what one device computes, tensor by tensor."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import SPLITS, TINY, Place, Pool, tiny_plan

from shardwright.data.batch import IGNORED
from shardwright.plan.plan import Plan
from shardwright.verify.compare import BARS, KINDS, Comparison, compare
from shardwright.verify.proof import prove
from shardwright.verify.reference import trace_one_device
from shardwright.verify.trace import Trace, read_traces, samples_for, trace_layout, write_trace

pytestmark = pytest.mark.world

STEPS = 2
NORM_BARS = {"fp64": 1e-12, "fp32": 1e-6}
SGD = {"dtype": "fp32", "optimizer": "sgd"}
LAYERNORM = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tied_embeddings": True},
    "gpt2": LAYERNORM | {"tied_embeddings": True, "kv_heads": 2},
    "qwen": {"qk_norm": True, "qkv_bias": True, "head_dim": 6},
    "odd": {"hidden": 20, "ffn": 27, "vocab": 61, "head_dim": 10},
    "llama": {"rope_scaling": {"factor": 8.0, "original_max_positions": 4}, "layers": 3},
}
"""Fields over TINY; "odd" has sizes at which owned ranges end inside matrices' rows."""


def write(place: Place, plan: Plan, folder: Path) -> None:
    """In a rank: trace a plan and write what the rank owns."""
    mesh = place.mesh(plan.topology)
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, STEPS))


@cache
def reference(dtype: str, variant: str = "") -> Trace:
    """One device's trace; it depends on nothing that is laid out."""
    model = VARIANTS[variant] if variant else {}
    return trace_one_device(tiny_plan(model=TINY | model, train=SGD if dtype == "fp32" else {}), STEPS)


def traces_of(pool: Pool, plan: Plan, folder: Path) -> list[Trace]:
    pool.run(plan.world_size, write, plan, folder)
    return read_traces(folder, plan.world_size)


def check(pool: Pool, plan: Plan, expected: Trace, folder: Path) -> Comparison:
    """Losses, gradients and parameters of every step under the dtype's bar, and gradient norms on every rank."""
    traces, bar = traces_of(pool, plan, folder), BARS[plan.dtype]
    found = compare(traces, expected, plan, STEPS, {kind: bar for kind in KINDS})
    assert found.missing is None
    assert found.first_difference is None, found.first_difference
    assert found.parameters is not None
    assert max(found.loss, found.gradients, found.parameters) <= bar
    for trace in traces:
        assert trace.norms == pytest.approx(expected.norms, rel=NORM_BARS[plan.dtype], abs=0)
        assert trace.norms == traces[0].norms and trace.losses == traces[0].losses  # bitwise: ranks decide alike
    return found


def layouts() -> list[Any]:
    """(zero, replicate, shard, microbatches, zero_pipeline) of the whole matrix."""
    rows = []
    for zero in range(4):
        for replicate, shard in SPLITS:
            for count in (1, 2, 3):
                pipelines = ["save_memory", "save_communication"] if zero >= 2 and count > 1 else ["save_memory"]
                rows += [(zero, replicate, shard, count, pipeline) for pipeline in pipelines]
    return [pytest.param(*row, id="zero{}-{}x{}-{}mb-{}".format(*row)) for row in rows]


@pytest.mark.parametrize(("zero", "replicate", "shard", "count", "pipeline"), layouts())
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_a_layout_computes_what_one_device_computes(
    pool: Pool, tmp_path: Path, dtype: str, zero: int, replicate: int, shard: int, count: int, pipeline: str
) -> None:
    parallel = {"zero": zero, "zero_pipeline": pipeline}
    plan = tiny_plan(replicate, shard, count, parallel=parallel, train=SGD if dtype == "fp32" else {})
    assert plan.num_microbatches == count
    check(pool, plan, reference(dtype), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("zero", "replicate", "shard", "count"), [(1, 2, 2, 1), (2, 1, 3, 3), (3, 1, 4, 2), (3, 2, 2, 1)]
)
def test_every_kind_of_architecture(
    pool: Pool, tmp_path: Path, variant: str, zero: int, replicate: int, shard: int, count: int
) -> None:
    plan = tiny_plan(replicate, shard, count, parallel={"zero": zero}, model=TINY | VARIANTS[variant])
    check(pool, plan, reference("fp64", variant), tmp_path)


def test_owned_ranges_cut_through_rows(pool: Pool, tmp_path: Path) -> None:
    plan = tiny_plan(1, 3, parallel={"zero": 3}, model=TINY | VARIANTS["odd"])
    traces = traces_of(pool, plan, tmp_path)
    boxes = [part.box for part in traces[0].parts if len(part.box.tensor.shape) == 2]
    assert any(box.size[1] < box.tensor.shape[1] for box in boxes)


@pytest.mark.parametrize("order", ["shard,tp,pp,replicate", "tp,shard,replicate,pp"])
@pytest.mark.parametrize("zero", [1, 3])
def test_ranks_numbered_in_another_order(pool: Pool, tmp_path: Path, order: str, zero: int) -> None:
    plan = tiny_plan(2, 2, 2, parallel={"zero": zero, "order": order})
    assert plan.topology.group(("shard",), 0) == (0, 2)
    check(pool, plan, reference("fp64"), tmp_path)


def test_samples_have_unequal_numbers_of_targets_and_clipping_bites() -> None:
    trace, plan = reference("fp64"), tiny_plan()
    assert min(trace.norms) > 2 * plan.spec.train.max_grad_norm
    targets = samples_for(plan).at(range(plan.spec.train.global_batch_size)).targets
    per_rank = [(targets[i : i + 18] != IGNORED).sum() for i in range(0, 72, 18)]
    assert len(set(per_rank)) > 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e3])
def test_gradients_under_the_limit_are_not_scaled(
    pool: Pool, tmp_path: Path, max_grad_norm: float, optimizer: str
) -> None:
    train = {"max_grad_norm": max_grad_norm, "optimizer": optimizer, "global_batch_size": 12}
    plan = tiny_plan(1, 2, 2, parallel={"zero": 2}, train=train)
    check(pool, plan, trace_one_device(plan, STEPS), tmp_path)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_prove_passes_in_each_precision(pool: Pool, tmp_path: Path, dtype: str) -> None:
    train = {"dtype": dtype, "global_batch_size": 12}
    plan = tiny_plan(1, 2, 2, parallel={"zero": 2}, train=train)
    proof = prove(plan, traces_of(pool, plan, tmp_path), STEPS)
    assert proof.passed, proof.as_json()
    document = proof.as_json()
    json.dumps(document, allow_nan=False)
    assert document["passed"] is True and document["dtype"] == dtype and document["steps"] == STEPS
    assert document["optimizer"] == "adamw" and document["missing"] is None and document["first_difference"] is None
    assert 0 < document["noise"] < document["bar"]
    assert document["loss"]["max_error"] <= document["loss"]["bar"]
    # Adam turns rounding into moves of the size of the learning rate: only fp64 compares parameters under it.
    assert (document["parameters"]["max_error"] is None) == (dtype != "fp64")


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = tiny_plan(train={"global_batch_size": 4})
    trace = trace_one_device(plan, 1)
    write_trace(tmp_path, 0, trace)
    (again,) = read_traces(tmp_path, 1)
    assert (again.losses, again.norms) == (trace.losses, trace.norms)
    for part, same in zip(trace.parts, again.parts, strict=True):
        assert (part.step, part.kind, part.rank, str(part.box)) == (same.step, same.kind, same.rank, str(same.box))
        assert torch.equal(part.values, same.values)
