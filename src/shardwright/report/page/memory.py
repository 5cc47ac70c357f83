"""Memory of every rank as bars of its categories, estimated beside measured."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.record.records import MemoryRecord
from shardwright.report.page.chart import Chart, Figure, Trace, byte_unit, faded, plain
from shardwright.report.page.run import Run
from shardwright.units import format_bytes

CATEGORIES = {
    "parameters": "#2563c9",
    "gradients": "#2a9d62",
    "optimizer": "#d98a1f",
    "communication": "#8a5cc2",
    "offload": "#1f9aa8",
    "activations": "#d1495b",
}

_MOST_RANKS = 256
_LEAST_PLACES = 6
"""Of fewer ranks the bars do not fill the width."""

_NOTE = (
    "Each rank has two bars: estimated (pale) and, to its right, measured. Parameters, gradients, optimizer state and "
    "buffers rest between microbatches; activations are the most that a step adds to them. A line marks the most that "
    "was live at one moment, transfers included."
)


def memory_charts(runs: Sequence[Run]) -> list[Chart]:
    """One chart; runs are chosen."""
    figures = [_figure(run) for run in runs if run.ranks]
    return [Chart("memory", "Memory per rank", _NOTE, figures, "run", height=380)] if figures else []


def _figure(run: Run) -> Figure:
    estimated = [file.estimated_memory for file in run.ranks.values()]
    measured = [file.measured_memory for file in run.ranks.values() if file.measured_memory]
    fullest = sorted(measured or estimated, key=lambda record: -record.peak)
    shown = sorted(record.rank for record in fullest[:_MOST_RANKS])
    places = {rank: place for place, rank in enumerate(shown)}
    unit, name = byte_unit(max(max(record.peak, record.total) for record in estimated + measured))
    data = [
        trace
        for records, shift, pale in ((estimated, -0.2, True), (measured, 0.2, False))
        for trace in _bars([record for record in records if record.rank in places], places, shift, pale, unit, name)
    ]
    few, beside = len(shown) <= 16, max(0.6, (_LEAST_PLACES - len(shown)) / 2)
    layout = {
        "barmode": "stack",
        "xaxis": {
            "title": {"text": "rank"},
            "zeroline": False,
            "range": [-beside, len(shown) - 1 + beside],
            "tickvals": list(range(0, len(shown), 1 if few else -(-len(shown) // 16))),
            "ticktext": [str(shown[i]) for i in range(0, len(shown), 1 if few else -(-len(shown) // 16))],
        },
        "yaxis": {"title": {"text": name}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    return Figure(plain(run.name), data, layout, _numbers(fullest, bool(measured), len(run.ranks), len(shown)))


def _numbers(fullest: Sequence[MemoryRecord], measured: bool, of: int, shown: int) -> list[tuple[str, str]]:
    first = fullest[0]
    origin = "measured" if measured else "estimated"
    numbers = [(f"fullest rank, {origin}", f"rank {first.rank}: {format_bytes(first.peak)}")]
    if first.host:
        numbers.append(("on the host", format_bytes(first.host)))
    return [*numbers, *([("shown", f"the {shown} fullest of {of} ranks")] if shown < of else [])]


def _bars(
    records: Sequence[MemoryRecord], places: dict[int, int], shift: float, pale: bool, unit: int, name: str
) -> list[Trace]:
    origin = "estimated" if pale else "measured"
    at = [places[record.rank] + shift for record in records]
    traces: list[Trace] = []
    for category, ink in CATEGORIES.items():
        sizes = [getattr(record, category) for record in records]
        if any(sizes):
            traces.append(
                {
                    "type": "bar",
                    "x": at,
                    "y": [size / unit for size in sizes],
                    "width": 0.38,
                    "name": category,
                    "legendgroup": category,
                    "showlegend": not pale,
                    "marker": {"color": faded(ink, 0.45) if pale else ink, "line": {"width": 0}},
                    "customdata": [[record.rank, size] for record, size in zip(records, sizes, strict=True)],
                    "hovertemplate": f"rank %{{customdata[0]}}, {category} {origin}<br>%{{y:.4~g}} {name}"
                    "<br>%{customdata[1]:,} bytes<extra></extra>",
                }
            )
    peaks: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": at,
        "y": [record.peak / unit for record in records],
        "name": "peak",
        "legendgroup": "peak",
        "showlegend": not pale,
        "marker": {
            "symbol": "line-ew",
            "size": 300 / max(12, len(places) * 2),
            "line": {"width": 2, "color": "#1b2430"},
        },
        "customdata": [[record.rank, record.peak] for record in records],
        "hovertemplate": f"rank %{{customdata[0]}}, peak {origin}<br>%{{y:.4~g}} {name}"
        "<br>%{customdata[1]:,} bytes<extra></extra>",
    }
    return [*traces, peaks] if any(record.peak for record in records) else traces
