"""The memory of a plan's ranks for people: by category, beside a device, and what would fit it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwright.cost.hardware import Hardware
from shardwright.plan.fit import Fit, fullest
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord
from shardwright.report.table import ends, print_table, table
from shardwright.units import format_bytes


def print_memory(plan: Plan, records: Sequence[MemoryRecord], console: Console) -> None:
    """The table of the fullest rank at each place of the pipeline, and which of these is fullest."""
    of = "the fullest rank at each place of the pipeline" if plan.topology.pp > 1 else "the fullest rank"
    print_table(f"memory of {of}, estimated", _memory_table(plan, records), console)
    console.print()
    worst = fullest(records)
    place = f", of pipeline rank {plan.topology.coordinate(worst.rank).pp}" if plan.topology.pp > 1 else ""
    console.print(f"fullest  rank {worst.rank}{place}: {format_bytes(worst.peak)} at its peak")


def _memory_table(plan: Plan, records: Sequence[MemoryRecord]) -> Table:
    many, offloads = plan.topology.pp > 1, plan.spec.memory.offload != "none"
    first = ("pipeline rank",) if many else ()
    headings = ("rank", "parameters", "gradients", "optimizer", "buffers", "activations", "peak")
    made = table(*first, *headings, *(("on the host",) if offloads else ()))
    for record in ends(records):
        if record is None:
            made.add_row(*["…"] * len(made.columns))
            continue
        cells = [str(plan.topology.coordinate(record.rank).pp)] * many + [str(record.rank)]
        sizes = [record.parameters, record.gradients, record.optimizer, record.communication + record.offload]
        sizes += [record.activations, record.peak] + [record.host] * offloads
        made.add_row(*cells, *map(format_bytes, sizes))
    return made


def print_fit(fit: Fit, hardware: Hardware, console: Console) -> None:
    """Whether the fullest rank fits, and the changes with which it would."""
    console.print(Text(f"{hardware.name}  {fit}", "" if fit.fits else "red"))
    if fit.fits:
        return
    if not fit.changes:
        console.print("         no change of one or two fields fits: more ranks, a shorter sequence or a smaller model")
        return
    for change in fit.changes:
        console.print(f"         fits with {change}: {format_bytes(change.peak)}", soft_wrap=True)
