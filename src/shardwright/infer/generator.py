"""A model that generates, from wherever its weights lie: what `generate` and Python programs use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardwright.comm.collectives import broadcast_text
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.cost.cache import cache_bytes
from shardwright.infer.engine import Engine, Token
from shardwright.infer.prepare import ends_of, plan_of, prompt_ids, spec_of, tokenizer_of
from shardwright.infer.settings import Finish, Settings
from shardwright.infer.text import Generated, text_of
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.train.start import initial_values


@dataclass(frozen=True)
class Completion:
    """A prompt and what came after it. `tokens` are the generated ids alone, an end-of-sequence token included."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish: Finish


@dataclass
class Pace:
    """How a rank's last prompts went: time to the first token, tokens and time in all, and bytes of the cache."""

    first: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    cache_estimated: int = 0
    cache_measured: int = 0


class Generator:
    """A checkpoint's, a run's or a Hugging Face directory's model on a plan's mesh; every rank makes one.

    `source` is the directory; `plan` comes from `plan_of`. Raises ShardwrightError.
    """

    def __init__(self, source: str, plan: Plan, mesh: Mesh) -> None:
        self.plan, self.mesh, self._source = plan, mesh, source
        self.tokenizer = tokenizer_of(source, plan.spec.data.separator)
        self._runtime = compose(plan, mesh, values=initial_values(plan, mesh), trains=False)
        self.pace = Pace()

    @staticmethod
    def of(source: str, worker: Worker, overrides: Sequence[str] = ()) -> Generator:
        """On the ranks of a job; `overrides` are fields such as "parallel.tp=2"."""
        plan = plan_of(spec_of(source, overrides), worker.world_size, worker.device.type)
        return Generator(source, plan, worker.mesh(plan.topology))

    @staticmethod
    def alone(source: str, device: str = "cpu", overrides: Sequence[str] = ()) -> Generator:
        """In this process by itself."""
        plan = plan_of(spec_of(source, overrides), 1, device)
        return Generator(source, plan, Mesh(plan.topology, torch.device(device)))

    def stream(
        self, prompts: Sequence[str], settings: Settings, *, batch_size: int = 16, groups: int = 0
    ) -> Iterator[tuple[Token, str]]:
        """Tokens of this rank's prompts as they come, each with the text that its prompt has so far, which only grows.

        The prompts are divided over the data axes in their order. To be gone through to its end, on every rank.
        """
        model = self.plan.architecture
        ids = prompt_ids(self.tokenizer, prompts, model.vocab, model.max_positions)
        ends = ends_of(self._source, self.tokenizer, settings, model.max_positions)
        engine, began, self.pace = Engine(self._runtime, ends), time.perf_counter(), Pace()
        for batch in self._batches(ids, batch_size):
            known = {sequence.number: sequence for sequence in batch}
            for token in engine.generate(batch, groups or self.plan.topology.pp):
                if not self.pace.tokens:
                    self.pace.first = time.perf_counter() - began
                self.pace.tokens += 1
                yield token, text_of(known[token.prompt], ends)
            self._note_cache(engine, batch, ends.context, settings)
        self.pace.seconds = time.perf_counter() - began

    def complete(
        self,
        prompts: Sequence[str],
        settings: Settings,
        *,
        batch_size: int = 16,
        groups: int = 0,
        show: Callable[[str], None] = lambda _: None,
    ) -> list[Completion]:
        """The completions of all prompts, in their order, on every rank. `show` is called with the text so far of
        whichever of this rank's prompts has a new token."""
        tokens: dict[int, list[int]] = {}
        ended: dict[int, tuple[str, Finish]] = {}
        for token, text in self.stream(prompts, settings, batch_size=batch_size, groups=groups):
            tokens.setdefault(token.prompt, []).append(token.id)
            show(text)
            if token.finish is not None:
                ended[token.prompt] = text, token.finish
        own = [[number, *ended[number], tokens[number]] for number in sorted(ended)]
        return self.gathered(prompts, own)

    def gathered(self, prompts: Sequence[str], own: list[list]) -> list[Completion]:
        """What every data rank has, [number, text, finish, tokens] each, put together on every rank."""
        data, device = self.mesh.data, self.mesh.device
        rows: list[Any] = []
        for source in range(data.degree):
            text = json.dumps(own) if source == data.index else None
            rows += json.loads(broadcast_text(text, data, device, source=source, reason="generate/texts"))
        return [Completion(prompts[int(n)], text, tuple(ids), Finish(finish)) for n, text, finish, ids in sorted(rows)]

    def _batches(self, ids: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[Generated]]:
        """This data rank's prompts, as many batches as every other has, and as large."""
        degree = self.mesh.topology.dp
        share = -(-len(ids) // degree)
        first = self.mesh.topology.data_index(self.mesh.rank) * share
        own = [Generated(n, ids[n]) for n in range(first, min(first + share, len(ids)))]
        own += [Generated(None, (0,), finish=Finish.LENGTH) for _ in range(share - len(own))]
        for begin in range(0, share, batch_size):
            yield own[begin : begin + batch_size]

    def _note_cache(self, engine: Engine, batch: Sequence[Generated], context: int, settings: Settings) -> None:
        longest = max(len(sequence.prompt) for sequence in batch)
        estimated = cache_bytes(
            self.plan.architecture,
            tp=self.mesh.tp.degree,
            index=self.mesh.tp.index,
            layers=self.plan.layers_per_stage[self.mesh.coordinate.pp],
            sequences=len(batch),
            positions=min(context, longest + settings.max_new_tokens),
            dtype=self.plan.dtype,
        )
        if engine.cache_bytes > self.pace.cache_measured:
            self.pace.cache_estimated, self.pace.cache_measured = estimated, engine.cache_bytes
