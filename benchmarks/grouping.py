"""Cases raced at a time: all of a race where memory holds them, or each of ours with those that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness import Case, Peak
from shardwright.units import Bytes


def takes(cases: Sequence[Case], memory: Sequence[Peak]) -> dict[str, int]:
    """Bytes that each case adds to the processes of all ranks. A ceiling was not measured: it keeps what the case does
    whose ceiling it is."""
    measured = {found.name: sum(found.peak) - sum(found.before) for found in memory}
    of = {case.name: [measured[other.name] for other in cases if other.ceiling == case.name] for case in cases}
    return {case.name: measured.get(case.name, max(of[case.name], default=0)) for case in cases}


def grouped(cases: Sequence[Case], sizes: Mapping[str, int], room: Bytes | None) -> list[list[Case]]:
    """The cases in groups of at most `room` bytes, None for any number; what cannot be apart may be more than that.

    A case of ours is once in a group, beside its peers and its ceiling, which may be in several.
    """
    if room is None or sum(sizes.values()) <= room:
        return [list(cases)]
    compared = [{case.name, *case.peers, case.ceiling} for case in cases if case.peers or case.ceiling]
    seen = set().union(*compared)
    groups: list[set[str]] = []
    for names in [*compared, *({case.name} for case in cases if case.name not in seen)]:
        merged = groups[-1] | names if groups else names
        if groups and sum(sizes.get(name, 0) for name in merged) <= room:
            groups[-1] = merged
        else:
            groups.append(names)
    return [[case for case in cases if case.name in names] for names in groups]
