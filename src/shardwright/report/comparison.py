"""A comparison of techniques as tables: what was measured, estimates beside it, and the seed's columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwright.report.table import percent, print_table, table
from shardwright.units import format_bytes, format_count

Cells = list[tuple[str, ...]]
"""Headings, then a row for each technique; the first column is its name."""


def print_comparison(document: dict[str, Any], console: Console) -> None:
    """The document of `shardwright compare` for people."""
    rows = document["rows"]
    console.print(Text(f"{document['recipe']}: {document['world']} ranks on {document['device']}{shared(document)}"))
    console.print()
    print_table(
        "memory of the fullest rank, and what a step sends; measured, estimated where it differs",
        _table(byte_columns(rows)),
        console,
    )
    console.print()
    print_table("a step", _table(step_columns(rows)), console)
    console.print()
    of = f"{document['hardware']}, {format_bytes(document['usable'])} a rank"
    print_table(
        f"the techniques, by the numbers above and as planned for {of}",
        _table(derived_columns(document["derived"])),
        console,
    )
    for row in rows:
        if "reason" in row:
            console.print(Text(f"{row['name']}: {row['reason']}", "yellow"), soft_wrap=True)


def shared(document: dict[str, Any]) -> str:
    """What is to be said of times where ranks share cores."""
    if document["device"] != "cpu" or document["world"] <= document["cores"]:
        return ""
    return f", {document['cores']} cores for them: times say how much work there is, not how it would overlap"


def _table(cells: Cells) -> Table:
    made = table(*cells[0], left=("",))
    for row in cells[1:]:
        made.add_row(*row)
    return made


def byte_columns(rows: list[dict[str, Any]]) -> Cells:
    """Memory of the fullest rank and bytes sent: measured, in brackets the estimate where it reads otherwise."""
    ledger = ("parameters", "gradients", "optimizer", "activations", "peak", "host")
    made: Cells = [("", "ranks", *ledger, "sent", "as estimated")]
    for row in rows:
        if "memory" not in row:
            made.append((row["name"], *["-"] * 9))
            continue
        of, by, sent = row["memory"]["measured"], row["memory"]["estimated"], row["communication"]["sent"]
        cells = [_pair(of[key], by[key]) for key in ledger]
        exact = "yes" if row["communication"]["exact"] else "NO"
        made.append((row["name"], str(row["ranks"]), *cells, _pair(sent["measured"], sent["estimated"]), exact))
    return made


def _pair(measured: int, estimated: int) -> str:
    same = format_bytes(measured) == format_bytes(estimated)
    return format_bytes(measured) if same else f"{format_bytes(measured)} ({format_bytes(estimated)})"


def step_columns(rows: list[dict[str, Any]]) -> Cells:
    """What a step takes, and its proof."""
    headings = ("time", "tokens/s", "bubble", "planned", "collectives a layer", "largest error", "proof")
    made: Cells = [("", *headings)]
    for row in rows:
        if "memory" not in row:
            made.append((row["name"], *["-"] * len(headings)))
            continue
        bubble, proof = row["bubble"], row["proof"]
        shares = (percent(bubble["measured"]), percent(bubble["planned"])) if bubble else ("", "")
        errors = [error for error in (proof["loss"], proof["gradients"], proof["parameters"]) if error is not None]
        made.append(
            (
                row["name"],
                f"{row['seconds'] * 1e3:,.0f} ms",
                f"{row['tokens_per_second']:,.0f}",
                *shares,
                f"{row['communication']['collectives_per_layer']:.1f}",
                f"{max(errors):.0e}",
                "holds" if proof["passed"] else "REFUTED",
            )
        )
    return made


def derived_columns(rows: list[dict[str, Any]]) -> Cells:
    """The seed's columns."""
    worlds = worlds_of(rows)
    headings = ("memory efficiency", "communication cost", "lines of code", "largest model")
    made: Cells = [("", *headings, *(f"on {n}" for n in worlds))]
    for row in rows:
        made.append(
            (
                row["name"],
                _worded(row["memory"], row["memory_efficiency"]),
                _worded(row["communication"], row["traffic"]),
                f"{row['complexity']}, {row['lines']:,}",
                _model(row["largest"]),
                *(_model(row["scalability"].get(n, ""), efficiency=True) for n in worlds),
            )
        )
    return made


def worlds_of(derived: list[dict[str, Any]]) -> list[str]:
    """The numbers of ranks for which scalability was planned."""
    return max((list(row["scalability"]) for row in derived), key=len)


def _worded(word: str | None, value: float | None) -> str:
    return "-" if word is None or value is None else f"{word}, {value:.2f}"


def _model(grown: dict[str, Any] | str, *, efficiency: bool = False) -> str:
    if isinstance(grown, str):
        return "-"
    size = format_count(grown["parameters"])
    return f"{size} at {percent(grown['efficiency'])}" if efficiency else size
