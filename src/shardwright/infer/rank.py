"""A rank of a generation, from joining the world to the last line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from shardwright.comm.collectives import barrier, broadcast_text
from shardwright.comm.memory import keep_freed_memory
from shardwright.comm.worker import Worker
from shardwright.errors import RunError
from shardwright.infer.generator import Completion, Generator, Pace
from shardwright.infer.prepare import Request
from shardwright.layout.mesh import Topology
from shardwright.units import format_bytes, format_seconds


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """Generate as one rank. `arguments`: what was asked for, and "json" for one document on standard output."""
    request, as_json = Request.from_json(arguments[0]), arguments[1] == "json"
    if worker.device.type == "cpu":
        keep_freed_memory()
    world = worker.mesh(Topology(replicate=worker.world_size)).world
    source = broadcast_text(request.source, world, worker.device)  # ranks that others started have each looked
    generator = Generator.of(source, worker, request.overrides)
    first = worker.rank == 0
    live = first and len(request.prompts) == 1 and not as_json and request.out is None
    completions = _completed(generator, request, sys.stdout if live else None)
    paces = _paces(generator)
    if first:
        rows = [_row(completion) for completion in completions]
        if request.out is not None:
            _write(Path(request.out), rows)
        if as_json:
            print(json.dumps({"completions": rows, "pace": [vars(pace) for pace in paces]}, ensure_ascii=False))
        elif request.out is None and not live:
            print("\n\n".join(completion.prompt + completion.text for completion in completions))
        print(_told(paces, sum(len(completion.tokens) for completion in completions)), file=sys.stderr, flush=True)
    barrier(generator.mesh.world)


def _completed(generator: Generator, request: Request, live: TextIO | None) -> list[Completion]:
    """All completions; the one prompt's text is printed as it comes where it is live."""
    shown = ""
    if live is not None:
        live.write(request.prompts[0])

    def show(text: str) -> None:
        nonlocal shown
        if live is not None:
            live.write(text[len(shown) :])
            live.flush()
            shown = text

    found = generator.complete(
        request.prompts, request.settings, batch_size=request.batch_size, groups=request.groups, show=show
    )
    if live is not None:
        live.write("\n")
    return found


def _paces(generator: Generator) -> list[Pace]:
    """Of every rank of the world, by rank, on every rank."""
    world, device = generator.mesh.world, generator.mesh.device
    own, found = json.dumps(vars(generator.pace)), []
    for source in range(world.degree):
        text = broadcast_text(own, world, device, source=source, reason="generate/pace")
        found.append(Pace(**json.loads(text)))
    return found


def _told(paces: list[Pace], tokens: int) -> str:
    """How fast it went, on the slowest rank, and what the caches took."""
    seconds = max(pace.seconds for pace in paces)
    first = max(pace.first for pace in paces)
    fullest = max(paces, key=lambda pace: pace.cache_measured)
    estimated, measured = format_bytes(fullest.cache_estimated), format_bytes(fullest.cache_measured)
    return (
        f"{tokens} tokens in {format_seconds(seconds)}, {tokens / max(seconds, 1e-9):,.1f} tokens/s; first after "
        f"{format_seconds(first)}; cache {estimated} estimated, {measured} measured on the fullest rank"
    )


def _row(completion: Completion) -> dict[str, Any]:
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": str(completion.finish),
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the lines so that the file is either complete or not there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise RunError(f"--out: {path}: cannot be written: {error.strerror}", "give another place") from None
