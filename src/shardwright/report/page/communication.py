"""What each rank sends in a step, by verb, axis and reason: estimated beside measured."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.record.communication import CommunicationRecord
from shardwright.report.page.chart import Chart, Figure, Trace, byte_unit, faded, plain
from shardwright.report.page.run import RankFile, Run
from shardwright.units import format_bytes

_INK = "#2563c9"
_NOTE = (
    "Bytes that the ring forms of the collectives put on the wire, in a step. Estimated is one training step; measured "
    "is all that the run sent, validation and checkpoints included, divided by its steps."
)

_Key = tuple[str, str, str]


def communication_charts(runs: Sequence[Run]) -> list[Chart]:
    """One chart; ranks are chosen."""
    several = len(runs) > 1
    figures = [
        _figure(file, f"{plain(run.name)}, rank {rank}" if several else f"rank {rank}")
        for run in runs
        for rank, file in run.ranks.items()
        if file.sent or file.estimated_sent
    ]
    if not figures:
        return []
    tallest = max(len(figure.data[0]["y"]) for figure in figures)
    return [Chart("communication", "Communication by reason", _NOTE, figures, "rank", height=120 + 46 * tallest)]


def _key(record: CommunicationRecord) -> _Key:
    return record.verb, record.axis, record.reason


def _figure(file: RankFile, label: str) -> Figure:
    steps = max(1, file.steps)
    estimated = {_key(r): (float(r.sent), float(r.calls)) for r in file.estimated_sent}
    measured = {_key(r): (r.sent / steps, r.calls / steps) for r in file.sent}
    most = {key: max(estimated.get(key, (0, 0))[0], measured.get(key, (0, 0))[0]) for key in estimated | measured}
    keys = sorted(most, key=lambda key: most[key])
    unit, name = byte_unit(max(most.values(), default=0))
    data = [
        _bars("measured per step", keys, measured, unit, name, _INK),
        _bars("estimated per step", keys, estimated, unit, name, faded(_INK, 0.4)),
    ]
    layout = {
        "barmode": "group",
        "bargap": 0.3,
        "xaxis": {
            "title": {"text": f"{name} per step"},
            "range": [0, 1.25 * max(most.values(), default=1) / unit or 1],
        },
        "yaxis": {"automargin": True},
        "hovermode": "closest",
        "legend": {"traceorder": "reversed"},
    }
    sums = [("estimated", sum(sent for sent, _ in estimated.values()))]
    sums.append(("measured", sum(sent for sent, _ in measured.values())))
    return Figure(label, data, layout, [(f"{origin} per step", format_bytes(total)) for origin, total in sums])


def _bars(
    name: str, keys: Sequence[_Key], found: dict[_Key, tuple[float, float]], unit: int, unit_name: str, ink: str
) -> Trace:
    rows = [found.get(key) for key in keys]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [f"{reason}  <br><i>{verb}, {axis}</i>  " for verb, axis, reason in keys],
        "x": [row[0] / unit if row else None for row in rows],
        "text": [f"{format_bytes(row[0])}" if row else "" for row in rows],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": ink},
        "customdata": [[*key, *(row or (0, 0))] for key, row in zip(keys, rows, strict=True)],
        "hovertemplate": "%{customdata[2]}: %{customdata[0]} along %{customdata[1]}<br>"
        f"{name}: %{{customdata[3]:,.6~g}} bytes in %{{customdata[4]:.4~g}} calls<extra></extra>",
    }
