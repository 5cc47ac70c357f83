"""What a plan will send: rank by rank in the rows of the measured ledger, and summed up for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from shardwright.cost.communication import StateTraffic, Tally, TensorTraffic, axis_name, pipeline_traffic, step_traffic
from shardwright.cost.memory import BYTES
from shardwright.layout.mesh import AXES, DATA_AXES, Topology
from shardwright.plan.pipeline import placement_of
from shardwright.plan.plan import Plan
from shardwright.plan.units import RankUnits, recompute_settings, representative, shapes_of, units_of
from shardwright.plan.world import crosses_nodes
from shardwright.record.communication import CommunicationRecord
from shardwright.record.records import Origin
from shardwright.schedule.bounds import backwards_at_once
from shardwright.units import Bytes

GROUPS = ("gradients", "parameters", "tensor parallelism", "pipeline", "other")
"""What reasons come to, in the order in which they are shown."""

_PURPOSES = {
    "zero/reduce": "gradients",
    "data/reduce": "gradients",
    "zero/publish": "parameters",
    "zero/gather": "parameters",
}
_TECHNIQUES = {"tensor": "tensor parallelism", "pipeline": "pipeline"}


def estimated_communication(plan: Plan, rank: int) -> tuple[CommunicationRecord, ...]:
    """What a rank will send in one training step, a record for each row of its ledger, in their order."""
    here = plan.topology.coordinate(rank)
    rows = _rows(plan, here.pp, representative(plan, here.tp))
    return tuple(replace(row, rank=rank) for row in rows)


def different_ranks(plan: Plan) -> tuple[int, ...]:
    """The first rank of each kind: ranks that send the same, as those do that differ along the data axes."""
    tps = sorted({representative(plan, tp) for tp in range(plan.topology.tp)})
    first = plan.topology.coordinate(0)
    return tuple(plan.topology.rank(replace(first, pp=pp, tp=tp)) for pp in range(plan.topology.pp) for tp in tps)


@lru_cache(maxsize=4096)
def _rows(plan: Plan, pp: int, tp: int) -> tuple[CommunicationRecord, ...]:
    """The rows of the first rank at a place of the pipeline and of `tp`."""
    tally, units = Tally(plan.topology), units_of(plan, pp, tp)
    shapes = shapes_of(plan, tp)
    _tensor(plan, TensorTraffic(tally, shapes, plan.num_microbatches), units.by_stage)
    _states(plan, tally, units, pp)
    pipeline_traffic(tally, placement_of(plan), units.by_stage, shapes.hidden, plan.num_microbatches)
    step_traffic(tally)
    rank = plan.topology.rank(replace(plan.topology.coordinate(0), pp=pp, tp=tp))
    return tuple(CommunicationRecord(Origin.ESTIMATED, rank, *key, *row) for key, row in sorted(tally.rows.items()))


def _tensor(plan: Plan, traffic: TensorTraffic, stages: Iterable[int]) -> None:
    for stage in stages:
        if stage == 0:
            traffic.embedding()
        traffic.layers(recompute_settings(plan, stage))
        if stage == len(plan.layers_per_stage) - 1:
            traffic.head()


def _states(plan: Plan, tally: Tally, units: RankUnits, pp: int) -> None:
    parallel = plan.spec.parallel
    traffic = StateTraffic(
        tally,
        zero=parallel.zero,
        per_microbatch=parallel.zero_pipeline == "save_memory",
        element=BYTES[plan.dtype],
        grad_element=BYTES[plan.grad_dtype],
        num_microbatches=plan.num_microbatches,
    )
    # A matrix that the first stage and the last share is taken in by both, where the rank has both.
    last, rest = len(plan.layers_per_stage) - 1, units.all
    if units.tied is not None:
        traffic.unit(rest.pop(0), num_stages=1 if last == 0 else 2)
    for unit in rest:
        traffic.unit(unit)
    for stage, blocks in units.by_stage.items():
        schedule = (parallel.pipeline_schedule, plan.topology.pp, plan.virtual_stages, plan.num_microbatches)
        stays = backwards_at_once(*schedule, pp) if stage == max(units.by_stage) else 0
        traffic.passages(blocks, stays, units.tied if stage == last else None)


# For people


@dataclass(frozen=True)
class Share:
    """What is sent along one axis for one of GROUPS: calls and bytes of a step on the rank that sends most there.

    `crosses_nodes`: whether some group of the axis has ranks on several nodes; None where nodes are not known.
    """

    group: str
    axis: str
    rank: int
    calls: int
    sent: Bytes
    crosses_nodes: bool | None


def group_of(reason: str) -> str:
    """Which of GROUPS a reason belongs to."""
    return _PURPOSES.get(reason) or _TECHNIQUES.get(reason.partition("/")[0], "other")


def total_sent(records: Iterable[CommunicationRecord]) -> Bytes:
    """Bytes of all records."""
    return Bytes(sum(record.sent for record in records))


def busiest_rank(plan: Plan) -> int:
    """The first rank of those that send most in a step."""
    return max(different_ranks(plan), key=lambda rank: total_sent(estimated_communication(plan, rank)))


def shares(
    records: Iterable[CommunicationRecord], topology: Topology, ranks_per_node: int | None = None
) -> tuple[Share, ...]:
    """One rank's records summed by group and axis, in the order of GROUPS and then by bytes."""
    sums: dict[tuple[str, str], Share] = {}
    for record in records:
        key = group_of(record.reason), record.axis
        share = sums.get(key) or Share(*key, record.rank, 0, Bytes(0), _crosses(topology, record.axis, ranks_per_node))
        sums[key] = replace(share, calls=share.calls + record.calls, sent=Bytes(share.sent + record.sent))
    return tuple(sorted(sums.values(), key=_order))


def most_by_group(plan: Plan, ranks_per_node: int | None = None) -> tuple[Share, ...]:
    """For each group and axis the share of the rank that sends most there; ranks may differ from row to row."""
    most: dict[tuple[str, str], Share] = {}
    for rank in different_ranks(plan):
        for share in shares(estimated_communication(plan, rank), plan.topology):
            key = share.group, share.axis
            if key not in most or share.sent > most[key].sent:
                most[key] = share
    known = [replace(s, crosses_nodes=_crosses(plan.topology, s.axis, ranks_per_node)) for s in most.values()]
    return tuple(sorted(known, key=_order))


def _order(share: Share) -> tuple[int, int, str]:
    return GROUPS.index(share.group), -share.sent, share.axis


def _crosses(topology: Topology, axis: str, ranks_per_node: int | None) -> bool | None:
    if ranks_per_node is None:
        return None
    named = {axis_name(axes): axes for axes in (*((single,) for single in AXES), DATA_AXES, AXES)}
    return crosses_nodes(topology, named[axis], ranks_per_node)
