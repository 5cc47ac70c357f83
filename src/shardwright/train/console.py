"""What a person sees: the plan, a live progress bar, validations, and a closing summary. Rank 0 alone shows it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shardwright.plan.describe import describe
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord, SaveRecord, StepRecord, ValidationRecord
from shardwright.train.directory import RunDirectory
from shardwright.train.loop import Outcome
from shardwright.units import format_bytes, format_seconds

_LINES_WITHOUT_TERMINAL = 10
_MOST_RANKS = 4


def make_console() -> Console:
    """Standard error; where it is no terminal, wide enough that no table is cut."""
    console = Console(file=sys.stderr, highlight=False)
    return console if console.is_terminal else Console(file=sys.stderr, highlight=False, width=120)


def print_plan(plan: Plan, directory: RunDirectory, changes: Sequence[str] = ()) -> None:
    """The resolved plan, one line a fact, and what is asked for otherwise than before."""
    console = make_console()
    table = Table.grid(padding=(0, 2))
    changed = [("changed", change) for change in changes]
    for label, value in [*describe(plan), *changed, ("run", str(directory.path))]:
        style = "yellow" if label in ("warning", "changed") else "dim"
        table.add_row(f"[{style}]{label}[/]", value)
    console.print(table)
    console.print()


class ConsoleProgress:
    """A live bar on a terminal; a line now and then where there is none."""

    def __init__(self, plan: Plan, start: int = 0) -> None:
        train = plan.spec.train
        self._total = min(train.steps, train.stop_after) if train.stop_after else train.steps
        self._console = make_console()
        self._live = self._console.is_terminal
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._progress.add_task("train", total=self._total, completed=start, numbers="")
        self._progress.start()

    def on_step(self, record: StepRecord) -> None:
        """See `Observer`."""
        numbers = f"loss {record.loss:.4f}  norm {record.grad_norm:.2f}  {record.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=record.step, numbers=numbers)
        every = max(1, self._total // _LINES_WITHOUT_TERMINAL)
        if not self._live and (record.step == 1 or record.step % every == 0 or record.step == self._total):
            self._console.print(f"step {record.step}/{self._total}  {numbers}")
        if not record.applied:
            self._console.print(f"step {record.step} skipped: loss {record.loss:g}, gradient norm {record.grad_norm:g}")

    def on_validation(self, record: ValidationRecord) -> None:
        """See `Observer`."""
        self._console.print(f"step {record.step}  validation loss {record.loss:.4f}")

    def on_save(self, record: SaveRecord) -> None:
        """See `Observer`."""
        size, took = format_bytes(record.bytes), format_seconds(record.seconds)
        self._console.print(f"step {record.step}  saved, {size} in {took}; stood still {format_seconds(record.stall)}")

    def tell(self, text: str) -> None:
        """Something worth a look, above the bar."""
        self._console.print(text, style="yellow", soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def print_summary(
    recipe: str,
    directory: RunDirectory,
    outcome: Outcome,
    steps: Sequence[StepRecord],
    memory: Sequence[tuple[MemoryRecord, MemoryRecord]],
    report: Path | None = None,
) -> None:
    """How the run went: losses, speed, memory estimated beside measured, where it is and what to do next."""
    console = make_console()
    console.print()
    first, last = outcome.first_validation, outcome.last_validation
    if first is not None and last is not None:
        console.print(f"validation loss  {first.loss:.4f} -> {last.loss:.4f}  ({last.num_targets:,} held-out tokens)")
    if steps:
        rates = sorted(step.tokens_per_second for step in steps[1:] or steps)
        rate = rates[len(rates) // 2]
        skipped = f", {outcome.skipped} skipped" if outcome.skipped else ""
        console.print(
            f"{outcome.steps} steps{skipped} in {format_seconds(outcome.seconds)}, {rate:,.0f} tokens/s (median)"
        )
    if memory:
        console.print(_memory_table(memory))
    state = "stopped early, as asked" if outcome.stopped else "complete"
    saved = directory.newest_checkpoint()
    where = f", {saved.relative_to(directory.path)}" if saved is not None else ""
    console.print(f"run {state}: {directory.path}  (steps.jsonl, validation.jsonl, plan.json, ranks/{where})")
    if report is not None:
        console.print(f"look at it: {report} in a browser", soft_wrap=True)
    if outcome.stopped and saved is not None:
        again = f"shardwright train {recipe} --run-dir {directory.path} --resume"
        console.print(f"go on with: [bold]{again}[/]", soft_wrap=True)
    else:
        console.print(f"next: prove this layout with [bold]shardwright verify {recipe}[/]")


def _memory_table(memory: Sequence[tuple[MemoryRecord, MemoryRecord]]) -> Table:
    """Estimated and measured bytes per category, the worst rank first."""
    on_host = any(measured.host for _, measured in memory)
    table = Table(box=None, padding=(0, 1), pad_edge=False, title_justify="left")
    table.title = "memory of the first step: what rests between microbatches, and the most at one moment"
    headings = ["parameters", "gradients", "optimizer", "buffers", "activations", "peak", *["host"] * on_host]
    for heading in ("rank", "", *headings):
        table.add_column(heading, justify="left" if heading in ("rank", "") else "right", no_wrap=True)
    ordered = sorted(memory, key=lambda pair: -pair[1].peak)
    for estimated, measured in ordered[:_MOST_RANKS]:
        for record in (estimated, measured):
            resting = (record.parameters, record.gradients, record.optimizer, record.communication + record.offload)
            most = [format_bytes(size) if record.peak else "not counted" for size in (record.activations, record.peak)]
            host = [format_bytes(record.host)] * on_host
            table.add_row(str(record.rank), record.origin, *map(format_bytes, resting), *most, *host)
    if len(ordered) > _MOST_RANKS:
        table.caption = f"the {_MOST_RANKS} fullest of {len(ordered)} ranks; ranks/ has all"
    return table
