"""Generation on a plan's layout: prefill, then one token after another, with a cache of keys and values.

Note: stages at work at the same time. A batch is cut into groups. A stage runs group after group, and hands each on;
while the last stage works on the first group the one before works on the second. What the last stage has chosen for a
group goes to all stages at once, and is waited for when that group's turn comes again. So with as many groups as stages
no stage waits for a token that another is still working on.

Note: data ranks in step. Under ZeRO-3 the ranks that share parameters gather them together, in every forward. There all
have equally many groups, filled up with prompts that nobody sees, and go on until the last of them has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from shardwright.comm.collectives import DONE, Handle, all_reduce, broadcast
from shardwright.comm.line import receive, send
from shardwright.comm.mesh import Transport
from shardwright.infer.sampling import choose
from shardwright.infer.settings import Finish
from shardwright.infer.text import Ends, Generated
from shardwright.nn.attention import Attention
from shardwright.nn.cache import LayerCache, Places
from shardwright.parallel.compose import Runtime

_CODES = (None, Finish.STOP, Finish.LENGTH)


@dataclass(frozen=True)
class Token:
    """A token as it comes: of which prompt, and why its text ends with it, if it does."""

    prompt: int
    id: int
    finish: Finish | None


@dataclass
class _Group:
    """Sequences that go through the stages together, with this rank's part of their cache."""

    sequences: list[Generated]
    places: Places
    caches: list[LayerCache]
    chosen: Tensor
    choosing: Handle = DONE
    sending: Handle = DONE
    finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.update()

    def update(self) -> None:
        """See whether all sequences have ended."""
        self.finished = all(sequence.finish is not None for sequence in self.sequences)


