"""Offload moves owned state to the host and changes nothing else: not a bit under `state`, not a bar under `update`."""

from __future__ import annotations

import hashlib
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GPT2, LLAMA, QWEN, Fault, compared, plan_of
from pool import Place, Pool, tiny_plan
from test_zero_memory import EVEN, alive, only_what_is_made_here
from torch import Tensor, nn

from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.offload import on_host
from shardwright.parallel.offload.on_host import OnHost
from shardwright.parallel.offload.streaming import Streaming
from shardwright.plan.host import host_memory
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord
from shardwright.train.batches import rank_batch
from shardwright.train.ledger import measured_memory
from shardwright.train.step import train_step
from shardwright.verify.compare import BARS

pytestmark = pytest.mark.world

FAMILIES = {"llama": LLAMA | {"kv_heads": 4}, "qwen": QWEN | {"kv_heads": 3}, "gpt2": GPT2 | {"kv_heads": 12}}
TINY_CHUNK = "8 KiB"  # 512 elements of two fp64 moments: cuts every unit into many windows


def case_plan(case: tuple[Any, ...], offload: str, chunk: str = TINY_CHUNK, **train: Any) -> Plan:
    family, tied, microbatches, dp, tp, pp, zero, schedule, virtual, more = case
    model = FAMILIES[family] | {"layers": 4, "tied_embeddings": tied}
    parallel = {"dp": dp, "tp": tp, "pp": pp, "zero": zero, "pipeline_schedule": schedule, "virtual_stages": virtual}
    batch = {"global_batch_size": dp * microbatches, "micro_batch_size": 1}
    memory = {"offload": offload, "offload_chunk": chunk}
    return plan_of(model, parallel | more, memory, **batch | train)


# family, tied, microbatches, dp, tp, pp, zero, schedule, virtual stages, more
CASES: list[tuple[Any, ...]] = [
    ("llama", True, 3, 2, 1, 2, 0, "1f1b", 1, {}),
    ("qwen", False, 2, 2, 1, 2, 1, "gpipe", 1, {}),
    ("gpt2", True, 4, 2, 1, 2, 2, "interleaved", 2, {}),
    ("llama", True, 3, 2, 1, 2, 3, "zb-h1", 1, {}),
    ("qwen", True, 3, 2, 1, 2, 3, "zbv", 2, {"zero_pipeline": "save_communication"}),
    ("gpt2", False, 3, 2, 1, 2, 2, "1f1b", 1, {"zero_pipeline": "save_communication"}),
    ("llama", True, 2, 1, 2, 2, 1, "zbv", 2, {}),
    ("qwen", False, 2, 2, 2, 1, 3, "1f1b", 1, {}),
    ("llama", False, 1, 2, 2, 1, 1, "1f1b", 1, {"dp_shard": 1}),
    ("gpt2", False, 2, 4, 1, 1, 2, "1f1b", 1, {"dp_shard": 2}),
]


def name(case: tuple[Any, ...]) -> str:
    family, tied, microbatches, dp, tp, pp, zero, schedule, *_ = case
    return f"{family}-{schedule}-dp{dp}tp{tp}pp{pp}-zero{zero}-m{microbatches}" + "-tied" * tied


