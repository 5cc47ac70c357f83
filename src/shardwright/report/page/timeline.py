"""The pipeline's timeline: what each rank was to do in one step above what it did, in one chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardwright.report.page.chart import GREY, Chart, Figure, Trace, faded, plain
from shardwright.report.page.pipeline import Measured, Pipeline, pipelines
from shardwright.report.page.run import Run
from shardwright.report.table import percent
from shardwright.schedule.action import Action

_COLOURS = {
    "F": "#2563c9",
    "B": "#2a9d62",
    "I": "#1f9aa8",
    "W": "#d98a1f",
    "waits": faded(GREY, 0.3),
    "sends": "#8a5cc2",
    "receives": "#c2579a",
    "other phases": "#5c6773",
}
_THIN = frozenset({"sends", "receives"})
_MOST_BARS = 60_000
"""Of all pipelines of a page."""

_NOTE = (
    "One step of the ranks that differ along pp alone, from their first action on. Planned: by the FLOPs of the "
    "stages, scaled to the measured work; transfers take no time. Measured: an action's wait for another stage is "
    "drawn at its beginning. The bubble is the share of all ranks' time, to the last action's end, in which they do "
    "not work on an action. Replayed: the schedule with every action as long as it was measured."
)


class Bar(NamedTuple):
    """Something that a rank does, of one of the kinds of `_COLOURS`; times in seconds."""

    rank: int
    kind: str
    begin: float
    end: float
    says: str


@dataclass(frozen=True)
class _Axis:
    """In what the time is shown."""

    scale: float
    title: str
    unit: str


_MILLISECONDS = _Axis(1e3, "ms since the first action", "ms")
_SHARES = _Axis(1e2, "% of the planned step", "%")


def timeline_charts(runs: Sequence[Run]) -> list[Chart]:
    """One chart; pipelines are chosen."""
    figures: list[Figure] = []
    bars = left_out = ranks = 0
    for run in runs:
        for pipeline in pipelines(run):
            if figures and bars > _MOST_BARS:
                left_out += 1
                continue
            figure = _figure(pipeline, f"{plain(run.name)}, " if len(runs) > 1 else "")
            bars += sum(len(trace["x"]) for trace in figure.data)
            ranks = max(ranks, len(pipeline.ranks))
            figures.append(figure)
    note = _NOTE + (f" {left_out} more pipelines are in trace.json." if left_out else "")
    height = 150 + min(1200, 2 * max(90, 26 * ranks))
    return [Chart("timeline", "Pipeline, planned beside measured", note, figures, "pipeline", height=height)]


def _figure(pipeline: Pipeline, prefix: str) -> Figure:
    measured = pipeline.measured
    axis = _MILLISECONDS if measured else _SHARES
    planned = [
        Bar(rank, _kind(span.action), span.begin, span.end, span.action.in_words)
        for rank, spans in zip(pipeline.ranks, pipeline.planned.spans, strict=True)
        for span in spans
    ]
    done = list(_measured_bars(measured, pipeline.ranks)) if measured else []
    present = {bar.kind for bar in planned + done}
    kinds = [kind for kind in _COLOURS if kind in present]
    data = [trace for kind in kinds for trace in _traces(kind, planned, done, axis)]
    rows = [f"rank {rank}" for rank in pipeline.ranks]
    halves = {"planned": [0.54, 1.0], "measured": [0.0, 0.46]} if measured else {"planned": [0.0, 1.0]}
    layout = {
        "barmode": "overlay",
        "bargap": 0.12,
        "hovermode": "closest",
        "xaxis": {"title": {"text": axis.title}, "anchor": "y2" if measured else "y", "zeroline": False},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
    }
    for half, (name, domain) in zip(("yaxis", "yaxis2"), halves.items(), strict=False):
        layout[half] = {
            "domain": domain,
            "type": "category",
            "categoryorder": "array",
            "categoryarray": rows,
            "range": [len(rows) - 0.5, -0.5],
            "title": {"text": name, "standoff": 14},
            "automargin": True,
            "showgrid": False,
        }
    return Figure(f"{prefix}{pipeline.label}", data, layout, _numbers(pipeline))


def _numbers(pipeline: Pipeline) -> list[tuple[str, str]]:
    measured = pipeline.measured
    numbers = [("bubble, planned", _percent(pipeline.planned.bubble))]
    if measured is None:
        return [*numbers, ("measured", "no whole pipeline's timeline is in the run directory")]
    numbers.append(("bubble, measured", _percent(measured.bubble)))
    numbers.append(("step recorded", str(measured.timelines[0].step)))
    numbers.append(("pipeline's part, measured", f"{measured.times.makespan * 1e3:.4g} ms"))
    if measured.times.makespan:
        off = measured.times.replayed / measured.times.makespan - 1
        numbers.append(("replayed", f"{measured.times.replayed * 1e3:.4g} ms, {off:+.1%}".replace("%", " %")))
    return numbers


def _percent(share: float) -> str:
    return percent(share) if share >= 0.1 else f"{100 * share:.1f} %"


def _kind(action: Action | None) -> str:
    if action is None:
        return "other phases"
    if action.kind.computes:
        return action.kind.value
    return "sends" if action.kind.sends else "receives"


def _measured_bars(measured: Measured, ranks: Sequence[int]) -> Iterable[Bar]:
    """Segments, those that waited in two bars; a phase before the first action is cut at it."""
    for rank, timeline in zip(ranks, measured.timelines, strict=True):
        for segment in timeline.segments:
            begin, end = segment.begin - measured.begin, segment.end - measured.begin
            action = Action.from_words(segment.doing)
            says = (
                f"{segment.doing}, begin {begin * 1e3:.3f}, end {end * 1e3:.3f}, waited {segment.waited * 1e3:.3f} ms"
            )
            if action is None and end <= 0:
                continue
            works = max(begin, 0.0) + segment.waited
            if segment.waited > 0:
                yield Bar(rank, "waits", works - segment.waited, works, says)
            yield Bar(rank, _kind(action), works, end, says)


def _traces(kind: str, planned: Sequence[Bar], done: Sequence[Bar], axis: _Axis) -> list[Trace]:
    """The bars of a kind in both halves, under one entry of the legend."""
    halves = [(bars, name) for bars, name in ((planned, "y"), (done, "y2")) if any(bar.kind == kind for bar in bars)]
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": kind,
            "legendgroup": kind,
            "showlegend": index == 0,
            "yaxis": name,
            "y": [f"rank {bar.rank}" for bar in bars if bar.kind == kind],
            "base": [round(bar.begin * axis.scale, 4) for bar in bars if bar.kind == kind],
            "x": [round((bar.end - bar.begin) * axis.scale, 4) for bar in bars if bar.kind == kind],
            "width": 0.5 if kind in _THIN else 0.88,
            "customdata": [_hover(bar, axis) for bar in bars if bar.kind == kind],
            "hovertemplate": "%{y}: %{customdata}<extra></extra>",
            "marker": {"color": _COLOURS[kind], "line": {"width": 0.0 if kind in _THIN else 0.5, "color": "#ffffff"}},
        }
        for index, (bars, name) in enumerate(halves)
    ]


def _hover(bar: Bar, axis: _Axis) -> str:
    if "," in bar.says:
        return bar.says
    return f"{bar.says}, begin {bar.begin * axis.scale:.3f}, end {bar.end * axis.scale:.3f} {axis.unit}"
