"""What is told of a collective that did not end: where every rank was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwright.comm.whereabouts import Sighting
from shardwright.units import Seconds, format_seconds


def report(timeout: Seconds, world_size: int, sightings: Mapping[int, Sighting]) -> str:
    """The text of a hang: a line for each place where ranks were seen, and which of them to look at first."""
    lines = [f"run.collective_timeout: a collective did not end within {format_seconds(timeout)}"]
    places: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(sightings):
        places.setdefault((sightings[rank].doing, sightings[rank].waiting), []).append(rank)
    for (doing, waiting), ranks in places.items():
        longest = format_seconds(max(sightings[rank].seconds for rank in ranks))
        place = f"waits in {waiting}" if waiting else "in no collective"
        lines.append(f"  {named(ranks)}: {doing}, {place} for {longest}")
    if unseen := [rank for rank in range(world_size) if rank not in sightings]:
        lines.append(f"  {named(unseen)}: not seen")
    free = [rank for rank, sighting in sightings.items() if not sighting.waiting]
    return "\n".join([*lines, f"  {_way_out(sorted([*free, *unseen]), len(places))}"])


def _way_out(suspects: Sequence[int], num_places: int) -> str:
    if suspects:
        verb = "is" if len(suspects) == 1 else "are"
        return (
            f"{named(suspects)} {verb} in no collective: look there first; "
            "if that is slow and not stuck, raise run.collective_timeout"
        )
    if num_places == 1:
        return "all wait in the same collective: look at the network between them"
    return "all wait, in different collectives: a message was lost, or the ranks' collectives differ in their order"


def named(ranks: Sequence[int]) -> str:
    """Sorted ranks in few words: rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"
