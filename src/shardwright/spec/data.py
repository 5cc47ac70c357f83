"""`[data]`: which text, cut into which tokens, and how much of it is held out."""

from __future__ import annotations

from shardwright.spec.section import Count, Fraction, Positive, Section


class DataSpec(Section):
    """A corpus and its tokenizer. Paths are relative to the working directory."""

    corpus: str | tuple[str, ...] = "stdlib"  # the Python standard library's sources; or paths; or "random"
    tokenizer: str = "bytes"  # bytes | bpe:8192 (trained on the corpus) | path of a tokenizer.json
    separator: str = ""  # the token between documents, for a tokenizer.json that names none
    validation_fraction: Fraction = 0.02
    eval_every: Count = 50  # steps; 0: only at the end
    eval_batches: Positive = 8  # global batches in one evaluation

    @property
    def expected_vocab(self) -> int | None:
        """The tokenizer's vocabulary where its name alone says it: bytes and one separator, or bpe:N's N."""
        if self.tokenizer == "bytes":
            return 257
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "bpe" and size.isdecimal() else None
