"""The arguments that every command over a recipe takes."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe: a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields over the recipe's, such as parallel.dp=2."),
]