class Engine:
    """Generates on the stages of one rank; every rank of the world makes one and calls it alike."""

    def __init__(self, runtime: Runtime, ends: Ends) -> None:
        self._runtime, self._ends = runtime, ends
        stages = list(runtime.pipeline.stages.values())
        assert len(stages) == 1, "generation has one stage on each rank"
        self._stage, self._line = stages[0], runtime.pipeline.line
        modules = [module for block in self._stage.blocks for module in block.modules()]
        self._attentions = [module for module in modules if isinstance(module, Attention)]
        self._placed = _unique([module for module in runtime.model.modules() if hasattr(module, "places")])
        mesh = runtime.mesh
        self._device = mesh.device
        self._message_device = mesh.device if mesh.transport is Transport.NATIVE else torch.device("cpu")
        self._in_step = mesh.shard if runtime.states.stage.owns_parameters else mesh.axis()
        self.cache_bytes = 0
        """Of the last batch's cache on this rank."""

    @torch.inference_mode()
    def generate(self, sequences: Sequence[Generated], num_groups: int) -> Iterator[Token]:
        """The tokens of one batch as they come. `sequences` are of this rank's data coordinate."""
        groups = self._grouped(sequences, num_groups)
        self.cache_bytes = sum(cache.num_bytes for group in groups for cache in group.caches)
        for group in groups:
            self._prefill(group)
        while self._goes_on(groups):
            for group in groups:
                yield from self._taken(group)
                if not group.finished or self._in_step.degree > 1:
                    self._decode(group)
        for group in groups:
            group.choosing.wait()
            group.sending.wait()

    def _goes_on(self, groups: Sequence[_Group]) -> bool:
        """Whether some sequence has not ended, on any rank that has to stay in step."""
        left = torch.tensor([any(not group.finished for group in groups)], dtype=torch.float64, device=self._device)
        all_reduce(left, self._in_step, reason="generate/goes-on").wait()
        return bool(left > 0)

    # Groups

    def _grouped(self, sequences: Sequence[Generated], num_groups: int) -> list[_Group]:
        """The batch cut into groups of about the same size."""
        capacity = min(self._ends.context, max(len(s.prompt) for s in sequences) + self._ends.settings.max_new_tokens)
        count = min(num_groups, len(sequences))
        cuts = [len(sequences) * index // count for index in range(count + 1)]
        return [self._group(list(sequences[a:b]), capacity) for a, b in pairwise(cuts)]

    def _group(self, sequences: list[Generated], capacity: int) -> _Group:
        places = Places(torch.zeros(len(sequences), dtype=torch.int64, device=self._device))
        dtype = self._runtime.pipeline.boundary.dtype
        caches = [
            LayerCache.empty(places, capacity, _kv_heads(attention), attention.head_dim, dtype)
            for attention in self._attentions
        ]
        chosen = torch.zeros(len(sequences), 2, dtype=torch.int64, device=self._message_device)
        return _Group(sequences, places, caches, chosen)

    # Forwards

    def _prefill(self, group: _Group) -> None:
        prompts = [sequence.prompt for sequence in group.sequences]
        longest = max(map(len, prompts))
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        group.places.move([0] * len(rows))
        self._forward(group, rows, [len(prompt) - 1 for prompt in prompts])

    def _decode(self, group: _Group) -> None:
        group.places.move([sequence.length - 1 for sequence in group.sequences])
        rows = [[(sequence.tokens or sequence.prompt)[-1]] for sequence in group.sequences]
        self._forward(group, rows, [0] * len(rows))

    def _forward(self, group: _Group, rows: list[list[int]], last: list[int]) -> None:
        """Run a group's new tokens [B, T] through this rank's stage; `last` [B] are those whose logits count."""
        for attention, cache in zip(self._attentions, group.caches, strict=True):
            attention.cache = cache
        for module in self._placed:
            module.places = group.places  # pyright: ignore[reportArgumentType]
        tokens = torch.tensor(rows, dtype=torch.int64, device=self._device)
        x = tokens if self._stage.is_first else self._received(tokens)
        blocks = self._stage.blocks
        for block in blocks[:-1] if self._stage.is_last else blocks:
            x = block(x)
        if self._stage.is_last:
            at = torch.tensor(last, device=self._device)
            logits = blocks[-1](x[at, torch.arange(len(last), device=self._device)][None], None)[0]
            self._choose(group, logits)
        else:
            group.sending.wait()
            group.sending = send(x.contiguous(), self._line, self._line.index + 1, reason="generate/activation")
        group.choosing = broadcast(group.chosen, self._line.axis, self._line.axis.degree - 1, reason="generate/token")

    def _received(self, tokens: Tensor) -> Tensor:
        x = self._runtime.pipeline.boundary.empty(tokens)
        receive(x, self._line, self._line.index - 1, reason="generate/activation").wait()
        return x

    # Choices

    def _choose(self, group: _Group, logits: Tensor) -> None:
        places = [(sequence.number or 0, len(sequence.tokens)) for sequence in group.sequences]
        ids = choose(logits, places, self._ends.settings).tolist()
        finishes = [
            self._ends.after(s, t) if s.finish is None else None for s, t in zip(group.sequences, ids, strict=True)
        ]
        chosen = [[token, _CODES.index(finish)] for token, finish in zip(ids, finishes, strict=True)]
        group.chosen.copy_(torch.tensor(chosen))

    def _taken(self, group: _Group) -> Iterator[Token]:
        """Wait for what was chosen for a group, and give it to its sequences."""
        if group.finished and self._in_step.degree == 1:
            return
        group.choosing.wait()
        for sequence, (token, code) in zip(group.sequences, group.chosen.tolist(), strict=True):
            if sequence.finish is None:
                sequence.tokens.append(token)
                sequence.finish = _CODES[code]
                if sequence.number is not None:
                    yield Token(sequence.number, token, sequence.finish)
        group.update()


def _kv_heads(attention: Attention) -> int:
    """Key-value heads that this rank has."""
    return attention.qkv.declaration.parts[1].rows // attention.head_dim


def _unique(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(modules))
