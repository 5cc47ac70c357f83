"""The charts of a comparison: horizontal bars, a place for each technique, estimated or planned beside measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from shardwright.plan.communication import GROUPS
from shardwright.report.comparison import worlds_of
from shardwright.report.page.chart import RUN_COLOURS, Chart, Figure, Trace, faded, plain
from shardwright.report.page.comparison_bars import PALE, Row, axes, bars, height, stacked
from shardwright.report.page.memory import CATEGORIES
from shardwright.report.table import percent
from shardwright.units import format_bytes, format_count

_INK = RUN_COLOURS[0]
_GROUP_INKS: Mapping[str, str] = dict(zip(GROUPS, ("#2a9d62", "#2563c9", "#d98a1f", "#8a5cc2", "#8b95a1"), strict=True))
_PAIR = "The upper bar of each pair is measured, the pale one below it {}."


def comparison_charts(document: dict[str, Any]) -> list[Chart]:
    """Of the rows that were measured; the last is planned."""
    rows = [row for row in document["rows"] if "memory" in row]
    piped = [row for row in rows if row["bubble"]]
    made = [_times(rows, wide=not piped), *([_bubbles(piped, len(rows))] if piped else [])] if rows else []
    made += [_memory(rows), _sent(rows)] if rows else []
    return made + _largest(document)


def _times(rows: Sequence[Row], wide: bool) -> Chart:
    values = [row["seconds"] * 1e3 for row in rows]
    said = [(row["name"], row["layout"], row["tokens_per_second"]) for row in rows]
    data = [
        bars("step", range(len(rows)), values, 0.62, _INK)
        | {
            "text": [f"{value:,.0f} ms" for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "customdata": [[plain(name), plain(layout), rate] for name, layout, rate in said],
            "hovertemplate": "%{customdata[0]}: %{x:,.4~g} ms<br>%{customdata[1]}<br>%{customdata[2]:,.0f} tokens/s"
            "<extra></extra>",
        }
    ]
    layout = axes(rows, "ms per step, median", 1.25 * max(values)) | {"showlegend": False}
    return Chart("times", "Step time", "", [Figure("times", data, layout)], height=height(rows, 30), wide=wide)


def _bubbles(rows: Sequence[Row], beside: int) -> Chart:
    """As tall as the chart of the times next to it, of `beside` techniques."""
    data: list[Trace] = []
    for name, shift, ink in (("measured", -0.2, _INK), ("planned", 0.2, faded(_INK, PALE))):
        shares = [100 * row["bubble"][name] for row in rows]
        data.append(
            bars(name, [place + shift for place in range(len(rows))], shares, 0.36, ink)
            | {
                "text": [percent(share / 100) for share in shares],
                "textposition": "outside",
                "cliponaxis": False,
                "customdata": [plain(row["name"]) for row in rows],
                "hovertemplate": f"%{{customdata}}: %{{x:.3~g}} % {name}<extra></extra>",
            }
        )
    layout = axes(rows, "% of the pipeline's time in which ranks work on no action", 100)
    return Chart(
        "bubble",
        "Bubble",
        _PAIR.format("planned"),
        [Figure("bubble", data, layout)],
        height=max(height(rows, 46), height([{}] * beside, 30) - 28),
    )


def _memory(rows: Sequence[Row]) -> Chart:
    def ledger(row: Row, origin: str) -> Mapping[str, int]:
        return row["memory"][origin]

    def most(row: Row, origin: str) -> int:
        return ledger(row, origin)["peak"] or ledger(row, origin)["total"]

    figure = stacked("peak", rows, CATEGORIES, ledger, most, "on the fullest rank", marked=True)
    note = (
        f"{_PAIR.format('estimated')} Parameters, gradients, optimizer state and buffers rest between microbatches; "
        "activations are the most that a step adds to them. A line and the number mark the peak: the most that was "
        "live at one moment, transfers included. Host memory is in the table."
    )
    return Chart("memory", "Peak memory of the fullest rank", note, [figure], height=height(rows, 46), wide=True)


def _sent(rows: Sequence[Row]) -> Chart:
    def groups(row: Row, origin: str) -> Mapping[str, int]:
        return row["communication"]["by_group"][origin]

    def total(row: Row, origin: str) -> int:
        return row["communication"]["sent"][origin]

    figure = stacked("sent", rows, _GROUP_INKS, groups, total, "sent by the busiest rank per step", marked=False)
    differ = [row["name"] for row in rows if not row["communication"]["exact"]]
    says = f"they differ in {'; '.join(differ)}" if differ else "equal to the byte, in every row of every rank's ledger"
    figure.numbers.append(("measured and estimated", says))
    note = f"{_PAIR.format('estimated')} Bytes that the ring forms of the collectives put on the wire."
    return Chart("sent", "Bytes sent, by what they are for", note, [figure], height=height(rows, 46), wide=True)


def _largest(document: dict[str, Any]) -> list[Chart]:
    """Bars of parameters on each number of ranks; none before the comparison is complete."""
    derived = document.get("derived", [])
    rows = [row for row in derived if any(isinstance(grown, dict) for grown in row["scalability"].values())]
    if not rows:
        return []
    worlds, device = worlds_of(derived), plain(document["hardware"])
    sizes = [grown["parameters"] for row in rows for grown in row["scalability"].values() if isinstance(grown, dict)]
    low, high = floor(log10(min(sizes))), log10(max(sizes))
    data: list[Trace] = []
    for index, world in enumerate(worlds):
        shift = 0.26 * (index - (len(worlds) - 1) / 2)
        grown = [(i, row["name"], row["scalability"][world]) for i, row in enumerate(rows)]
        found = [(i, plain(name), model) for i, name, model in grown if isinstance(model, dict)]
        places, values = [i + shift for i, *_ in found], [model["parameters"] for *_, model in found]
        drawn = bars(f"{world} ranks", places, values, 0.24, faded(_INK, 0.3 + 0.7 * (index + 1) / len(worlds)))
        said = [
            [n, format_count(m["parameters"]), m["layers"], m["hidden"], percent(m["efficiency"])] for _, n, m in found
        ]
        drawn |= {"text": [format_count(value) for value in values], "textposition": "outside", "customdata": said}
        drawn |= {"textfont": {"size": 10.5}, "cliponaxis": False}
        drawn["hovertemplate"] = (
            f"%{{customdata[0]}} on {world} {device}: %{{customdata[1]}} parameters<br>%{{customdata[2]}} layers, "
            "hidden %{customdata[3]}<br>planned efficiency %{customdata[4]}<extra></extra>"
        )
        data += [drawn] if found else []
    ticks = range(low, ceil(high) + 1)
    layout = axes(rows, "parameters, logarithmic", 1)
    layout["xaxis"] |= {"type": "log", "range": [low, high + 0.08 * (high - low) + 0.05]}
    layout["xaxis"] |= {"tickvals": [10**e for e in ticks], "ticktext": [format_count(10**e) for e in ticks]}
    usable = format_bytes(document["usable"])
    note = f"Planned, not measured: the fullest rank takes up to {usable}. Point at a bar for its planned efficiency."
    alone = next((row["largest"] for row in derived if not row["scalability"]), None)
    numbers = [("on one rank", f"{format_count(alone['parameters'])} parameters")] if isinstance(alone, dict) else []
    title = f"Largest model on {', '.join(worlds)} {device}"
    return [
        Chart("largest", title, note, [Figure("largest", data, layout, numbers)], height=height(rows, 58), wide=True)
    ]
