"""How to generate: how far, how tokens are chosen, and what ends a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from shardwright.errors import RunError


class Finish(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """At an end-of-sequence token or a stop string."""
    LENGTH = "length"
    """At `max_new_tokens`, or at the end of the context."""


@dataclass(frozen=True)
class Settings:
    """Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave no token out. Raises RunError for what cannot be."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RunError(f"--max-new-tokens: {self.max_new_tokens} is not at least 1", "give 1 or more")
        if not math.isfinite(self.temperature):
            raise RunError(f"--temperature: {self.temperature} is not a finite number", "0 is greedy, 1 samples as is")
        if self.temperature < 0:
            raise RunError(f"--temperature: {self.temperature:g} is not at least 0", "0 is greedy, 1 samples as is")
        if not 0 < self.top_p <= 1:
            raise RunError(f"--top-p: {self.top_p:g} is not above 0 and at most 1", "1 leaves no token out")
        if self.top_k < 0:
            raise RunError(f"--top-k: {self.top_k} is negative", "0 leaves no token out")
        if any(not text for text in self.stop):
            raise RunError("--stop: an empty text ends everything", "give the text that is to end a generation")
