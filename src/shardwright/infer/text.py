"""A sequence that is being generated: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from shardwright.data.tokenizer import Tokenizer
from shardwright.infer.settings import Finish, Settings

_BROKEN = "\ufffd"  # what a tokenizer gives for bytes that are not a whole character yet


@dataclass
class Generated:
    """One prompt and what was generated after it. `number` is its place in the input; None fills up a batch."""

    number: int | None
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def length(self) -> int:
        """Positions so far."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Ends:
    """What ends a sequence: tokens, stop strings, and how long it may become."""

    tokens: Collection[int]
    tokenizer: Tokenizer | None
    settings: Settings
    context: int

    def after(self, sequence: Generated, token: int) -> Finish | None:
        """Whether a sequence ends with a new token, and why."""
        if token in self.tokens:
            return Finish.STOP
        if self.settings.stop and self.tokenizer is not None:
            text = self.tokenizer.decode([*sequence.tokens, token])
            if any(stop in text for stop in self.settings.stop):
                return Finish.STOP
        grown = len(sequence.tokens) + 1
        if grown >= self.settings.max_new_tokens or len(sequence.prompt) + grown >= self.context:
            return Finish.LENGTH
        return None


def text_of(tokens: Sequence[int], ends: Ends, *, complete: bool) -> str:
    """The text of generated tokens, without what ended it. Of tokens that go on, what no further one can change: whole
    characters, and nothing that a stop string might begin with."""
    assert ends.tokenizer is not None
    tokens = [token for token in tokens if token not in ends.tokens]
    text = ends.tokenizer.decode(tokens)
    cuts = [text.find(stop) for stop in ends.settings.stop if stop in text]
    if cuts:
        return text[: min(cuts)]
    if complete:
        return text
    text = text.rstrip(_BROKEN)
    held = max((_overlap(text, stop) for stop in ends.settings.stop), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
