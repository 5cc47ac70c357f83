"""What a run is and came to, in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.plan.communication import total_sent
from shardwright.plan.describe import describe, layout
from shardwright.report.page.pipeline import pipelines
from shardwright.report.page.run import Run
from shardwright.report.table import percent
from shardwright.units import format_bytes, format_count, format_seconds

Facts = list[tuple[str, str]]

UNKNOWN = "not recorded"


def headline(run: Run) -> Facts:
    """The numbers that a person looks for first; for several runs, the rows of their table."""
    steps = run.plan.spec.train.steps
    rate, seconds = run.tokens_per_second, run.seconds_per_step
    last = run.steps[-1] if run.steps else None
    return [
        ("state", run.state),
        ("model", f"{format_count(run.plan.architecture.num_parameters)} parameters"),
        ("layout", layout(run.plan)),
        ("steps", f"{last.step if last else 0:,} of {steps:,}"),
        ("tokens/s, median", f"{rate:,.0f}" if rate is not None else UNKNOWN),
        ("step, median", format_seconds(seconds) if seconds is not None else UNKNOWN),
        ("training loss", _number(last.loss if last else None)),
        ("validation loss", _number(run.validation[-1].loss if run.validation else None)),
    ]


def comparison(run: Run) -> Facts:
    """More of it, for runs side by side."""
    parallel, files = run.plan.spec.parallel, list(run.ranks.values())
    peaks = [file.measured_memory.peak for file in files if file.measured_memory]
    sent = [total_sent(file.sent) / max(1, file.steps) for file in files]
    measured = [pipeline.measured.bubble for pipeline in pipelines(run) if pipeline.measured]
    return [
        *headline(run),
        ("ZeRO", str(parallel.zero)),
        ("schedule", f"{parallel.pipeline_schedule}, {run.plan.num_microbatches} microbatches"),
        ("peak of the fullest rank, measured", format_bytes(max(peaks)) if peaks else UNKNOWN),
        ("sent in a step by the busiest rank, measured", format_bytes(max(sent)) if sent else UNKNOWN),
        ("bubble, planned", percent(pipelines(run)[0].planned.bubble)),
        ("bubble, measured (mean)", percent(sum(measured) / len(measured)) if measured else UNKNOWN),
    ]


def plan_facts(run: Run) -> Facts:
    """The plan, as it was printed when the run began."""
    return describe(run.plan)


def environments(run: Run) -> Facts:
    """In what the ranks ran, each kind of environment once."""
    kinds: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for rank, file in run.ranks.items():
        kinds.setdefault(tuple(file.environment.items()), []).append(rank)
    facts: Facts = [("device", run.plan.device), ("precision", f"{run.plan.dtype}, gradients {run.plan.grad_dtype}")]
    for items, ranks in kinds.items():
        of = f" (ranks {_ranges(ranks)})" if len(kinds) > 1 else ""
        facts += [(f"{name}{of}", str(value)) for name, value in items]
    return facts


def checkpoints(run: Run) -> list[tuple[str, ...]]:
    """A row for each checkpoint that was saved, under its headings."""
    headings = ("step", "bytes", "training stood still", "complete after")
    rows = [
        (f"{save.step:,}", format_bytes(save.bytes), format_seconds(save.stall), format_seconds(save.seconds))
        for save in run.saves
    ]
    return [headings, *rows] if rows else []


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _ranges(ranks: Sequence[int]) -> str:
    """Sorted numbers in runs: 0 to 3, 8."""
    groups: list[list[int]] = []
    for rank in sorted(ranks):
        if groups and groups[-1][-1] == rank - 1:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)
