"""A schedule drawn as text: one row per rank, one column per unit of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwright.schedule.action import Action, Kind, Schedule
from shardwright.schedule.simulate import Timeline, simulate

_LEGEND = {
    Kind.FORWARD: "F forward",
    Kind.BACKWARD: "B backward",
    Kind.INPUT: "I input gradient",
    Kind.WEIGHT: "W weight gradient",
}
_IDLE, _GOES_ON, _CUT = "·", "─", "…"


@dataclass(frozen=True)
class Cell:
    """A piece of a row: an action, or the idle time between two (kind None). Its text is as wide as it lasts."""

    text: str
    kind: Kind | None


@dataclass(frozen=True)
class Row:
    """What stands in one line: a label, then cells side by side."""

    label: str
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        return (self.label + "".join(cell.text for cell in self.cells)).rstrip()


@dataclass(frozen=True)
class Grid:
    """A drawn schedule; the cells are there for whoever wants to colour them."""

    axis: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The grid as plain text."""
        return [self.axis, *map(str, self.rows), *self.notes]


def grid(
    source: Timeline | Schedule, width: int | None = None, unit: float = 1.0, makespan: float | None = None
) -> Grid:
    """A timeline, or a schedule whose F, I and W take 1 on every stage, with `unit` of time per column.

    The number is the microbatch; where a rank has several stages, a letter says which, in the order of the model.
    A grid wider than `width` characters is cut, and says how much is not shown. `makespan` is that of the whole, where
    the timeline is its beginning alone; that must reach as far as the grid.
    """
    timeline = simulate(source) if isinstance(source, Schedule) else source
    schedule = timeline.schedule
    names = stage_names(schedule)
    span_texts = [name_of(span.action, names) for spans in timeline.spans for span in spans]
    column = max(map(len, span_texts), default=1) + 1
    labels = _labels(schedule)
    units = round((timeline.makespan if makespan is None else makespan) / unit)
    shown = units if width is None else min(units, max(1, (width - len(labels[0]) - 1) // column))
    rows = []
    for label, spans in zip(labels, timeline.spans, strict=True):
        pieces = [(name_of(s.action, names), s.action.kind, round(s.begin / unit), round(s.end / unit)) for s in spans]
        cells = _cells(pieces, column, shown)
        rows.append(Row(label, (*cells, Cell(_CUT, None)) if shown < units else cells))
    notes = [_legend(schedule)]
    if shown < units:
        notes.append(f"{_CUT} {units - shown} of {units} units of time are not shown")
    return Grid(_axis(len(labels[0]), column, shown), tuple(rows), tuple(notes))


def draw(source: Timeline | Schedule, width: int | None = None, unit: float = 1.0) -> list[str]:
    """The lines of `grid`."""
    return grid(source, width, unit).lines()


def draw_programs(schedule: Schedule, around: Mapping[int, int], width: int = 116) -> list[str]:
    """The actions of some ranks in order, without times, as even a broken schedule has them.

    `around` gives for each rank to show the index of an action, which stands between brackets.
    """
    lines = []
    for rank, label in enumerate(_labels(schedule)):
        if rank not in around:
            continue
        begin = max(0, around[rank] - 4)
        texts = [str(action) for action in schedule.actions[rank][begin:]]
        if around[rank] - begin < len(texts):
            texts[around[rank] - begin] = f"[{texts[around[rank] - begin]}]"
        line = label + (f"{_CUT} " if begin else "") + " ".join(texts)
        lines.append(line if len(line) <= width else line[: width - 2].rsplit(" ", 1)[0] + f" {_CUT}")
    return lines


def name_of(action: Action, names: Sequence[str]) -> str:
    """An action as a cell shows it: kind, microbatch, and the letter of the stage if its rank has several."""
    return f"{action.kind}{action.microbatch}{names[action.stage]}"


def stage_names(schedule: Schedule) -> list[str]:
    """For each stage its letter among those of its rank, or nothing where no rank has more than one."""
    counts = [0] * schedule.num_ranks
    indices = []
    for rank in schedule.placement:
        indices.append(counts[rank])
        counts[rank] += 1
    if max(counts) == 1:
        return [""] * schedule.num_stages
    return [chr(ord("a") + index) if index < 26 else f".{index}" for index in indices]


def _labels(schedule: Schedule) -> list[str]:
    digits = len(str(schedule.num_ranks - 1))
    return [f"rank {rank:>{digits}}  " for rank in range(schedule.num_ranks)]


def _cells(pieces: Sequence[tuple[str, Kind, int, int]], column: int, shown: int) -> tuple[Cell, ...]:
    """The cells of one row up to column `shown`, from (text, kind, begin, end) in columns."""
    cells, now = [], 0
    for text, kind, begin, end in pieces:
        begin, end = min(begin, shown), min(end, shown)
        if begin > now:
            cells.append(_idle(begin - now, column))
        if end > begin:
            lasts = (end - begin) * column
            filled = text.ljust(lasts - 1, _GOES_ON if end - begin > 1 else " ")
            cells.append(Cell(filled[: lasts - 1] + " ", kind))
        now = max(now, end)
    if now < shown:
        cells.append(_idle(shown - now, column))
    return tuple(cells)


def _idle(units: int, column: int) -> Cell:
    return Cell((_IDLE.ljust(column)) * units, None)


def _axis(indent: int, column: int, shown: int) -> str:
    """Every fifth unit of time, over its column."""
    ticks = "".join(str(time).ljust(5 * column) for time in range(0, shown, 5))
    return ("time".ljust(indent) + ticks).rstrip()


def _legend(schedule: Schedule) -> str:
    kinds = {action.kind for actions in schedule.actions for action in actions}
    parts = [text for kind, text in _LEGEND.items() if kind in kinds] + [f"{_IDLE} idle"]
    names = sorted(filter(None, set(stage_names(schedule))), key=lambda name: (len(name), name))
    if names:
        parts.append(f"{names[0]} to {names[-1]}: the stages of a rank")
    return "   ".join(parts)
