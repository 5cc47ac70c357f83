"""Schedules that cut the backward in two, I and W, and fill the bubble with W, for which nobody waits."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shardwright.schedule.action import Action, Kind
from shardwright.schedule.dependencies import Result, needs


def zb_h1(num_ranks: int, virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
    """ZB-H1 (Zero Bubble, Qi et al. 2023): the order of 1F1B, W postponed by as many microbatches as stages before.

    A stage then keeps as many microbatches as the first one does in 1F1B, and a third of 1F1B's bubble is left.
    """
    programs = []
    for stage in range(num_ranks):
        warmup = min(num_ranks - 1 - stage, num_microbatches)
        program = [Action(Kind.FORWARD, stage, microbatch) for microbatch in range(warmup)]
        for microbatch in range(num_microbatches):
            if warmup + microbatch < num_microbatches:
                program.append(Action(Kind.FORWARD, stage, warmup + microbatch))
            program.append(Action(Kind.INPUT, stage, microbatch))
            if microbatch >= stage:
                program.append(Action(Kind.WEIGHT, stage, microbatch - stage))
        postponed = range(max(0, num_microbatches - stage), num_microbatches)
        programs.append(program + [Action(Kind.WEIGHT, stage, microbatch) for microbatch in postponed])
    return programs


def v_shaped(num_ranks: int, virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
    """ZB-V (Pipeline Parallelism with Controllable Memory, Qi et al. 2024): two stages per rank, there and back.

    The order of F and I is the paper's. W comes where the rank would otherwise wait, or would keep more than
    2 * num_ranks microbatches of a stage: as much memory as the first rank of 1F1B.
    """
    orders = [_v_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return _fill_with_weights(orders, num_stages=2 * num_ranks, limit=2 * num_ranks)


def _v_order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """F and I of a rank whose stages are a, on the way there, and b, on the way back."""
    a, b = rank, 2 * num_ranks - 1 - rank
    f_a, f_b, i_a, i_b = ((kind, stage) for kind in (Kind.FORWARD, Kind.INPUT) for stage in (a, b))
    behind = num_ranks - rank
    # Until the first microbatch is back: 2 * behind - 1 units pass between its F on a and its F on b, and 2 * rank + 1
    # from then to its I on b.
    pattern = [f_a] * (2 * behind - 1) + [f_b, f_a] * rank + [f_b, i_b] * behind
    pattern += [f_a, i_a, f_b, i_b] * num_microbatches + [i_a, i_b] * num_microbatches
    done = {f_a: 0, f_b: 0, i_a: 0, i_b: 0}
    order = []
    for what in pattern:
        if done[what] < num_microbatches and (what[0] is Kind.FORWARD or done[what] < done[Kind.FORWARD, what[1]]):
            order.append(Action(*what, done[what]))
            done[what] += 1
    return order


@dataclass
class _Rank:
    """A rank while Ws are filled in: the Fs and Is still to do, the Ws that may be done, what is kept and was done."""

    ahead: deque[Action]
    pending: deque[Action] = field(default_factory=deque)
    live: int = 0
    program: list[Action] = field(default_factory=list)


def _fill_with_weights(orders: Sequence[Sequence[Action]], num_stages: int, limit: int) -> list[list[Action]]:
    """Each rank's order of F and I with W where the rank would wait, if F, I and W take one unit of time each.

    A rank never keeps more than `limit` microbatches of a stage; each order must be one that does not need to.
    """
    ranks = [_Rank(deque(order)) for order in orders]
    ends: dict[Result, dict[int, int]] = defaultdict(dict)
    now = 0
    while any(rank.ahead or rank.pending for rank in ranks):
        for rank in ranks:
            following = rank.ahead[0] if rank.ahead else None
            if following is not None and _may_begin(following, rank, ends, num_stages, limit, now):
                rank.program.append(rank.ahead.popleft())
                ends[following.kind, following.stage][following.microbatch] = now + 1
                if following.kind is Kind.FORWARD:
                    rank.live += 1
                else:
                    rank.pending.append(replace(following, kind=Kind.WEIGHT))
            elif rank.pending:
                rank.program.append(rank.pending.popleft())
                rank.live -= 1
        now += 1
    return [rank.program for rank in ranks]


def _may_begin(
    action: Action, rank: _Rank, ends: dict[Result, dict[int, int]], num_stages: int, limit: int, now: int
) -> bool:
    if action.kind is Kind.FORWARD and rank.live == limit:
        return False
    return all(
        ends[need].get(action.microbatch, now + 1) <= now for need in needs(action.kind, action.stage, num_stages)
    )
