"""`shardwright plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.recipe import Overrides, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from shardwright.plan.plan import Plan
    from shardwright.spec.spec import Spec


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    world: Annotated[
        int | None,
        typer.Option("--world", min=1, help="Ranks in the world; default: as many as train would start here."),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option("--ranks-per-node", min=1, help="Warns about groups that cross nodes of so many ranks."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Show what a recipe will do, without doing it.

    The layout with its decisions, the pipeline's stages, its schedule and its bubble, and what each of its ranks holds.
    Needs neither the machines nor torch. A device of "auto" is this machine's; run.device=cuda plans for GPUs.

    \b
    Example: shardwright plan recipes/quickstart.toml parallel.pp=2 --world 4
    """
    import gc

    # A step of a large pipeline is 10^5 small objects without cycles; looking for some takes a third of the time.
    gc.disable()
    try:
        _show(_resolve(recipe, overrides or [], world, ranks_per_node), as_json)
    finally:
        gc.enable()


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        import json

        from shardwright.report.pipeline import document

        typer.echo(json.dumps(document(made), indent=2))
    else:
        from shardwright.report.plan import print_plan

        print_plan(made, _console())


def _resolve(recipe: str, overrides: list[str], world: int | None, ranks_per_node: int | None) -> Plan:
    from shardwright.data.vocabulary import vocabulary_of
    from shardwright.plan.machine import cpu_computes_bf16, num_gpus
    from shardwright.plan.resolve import resolve
    from shardwright.spec.load import load

    spec = load(recipe, overrides)
    data = spec.data
    on_gpus = spec.run.device == "cuda" or (spec.run.device == "auto" and num_gpus() > 0)
    return resolve(
        spec,
        world_size=world or _world_here(spec),
        device="cuda" if on_gpus else "cpu",
        native_bf16=on_gpus or cpu_computes_bf16(),
        tokenizer_vocab=None if spec.model.vocab else vocabulary_of(data.corpus, data.tokenizer, data.separator),
        local_size=ranks_per_node,
    )


def _world_here(spec: Spec) -> int | None:
    """As many ranks as `train` would start; None, for the fewest that the recipe takes, where the GPUs are too few."""
    from shardwright.errors import LayoutError
    from shardwright.plan.machine import num_cores, num_gpus
    from shardwright.plan.world import local_world_size

    try:
        return local_world_size(spec, cores=num_cores(), gpus=num_gpus())
    except LayoutError:  # it is planned for machines that are elsewhere
        return None


def _console() -> Console:
    """Standard output; where it is no terminal, 120 columns unless COLUMNS says otherwise."""
    import os

    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=120)
