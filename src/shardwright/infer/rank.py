"""A rank of a generation, from joining the world to the last line."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from shardwright.comm.collectives import barrier, broadcast_text
from shardwright.comm.worker import Worker
from shardwright.errors import RunError
from shardwright.infer.generator import Completion, Generator, Pace
from shardwright.infer.out import write_out
from shardwright.infer.prepare import Request
from shardwright.layout.mesh import Topology
from shardwright.units import format_bytes, format_seconds


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """Generate as one rank. `arguments`: what was asked for, and "json" for one document on standard output."""
    request, as_json = Request.from_json(arguments[0]), arguments[1] == "json"
    world = worker.mesh(Topology(replicate=worker.world_size)).world
    source = broadcast_text(request.source, world, worker.device)  # ranks that others started have each looked
    generator = Generator.of(source, worker, request.overrides)
    first = worker.rank == 0
    live = first and len(request.prompts) == 1 and not as_json and request.out is None
    output = Output(alone=worker.world_size == 1)
    completions = _completed(generator, request, worker, output if live else None)
    paces = _paces(generator)
    if first:
        if not live:
            give(completions, paces, request.out, output, as_json=as_json)
        print(_told(paces, sum(len(completion.tokens) for completion in completions)), file=sys.stderr, flush=True)
    barrier(generator.mesh.world)


class Output:
    """Standard output. Characters that it has none of are replaced; once nobody reads it, nothing is said any more."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def write(self, text: str) -> None:
        """Write at once. Raises RunError, and SystemExit where nobody reads or waits any more."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if self._alone:
                raise SystemExit from None
        except OSError as error:
            raise RunError(f"standard output: cannot be written: {error.strerror}", "give it another place") from None

    @staticmethod
    def json(content: object) -> str:
        """A line of JSON, in which nothing has to be replaced."""
        unicode = sys.stdout.encoding.lower().startswith("utf")
        return json.dumps(content, ensure_ascii=not unicode) + "\n"


def _completed(generator: Generator, request: Request, worker: Worker, live: Output | None) -> list[Completion]:
    """All completions; the one prompt's text is printed as it comes where it is live."""
    shown = ""
    if live is not None:
        live.write(request.prompts[0])

    def show(text: str) -> None:
        nonlocal shown
        if worker.stop.requested:
            raise SystemExit  # the others lose this rank, and there is nothing to save
        if live is not None:
            live.write(text[len(shown) :])
            shown = text

    found = generator.complete(
        request.prompts, request.settings, batch_size=request.batch_size, groups=request.groups, show=show
    )
    if live is not None:
        live.write("\n")
    return found


def give(
    completions: Sequence[Completion], paces: list[Pace], out: str | None, output: Output, *, as_json: bool
) -> None:
    """Write all completions where they were asked for. Where that fails at last they are on standard output."""
    rows = [_row(completion) for completion in completions]
    if as_json:
        output.write(output.json({"completions": rows, "pace": [vars(pace) for pace in paces]}))
    elif out is None:
        output.write("\n\n".join(completion.prompt + completion.text for completion in completions) + "\n")
    if out is None:
        return
    try:
        write_out(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except RunError as error:
        if not as_json:
            output.write("".join(map(output.json, rows)))
        raise RunError(error.problem, "the lines are on standard output instead") from None


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
