"""`shardwright data prepare`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardwright.data.manifest import PreparedData

app = typer.Typer(help="Text into tokens.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _data() -> None:
    pass


@app.command()
def prepare(
    corpus: Annotated[
        list[str], typer.Option("--corpus", help="stdlib, or a path; repeat it for several.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="bytes, bpe:8192, or the path of a tokenizer.json.")
    ] = "bytes",
    validation_fraction: Annotated[
        float, typer.Option("--validation-fraction", help="Share of documents held out.")
    ] = 0.02,
    seed: Annotated[int, typer.Option("--seed", help="Decides which documents are held out.")] = 0,
    separator: Annotated[
        str, typer.Option("--separator", help="Token between documents, for a tokenizer.json that names none.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Turn text into memory-mapped tokens.

    Reads text files, .jsonl and .parquet. Interrupted, the same command goes on where it was.

    \b
    Example: shardwright data prepare --corpus stdlib --tokenizer bpe:8192 --out data/stdlib
    """
    from shardwright.data.prepare import prepare as prepare_corpus

    with _progress() as progress:
        prepared = prepare_corpus(
            corpus[0] if len(corpus) == 1 else corpus,
            tokenizer,
            out,
            validation_fraction=validation_fraction,
            seed=seed,
            progress=progress,
            separator=separator or None,
        )
    typer.echo(json.dumps(_content(prepared)) if as_json else _summary(prepared))


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, moved by (bytes done, bytes in all, what is being done)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _content(prepared: PreparedData) -> dict[str, Any]:
    return dataclasses.asdict(prepared) | {"directory": str(prepared.directory)}


def _summary(prepared: PreparedData) -> str:
    lines = [f"{prepared.directory}: {prepared.tokenizer}, vocabulary {prepared.vocab_size}"]
    lines += [
        f"  {name}: {split.documents} documents, {split.tokens} tokens" for name, split in prepared.splits.items()
    ]
    lines += [f"  left out: {count} {reason}" for reason, count in prepared.skipped.items()]
    return "\n".join([*lines, f'next: data.corpus = "{prepared.directory}" in a recipe'])
