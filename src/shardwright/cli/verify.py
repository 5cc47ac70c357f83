"""`shardwright verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwright.cli.recipe import Overrides, Recipe


def verify(
    recipe: Recipe,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to compare.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Prove that a layout computes what one device computes.

    Both run on this machine on seeded random tokens, and losses, gradients and parameters are compared. The exit code
    is 1 when they differ.

    \b
    Example: shardwright verify recipes/quickstart.toml parallel.dp=2 parallel.zero=3 --steps 3
    """
    from shardwright.verify import run

    raise typer.Exit(run.verify(recipe, overrides or [], steps, as_json))
