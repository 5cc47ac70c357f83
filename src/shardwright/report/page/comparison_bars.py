"""Horizontal bars, a place for each technique of a comparison, and pairs of stacks that are estimated and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shardwright.report.page.chart import Figure, Trace, byte_unit, faded, plain
from shardwright.units import format_bytes

Row = dict[str, Any]

PALE = 0.45
_TEXT, _SOFT = "#1b2430", "#5c6773"
_HALVES = (("measured", -0.2), ("estimated", 0.2))
"""The two bars of a place; the axis points down, so that measured is the upper one."""


def bars(name: str, places: Iterable[float], values: Sequence[float], width: float, ink: str) -> Trace:
    """Bars of one colour."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(places),
        "x": list(values),
        "width": width,
        "marker": {"color": ink, "line": {"width": 0}},
    }


def axes(rows: Sequence[Row], title: str, most: float) -> dict[str, Any]:
    """The layout of a chart whose places are the names of `rows`, up to `most`."""
    return {
        "barmode": "overlay",
        "hovermode": "closest",
        "xaxis": {"title": {"text": title}, "range": [0, most], "separatethousands": True},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [f"{plain(row['name'])}  " for row in rows],
            "range": [len(rows) - 0.4, -0.6],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
    }


def height(rows: Sequence[Row], each: int) -> int:
    """Of a chart with so many pixels for each place."""
    return 110 + each * len(rows)


def stacked(
    whole: str,
    rows: Sequence[Row],
    inks: Mapping[str, str],
    parts: Callable[[Row, str], Mapping[str, int]],
    total: Callable[[Row, str], int],
    title: str,
    marked: bool,
) -> Figure:
    """Two bars of parts for each row, their `total` in words behind them, with a line at it where it is `marked`."""
    most = max(max(total(row, o), sum(parts(row, o).get(p, 0) for p in inks)) for row in rows for o, _ in _HALVES)
    unit, name = byte_unit(most)
    data: list[Trace] = []
    for origin, shift in _HALVES:
        upper = origin == "measured"
        places = [place + shift for place in range(len(rows))]
        for part, ink in inks.items():
            sizes = [parts(row, origin).get(part, 0) for row in rows]
            if any(sizes):
                stack = bars(part, places, [size / unit for size in sizes], 0.36, ink if upper else faded(ink, PALE))
                hover = f"{part}, {origin}: %{{x:.4~g}} {name}"
                data.append(stack | _said(rows, sizes, hover) | {"legendgroup": part, "showlegend": upper})
        sizes = [total(row, origin) for row in rows]
        ends: Trace = {"type": "scatter", "name": whole, "x": [size / unit for size in sizes], "y": places}
        ends |= {"mode": "markers+text" if marked else "text", "legendgroup": whole, "showlegend": upper and marked}
        ends |= {"marker": {"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": _TEXT}}}
        ends |= {"text": [f"  {format_bytes(size)}" for size in sizes], "textposition": "middle right"}
        ends |= {"textfont": {"size": 11, "color": _TEXT if upper else _SOFT}, "cliponaxis": False}
        data.append(ends | _said(rows, sizes, f"{whole}, {origin}: %{{x:.4~g}} {name}"))
    return Figure(whole, data, axes(rows, f"{name} {title}", 1.12 * most / unit or 1) | {"barmode": "stack"})


def _said(rows: Sequence[Row], sizes: Sequence[int], hover: str) -> Trace:
    """What is shown where a reader points."""
    return {
        "customdata": [[plain(row["name"]), size] for row, size in zip(rows, sizes, strict=True)],
        "hovertemplate": f"%{{customdata[0]}}<br>{hover}<br>%{{customdata[1]:,}} bytes<extra></extra>",
    }
