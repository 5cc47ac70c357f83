"""The files of a report: the page, and the trace beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardwright.errors import RunError
from shardwright.report.page.page import page
from shardwright.report.page.run import Run, read_run
from shardwright.report.trace import trace

PAGE, TRACE = "report.html", "trace.json"


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes the report of runs, and a trace where a step was recorded; gives the paths of both.

    Without `out`, of one run into its directory and of several into the current one. Raises RunError where a run
    cannot be read or the report cannot be written.
    """
    runs = _told_apart([read_run(path) for path in paths])
    target = out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
    contents = {target: page(runs)}
    if any(file.timeline for run in runs for file in run.ranks.values()):
        beside = target.with_name(TRACE if target.name == PAGE else f"{target.stem}.{TRACE}")
        contents[beside] = json.dumps(trace(runs), separators=(",", ":"))
    for path, content in contents.items():
        _write(path, content)
    return list(contents)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose directories have one name are called by their paths."""
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs]


def _write(path: Path, content: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise RunError(f"--out: {path} cannot be written: {error.strerror}", "give another --out FILE") from None
