"""What a chart of the report is: figures of Plotly as plain dicts, one of which is drawn at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

Trace = dict[str, Any]

RUN_COLOURS = ("#2563c9", "#d1495b", "#2a9d62", "#8a5cc2", "#d98a1f", "#1f9aa8", "#8c6d4f", "#c2579a")
"""Runs, in their order; a ninth has the first's again."""

GREY = "#8b95a1"


@dataclass(frozen=True)
class Figure:
    """What is drawn when `label` is chosen: traces, what they change in the layout, and numbers that stand above."""

    label: str
    data: list[Trace]
    layout: dict[str, Any]
    numbers: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A place on the page. `choose` says what its figures differ in; `log` offers a logarithmic y axis. A
    chart takes half of the page, or all of it: where there is something to choose, or it is `wide`."""

    name: str
    title: str
    note: str
    figures: Sequence[Figure]
    choose: str = ""
    log: bool = False
    height: int = 320
    wide: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the page's script takes."""
        return asdict(self)


def plain(text: str) -> str:
    """A text as Plotly shows it as it is: it knows some HTML."""
    return escape(text, quote=False)


def colour(index: int) -> str:
    """The colour of a run."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def faded(colour: str, opacity: float) -> str:
    """A colour that lets the ground through."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def short(value: float | None, digits: int = 6) -> float | None:
    """As many digits as a chart can show: pages of long runs stay small."""
    return None if value is None else float(f"{value:.{digits}g}")


def byte_unit(most: float) -> tuple[int, str]:
    """The binary unit in which the largest number of an axis reads well."""
    for exponent, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if most >= 1024**exponent:
            return 1024**exponent, unit
    return 1, "B"
