"""A plan for people: its lines, its pipeline as tables, as a grid and in numbers, its memory and what it sends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwright.cost.hardware import Hardware
from shardwright.plan.communication import most_by_group
from shardwright.plan.describe import describe
from shardwright.plan.fit import Fit, fullest_by_stage
from shardwright.plan.flops import flops_of
from shardwright.plan.pipeline import beginning_in_units, bubble_in_units, makespan_in_units, totals_of
from shardwright.plan.plan import Plan
from shardwright.report.communication import print_communication
from shardwright.report.memory import print_fit, print_memory
from shardwright.report.pipeline import RankRow, StageRow, rank_rows, stage_rows
from shardwright.report.table import ends, percent, print_table, table
from shardwright.schedule.action import Kind
from shardwright.schedule.grid import Row, grid
from shardwright.units import format_bytes, format_count

_STYLES = {Kind.FORWARD: "blue", Kind.BACKWARD: "green", Kind.INPUT: "green", Kind.WEIGHT: "yellow"}

_NARROWEST_COLUMN = 3
"""Characters of a unit of time in the grid, at least."""


def print_plan(
    plan: Plan,
    console: Console,
    hardware: Hardware | None = None,
    fit: Fit | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """Everything that a plan says, for a terminal of the console's width."""
    console.print(plan_lines(plan, hardware))
    console.print()
    _print_pipeline(plan, console)
    console.print()
    print_memory(plan, fullest_by_stage(plan), console)
    if hardware and fit:
        print_fit(fit, hardware, console)
    console.print()
    print_communication(most_by_group(plan, ranks_per_node), console)


def _print_pipeline(plan: Plan, console: Console) -> None:
    if plan.topology.pp == 1:
        layers = "the only layer" if plan.architecture.layers == 1 else f"all {plan.architecture.layers} layers"
        console.print(f"parallel.pp = 1: one stage, {layers}; no rank waits for another stage.")
        return
    print_table("stages", _stage_table(stage_rows(plan)), console)
    console.print()
    _print_grid(plan, console)
    console.print()
    print_table("ranks of the pipeline in a step, by estimated costs", _rank_table(rank_rows(plan)), console)
    console.print()
    console.print(f"bubble  {percent(totals_of(plan).bubble)} by the estimated cost of each stage")
    console.print(f"        {percent(bubble_in_units(plan))} if F, I and W took one unit of time on every stage")


def plan_lines(plan: Plan, hardware: Hardware | None = None) -> Table:
    """The lines of `describe`, labels beside them, and what the device is."""
    said, notes = describe(plan), ("decided", "warning")
    lines = [line for line in said if line[0] not in notes]
    lines.append(("flops", _flops(plan)))
    if hardware:
        lines.append(("hardware", _hardware(hardware)))
    made = Table.grid(padding=(0, 2))
    for label, value in lines + [line for line in said if line[0] in notes]:
        made.add_row(Text(label, style="yellow" if label == "warning" else "dim"), Text(value))
    return made


def _flops(plan: Plan) -> str:
    """ "3.23 TFLOP a token, 3.95 TFLOP with recomputation: 15.5 EFLOP a step, 6.94 PFLOP on each device"."""
    flops = flops_of(plan)
    again = flops.hardware_per_token != flops.model_per_token
    more = f", {_many(flops.hardware_per_token)} with recomputation" if again else ""
    step = f"{_many(flops.hardware_per_step)} a step, {_many(flops.hardware_per_device)} on each device"
    return f"{_many(flops.model_per_token)} a token{more}: {step}"


def _many(flops: float) -> str:
    """Three digits and a prefix: "27.1 EFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if flops < 1000:
            return f"{flops:.3g} {prefix}FLOP"
        flops /= 1000
    return f"{flops:.3g} ZFLOP"


def _hardware(hardware: Hardware) -> str:
    return (
        f"{hardware.name}: {hardware.sold}, {format_bytes(hardware.usable)} usable; "
        f"{hardware.peak_bf16 / 1e12:.0f} TFLOP/s, {hardware.memory_rate / 1e12:.3g} TB/s; "
        f"{hardware.gpus_per_node} in a node"
    )


def _stage_table(rows: Sequence[StageRow]) -> Table:
    made = table("stage", "rank", "layers", "with", "share of cost", "parameters", left=("with",))
    for row in ends(rows):
        if row is None:
            made.add_row(*["…"] * 6)
            continue
        layers = f"{row.first_layer}" + (f"-{row.last_layer}" if row.last_layer > row.first_layer else "")
        parts = [name for name, has in (("embedding", row.embedding), ("head", row.head)) if has]
        share, parameters = f"{row.cost_share:.1%}".replace("%", " %"), format_count(row.parameters)
        made.add_row(str(row.stage), str(row.rank), layers, ", ".join(parts), share, parameters)
    return made


def _rank_table(rows: Sequence[RankRow]) -> Table:
    made = table("rank", "stages", "computes", "live microbatches")
    for row in ends(rows):
        if row is None:
            made.add_row(*["…"] * 4)
            continue
        stages = ", ".join(map(str, row.stages))
        made.add_row(str(row.rank), stages, percent(row.busy), str(row.live_microbatches))
    return made


def _print_grid(plan: Plan, console: Console) -> None:
    timeline = beginning_in_units(plan, until=console.width / _NARROWEST_COLUMN)
    drawn = grid(timeline, width=console.width, makespan=makespan_in_units(plan))
    console.print(Text(f"schedule {timeline.schedule.name} in units of time: F, I and W take one each", "bold"))
    console.print(Text(drawn.axis, style="dim"))
    for row in ends(drawn.rows):
        console.print(Text("…") if row is None else _coloured(row), no_wrap=True, crop=True)
    for note in drawn.notes:
        console.print(Text(note, style="dim"))


def _coloured(row: Row) -> Text:
    text = Text(row.label, style="")
    for cell in row.cells:
        text.append(cell.text, _STYLES[cell.kind] if cell.kind else "dim")
    text.rstrip()
    return text
