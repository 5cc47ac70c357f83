"""Tables of reports: their form, and what is left out of long ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

Entry = TypeVar("Entry")

_MOST_ROWS = 16
"""Of longer tables and grids the middle is left out."""


def table(*headings: str, left: tuple[str, ...] = ()) -> Table:
    """An empty table; columns are for numbers, but those of the headings in `left`."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="left" if heading in left else "right", header_style="dim")
    return made


def print_table(title: str, made: Table, console: Console) -> None:
    """A table under its title, which may be wider."""
    console.print(Text(title, "bold"))
    console.print(made)


def ends(rows: Sequence[Entry]) -> list[Entry | None]:
    """All rows, or of many the first and the last, with None for those between."""
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    half = (_MOST_ROWS - 1) // 2
    return [*rows[:half], None, *rows[-half:]]


def percent(share: float) -> str:
    """A share in whole percents."""
    return f"{share:.0%}".replace("%", " %")
