"""What no schedule can beat, and what the named schedules come to in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from shardwright.schedule.action import Kind, Schedule, StageCost
from shardwright.schedule.errors import ScheduleError


def lower_bound(schedule: Schedule, costs: Sequence[StageCost] | None = None, transfer: float = 0.0) -> float:
    """A time below which no schedule with this placement, these kinds of action and these costs can end.

    It is the largest of: the way of one microbatch through the whole model; and for each rank, the time before its
    first action can begin, its work, and the time that must pass after its last action. If the backward is split,
    the last is a W, after which nothing must pass; so F and I are also counted alone, with what must follow the last I.
    """
    costs = [StageCost()] * schedule.num_stages if costs is None else costs
    count, placement = schedule.num_microbatches, schedule.placement
    kinds = {action.kind for actions in schedule.actions for action in actions}
    backward = next((kind for kind in (Kind.INPUT, Kind.BACKWARD) if kind in kinds), None)
    hops = [transfer if a != b else 0.0 for a, b in pairwise(placement)]
    forward = [cost.of(Kind.FORWARD) for cost in costs]
    back = [cost.of(backward) if backward else 0.0 for cost in costs]
    weight = [cost.of(Kind.WEIGHT) if backward is Kind.INPUT else 0.0 for cost in costs]
    before = _sums(forward, hops)  # of the first F of each stage
    if backward:
        after = [end + weight[0] for end in _sums(back, hops)]  # of the last I or B of each stage
        whole = before[-1] + forward[-1] + back[-1] + after[-1]
    else:
        after = [before[-1] - before[s] + forward[-1] - forward[s] for s in range(len(costs))]
        whole = before[-1] + forward[-1]
    bound = whole if count else 0.0
    for rank in set(placement):
        stages = [stage for stage, place in enumerate(placement) if place == rank]
        begin = before[stages[0]]
        critical = count * sum(forward[stage] + back[stage] for stage in stages)
        all_work = critical + count * sum(weight[stage] for stage in stages)
        bound = max(bound, begin + all_work, begin + critical + min(after[stage] for stage in stages))
    return bound


def _sums(costs: Sequence[float], hops: Sequence[float]) -> list[float]:
    """For each stage, the costs of all before it and the transfers on the way to it."""
    return list(accumulate((cost + hop for cost, hop in zip(costs, hops, strict=False)), initial=0.0))


def closed_form_makespan(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> int:
    """The makespan of a schedule that `build` names, if F, I and W take one unit on every stage and transfers none.

    Holds for any numbers that `build` takes. With fewer microbatches than ranks, interleaved and zbv wait for
    a microbatch to come around. Raises ScheduleError for a name that has no closed form.
    """
    p, v, m = num_ranks, virtual_stages, num_microbatches
    match name:
        case "gpipe" | "1f1b":
            return 3 * (m + p - 1)
        case "interleaved":
            return 3 * (v * m + p - 1 + (v - 1) * max(0, p - m))
        case "zb-h1":
            return max(3 * m + p - 1, 2 * m + 2 * p - 1)
        case "zbv":
            return max(6 * m + p - 1, 4 * m + 3 * p - 1, 2 * m + 4 * p - 1)
    raise ScheduleError(f'schedule: "{name}" has no closed form', "simulate it")


def ideal_bubble(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> float:
    """The bubble of a schedule that `build` names, on equal stages and with free transfers."""
    makespan = closed_form_makespan(name, num_ranks, virtual_stages, num_microbatches)
    return 1 - 3 * virtual_stages * num_microbatches / makespan


def backwards_at_once(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int, rank: int) -> int:
    """How many microbatches a rank takes backward through a stage right after taking them forward through it, in a
    schedule that `build` names. The stage is always the last one that the rank has.
    """
    p, v, m = num_ranks, virtual_stages, num_microbatches
    if m == 1:
        return 1  # what else there is to do comes before the forward or after the backward
    if name == "zbv":
        return m if rank == 0 else 0
    if name == "gpipe" or rank != p - 1:
        return 0
    if name == "interleaved" and v > 1:
        # Groups of fewer microbatches than the first one come back a little late.
        count = max(1, m // p)
        return -(-m // count) * (m % count) if m % count else m
    return m
