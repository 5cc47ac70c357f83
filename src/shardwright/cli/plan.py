"""`shardwright plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.recipe import Overrides, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from shardwright.cost.hardware import Hardware
    from shardwright.plan.plan import Plan
    from shardwright.spec.spec import Spec


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="Device to fit into, such as A100-80GB or H100-SXM; plans for GPUs."),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option("--world", min=1, help="Ranks in the world; default: as many as train would start here."),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            "--ranks-per-node",
            min=1,
            help="Warns about groups that cross nodes of so many ranks; default: as the hardware is sold.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Show what a recipe will do, without doing it.

    The layout with its decisions, the pipeline's stages, its schedule and its bubble, the memory of its ranks by
    category, whether they fit the hardware and what would, FLOPs, and what is sent in a step. Needs neither the
    machines nor torch. A device of "auto" is this machine's; run.device=cuda plans for GPUs, and so does --hardware.

    \b
    Example: shardwright plan recipes/gpt-1t.toml --hardware A100-80GB
    """
    import gc

    # A step of a large pipeline is 10^5 small objects without cycles; looking for some takes a third of the time.
    gc.disable()
    try:
        _show(recipe, overrides or [], hardware, world, ranks_per_node, as_json)
    finally:
        gc.enable()


def _show(
    recipe: str, overrides: list[str], name: str | None, world: int | None, ranks_per_node: int | None, as_json: bool
) -> None:
    from shardwright.cost.hardware import hardware_named
    from shardwright.plan.fit import fit
    from shardwright.spec.load import load

    spec, hardware = load(recipe, overrides), None if name is None else hardware_named(name)
    if hardware:
        spec = spec.model_copy(update={"run": spec.run.model_copy(update={"device": "cuda"})})
        ranks_per_node = ranks_per_node or hardware.gpus_per_node
    if world is None and hardware is None:
        world = _world_here(spec)
    resolve = _resolver(spec, hardware, world, ranks_per_node)
    made = resolve(spec)
    fitted = None
    if hardware:
        node = ranks_per_node or hardware.gpus_per_node
        fitted = fit(made, hardware.usable, node, _resolver(spec, hardware, made.world_size, ranks_per_node))
    if as_json:
        import json

        from shardwright.report.document import document

        typer.echo(json.dumps(document(made, hardware, fitted, ranks_per_node), indent=2))
    else:
        from shardwright.report.plan import print_plan

        print_plan(made, _console(), hardware, fitted, ranks_per_node)


def _resolver(
    spec: Spec, hardware: Hardware | None, world: int | None, ranks_per_node: int | None
) -> Callable[[Spec], Plan]:
    """Resolves a recipe, or that recipe with changes, for the same machines."""
    from shardwright.data.vocabulary import vocabulary_of
    from shardwright.plan.machine import cpu_computes_bf16, num_gpus
    from shardwright.plan.resolve import resolve

    data = spec.data
    vocab = None if spec.model.vocab else vocabulary_of(data.corpus, data.tokenizer, data.separator)
    on_gpus = spec.run.device == "cuda" or (spec.run.device == "auto" and num_gpus() > 0)
    native = hardware.native_bf16 if hardware else on_gpus or cpu_computes_bf16()

    def resolved(spec: Spec) -> Plan:
        return resolve(
            spec,
            world_size=world,
            device="cuda" if on_gpus else "cpu",
            native_bf16=native,
            tokenizer_vocab=vocab,
            local_size=ranks_per_node,
        )

    return resolved


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
