"""The page of a comparison: the charts, and under them one table of all that was measured and what follows from it."""

from __future__ import annotations

from html import escape
from typing import Any

from shardwright.report.comparison import Cells, byte_columns, derived_columns, shared, step_columns
from shardwright.report.page.comparison_charts import comparison_charts
from shardwright.report.page.facts import Facts
from shardwright.report.page.page import document as html_document
from shardwright.report.page.page import facts_list, header, section
from shardwright.units import format_bytes

_RULES = (
    (
        "memory efficiency",
        "What one device takes at its peak, over what all ranks take together, each as the fullest: above 3/4 is very "
        "high, above 1/2 high, above 1/3 medium.",
    ),
    (
        "communication cost",
        "Bytes that the busiest rank sends in a step, over those of plain data parallelism, which are 2 (N - 1) / N "
        "times the gradients: up to 1/2 is low, up to 5/4 medium.",
    ),
    (
        "lines of code",
        "Lines of the files that are there for the technique alone, as a measure of complexity: up to 150 are low, up "
        "to 1,000 medium, up to 2,000 high.",
    ),
    (
        "scalability",
        "The largest model here and on more ranks, the recipe's architecture grown in width and depth until the "
        "fullest rank is full; and its planned efficiency, the time of its FLOPs at the device's peak over the same "
        "with the bubble and every byte sent, nothing overlapped: a lower bound to compare with, no prediction.",
    ),
)
_WRONG = ("NO", "REFUTED")
_WIDEST = 10
"""Columns of the widest part."""


def comparison_page(document: dict[str, Any], name: str) -> str:
    """The page of the document of `compare`; `name` is its directory's. What is not complete has no derived columns."""
    charts = comparison_charts(document)
    body = [
        header(name, "techniques side by side, as measured"),
        facts_list(_facts(document)),
        f'<p class="warning">{escape(_note(document))}</p>' if _note(document) else "",
        '<div class="page">',
        *(section(chart) for chart in charts),
        _table_section(document),
        _rules() if "derived" in document else "",
        "</div>",
    ]
    return html_document(name, charts, body)


def _facts(document: dict[str, Any]) -> Facts:
    rows = document["rows"]
    there = sum("memory" in row for row in rows)
    times = sorted(row["measured_at"] for row in rows if "measured_at" in row)
    planned = f"{document['hardware']}, {format_bytes(document['usable'])} a rank" if "derived" in document else "-"
    return [
        ("recipe", document["recipe"]),
        ("changed", ", ".join(document["overrides"]) or "nothing"),
        ("ranks", f"{document['world']:,}"),
        ("device", f"{document['device']}, {document['cores']:,} cores"),
        ("techniques", f"{there:,} measured, {len(rows) - there:,} not"),
        ("state", "complete" if "derived" in document else "not complete: running, or ended early"),
        ("measured", _from_to(times[0], times[-1]) if times else "-"),
        ("largest models planned for", planned),
    ]


def _from_to(first: str, last: str) -> str:
    """Two moments, their day once where it is one."""
    day, _, hour = last.partition(" ")
    return first if first == last else f"{first} to {hour if first.startswith(day) else last}"


def _note(document: dict[str, Any]) -> str:
    said = shared(document)
    return f"{document['world']} ranks on {document['device']}{said}." if said else ""


def _table_section(document: dict[str, Any]) -> str:
    """One table in the terminal's parts, one below the other so that it has the page's width."""
    rows = document["rows"]
    reasons = {row["name"]: row["reason"] for row in rows if "memory" not in row}
    parts = [
        _part("memory of the fullest rank, and what a step sends", byte_columns(rows), reasons),
        _part("a step", step_columns(rows), dict.fromkeys(reasons, "see above")),
    ]
    if "derived" in document:
        parts.append(
            _part("the techniques, by the numbers above and as planned", derived_columns(document["derived"]), {})
        )
    note = "Measured; in brackets the estimate, where it reads otherwise. docs/compare.md has every column's meaning."
    columns = f'<colgroup><col class="name"><col span="{_WIDEST - 1}"></colgroup>'
    return (
        '<section id="table" class="wide"><h2>All numbers</h2>'
        f'<div class="scroll"><table class="parts">{columns}{"".join(parts)}</table></div>'
        f'<p class="note">{note}</p></section>'
    )


def _part(title: str, cells: Cells, reasons: dict[str, str]) -> str:
    """A part under its headings; what was not measured has its reason instead of numbers."""
    rest = _WIDEST - len(cells[0])
    pad = f'<td colspan="{rest}"></td>' if rest else ""
    made = [f'<tr class="title"><th colspan="{_WIDEST}">{title}</th></tr>']
    made.append("<tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in cells[0]) + pad + "</tr>")
    for name, *values in cells[1:]:
        if name in reasons:
            said = f'<td class="reason" colspan="{_WIDEST - 1}">not measured: {escape(reasons[name])}</td>'
        else:
            said = "".join(_cell(value) for value in values) + pad
        made.append(f"<tr><th>{escape(name)}</th>{said}</tr>")
    return f"<tbody>{''.join(made)}</tbody>"


def _cell(value: str) -> str:
    wrong = ' class="wrong"' if value in _WRONG else ""
    return f"<td{wrong}>{_whole(value)}</td>"


def _whole(cell: str) -> str:
    """A quantity stays beside its unit."""
    parts = escape(cell).replace(" (", "\n(").replace(", ", ",\n").replace(" at ", "\nat ").split("\n")
    return " ".join(f"<span>{part}</span>" for part in parts)


def _rules() -> str:
    says = "".join(f"<tr><th>{name}</th><td>{escape(rule)}</td></tr>" for name, rule in _RULES)
    return (
        '<section id="rules" class="wide"><h2>What the words and the last columns mean</h2>'
        f"<table>{says}</table></section>"
    )
