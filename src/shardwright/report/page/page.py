"""The page: one HTML file that opens without a network, with everything in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from shardwright import __version__
from shardwright.report.page.chart import Chart
from shardwright.report.page.communication import communication_charts
from shardwright.report.page.facts import Facts, checkpoints, comparison, environments, headline, plan_facts
from shardwright.report.page.memory import memory_charts
from shardwright.report.page.progress import progress_charts
from shardwright.report.page.run import Run
from shardwright.report.page.timeline import timeline_charts

_CHARTS = (progress_charts, timeline_charts, memory_charts, communication_charts)
"""The parts of the page that are drawn, in their order."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What the page may load: nothing that is not in it."""


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or of several over one another and side by side."""
    title = ", ".join(run.name for run in runs)
    charts = [chart for part in _CHARTS for chart in part(runs)]
    told = "a training run" if len(runs) == 1 else f"{len(runs)} training runs"
    body = [
        header(title, f"{told}, as recorded"),
        facts_list(headline(runs[0])) if len(runs) == 1 else _side_by_side(runs),
        '<div class="page">',
        *(section(chart) for chart in charts),
        *(_tables(run, len(runs) > 1) for run in runs),
        "</div>",
    ]
    return document(title, charts, body, " trace.json opens in Perfetto and in chrome://tracing.")


def document(title: str, charts: Sequence[Chart], body: Sequence[str], last: str = "") -> str:
    """The file: `body` is HTML that has a section for each of the charts, `last` a sentence for its end."""
    scripts = [
        f'<script type="application/json" id="charts">{_json([chart.as_json() for chart in charts])}</script>',
        f"<script>{_plotly()}</script>",
        f"<script>{_file('page.js')}</script>",
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} - Shardwright</title>\n<style>{_file('page.css')}</style>",
            "</head>\n<body>\n<main>",
            *body,
            f"<footer>Shardwright {escape(__version__)}.{escape(last)}</footer>",
            "</main>",
            *scripts,
            "</body>\n</html>\n",
        ]
    )


def _plotly() -> str:
    """Plotly's script. It is read here, so that commands which draw nothing start without it."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(content: object) -> str:
    """JSON that no browser takes for the end of its script."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def header(title: str, told: str) -> str:
    """The page's name, and what it is of."""
    return f"<header><h1>{escape(title)}</h1><p>{escape(told)}</p></header>"


def facts_list(facts: Facts) -> str:
    """Facts in cells."""
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{cells}</dl>'


def _side_by_side(runs: Sequence[Run]) -> str:
    columns = [comparison(run) for run in runs]
    rows = [(label, *(column[i][1] for column in columns)) for i, (label, _) in enumerate(columns[0])]
    return f'<section id="runs"><h2>Runs</h2>{_table([("", *(run.name for run in runs)), *rows])}</section>'


def section(chart: Chart) -> str:
    """The place of a chart."""
    wide = ' class="wide"' if chart.choose or chart.wide else ""
    controls = ""
    if len(chart.figures) > 1:
        options = "".join(f'<option value="{i}">{figure.label}</option>' for i, figure in enumerate(chart.figures))
        controls += f"<label>{chart.choose} <select>{options}</select></label>"
    if chart.log:
        controls += '<label><input type="checkbox"> log scale</label>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<section id="{chart.name}"{wide}><div class="bar"><h2>{chart.title}</h2>{controls}</div>'
        f'<dl class="numbers"></dl><div class="plot" style="height:{chart.height}px"></div>{note}</section>'
    )


def _tables(run: Run, named: bool) -> str:
    of = f" of {escape(run.name)}" if named else ""
    parts = [
        f'<section class="wide"><h2>Plan{of}</h2>{_table(plan_facts(run))}</section>',
        f"<section><h2>Environment{of}</h2>{_table(environments(run))}</section>",
    ]
    saved = checkpoints(run)
    rows = _table(saved, headed=True) if saved else '<p class="note">None was saved.</p>'
    return "".join([*parts, f"<section><h2>Checkpoints{of}</h2>{rows}</section>"])


def _table(rows: Sequence[Sequence[str]], headed: bool = False) -> str:
    made = []
    for index, row in enumerate(rows):
        first = "th" if index == 0 and headed else "td"
        cells = "".join(f"<{first}>{escape(cell)}</{first}>" for cell in row[1:])
        made.append(f"<tr><th>{escape(row[0])}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(made)}</table></div>'
