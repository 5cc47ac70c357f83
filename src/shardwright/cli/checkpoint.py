"""`shardwright checkpoint`: inspect, check, import, export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from shardwright.checkpoint.load import Checkpoint

app = typer.Typer(
    help="What was saved: look at it, check it, exchange it.", no_args_is_help=True, rich_markup_mode=None
)

Source = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run directory: its newest one.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@app.callback()
def _checkpoint() -> None:
    pass


@app.command()
def inspect(checkpoint: Source, as_json: Json = False) -> None:
    """Show what a checkpoint holds, without reading its tensors.

    \b
    Example: shardwright checkpoint inspect runs/quickstart-1
    """
    from rich.console import Console

    from shardwright.checkpoint.load import Checkpoint
    from shardwright.report.checkpoint import print_checkpoint

    document = _document(Checkpoint.open(checkpoint))
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        console = Console(highlight=False)
        print_checkpoint(document, console if console.is_terminal else Console(highlight=False, width=120))


@app.command()
def check(checkpoint: Source, as_json: Json = False) -> None:
    """Read every byte of a checkpoint and compare it with the checksums.

    The exit code is 2 where something is damaged.

    \b
    Example: shardwright checkpoint check runs/quickstart-1/checkpoints/step-00000400
    """
    from shardwright.checkpoint.load import Checkpoint
    from shardwright.units import format_bytes

    opened = Checkpoint.open(checkpoint)
    with _progress("reading", opened.manifest.num_bytes) as advance:
        opened.check(advance)
    size, files = opened.manifest.num_bytes, len(opened.manifest.files)
    if as_json:
        typer.echo(json.dumps({"path": str(opened.path), "whole": True, "bytes": size, "files": files}))
    else:
        typer.echo(f"{opened.path}: whole, {format_bytes(size)} in {files} files as they were written")


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A directory with config.json and safetensors.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint to write.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Turn a Hugging Face directory into a checkpoint of weights.

    Training can also start from such a directory as it is: model.init_from takes it.

    \b
    Example: shardwright checkpoint import models/Llama-3.2-1B checkpoints/llama
    """
    from shardwright.checkpoint.exchange.adopt import adopt
    from shardwright.units import format_bytes, format_count

    with _progress("importing", None) as advance:
        manifest, notes = adopt(source, out, progress=advance)
    if as_json:
        document = {"path": str(out), "parameters": manifest.num_parameters, "bytes": manifest.num_bytes}
        typer.echo(json.dumps(document | {"notes": notes}))
        return
    size, count = format_bytes(manifest.num_bytes), format_count(manifest.num_parameters)
    typer.echo("\n".join([f"{out}: {count} parameters, {size}", *(f"  {note}" for note in notes)]))
    typer.echo(f'next: model.init_from = "{out}" in a recipe')


@app.command()
def export(
    checkpoint: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.", show_default=False)],
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option("--dtype", help="Of the weights; auto: what the model computes in."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights as a Hugging Face directory, config and tokenizer included.

    \b
    Example: shardwright checkpoint export runs/quickstart-1 exported
    """
    from shardwright.checkpoint.exchange.companions import CONFIG, read_companion
    from shardwright.checkpoint.exchange.export import export as write
    from shardwright.checkpoint.load import Checkpoint
    from shardwright.checkpoint.manifest import WEIGHTS
    from shardwright.nn.dtypes import torch_dtype
    from shardwright.units import format_bytes

    opened = Checkpoint.open(checkpoint)
    config = opened.companions / CONFIG
    with _progress("reading", opened.manifest.num_bytes) as advance:
        opened.check(advance)  # a bit that was flipped must not be published
    with _progress("exporting", None) as advance:
        written = write(
            opened.weights,
            opened.manifest.architecture,
            out,
            base_config=read_companion(config) if config.exists() else None,
            companions=opened.companions if opened.companions.is_dir() else None,
            dtype=torch_dtype(opened.manifest.dtype if dtype == "auto" else dtype),
            progress=advance,
        )
    if as_json:
        document = {"path": str(out), "family": written.family, "bytes": written.num_bytes}
        typer.echo(json.dumps(document | {"files": written.files, "notes": written.notes}))
        return
    if opened.manifest.kinds[WEIGHTS] == "F16" and dtype == "auto":
        typer.echo("  the weights are fp16, and were written as bf16: --dtype fp32 keeps every bit", err=True)
    lines = [f"{out}: {written.family}, {format_bytes(written.num_bytes)} in {', '.join(written.files)}"]
    typer.echo("\n".join([*lines, *(f"  {note}" for note in written.notes)]))


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` tells."""
    import math

    from shardwright.plan.describe import layout
    from shardwright.plan.plan import Plan

    manifest = checkpoint.manifest
    files = [file.model_dump(mode="json") | {"boxes": len(file.boxes)} for file in manifest.files]
    companions = sorted(path.name for path in checkpoint.companions.iterdir()) if checkpoint.companions.is_dir() else []
    return {
        "path": str(checkpoint.path),
        "parameters": manifest.num_parameters,
        "bytes": manifest.num_bytes,
        "kinds": manifest.kinds,
        "dtype": manifest.dtype,
        "training": manifest.training.model_dump(mode="json") if manifest.training else None,
        "layout": layout(Plan.model_validate(manifest.plan)) if manifest.plan else None,
        "architecture": manifest.architecture.model_dump(mode="json"),
        "companions": companions,
        "tensors": {name: {"shape": s, "elements": math.prod(s)} for name, s in manifest.tensors.items()},
        "files": files,
    }


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, moved by bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.update(task, advance=size)
