"""A plan for people: its lines, then its pipeline as tables, as a grid and in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwright.plan.describe import describe
from shardwright.plan.pipeline import timeline_in_units, timeline_of
from shardwright.plan.plan import Plan
from shardwright.report.pipeline import RankRow, StageRow, rank_rows, stage_rows
from shardwright.schedule.action import Kind
from shardwright.schedule.grid import Row, grid
from shardwright.schedule.simulate import Timeline
from shardwright.units import format_bytes, format_count

Entry = TypeVar("Entry")

_MOST_ROWS = 20
"""Of longer tables and grids the middle is left out."""

_STYLES = {Kind.FORWARD: "blue", Kind.BACKWARD: "green", Kind.INPUT: "green", Kind.WEIGHT: "yellow"}


def print_plan(plan: Plan, console: Console) -> None:
    """Everything that a plan says, for a terminal of the console's width."""
    console.print(plan_lines(plan))
    console.print()
    if plan.topology.pp == 1:
        console.print("No pipeline: parallel.pp = 1, so every rank has all layers.")
        return
    timeline, in_units = timeline_of(plan), timeline_in_units(plan)
    console.print(_stage_table(stage_rows(plan)))
    console.print()
    _print_grid(in_units, console)
    console.print()
    console.print(_rank_table(rank_rows(plan, timeline)))
    console.print()
    console.print(f"bubble  {_percent(timeline.bubble)} by the estimated cost of each stage")
    console.print(f"        {_percent(in_units.bubble)} if F, I and W took one unit of time on every stage")


def plan_lines(plan: Plan) -> Table:
    """The lines of `describe`, labels beside them."""
    table = Table.grid(padding=(0, 2))
    for label, value in describe(plan):
        table.add_row(Text(label, style="yellow" if label == "warning" else "dim"), Text(value))
    return table


def _stage_table(rows: Sequence[StageRow]) -> Table:
    table = _table("stages", "stage", "rank", "layers", "with", "share of cost", "parameters", left=("with",))
    for row in _ends(rows):
        if row is None:
            table.add_row(*["…"] * 6)
            continue
        layers = f"{row.first_layer}" + (f"-{row.last_layer}" if row.last_layer > row.first_layer else "")
        parts = [name for name, has in (("embedding", row.embedding), ("head", row.head)) if has]
        share, parameters = f"{row.cost_share:.1%}".replace("%", " %"), format_count(row.parameters)
        table.add_row(str(row.stage), str(row.rank), layers, ", ".join(parts), share, parameters)
    return table


def _rank_table(rows: Sequence[RankRow]) -> Table:
    headings = ("rank", "stages", "computes", "live microbatches", "training state")
    table = _table("ranks of the pipeline in a step, by estimated costs", *headings)
    for row in _ends(rows):
        if row is None:
            table.add_row(*["…"] * 5)
            continue
        stages = ", ".join(map(str, row.stages))
        live, state = str(row.live_microbatches), format_bytes(row.state_bytes)
        table.add_row(str(row.rank), stages, _percent(row.busy), live, state)
    return table


def _table(title: str, *headings: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", header_style="dim")
    return table


def _print_grid(timeline: Timeline, console: Console) -> None:
    schedule = timeline.schedule
    drawn = grid(timeline, width=console.width)
    console.print(Text(f"schedule {schedule.name} in units of time: F, I and W take one each", "bold"))
    console.print(Text(drawn.axis, style="dim"))
    for row in _ends(drawn.rows):
        console.print(Text("…") if row is None else _coloured(row), no_wrap=True, crop=True)
    for note in drawn.notes:
        console.print(Text(note, style="dim"))


def _coloured(row: Row) -> Text:
    text = Text(row.label, style="")
    for cell in row.cells:
        text.append(cell.text, _STYLES[cell.kind] if cell.kind else "dim")
    text.rstrip()
    return text


def _ends(rows: Sequence[Entry]) -> list[Entry | None]:
    """All rows, or of many the first and the last, with None for those between."""
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    half = (_MOST_ROWS - 1) // 2
    return [*rows[:half], None, *rows[-half:]]


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
