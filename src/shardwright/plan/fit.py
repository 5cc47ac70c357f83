"""Whether a plan fits a device, and if not, the nearest changes of its recipe that do, each one really evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from shardwright.errors import ShardwrightError
from shardwright.layout.mesh import Coordinate
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.plan.units import representative
from shardwright.record.records import MemoryRecord
from shardwright.spec.spec import Spec
from shardwright.units import Bytes, format_bytes

Resolve = Callable[[Spec], Plan]
"""A changed recipe on the same world and device; raises ShardwrightError where it cannot be."""

MOST_CHANGES = 3


@dataclass(frozen=True)
class Change:
    """Fields to set, such as {"memory.recompute": "full"}, and what the fullest rank then needs at its peak."""

    fields: dict[str, str | int]
    peak: Bytes

    def __str__(self) -> str:
        return " ".join(f"{field}={value}" for field, value in self.fields.items())


@dataclass(frozen=True)
class Fit:
    """The peak of the fullest rank beside what a device has; `changes` are there where it does not fit."""

    rank: int
    needed: Bytes
    usable: Bytes
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every rank fits."""
        return self.needed <= self.usable

    def __str__(self) -> str:
        needed, usable, rest = format_bytes(self.needed), format_bytes(self.usable), abs(self.usable - self.needed)
        if self.fits:
            return f"fits: {needed} of {usable} usable ({format_bytes(rest)} left)"
        return f"does not fit: needs {needed}, {format_bytes(rest)} more than the {usable} that are usable"


def fullest_by_stage(plan: Plan) -> list[MemoryRecord]:
    """Of each rank of the pipeline the record of the fullest of those that share its place, by the peak."""
    return [max(_records(plan, pp), key=lambda record: record.peak) for pp in range(plan.topology.pp)]


def fullest(records: Iterable[MemoryRecord]) -> MemoryRecord:
    """The record with the highest peak; of equals the first."""
    return max(records, key=lambda record: record.peak)


def _records(plan: Plan, pp: int) -> Iterator[MemoryRecord]:
    """One record for each kind of rank at a place of the pipeline: ranks along the data axes hold the same."""
    for tp in sorted({representative(plan, index) for index in range(plan.topology.tp)}):
        yield estimated_memory(plan, plan.topology.rank(Coordinate(pp=pp, tp=tp)))


def fit(plan: Plan, usable: Bytes, ranks_per_node: int, resolve: Resolve) -> Fit:
    """Compare a plan with the bytes that a device leaves to it, and look for changes where it is too large."""
    worst = fullest(fullest_by_stage(plan))
    found = Fit(worst.rank, worst.peak, usable)
    if found.fits:
        return found
    return replace(found, changes=tuple(_changes_that_fit(plan, usable, ranks_per_node, resolve)))


def _changes_that_fit(plan: Plan, usable: Bytes, ranks_per_node: int, resolve: Resolve) -> list[Change]:
    """The first of the candidates that fit, alone or, where none does, two at a time."""
    alone = list(_candidates(plan, ranks_per_node))
    fitting = _evaluated(plan, alone, usable, resolve)
    if fitting:
        return fitting
    both = sorted(combinations(range(len(alone)), 2), key=sum)
    pairs = (alone[one] | alone[other] for one, other in both if not alone[one].keys() & alone[other].keys())
    return _evaluated(plan, pairs, usable, resolve)


def _evaluated(plan: Plan, candidates: Iterable[dict[str, str | int]], usable: Bytes, resolve: Resolve) -> list[Change]:
    fitting: list[Change] = []
    for fields in candidates:
        # Of the same field the smallest step is enough: not also zero = 3 where zero = 2 fits.
        if len(fitting) == MOST_CHANGES or any(change.fields.keys() == fields.keys() for change in fitting):
            continue
        peak = _peak_within(plan, fields, usable, resolve)
        if peak is not None:
            fitting.append(Change(fields, peak))
    return fitting


def _peak_within(plan: Plan, fields: dict[str, str | int], usable: Bytes, resolve: Resolve) -> Bytes | None:
    """The peak of the changed recipe; None where it cannot be, or does not fit."""
    try:
        changed = resolve(with_fields(plan.spec, fields))
    except ShardwrightError:
        return None
    highest = Bytes(0)
    # The first stage keeps most microbatches and the last has the logits: most that do not fit are told by these.
    last = changed.topology.pp - 1
    for pp in sorted(range(changed.topology.pp), key=lambda pp: min(pp, last - pp)):
        highest = max(highest, *(record.peak for record in _records(changed, pp)))
        if highest > usable:
            return None
    return highest


def with_fields(spec: Spec, fields: dict[str, str | int]) -> Spec:
    """The recipe with some fields of its sections set, dotted names to values."""
    for field, value in fields.items():
        section, name = field.split(".")
        changed = getattr(spec, section).model_copy(update={name: value})
        spec = spec.model_copy(update={section: changed})
    return spec


def _candidates(plan: Plan, ranks_per_node: int) -> Iterator[dict[str, str | int]]:
    """Changes of one technique, in the order of what they cost a step, as far as that can be said in general.

    ZeRO-1 sends what plain data parallelism does. Selective recomputation costs a few percent, smaller microbatches
    efficiency, full recomputation up to a third; then come more communication or a larger bubble, and offload last.
    """
    spec, parallel, train = plan.spec, plan.spec.parallel, plan.spec.train
    if plan.topology.shard > 1 and parallel.zero < 1:
        yield {"parallel.zero": 1}
    if spec.memory.recompute == "none":
        yield {"memory.recompute": "selective"}
    micro = train.micro_batch_size
    for size in sorted((size for size in range(1, micro) if micro % size == 0), reverse=True):
        yield {"train.micro_batch_size": size}
    if spec.memory.recompute != "full":
        yield {"memory.recompute": "full"}
    if plan.topology.shard > 1:
        for stage in range(max(parallel.zero + 1, 2), 4):
            yield {"parallel.zero": stage}
    yield from _more_ranks(plan, ranks_per_node)
    for form in ("state", "update"):
        if spec.memory.offload == "none":
            yield {"memory.offload": form}


def _more_ranks(plan: Plan, ranks_per_node: int) -> Iterator[dict[str, str | int]]:
    """The tensors, within a node, or the pipeline over twice as many ranks of the same world: half as many copies."""
    topology, parallel = plan.topology, plan.spec.parallel
    if topology.dp % 2:
        return
    copies: dict[str, str | int] = {} if parallel.dp == "auto" else {"parallel.dp": topology.dp // 2}
    if parallel.dp_shard != "auto" and (topology.dp // 2) % parallel.dp_shard:
        copies["parallel.dp_shard"] = "auto"
    if 2 * topology.tp <= ranks_per_node:
        yield {"parallel.tp": 2 * topology.tp} | copies
    stages: dict[str, str | int] = {} if parallel.stages == "auto" else {"parallel.stages": "auto"}
    yield {"parallel.pp": 2 * topology.pp} | copies | stages
