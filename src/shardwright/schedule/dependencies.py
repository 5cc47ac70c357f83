"""Who waits for whom: the one place that says it."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.schedule.action import Action, Kind

# A result is named by what computes it: (FORWARD, s) is the output of stage s, (INPUT, s) the gradient of its input,
# which B computes as well as I. Results and what needs them always belong to the same microbatch.
Result = tuple[Kind, int]

_COUNTERPARTS = {
    Kind.SEND_OUTPUT: (Kind.RECEIVE_INPUT, 1),
    Kind.RECEIVE_INPUT: (Kind.SEND_OUTPUT, -1),
    Kind.SEND_GRADIENT: (Kind.RECEIVE_GRADIENT, -1),
    Kind.RECEIVE_GRADIENT: (Kind.SEND_GRADIENT, 1),
}


def needs(kind: Kind, stage: int, num_stages: int) -> tuple[Result, ...]:
    """The results that an action which computes needs, of its own microbatch."""
    if kind is Kind.FORWARD:
        return ((Kind.FORWARD, stage - 1),) if stage > 0 else ()
    if kind is Kind.WEIGHT:
        return ((Kind.INPUT, stage),)
    own = (Kind.FORWARD, stage)
    return (own, (Kind.INPUT, stage + 1)) if stage + 1 < num_stages else (own,)


def result(kind: Kind, stage: int) -> Result | None:
    """The result that an action which computes gives to others: None for W."""
    if kind is Kind.WEIGHT:
        return None
    return (Kind.FORWARD if kind is Kind.FORWARD else Kind.INPUT, stage)


def send(kind: Kind, stage: int, microbatch: int, placement: Sequence[int]) -> Action | None:
    """The transfer that gives what an action computed to another rank; None where no other rank needs it."""
    if kind is Kind.WEIGHT:
        return None
    transfer, step = (Kind.SEND_OUTPUT, 1) if kind is Kind.FORWARD else (Kind.SEND_GRADIENT, -1)
    if not 0 <= stage + step < len(placement) or placement[stage + step] == placement[stage]:
        return None
    return Action(transfer, stage, microbatch)


def counterpart(transfer: Action) -> Action:
    """The other end of a transfer: the receive of a send, the send of a receive."""
    kind, step = _COUNTERPARTS[transfer.kind]
    return Action(kind, transfer.stage + step, transfer.microbatch)


def peer(transfer: Action, placement: Sequence[int]) -> int:
    """The rank at the other end of a transfer."""
    return placement[transfer.stage + _COUNTERPARTS[transfer.kind][1]]