@pytest.mark.parametrize("offload", ["state", "update"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_layout_computes_what_one_device_computes(
    pool: Pool, tmp_path: Path, case: tuple[Any, ...], offload: str
) -> None:
    found = compared(pool, case_plan(case, offload), tmp_path)
    assert found.missing is None
    assert found.first_difference is None, found.first_difference


# To the bit


def bits(place: Place, plan: Plan) -> tuple[list[float], str]:
    """In a rank: losses, and a fingerprint of parameters, masters and optimizer state, after three steps."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples, losses = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3, 0.4), []
    for step in range(3):
        losses.append(train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-2).loss)
    return losses, fingerprint(runtime, optimizer)


def fingerprint(runtime: Runtime, optimizer: Any) -> str:
    digest = hashlib.sha256()
    for unit in runtime.states.units:
        unit.need()
        for tensor in (unit.whole, unit.owned_tensor().values, *optimizer.state(unit.name).values()):
            digest.update(tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
        unit.release()
    return digest.hexdigest()


@pytest.mark.parametrize("offload", ["state", "update"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "grad", "optimizer"),
    [("bf16", "bf16", "adamw"), ("bf16", "fp32", "adamw"), ("fp32", "fp32", "adamw"), ("bf16", "bf16", "sgd")],
)
def test_every_bit_is_that_of_no_offload(
    pool: Pool, zero: int, dtype: str, grad: str, optimizer: str, offload: str
) -> None:
    """The same kernel, whatever the chunks: 2 KiB are 128 elements of bf16 AdamW. (On CPUs `update` has it too.)"""
    case = ("llama", True, 2, 2, 1, 2, zero, "1f1b", 1, {})
    train = {"dtype": dtype, "grad_dtype": grad, "optimizer": optimizer}
    expected = pool.run(4, bits, case_plan(case, "none", **train))
    for chunk in ("2 KiB", "17 KB", "64 MiB") if offload == "state" else ("64 MiB",):
        assert pool.run(4, bits, case_plan(case, offload, chunk, **train)) == expected


# The ledger


@only_what_is_made_here()
def count(place: Place, plan: Plan) -> tuple[MemoryRecord, int, int]:
    """In a rank, between two microbatches: the ledger, bytes of all tensors that Python can reach, and of a slot."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    found: list[tuple[MemoryRecord, int, int]] = []

    def between() -> None:
        slots = [slot.nbytes for slot in runtime.states.home.buffers()]
        assert len(set(slots)) <= 1 and len(slots) in (0, 2)
        found.append((measured_memory(runtime, optimizer, transient=True), alive(), max(slots, default=0)))
        listed = runtime.states.resident(optimizer)
        assert sum(t.nbytes for ts in listed.values() for t in ts) == found[-1][0].total + found[-1][0].host

    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    for step in range(2):  # after an update too
        runtime.pipeline.between = between
        train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-3)
    runtime.states.home.settle()
    assert len(found) == 2 and found[0] == found[1]
    return found[0]


def memory_plan(zero: int, shard: int, offload: str, chunk: str = "8 KiB", **train: Any) -> Plan:
    precision = {"dtype": "bf16", "grad_dtype": "bf16", "global_batch_size": 2 * shard}
    memory = {"offload": offload, "offload_chunk": chunk}
    return tiny_plan(1, shard, 2, model=EVEN, train=precision | train, parallel={"zero": zero}, memory=memory)


@pytest.mark.parametrize("offload", ["state", "update"])
@pytest.mark.parametrize("shard", [1, 2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_device_keeps_parameters_and_gradients_alone(pool: Pool, zero: int, shard: int, offload: str) -> None:
    """4, 4, 2 + 2/N and 4/N bytes per parameter with bf16 gradients; the host's share beside them."""
    plan = memory_plan(zero, shard, offload)
    num_parameters, owners = plan.architecture.num_parameters, shard if zero else 1
    device = [Fraction(4), Fraction(4), 2 + Fraction(2, shard), Fraction(4, shard)][zero] * num_parameters
    for rank, (measured, reachable, slot) in enumerate(pool.run(plan.world_size, count, plan)):
        assert measured.padding == 0 and measured.optimizer == measured.communication == 0
        assert measured.total - measured.offload == device
        assert measured.host == host_memory(plan, rank) == (12 if offload == "state" else 14) * num_parameters / owners
        assert measured.offload == 2 * slot <= 2 * 8 * 1024 and (slot > 0) == (offload == "state")
        assert reachable == measured.total + measured.host


@pytest.mark.parametrize(
    ("dtype", "grad", "optimizer", "offload", "per_parameter"),
    [
        ("fp32", "fp32", "adamw", "state", 8),  # the parameters are the masters
        ("fp32", "fp32", "adamw", "update", 16),
        ("fp64", "fp64", "sgd", "state", 8),
        ("bf16", "fp32", "adamw", "update", 16),
        ("bf16", "bf16", "sgd", "state", 8),
        ("bf16", "bf16", "sgd", "update", 10),
    ],
)
def test_host_bytes(pool: Pool, dtype: str, grad: str, optimizer: str, offload: str, per_parameter: int) -> None:
    plan = memory_plan(1, 2, offload, dtype=dtype, grad_dtype=grad, optimizer=optimizer)
    for rank, (measured, reachable, _) in enumerate(pool.run(2, count, plan)):
        assert measured.host == host_memory(plan, rank) == per_parameter * plan.architecture.num_parameters // 2
        assert reachable == measured.total + measured.host


def test_slots_are_no_larger_than_the_longest_owned_range_needs(pool: Pool) -> None:
    plan = memory_plan(1, 2, "state", "64 MiB")
    layer = plan.architecture.num_parameters // 4  # more than any unit has
    for measured, _, slot in pool.run(2, count, plan):
        assert measured.offload == 2 * slot and 0 < slot < 16 * layer


# Faults


def a_window_not_stored(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The host keeps what one window had before the update."""
    home, changed = runtime.states.home, []
    assert isinstance(home, Streaming)
    update = home._update

    def forgetting(share: Any, optimizer: Any, rule: Any, window: Any, *rest: Any) -> None:
        host = [moment[window.begin : window.end] for moment in optimizer.moments(share.name)]
        before = [moment.clone() for moment in host]
        update(share, optimizer, rule, window, *rest)
        if not changed:
            changed.append(share)
            for moment, old in zip(host, before, strict=True):
                moment.copy_(old)

    patch.setattr(home, "_update", forgetting)


def values_not_returned(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The update of one unit stays on the host."""
    home, last = runtime.states.home, runtime.states.units[-1]
    assert isinstance(home, OnHost)
    update = home._update

    def keeping(share: Any, *arguments: Any) -> Any:
        before = share.owned_values.clone()
        mark = update(share, *arguments)
        if share is last:
            share.owned_values.copy_(before)
        return mark

    patch.setattr(home, "_update", keeping)


def nobody_waits(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The next forward does not wait for a worker that takes its time."""
    home = runtime.states.home
    assert isinstance(home, OnHost)
    update = home._update

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return update(*arguments)

    patch.setattr(home, "_update", slow)
    patch.setattr(on_host._Arrival, "wait", lambda _: None)


def gradients_of_the_first_step(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """What has landed once is never replaced."""
    home = runtime.states.home
    assert isinstance(home, OnHost)
    patch.setattr(home, "begin_step", lambda: None)


def twins_not_summed_first(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The gradient of a tied matrix leaves before it was summed with its twin's."""
    home, collect = runtime.states.home, runtime.states.collect_gradients

    def early() -> None:
        for unit in reversed(runtime.states.units):
            unit.finish_reduction()
            home.take(unit)
        collect()

    patch.setattr(runtime.states, "collect_gradients", early)


@pytest.mark.parametrize(
    ("offload", "fault"),
    [
        ("state", a_window_not_stored),
        ("update", values_not_returned),
        ("update", nobody_waits),
        ("update", gradients_of_the_first_step),
        ("update", twins_not_summed_first),
    ],
)
def test_a_fault_is_seen_a_thousandfold(pool: Pool, tmp_path: Path, offload: str, fault: Fault) -> None:
    found = compared(pool, case_plan(CASES[0], offload, optimizer="adamw"), tmp_path, fault)
    assert found.first_difference is not None
    assert max(error or 0.0 for error in found.errors().values()) > 1000 * BARS["fp64"], found


# What does not go as planned


def skipping(place: Place, plan: Plan) -> tuple[list[bool], bool, str]:
    """In a rank: a step, one whose loss is not finite, and another; whether each was applied, whether the second left
    everything as it was, and the fingerprint at the end."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    run, applied, prints = runtime.pipeline.run, [], []

    def poisoned(microbatches: Any, scale: Tensor) -> Tensor:
        return run(microbatches, scale) + (math.inf if len(applied) == 1 else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.pipeline, "run", poisoned)
        for step in range(3):
            applied.append(train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-2).applied)
            prints.append(fingerprint(runtime, optimizer))
    return applied, prints[0] == prints[1] != prints[2], prints[2]


@pytest.mark.parametrize("zero", [1, 3])
def test_a_skipped_step_leaves_the_host_alone(pool: Pool, zero: int) -> None:
    case = ("llama", True, 2, 2, 1, 2, zero, "1f1b", 1, {})
    expected = pool.run(4, skipping, case_plan(case, "none", dtype="bf16"))
    assert [found[:2] for found in expected] == [([True, False, True], True)] * 4
    for offload in ("state", "update"):
        assert pool.run(4, skipping, case_plan(case, offload, dtype="bf16")) == expected


def breaking(place: Place, plan: Plan) -> list[str]:
    """In a rank: what the next step, and a reader of the state, are told when the worker fails."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples, told = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3), []

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("the host's memory is bad")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "apply", broken)
        train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-2)
        for reader in (
            lambda: train_step(runtime, optimizer, rank_batch(runtime, samples, 1), 1e-2),
            lambda: optimizer.state(runtime.states.units[0].name),
        ):
            try:
                reader()
            except ValueError as error:
                told.append(str(error))
    return told


def test_what_fails_in_the_worker_is_raised_where_it_is_needed(pool: Pool) -> None:
    assert pool.run(1, breaking, memory_plan(1, 1, "update")) == [["the host's memory is bad"] * 2]


class Choosing(nn.Module):
    """A model in which ranks run different blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.skipped: tuple[int, ...] = ()

    def blocks(self) -> list[nn.Module]:
        return [self.embedding, *self.layers]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = x if index in self.skipped else layer(x)
        logits = (x @ self.embedding.weight.T).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


def choosing(place: Place, plan: Plan) -> str:
    """In a rank: four steps in which each rank leaves out other layers, more than are gathered ahead."""
    model = Choosing()
    runtime = compose(plan, place.mesh(plan.topology), model)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    for step in range(4):
        model.skipped = (0, 1) if (place.rank + step) % 2 else (2, 3)
        train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-2)
    return fingerprint(runtime, optimizer)


@pytest.mark.parametrize("zero", [1, 2])
def test_ranks_may_run_different_blocks(pool: Pool, zero: int) -> None:
    """What is published late is published in one order: after every update the ranks of `update` gather alike."""
    model = {"layers": 4, "hidden": 16, "heads": 4, "ffn": 16, "vocab": 61}
    parallel = {"dp": 2, "zero": zero, "pp": 1}
    one, late = (plan_of(model, parallel, {"offload": offload}) for offload in ("none", "update"))
    assert pool.run(2, choosing, one) == pool.run(2, choosing, late)
