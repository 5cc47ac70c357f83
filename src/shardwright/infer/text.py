"""A sequence that is being generated: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from shardwright.data.tokenizer import Tokenizer
from shardwright.infer.settings import Finish, Settings

_BROKEN = "\ufffd"  # what a tokenizer gives for bytes that are not a whole character yet


@dataclass
class Reading:
    """The text of a sequence's generated tokens, read as they come. What was read never changes.

    Note: a token's text depends on those before it. Decoders take the space off the first word, and some replace a
    whole run of bytes while its last character is incomplete. So tokens are decoded together with the ones that were
    read last, at first with the whole prompt, and the text of those is cut off. What ends in an incomplete character
    waits for the next token.
    """

    text: str = ""
    _window: int = 0  # tokens from here on are decoded,
    _read: int = 0  # those from here on for the first time
    _seen: int = 0

    def up_to(self, prompt: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer, *, complete: bool) -> str:
        """The text of generated tokens, of which it has read the first ones; of `complete` ones also the bytes that
        are no character."""
        whole = [*prompt, *tokens]
        self._read, self._seen = max(self._read, len(prompt)), max(self._seen, len(prompt))
        while self._seen < len(whole):
            self._seen += 1
            self._look(whole[: self._seen], tokenizer, complete=complete and self._seen == len(whole))
        if complete and self._read < len(whole):
            self._look(whole, tokenizer, complete=True)
        return self.text

    def _look(self, whole: Sequence[int], tokenizer: Tokenizer, *, complete: bool) -> None:
        now = tokenizer.decode(whole[self._window :])
        if now.endswith(_BROKEN) and not complete:
            return
        before = tokenizer.decode(whole[self._window : self._read])
        new = now[len(before) :] if now.startswith(before) else tokenizer.decode(whole[self._read :])
        if new:
            self.text += new
            self._window, self._read = self._read, len(whole)


@dataclass
class Generated:
    """One prompt and what was generated after it. `number` is its place in the input; None fills up a batch."""

    number: int | None
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    reading: Reading = field(default_factory=Reading)

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
        grown = [*sequence.tokens, token]
        if self.settings.stop and self.tokenizer is not None:
            text = sequence.reading.up_to(sequence.prompt, grown, self.tokenizer, complete=False)
            if any(stop in text for stop in self.settings.stop):
                return Finish.STOP
        if len(grown) >= self.settings.max_new_tokens or len(sequence.prompt) + len(grown) >= self.context:
            return Finish.LENGTH
        return None


def text_of(sequence: Generated, ends: Ends) -> str:
    """The text that a sequence has so far, without what ended it. Of one that goes on, what no further token can
    change: whole characters, and nothing that a stop string might begin with."""
    assert ends.tokenizer is not None
    tokens = [token for token in sequence.tokens if token not in ends.tokens]
    complete = sequence.finish is not None
    text = sequence.reading.up_to(sequence.prompt, tokens, ends.tokenizer, complete=complete)
    cuts = [text.find(stop) for stop in ends.settings.stop if stop in text]
    if cuts:
        return text[: min(cuts)]
    if complete:
        return text
    held = max((_overlap(text, stop) for stop in ends.settings.stop), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
