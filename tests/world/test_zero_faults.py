"""Broken on purpose: the comparison sees every fault a thousandfold over its bar, and the pool tells whose it is."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pool import Place, Pool, RankFailed, tiny_plan

from shardwright.comm.cause import Kind
from shardwright.comm.collectives import DONE, Handle, barrier
from shardwright.comm.job import Job
from shardwright.errors import RunError
from shardwright.layout.mesh import Topology
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.zero import unit as units
from shardwright.parallel.zero.unit import Unit
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json
from shardwright.train import step as stepping
from shardwright.verify import run as verifying
from shardwright.verify.compare import BARS, KINDS, Comparison, compare
from shardwright.verify.reference import trace_one_device
from shardwright.verify.run import verify
from shardwright.verify.trace import Trace, read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

STEPS = 3
A_THOUSANDFOLD = 1000 * BARS["fp64"]


def named(runtime: Runtime, name: str) -> Unit:
    return next(unit for unit in runtime.states.units if unit.name == name)


def without(verb: str, method: str, name: str, runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """One unit's method no longer calls one verb."""
    unit = named(runtime, name)
    original = getattr(unit, method)

    def skipping(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(units, verb, lambda *_, **__: DONE)
            original(*arguments)

    patch.setattr(unit, method, skipping)


def scale_times_microbatches(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    run = runtime.pipeline.run
    patch.setattr(runtime.pipeline, "run", lambda microbatches, scale: run(microbatches, scale * len(microbatches)))


def gradients_scaled_and_loss_right(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    run = runtime.pipeline.run
    patch.setattr(runtime.pipeline, "run", lambda microbatches, scale: run(microbatches, scale / 2) * 2)


def tokens_counted_on_one_rank(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    reduce = stepping.all_reduce
    patch.setattr(
        stepping, "all_reduce", lambda t, a, *, reason: DONE if "count" in reason else reduce(t, a, reason=reason)
    )


def all_ranks_read_the_same_sequences(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(runtime.mesh.topology), "data_index", lambda _self, _rank: 0)


def reduction_skipped(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    without("reduce_scatter", "reduce", "layers.1", runtime, patch)


def copies_not_summed(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    without("all_reduce", "finish_scatter", "layers.0", runtime, patch)


def one_microbatch_reduced_alone(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """ZeRO-2 forgets what earlier microbatches brought to the owner."""
    unit = named(runtime, "head")
    original = unit.finish_scatter

    def forgetting() -> None:
        unit._owned_written = False
        original()

    patch.setattr(unit, "finish_scatter", forgetting)


def accumulation_overwrites(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    unit = named(runtime, "layers.1")
    original = unit.accumulate

    def overwriting(index: int, *arguments: Any) -> None:
        unit._written[index] = False
        original(index, *arguments)

    patch.setattr(unit, "accumulate", overwriting)


def last_gradients_kept(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """A step adds to the gradients of the step before."""
    patch.setattr(named(runtime, "layers.1"), "begin_step", lambda: None)


def not_published(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    without("all_gather", "publish", "layers.0", runtime, patch)


def never_released(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 keeps the parameters that it gathered before the update."""
    patch.setattr(named(runtime, "layers.0"), "release", lambda: None)


def no_fault(_runtime: Runtime, _patch: pytest.MonkeyPatch) -> None:
    pass


def norm_of_one_rank(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    reduce = stepping.all_reduce

    class Kept:
        def __init__(self, handle: Handle, scalars: Any) -> None:
            self.handle, self.scalars, self.own = handle, scalars, scalars[1].clone()

        def wait(self) -> None:
            self.handle.wait()
            self.scalars[1] = self.own

    def forgetful(tensor: Any, axis: Any, *, reason: str) -> Handle:
        if reason != "health":
            return reduce(tensor, axis, reason=reason)
        own = Kept(DONE, tensor)
        own.handle = reduce(tensor, axis, reason=reason)
        return own

    patch.setattr(stepping, "all_reduce", forgetful)


def copies_counted_twice(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    unit = named(runtime, "layers.1")
    patch.setattr(unit, "counted_gradient", lambda: [unit.owned_gradient])


def padding_counted(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Something is left in the padding, and the norm sees it."""
    for unit in runtime.states.units:
        original = unit.finish_reduction

        def dirty(unit: Unit = unit, original: Callable[[], None] = original) -> None:
            original()
            for begin, end in unit.layout.gaps:
                unit.owned_gradient[max(0, begin - unit.begin) : max(0, end - unit.begin)] = 0.01

        patch.setattr(unit, "finish_reduction", dirty)


def everything_decays(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    for unit in runtime.states.units:
        patch.setitem(vars(unit.layout), "decayed", unit.layout.length)


@dataclass(frozen=True)
class Case:
    """A fault, the layout that shows it, and where the comparison has to see it first."""

    fault: Callable[[Runtime, pytest.MonkeyPatch], None]
    zero: int
    split: tuple[int, int]
    kind: str
    name: str
    step: int = 1
    num_microbatches: int = 2
    loss_differs: bool = False


EMBEDDING, FIRST, SECOND, HEAD = "embedding.", "layers.0.", "layers.1.", "head."
CASES = [
    Case(scale_times_microbatches, 1, (1, 2), "gradients", EMBEDDING, loss_differs=True),
    Case(gradients_scaled_and_loss_right, 1, (1, 2), "gradients", EMBEDDING),
    Case(tokens_counted_on_one_rank, 1, (1, 2), "gradients", EMBEDDING, loss_differs=True),
    Case(all_ranks_read_the_same_sequences, 3, (1, 2), "gradients", EMBEDDING, loss_differs=True),
    Case(reduction_skipped, 1, (1, 2), "gradients", SECOND),
    Case(reduction_skipped, 2, (1, 3), "gradients", SECOND),
    Case(reduction_skipped, 3, (2, 2), "gradients", SECOND),
    Case(copies_not_summed, 0, (2, 1), "gradients", FIRST),
    Case(copies_not_summed, 1, (2, 2), "gradients", FIRST),
    Case(copies_not_summed, 3, (2, 2), "gradients", FIRST),
    Case(one_microbatch_reduced_alone, 2, (1, 2), "gradients", HEAD),
    Case(one_microbatch_reduced_alone, 3, (1, 2), "gradients", HEAD),
    Case(accumulation_overwrites, 0, (2, 1), "gradients", SECOND),
    Case(accumulation_overwrites, 1, (1, 2), "gradients", SECOND),
    Case(last_gradients_kept, 0, (2, 1), "gradients", SECOND, step=2),
    Case(last_gradients_kept, 1, (1, 2), "gradients", SECOND, step=2),
    # Masters are right: the next step's gradients tell.
    Case(not_published, 1, (1, 2), "gradients", EMBEDDING, step=2, loss_differs=True),
    Case(not_published, 2, (2, 2), "gradients", EMBEDDING, step=2, loss_differs=True),
    Case(never_released, 3, (1, 2), "gradients", EMBEDDING, step=2, loss_differs=True),
    Case(norm_of_one_rank, 1, (1, 2), "parameters", EMBEDDING),
    Case(norm_of_one_rank, 0, (2, 1), "parameters", EMBEDDING),
    Case(copies_counted_twice, 0, (2, 1), "parameters", EMBEDDING),
    Case(copies_counted_twice, 3, (2, 2), "parameters", EMBEDDING),
    Case(padding_counted, 2, (1, 3), "parameters", EMBEDDING),
    Case(everything_decays, 1, (1, 2), "parameters", "layers.0.attention_norm.weight"),
]


def write_broken(place: Place, plan: Plan, fault: Callable[[Runtime, pytest.MonkeyPatch], None], folder: Path) -> None:
    """In a rank: break the composed engine, then trace it."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    with pytest.MonkeyPatch.context() as patch:
        fault(runtime, patch)
        trace = trace_layout(plan, mesh, STEPS, runtime)
    write_trace(folder, mesh.rank, trace)


def fault_plan(case: Case, **train: Any) -> Plan:
    sections = {"train": {"optimizer": "sgd", "global_batch_size": 24, **train}, "parallel": {"zero": case.zero}}
    return tiny_plan(*case.split, case.num_microbatches, **sections)


@cache
def reference() -> Trace:
    return trace_one_device(fault_plan(CASES[0]), STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.fault.__name__}-zero{c.zero}-{c.split[0]}x{c.split[1]}")
def test_a_fault_is_seen_a_thousandfold_where_it_is(pool: Pool, tmp_path: Path, case: Case) -> None:
    plan = fault_plan(case)
    pool.run(plan.world_size, write_broken, plan, case.fault, tmp_path)
    traces = read_traces(tmp_path, plan.world_size)
    found = compare(traces, reference(), plan, STEPS, {kind: BARS["fp64"] for kind in KINDS})
    assert largest(found) > A_THOUSANDFOLD, found
    first = found.first_difference
    assert first is not None
    assert (first.kind, first.step) == (case.kind, case.step), first
    assert first.name.startswith(case.name), first
    assert first.error > A_THOUSANDFOLD
    assert (found.loss > A_THOUSANDFOLD) or not case.loss_differs
    if case.kind == "parameters":
        assert found.parameters is not None and found.parameters >= first.error


def largest(found: Comparison) -> float:
    return max(found.loss, found.gradients, found.parameters or 0.0)


def test_without_a_fault_the_same_comparison_is_silent(pool: Pool, tmp_path: Path) -> None:
    found = compare(traces_with(pool, tmp_path), reference(), CONTROL, STEPS, FP64_BARS)
    assert largest(found) < BARS["fp64"] and found.first_difference is None and found.missing is None


CONTROL = fault_plan(Case(no_fault, 3, (1, 2), "", ""))
FP64_BARS = {kind: BARS["fp64"] for kind in KINDS}


def traces_with(pool: Pool, folder: Path) -> list[Trace]:
    pool.run(CONTROL.world_size, write_broken, CONTROL, no_fault, folder)
    return read_traces(folder, CONTROL.world_size)


def test_a_difference_says_where_it_is(pool: Pool, tmp_path: Path) -> None:
    traces = traces_with(pool, tmp_path)
    found = [i for i, p in enumerate(traces[1].parts) if (p.step, p.kind) == (2, "gradients") and p.values.dim() == 2]
    part = traces[1].parts[index := found[-1]]
    assert part.box.name.startswith("head.")
    broken = part.values.clone()
    broken[0, -1] += 1.0
    traces[1].parts[index] = replace(part, values=broken)
    first = compare(traces, reference(), CONTROL, STEPS, FP64_BARS).first_difference
    assert first is not None
    assert (first.step, first.kind, first.name, first.owner) == (2, "gradients", part.box.name, 1)
    assert first.box == str(part.box)
    assert first.element == (part.box.offset[0], part.box.offset[1] + part.box.size[1] - 1)
    assert first.value == float(broken[0, -1]) and first.expected == pytest.approx(float(part.values[0, -1]), rel=1e-9)


def test_an_element_that_nobody_owns_is_missed(pool: Pool, tmp_path: Path) -> None:
    traces = traces_with(pool, tmp_path)
    dropped = traces[0].parts.pop()
    found = compare(traces, reference(), CONTROL, STEPS, FP64_BARS)
    assert found.missing == f"{dropped.kind} of {dropped.box.name}: some elements have no owner"
    assert found.parameters == math.inf


def test_what_is_not_a_number_is_a_difference(pool: Pool, tmp_path: Path) -> None:
    traces = traces_with(pool, tmp_path)
    traces[0].parts[0].values.flatten()[-1] = math.nan
    traces[1].losses[2] = math.nan
    found = compare(traces, reference(), CONTROL, STEPS, FP64_BARS)
    assert found.gradients == math.inf and found.loss == math.inf
    assert found.first_difference is not None and found.first_difference.owner == 0


# `verify` itself: the launcher is replaced by the pool, the rest is what the command runs

RECIPE = """
[model]
layers = 2
hidden = 16
heads = 2
vocab = 37

[train]
sequence_length = 5
global_batch_size = 12
micro_batch_size = 3
dtype = "fp32"

[parallel]
dp = 2
zero = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return str(path)


def launch_on(pool: Pool, fault: Callable[[Runtime, pytest.MonkeyPatch], None]) -> Callable[[Job], int]:
    def launch(job: Job) -> int:
        steps, *folders = job.arguments
        assert (int(steps), job.entry) == (STEPS, "shardwright.verify.rank")
        for folder in map(Path, folders):
            plan = Plan.model_validate(read_json(folder / "plan.json"))
            pool.run(plan.world_size, write_broken, plan, fault, folder)
        return 0

    return launch


def test_verify_fails_with_1_and_names_the_first_difference(
    pool: Pool, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verifying, "launch", launch_on(pool, reduction_skipped))
    assert verify(recipe, [], STEPS, json_output=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False and document["gate"]["passed"] is False
    assert (document["dtype"], document["gate"]["dtype"], document["steps"]) == ("fp32", "fp64", STEPS)
    assert document["gradients"]["max_error"] > document["gradients"]["bar"] == BARS["fp32"]
    assert document["gate"]["gradients"]["max_error"] > A_THOUSANDFOLD
    first = document["first_difference"]
    assert (first["step"], first["kind"], first["name"].split(".")[:2]) == (1, "gradients", ["layers", "1"])
    assert first["owner"] in (0, 1) and first["value"] != first["expected"] and first["name"] in first["box"]

    assert verify(recipe, [], STEPS) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "DIFFERS from one device" in said
    assert f"first difference in fp32: step 1, gradients of {first['box']}, on rank {first['owner']}" in said


def test_verify_passes_with_0_and_the_same_document(
    pool: Pool, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verifying, "launch", launch_on(pool, no_fault))
    assert verify(recipe, ["parallel.zero=3"], STEPS, json_output=True) == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"passed", "dtype", "steps", "layout", "shrunk", "loss", "gradients", "parameters", "noise", "bar"}
    assert expected | {"first_difference"} <= document.keys()
    assert document["passed"] is True and document["first_difference"] is None and document["shrunk"] == []
    assert document["loss"]["max_error"] <= document["bar"]
    assert document["parameters"]["max_error"] is None  # fp32 under AdamW: rounding, not a proof

    assert verify(recipe, ["train.dtype=fp64"], STEPS) == 0
    assert "computes what one device computes, over 3 steps" in " ".join(capsys.readouterr().out.split())


def test_verify_ends_with_the_launchers_code(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "launch", lambda _job: 137)
    assert verify(recipe) == 137


# The pool: what it says of a rank that fails, and that the next test gets ranks that work


def fail(place: Place, how: str) -> int:
    if place.rank == 1 and how == "raises":
        raise ValueError("rank 1 has had enough")
    if place.rank == 1 and how == "refuses":
        raise RunError("train.lr: too bold", "be timid")
    if place.rank == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if place.rank == 1 and how == "sleeps":
        time.sleep(60)
    barrier(place.mesh(Topology(shard=2)).world)
    return place.rank


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("raises", Kind.EXCEPTION, "ValueError: rank 1 has had enough"),
        ("refuses", Kind.CONDITION, "train.lr: too bold\n  be timid"),
        ("dies", Kind.SIGNAL, "rank 1 was killed by signal 9"),
        ("sleeps", Kind.EXCEPTION, "did not answer in time"),
    ],
)
def test_the_pool_tells_the_first_cause_and_is_replaced(pool: Pool, how: str, kind: Kind, text: str) -> None:
    assert pool.run(2, fail, "works") == [0, 1]
    before = pool.processes
    with pytest.raises(RankFailed) as caught:
        pool.run(2, fail, how, limit=1.0)
    assert caught.value.cause.kind is kind and text in str(caught.value)
    assert (how != "raises") or "test_zero_faults.py" in str(caught.value)  # the rank's own traceback
    assert caught.value.cause.rank == (0 if how == "sleeps" else 1)
    assert not any(Path(f"/proc/{process}").exists() for process in before)
    assert pool.run(4, fail_nothing) == [0, 1, 2, 3]


def fail_nothing(place: Place) -> int:
    barrier(place.mesh(Topology(replicate=2, shard=2)).world)
    return place.rank
