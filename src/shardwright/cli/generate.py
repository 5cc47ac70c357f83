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
    seed: Annotated[int, typer.Option("--seed", help="In fp32 the same seed draws the same on any layout.")] = 0,
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
    from shardwright.comm.job import found_job
    from shardwright.errors import RunError, ShardwrightError
    from shardwright.infer.prepare import Request, numbered, read_prompts
    from shardwright.infer.run import generate as run
    from shardwright.infer.settings import Settings

    try:
        if prompt and prompts:
            raise RunError("--prompts: given beside --prompt", "give one of them")
        settings = Settings(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
        given = prompt or []
        texts = read_prompts(prompts) if prompts else dict(zip(numbered("--prompt", len(given)), given, strict=True))
        origins, fields = tuple(texts), tuple(overrides or ())
        request = Request(source, fields, tuple(texts.values()), origins, settings, batch_size, microbatches, out)
        code = run(request, as_json=as_json)
    except ShardwrightError as error:
        place = found_job()
        if place is None:
            raise
        from shardwright.comm.worker import refuse

        refuse(place, error)  # all ranks meet it, and one tells it
    raise typer.Exit(code)
