"""Builders of schedules: from a name and three numbers to what each rank of the pipeline computes, in order.

They say nothing of transfers: those are added by `transfers.with_transfers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from shardwright.schedule.action import Action, Kind, Schedule
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.zero_bubble import v_shaped, zb_h1

Programs = Sequence[Sequence[Action]]


def placement(name: str, num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """The rank of each stage, in the order of the model; `virtual_stages` is the number of stages per rank.

    Raises ScheduleError for a name that no builder has, and for a number of stages per rank that it does not take.
    """
    if name not in _BUILDERS:
        raise ScheduleError(f'schedule: there is none named "{name}"', f"those that exist: {', '.join(NAMES)}")
    for what, count in (("ranks", num_ranks), ("virtual stages per rank", virtual_stages)):
        if count < 1:
            raise ScheduleError(f"schedule {name}: {count} {what}", "at least 1")
    required = REQUIRED_VIRTUAL_STAGES[name]
    if required is not None and virtual_stages != required:
        raise ScheduleError(
            f"schedule {name}: {virtual_stages} virtual stages per rank, but it takes exactly {required}",
            f'virtual stages = {required}, or schedule = "interleaved", which takes any number',
        )
    if name == "zbv":
        return tuple(range(num_ranks)) + tuple(reversed(range(num_ranks)))
    return tuple(range(num_ranks)) * virtual_stages


def build(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """The named schedule, actions that compute only. Raises ScheduleError as `placement` does."""
    placed = placement(name, num_ranks, virtual_stages)
    if num_microbatches < 1:
        raise ScheduleError(f"schedule {name}: {num_microbatches} microbatches", "at least 1")
    programs = _BUILDERS[name](num_ranks, virtual_stages, num_microbatches)
    return Schedule(name, placed, num_microbatches, tuple(tuple(program) for program in programs))


def forward_only(placement: Sequence[int], num_microbatches: int) -> Schedule:
    """The schedule of an evaluation: every rank takes its stages in order, for one group of microbatches after another.

    A group has as many as there are ranks, so that between two stages of a rank no more than that are kept.
    """
    num_ranks = max(placement) + 1
    programs: list[list[Action]] = [[] for _ in range(num_ranks)]
    for begin in range(0, num_microbatches, num_ranks):
        group = range(begin, min(begin + num_ranks, num_microbatches))
        for stage, rank in enumerate(placement):
            programs[rank] += [Action(Kind.FORWARD, stage, microbatch) for microbatch in group]
    return Schedule("forward_only", tuple(placement), num_microbatches, tuple(tuple(program) for program in programs))


def _gpipe(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Programs:
    """All forwards, then all backwards (GPipe, Huang et al. 2019)."""
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    return [[Action(kind, s, j) for kind in kinds for j in range(num_microbatches)] for s in range(num_ranks)]


def _one_forward_one_backward(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Programs:
    """As many forwards as there are stages behind, then forwards and backwards in turn (PipeDream-flush, 1F1B)."""
    programs = []
    for stage in range(num_ranks):
        forwards = [Action(Kind.FORWARD, stage, microbatch) for microbatch in range(num_microbatches)]
        backwards = [Action(Kind.BACKWARD, stage, microbatch) for microbatch in range(num_microbatches)]
        programs.append(_alternate(forwards, backwards, warmup=num_ranks - 1 - stage))
    return programs


def _interleaved(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Programs:
    """1F1B over several stages per rank (Narayanan et al. 2021), for any number of microbatches.

    A rank takes its stages in turn for a group of microbatches, then for the next group. The paper's groups have as
    many microbatches as there are ranks, which must divide their number. Here groups are as equal as they can be and
    no smaller than that, so that a group's last microbatch has left a stage no sooner than the first has gone around.
    """
    if virtual_stages == 1:
        return _one_forward_one_backward(num_ranks, virtual_stages, num_microbatches)
    groups = _groups(num_microbatches, num_ranks)
    programs = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * virtual_stages, num_ranks)
        forwards = [Action(Kind.FORWARD, s, j) for group in groups for s in stages for j in group]
        backwards = [Action(Kind.BACKWARD, s, j) for group in groups for s in reversed(stages) for j in group]
        warmup = (virtual_stages - 1) * len(groups[0]) + 2 * (num_ranks - 1 - rank)
        programs.append(_alternate(forwards, backwards, warmup))
    return programs


def _groups(num_microbatches: int, least: int) -> list[range]:
    """Microbatches cut into as many groups of at least `least` as there can be, sizes differing by at most one."""
    count = max(1, num_microbatches // least)
    cuts = [-(-index * num_microbatches // count) for index in range(count + 1)]  # rounded up: the larger come first
    return [range(begin, end) for begin, end in pairwise(cuts)]


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, or all, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
    return [*forwards[:warmup], *(action for pair in pairs for action in pair), *backwards[steady:]]


_BUILDERS: dict[str, Callable[[int, int, int], Programs]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb-h1": zb_h1,
    "zbv": v_shaped,
}

NAMES = tuple(_BUILDERS)

# Stages per rank that a schedule asks for; None takes any number.
REQUIRED_VIRTUAL_STAGES: dict[str, int | None] = {"gpipe": 1, "1f1b": 1, "interleaved": None, "zb-h1": 1, "zbv": 2}
