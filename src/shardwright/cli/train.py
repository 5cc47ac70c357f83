"""`shardwright train`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwright.cli.recipe import Overrides, Recipe


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Where the run is written; default: a new directory in runs/.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest good checkpoint of --run-dir, or of the newest run."),
    ] = False,
) -> None:
    """Train a recipe's model.

    The ranks are started on this machine, or joined where torchrun or srun started them.

    \b
    Example: shardwright train recipes/quickstart.toml parallel.dp=2 train.steps=50
    """
    from shardwright.train import run

    raise typer.Exit(run.train(recipe, overrides or [], run_dir, resume=resume))
