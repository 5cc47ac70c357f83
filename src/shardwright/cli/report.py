"""`shardwright report`."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, such as runs/quickstart-1.")],
    out: Annotated[
        str | None,
        typer.Option("--out", help="The file; default: RUN/report.html, of several runs report.html here."),
    ] = None,
) -> None:
    """Write a page that shows what runs recorded.

    Losses, throughput, memory, what was sent, and the pipeline's timeline, planned beside measured; several runs are
    laid over one another. The page opens in a browser without a network; trace.json beside it opens in Perfetto.

    \b
    Example: shardwright report runs/quickstart-1
    """
    from pathlib import Path

    from shardwright.report.files import write_report

    for path in write_report([Path(run) for run in runs], Path(out) if out else None):
        typer.echo(path)
