"""`shardwright generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwright.cli.recipe import Overrides


def generate(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A checkpoint, a run or a Hugging Face directory.", show_default=False),
    ],
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text to go on with; repeat it for more.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help='A file with a line like {"prompt": "..."} for each.')
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write a JSON line for each prompt there instead of printing.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="The most tokens for a prompt.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Only the most probable tokens that make up this much.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Only so many of the most probable tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same tokens on any layout.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends a generation; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts at a time on each data rank.")] = 16,
    microbatches: Annotated[
        int, typer.Option("--microbatches", help="Parts of a batch that stages work on in turn; 0: parallel.pp.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Let a model speak, on any layout.

    One prompt is printed as it goes on; several when all have ended. What it took is printed on standard error.

    \b
    Example: shardwright generate runs/quickstart-1 --prompt "def " --max-new-tokens 200 parallel.tp=2
    """
    from shardwright.errors import RunError
    from shardwright.infer.prepare import Request, read_prompts
    from shardwright.infer.run import generate as run
    from shardwright.infer.settings import Settings

    if prompt and prompts:
        raise RunError("--prompts: given beside --prompt", "give one of them")
    settings = Settings(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    texts = tuple(read_prompts(prompts) if prompts else prompt or ())
    request = Request(source, tuple(overrides or ()), texts, settings, batch_size, microbatches, out)
    raise typer.Exit(run(request, as_json=as_json))
