"""What is to be prepared: which files, with which tokenizer, split how; all of it in one fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shardwright.data.corpus import Corpus, Source, Sources, find_sources, items
from shardwright.data.file import sha256
from shardwright.data.manifest import FORMAT, is_prepared
from shardwright.data.piece import Piece, read
from shardwright.data.tokenizer import LEARNED, bpe_size, check_separator
from shardwright.errors import DataError

SAMPLE_BYTES = 16 << 20
"""A "bpe:N" is trained on at most this much text, drawn evenly over the corpus's training documents."""


@dataclass(frozen=True)
class Request:
    """Everything that decides the content of a prepared directory."""

    sources: Sources
    tokenizer: str
    separator: str | None
    validation_fraction: float
    seed: int

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever would change the prepared files; 64 hexadecimal digits."""
        parts = [FORMAT, self.sources.digest(), _identity(self.tokenizer), self.separator]
        content = json.dumps([*parts, self.validation_fraction, self.seed])
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, source: Source, document: int) -> str:
        """Where the document that begins at a position of a source goes: a seeded hash of its name decides.

        The first of all is for training, so that a single document is never all validation.
        """
        if document == 0 and source is self.sources.files[0]:
            return "train"
        return "validation" if self._draw("split", source, document) < self.validation_fraction else "train"

    def sample(self) -> Iterator[str]:
        """Texts of training documents, at most SAMPLE_BYTES of them: all, or an even seeded draw."""
        left = SAMPLE_BYTES
        share = SAMPLE_BYTES / max(self.sources.size, 1)
        opening: tuple[Source, int] | None = None  # the first document, which is for training whatever the hash says
        for source in self.sources.files:
            for piece in read(source, wanted=lambda at, of=source: self._draw("sample", of, at) < share):
                if piece.skipped:
                    continue
                document = (source, piece.document)
                opening = document if opening is None and share >= 1 else opening
                if document == opening or self.split(*document) == "train":
                    for text in (piece.prompt, piece.text):
                        data = text.encode()[: min(left, self._training_bytes(source, piece))]
                        left -= len(data)
                        if data:
                            yield data.decode(errors="ignore")
                if left <= 0:
                    return

    def _training_bytes(self, source: Source, piece: Piece) -> int:
        """How much of a piece may be trained on: of a single document, validation takes the end."""
        size = len(piece.text.encode())
        if source.kind != "text" or len(self.sources.files) > 1:
            return source.size
        return max(0, int(source.size * (1 - self.validation_fraction)) - (piece.after - size))

    def _draw(self, purpose: str, source: Source, position: int) -> float:
        """In [0, 1), a pure function of the seed, the purpose and the document."""
        key = f"{self.seed}/{purpose}/{source.name}/{position}".encode(errors="surrogateescape")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64


def make_request(
    corpus: Corpus, tokenizer: str, validation_fraction: float, seed: int, separator: str | None = None
) -> Request:
    """Find the corpus's files and check what can be checked before reading them. Raises DataError."""
    if not 0 <= validation_fraction < 1:
        way_out = "0 for none, or a small one like 0.02"
        raise DataError(f"data.validation_fraction: {validation_fraction} is not in [0, 1)", way_out)
    separator = separator or None  # a recipe leaves it empty
    check_separator(tokenizer, separator)
    for item in items(corpus):
        if is_prepared(Path(item).expanduser()):
            raise DataError(f"data.corpus: {item} is prepared already", "give it alone, as data.corpus of a recipe")
    return Request(find_sources(corpus), str(tokenizer), separator, float(validation_fraction), seed)


def _identity(tokenizer: str) -> str:
    """The spec, or for a tokenizer's file its content: the same path may come to hold another one."""
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        path = path / LEARNED
    if tokenizer == "bytes" or bpe_size(tokenizer) or not path.is_file():
        return tokenizer  # a missing file is reported when the tokenizer is loaded
    return sha256(path)
