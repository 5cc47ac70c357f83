"""`shardwright compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwright.cli.recipe import Overrides

_RECIPE = "recipes/quickstart.toml"


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe: a TOML file.")] = _RECIPE,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option("--world", min=1, help="Ranks of every row but the first; default: the recipe's own.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Techniques whose names begin so, such as zero; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time in each row.")] = 5,
    hardware: Annotated[
        str, typer.Option("--hardware", help="Device for which the largest models and scalability are planned.")
    ] = "H100-SXM",
    size: Annotated[
        str | None, typer.Option("--bytes", help='Bytes of a rank for the largest model, such as "24 GiB".')
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Where rows are kept; default: runs/compare-RECIPE.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Measure a recipe under every technique, one after the other, on this machine's processes.

    Memory, bytes sent, time, bubble and proof, estimates beside them; then what follows for memory efficiency,
    communication cost, complexity and scalability. Rows that are there already are kept: what was stopped goes on.

    \b
    Example: shardwright compare recipes/quickstart.toml --world 4 --only zero --only data
    """
    from shardwright.comm.job import found_job
    from shardwright.compare.run import Asked, show
    from shardwright.compare.run import compare as run
    from shardwright.errors import RunError
    from shardwright.units import parse_bytes

    if place := found_job():
        from shardwright.comm.worker import refuse

        problem = f"compare: it starts the ranks of each row itself, and {place.source} has started {place.world_size}"
        refuse(place, RunError(problem, "call it without, on one machine"))
    usable = parse_bytes(size, "--bytes") if size is not None else None
    asked = Asked(recipe, tuple(overrides or ()), world, tuple(only or ()), steps, hardware, usable, run_dir, again)
    raise typer.Exit(show(run(asked), as_json))
