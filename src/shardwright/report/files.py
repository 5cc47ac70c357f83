"""The files of a report: the page, and the trace beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardwright.errors import RunError
from shardwright.record.store import read_json, write_text
from shardwright.report.page.comparison import comparison_page
from shardwright.report.page.page import page
from shardwright.report.page.run import Run, read_file, read_run
from shardwright.report.trace import trace

PAGE, TRACE, COMPARISON = "report.html", "trace.json", "comparison.json"


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes the report of runs, and a trace where a step was recorded; gives the paths of both.

    Without `out`, of one run into its directory and of several into the current one. Of the directory of a comparison
    it is the comparison's page. Raises RunError where a run cannot be read or the report cannot be written.
    """
    compared = [path for path in paths if _is_comparison(path)]
    if compared and len(paths) > 1:
        raise RunError(f"RUN: {compared[0]} is a comparison, which has a page of its own", "give it alone")
    if compared:
        return [write_comparison(compared[0], out)]
    runs = _told_apart([read_run(path) for path in paths])
    target = out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
    contents = {target: page(runs)}
    if any(file.timeline for run in runs for file in run.ranks.values()):
        beside = target.with_name(TRACE if target.name == PAGE else f"{target.stem}.{TRACE}")
        contents[beside] = json.dumps(trace(runs), separators=(",", ":"))
    for path, content in contents.items():
        _write(path, content)
    return list(contents)


def write_comparison(directory: Path, out: Path | None = None) -> Path:
    """Writes the page of the comparison in a directory, without `out` into it, and gives its path. Raises RunError."""
    name = directory.resolve().name
    content = read_file(
        directory / COMPARISON,
        lambda file: comparison_page(read_json(file), name),
        "compare",
        "run `compare` again: it keeps the rows that are there",
    )
    target = out or directory / PAGE
    _write(target, content)
    return target


def _is_comparison(path: Path) -> bool:
    return (path / COMPARISON).is_file() and not (path / "plan.json").is_file()


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose directories have one name are called by their paths."""
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs]


def _write(path: Path, content: str) -> None:
    try:
        write_text(path, content)
    except OSError as error:
        raise RunError(f"--out: {path} cannot be written: {error.strerror}", "give another --out FILE") from None
