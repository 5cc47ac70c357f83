"""The ledger shows the seed's bytes per parameter, measured between microbatches, and forgets nothing that is alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from layouts import LLAMA, plan_of
from pool import Place, Pool, tiny_plan
from torch import Tensor

from shardwright.comm.collectives import DONE
from shardwright.data.dataset import Dataset
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.parallel.zero.unit import Unit
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord
from shardwright.train.batches import rank_batch
from shardwright.train.ledger import measured_memory
from shardwright.train.loop import TrainingLoop
from shardwright.train.step import train_step

pytestmark = pytest.mark.world

# Learned positions: rotary tables are no training state, and would be counted among what is alive.
ODD = {"layers": 2, "hidden": 20, "heads": 2, "ffn": 27, "vocab": 61, "positions": "learned", "max_positions": 5}
EVEN = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 64, "vocab": 64, "positions": "learned", "max_positions": 64}
CATEGORIES = ("parameters", "gradients", "optimizer", "communication")
SPLITS = [(1, 1), (1, 2), (1, 4), (2, 2)]


@dataclass
class Count:
    """What one rank holds between two microbatches: the ledger's record beside its estimate, and `alive`, the bytes of
    all storages of floating-point tensors that Python can reach, scalars apart."""

    estimated: MemoryRecord
    measured: MemoryRecord
    alive: int
    residencies: set[str]


@contextmanager
def only_what_is_made_here() -> Iterator[None]:
    """Inside, the collector knows only objects made inside, which also makes it quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def alive() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 0]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@only_what_is_made_here()
