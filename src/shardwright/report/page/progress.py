"""How training went: loss, gradient norm and throughput over steps, of one run or of several over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from shardwright.record.records import StepRecord
from shardwright.report.page.chart import Chart, Figure, Trace, colour, faded, plain, short
from shardwright.report.page.run import Run

_SMOOTHED_FROM = 200
_WINDOWS = 100
"""Steps from which a running mean is drawn over the single ones, and how many of its windows a run has."""

_MOST_MARKERS = 40

_STEP_AXIS = {"title": {"text": "step"}, "rangemode": "tozero"}


def progress_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts over steps."""
    return [
        _chart("loss", "Loss", "nats per token", runs, lambda step: step.loss, _validation, log=True),
        _chart(
            "grad-norm", "Gradient norm", "norm before clipping", runs, lambda step: step.grad_norm, _skipped, log=True
        ),
        _chart("throughput", "Throughput", "tokens/s", runs, lambda step: step.tokens_per_second),
        _chart("step-time", "Step time", "ms", runs, lambda step: step.seconds * 1e3),
    ]


def _chart(
    name: str,
    title: str,
    unit: str,
    runs: Sequence[Run],
    value: Callable[[StepRecord], float | None],
    more: Callable[[Run, int, bool], list[Trace]] = lambda run, index, many: [],
    log: bool = False,
) -> Chart:
    many = len(runs) > 1
    data = [trace for i, run in enumerate(runs) for trace in [*_lines(run, i, many, title, value), *more(run, i, many)]]
    rangemode = "normal" if log else "tozero"
    layout = {
        "xaxis": _STEP_AXIS,
        "yaxis": {"title": {"text": unit}, "rangemode": rangemode},
        "hovermode": "x unified",
        "showlegend": len(data) > 1,
    }
    return Chart(name, title, _note(runs), [Figure(title, data, layout)], log=log)


def _note(runs: Sequence[Run]) -> str:
    without = [run.name for run in runs if not run.steps]
    return f"No steps yet: {', '.join(without)}." if without else ""


def _lines(run: Run, index: int, many: bool, title: str, value: Callable[[StepRecord], float | None]) -> list[Trace]:
    """The values of all steps, and over those of a long run their running mean."""
    if not run.steps:
        return []
    steps, values = [step.step for step in run.steps], [value(step) for step in run.steps]
    window = len(steps) // _WINDOWS if len(steps) >= _SMOOTHED_FROM else 1
    name = plain(run.name) if many else title.lower()
    ink = colour(index)
    raw = _line(steps, values, name, faded(ink, 0.35) if window > 1 else ink, 1 if window > 1 else 1.6)
    if window == 1:
        return [raw | _group(run, many)]
    raw |= {"hoverinfo": "skip", "showlegend": False} if many else {}
    mean = _line(steps, _running_mean(values, window), f"{name}, mean of {window} steps", ink, 2)
    return [raw | _group(run, many), mean | _group(run, many)]


def _group(run: Run, many: bool) -> Trace:
    """A click on one of a run's entries in the legend is for all of its lines."""
    return {"legendgroup": run.name} if many else {}


def _line(steps: Sequence[int], values: Sequence[float | None], name: str, ink: str, width: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) == 1 else "lines",
        "x": list(steps),
        "y": [short(value) for value in values],
        "name": name,
        "line": {"color": ink, "width": width},
        "hovertemplate": "%{y:.5~g}",
    }


def _running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Of each step, the mean over it and those before it in the window; steps without a number do not count."""
    sums = [0.0, *accumulate(value or 0.0 for value in values)]
    counts = [0, *accumulate(int(value is not None) for value in values)]
    means = []
    for end in range(1, len(sums)):
        begin = max(0, end - window)
        count = counts[end] - counts[begin]
        means.append((sums[end] - sums[begin]) / count if count else None)
    return means


def _validation(run: Run, index: int, many: bool) -> list[Trace]:
    if not run.validation:
        return []
    ink = colour(index) if many else "#d98a1f"
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(run.validation) <= _MOST_MARKERS else "lines",
            "x": [row.step for row in run.validation],
            "y": [short(row.loss) for row in run.validation],
            "name": f"{plain(run.name)}, validation" if many else "validation",
            "line": {"color": ink, "width": 1.6, "dash": "dot"},
            "marker": {"color": ink, "size": 6},
            "hovertemplate": "%{y:.5~g}",
        }
        | _group(run, many)
    ]


def _skipped(run: Run, index: int, many: bool) -> list[Trace]:
    """Steps that were not applied stand on the axis: their numbers may be none."""
    skipped = [step for step in run.steps if not step.applied]
    if not skipped:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [step.step for step in skipped],
            "y": [short(step.grad_norm) or 0.0 for step in skipped],
            "name": f"{plain(run.name)}, skipped" if many else "skipped",
            "marker": {"color": "#c1121f", "symbol": "x", "size": 8},
            "hovertemplate": "skipped",
        }
        | _group(run, many)
    ]
