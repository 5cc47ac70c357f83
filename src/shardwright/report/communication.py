"""What a plan sends for people: bytes of a step by what they are for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from shardwright.plan.communication import Share
from shardwright.report.table import print_table, table
from shardwright.units import format_bytes, format_count


def print_communication(shares: Sequence[Share], console: Console) -> None:
    """A row for each purpose and axis, of the rank that sends most for it."""
    if not shares:
        console.print("Nothing is sent: there is one rank.")
        return
    nodes = any(share.crosses_nodes is not None for share in shares)
    headings = ("for", "axis", "rank", "calls", "bytes", *(("crosses nodes",) if nodes else ()))
    made = table(*headings, left=("for", "axis"))
    for share in shares:
        crosses = ["yes" if share.crosses_nodes else "no"] if nodes else []
        cells = str(share.rank), format_count(share.calls), format_bytes(share.sent)
        made.add_row(share.group, share.axis, *cells, *crosses)
    print_table("sent in a step by the rank that sends most for it, estimated", made, console)