def count(place: Place, plan: Plan) -> Count:
    """In a rank: run one step of two microbatches and count in the middle of it."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    found: list[Count] = []

    def between() -> None:
        measured = measured_memory(runtime, optimizer, transient=True)
        residencies = {str(unit.residency) for unit in runtime.states.units}
        found.append(Count(estimated_memory(plan, place.rank), measured, alive(), residencies))

    runtime.pipeline.between = between
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    assert len(found) == plan.num_microbatches - 1
    return found[0]


def memory_plan(
    zero: int,
    replicate: int,
    shard: int,
    model: dict[str, Any],
    *,
    dtype: str = "bf16",
    grad: str = "bf16",
    **more: Any,
) -> Plan:
    train = {"dtype": dtype, "grad_dtype": grad, "global_batch_size": 2 * replicate * shard} | more
    pipeline = train.pop("zero_pipeline", "save_memory")
    return tiny_plan(replicate, shard, 2, model=model, train=train, parallel={"zero": zero, "zero_pipeline": pipeline})


def seed_table(zero: int, owners: int, grad: str) -> Fraction:
    """Bytes per parameter of bf16 Adam, as the seed writes them."""
    n = owners
    if grad == "bf16":
        return [Fraction(16), 4 + Fraction(12, n), 2 + Fraction(14, n), Fraction(16, n)][zero]
    return [Fraction(18), 6 + Fraction(12, n), 2 + Fraction(16, n), Fraction(18, n)][zero]


@pytest.mark.parametrize("grad", ["bf16", "fp32"])
@pytest.mark.parametrize(("replicate", "shard"), SPLITS)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_per_parameter_are_the_seeds(pool: Pool, zero: int, replicate: int, shard: int, grad: str) -> None:
    plan = memory_plan(zero, replicate, shard, ODD, grad=grad)
    counts = pool.run(plan.world_size, count, plan)
    expected = seed_table(zero, shard, grad) * plan.architecture.num_parameters
    # A rank's share has more or less of the padding in it; all shares together have exactly the parameters.
    without_padding = sum(c.measured.total - c.measured.padding for c in counts)
    assert without_padding == plan.world_size * expected
    for found in counts:
        # The estimate divides the padding evenly.
        assert found.estimated.total == found.measured.total
        assert found.estimated.total - found.estimated.padding == pytest.approx(float(expected), abs=2)
        assert found.measured.total == counts[0].measured.total
        assert found.alive == found.measured.total
        assert found.measured.communication == 0
        assert found.residencies == {"owned" if zero == 3 and shard > 1 else "whole"}


@pytest.mark.parametrize(
    ("zero", "pipeline"), [(z, "save_memory") for z in range(4)] + [(z, "save_communication") for z in (2, 3)]
)
@pytest.mark.parametrize(
    ("dtype", "grad", "optimizer"),
    [
        ("bf16", "bf16", "adamw"),
        ("bf16", "fp32", "sgd"),
        ("fp32", "fp32", "adamw"),
        ("fp64", "fp64", "sgd"),
    ],
)
def test_every_category_is_the_formulas(
    pool: Pool, zero: int, dtype: str, grad: str, optimizer: str, pipeline: str
) -> None:
    plan = memory_plan(zero, 1, 2, EVEN, dtype=dtype, grad=grad, optimizer=optimizer, zero_pipeline=pipeline)
    for found in pool.run(plan.world_size, count, plan):
        assert found.measured.padding == 0
        for category in (*CATEGORIES, "total"):
            assert getattr(found.measured, category) == getattr(found.estimated, category), category
        assert found.alive == found.measured.total


@pytest.mark.parametrize(("zero", "held"), [(2, Fraction(2)), (3, Fraction(2 + 2))])
def test_saving_communication_keeps_what_would_move_again(pool: Pool, zero: int, held: Fraction) -> None:
    plan = memory_plan(zero, 1, 4, EVEN, zero_pipeline="save_communication")
    for found in pool.run(plan.world_size, count, plan):
        assert found.measured.communication == held * plan.architecture.num_parameters
        resting = found.measured.total - found.measured.communication
        assert resting == seed_table(zero, 4, "bf16") * plan.architecture.num_parameters
        assert found.residencies == {"whole"}


def test_padding_is_under_one_percent_of_a_25m_model(pool: Pool) -> None:
    model = {"preset": "small-25m", "positions": "learned", "max_positions": 8}
    plan = memory_plan(3, 1, 4, model, sequence_length=8)
    assert 24e6 < plan.architecture.num_parameters < 27e6
    counts = pool.run(plan.world_size, count, plan)
    for found in counts:
        assert 0 <= found.measured.padding < 0.01 * found.measured.total
        assert found.alive == found.measured.total
    whole = sum(found.measured.total - found.measured.padding for found in counts)
    assert whole == 16 * plan.architecture.num_parameters


# The record of a run


def run(place: Place, plan: Plan) -> MemoryRecord | None:
    """In a rank: the ledger that the loop takes."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    loop = TrainingLoop(runtime, optimizer, Dataset(samples, None, 0, None, "", "", 0, 0, None))
    memory = loop.run().memory
    assert runtime.pipeline.between is None
    return memory


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_loop_records_the_first_steps_ledger(pool: Pool, zero: int, num_microbatches: int) -> None:
    plan = memory_plan(zero, 1, 2, EVEN, steps=2, micro_batch_size=2 // num_microbatches)
    assert plan.num_microbatches == num_microbatches
    expected = seed_table(zero, 2, "bf16") * plan.architecture.num_parameters
    for memory in pool.run(plan.world_size, run, plan):
        assert memory.total == expected


def most_sums(place: Place, plan: Plan) -> int:
    """In a rank: of how many units the sum over the copies was under way at once."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples, found = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3), [0]
    begun = Unit.finish_scatter

    def watched(unit: Unit) -> None:
        begun(unit)
        found.append(sum(own._summing is not DONE for own in runtime.states.units))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unit, "finish_scatter", watched)
        train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    return max(found)


@pytest.mark.parametrize("pp", [1, 2])
def test_few_sums_over_two_copies_hold_what_arrives(pool: Pool, pp: int) -> None:
    """Also of a tied matrix that two ranks have: it waits for its twin, and not with the buffer."""
    parallel = {"dp": 2, "dp_shard": 1, "zero": 0, "pp": pp}
    plan = plan_of(LLAMA | {"layers": 7 * pp, "tied_embeddings": True}, parallel)
    assert pool.run(plan.world_size, most_sums, plan) == [3] * plan.world_size


# What moves for it


def calls(place: Place, plan: Plan) -> dict[tuple[str, str], int]:
    """In a rank: how often each verb was called for each reason in one step."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    mesh.ledger.clear()
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    found: dict[tuple[str, str], int] = {}
    for (verb, _axis, reason), row in mesh.ledger.rows.items():
        if reason.startswith(("zero/", "data/")):
            found[verb, reason] = found.get((verb, reason), 0) + row.calls
    return found


@pytest.mark.parametrize("pipeline", ["save_memory", "save_communication"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nothing_moves_more_often_than_it_has_to(pool: Pool, zero: int, pipeline: str) -> None:
    units, microbatches = 4, 2  # the embedding, two layers, the head
    plan = memory_plan(zero, 2, 2, EVEN, zero_pipeline=pipeline)
    often = microbatches if pipeline == "save_memory" else 1
    # The head stays between its forward and its backward; the others are gathered for each.
    gathers = microbatches * (2 * units - 1) if pipeline == "save_memory" else units
    expected = {("all_reduce", "data/reduce"): units}
    if zero in (1, 2):
        expected["all_gather", "zero/publish"] = units
    if zero == 3:
        expected["all_gather", "zero/gather"] = gathers
    if zero >= 1:
        expected["reduce_scatter", "zero/reduce"] = units * (often if zero >= 2 else 1)
    assert pool.run(4, calls, plan) == [expected] * 4
