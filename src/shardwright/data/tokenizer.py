"""Text to token ids and back: bytes, a byte-level BPE trained on the corpus, or any tokenizer.json."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardwright.data.file import write_text
from shardwright.data.piece import cut
from shardwright.errors import DataError

if TYPE_CHECKING:
    import tokenizers

DESCRIPTION = "shardwright-tokenizer.json"
"""Says which tokenizer a directory holds; a learned one lies beside it in LEARNED."""
LEARNED = "tokenizer.json"

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""End-of-text tokens looked for in a tokenizer.json, in this order."""

_BPE = re.compile(r"bpe:([0-9]+)")
_KINDS = 'write "bytes", "bpe:8192", or the path of a tokenizer.json'


class Tokenizer(ABC):
    """Maps text to ids in [0, vocab_size); `separator` is the id that ends each document.

    `spec` is what a recipe's data.tokenizer says: bytes, bpe:N, or a path.
    """

    spec: str
    vocab_size: int
    separator: int

    @property
    def dtype(self) -> np.dtype:
        """What one token is stored as: the smaller of little-endian uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, each of `dtype` [tokens of that text], without separators."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int64 [tokens], without a separator."""
        return self.encode_many([text])[0].astype(np.int64)

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids."""
        return self.spec == other.spec == "bytes"

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that is to be gone on with, as its model has learnt texts to begin."""
        return self.encode(text).tolist() or [self.separator]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators and other special tokens are left out, broken UTF-8 is replaced."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write into the directory what `load_tokenizer(directory)` reads back."""


class BytesTokenizer(Tokenizer):
    """One token per byte of UTF-8, and 256 as the separator."""

    spec = "bytes"
    vocab_size = 257
    separator = 256

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save(self, directory: Path) -> None:
        _describe(directory, self.spec, None)


class LearnedTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library; `separator_token` is the text of its separator."""

    def __init__(self, inner: tokenizers.Tokenizer, spec: str, separator_token: str) -> None:
        # A tokenizer.json may carry the truncation and padding of whoever saved it; a corpus is neither cut nor padded.
        inner.no_truncation()
        inner.no_padding()
        # Ours has one special token, the separator, and a text that spells it out does not end there. In a
        # tokenizer.json there may be many, and text prepared for it, like a chat's, is meant to spell them out.
        inner.encode_special_tokens = bpe_size(spec) is not None
        self.inner = inner
        self.spec = spec
        self.separator_token = separator_token
        # Ids may have holes, so the vocabulary's size is not the number of its entries.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.separator = _id_of(inner, separator_token, spec)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The library needs about 150 bytes per byte of one text, so a long text goes through in pieces.
        pieces = [list(_pieces(text)) for text in texts]
        flat = self.inner.encode_batch_fast([piece for of in pieces for piece in of], add_special_tokens=False)
        ids = iter([np.array(encoding.ids, dtype=self.dtype) for encoding in flat])
        return [next(ids) if len(of) == 1 else np.concatenate([next(ids) for _ in of]) for of in pieces]

    def same_as(self, other: Tokenizer) -> bool:
        """See `Tokenizer`."""
        return isinstance(other, LearnedTokenizer) and self.inner.to_str() == other.inner.to_str()

    def encode_prompt(self, text: str) -> list[int]:
        if bpe_size(self.spec) is not None:
            return super().encode_prompt(text)
        return self.inner.encode(text, add_special_tokens=True).ids or [self.separator]

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode([i for i in map(int, ids) if i != self.separator], skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        write_text(directory / LEARNED, self.inner.to_str(pretty=True))
        _describe(directory, self.spec, self.separator_token)


def bpe_size(spec: str) -> int | None:
    """N of "bpe:N", None for any other spec. Raises DataError where N cannot hold the bytes and a separator."""
    match = _BPE.fullmatch(spec)
    if match is None:
        return None
    if int(match[1]) < 257:
        raise DataError(f"data.tokenizer: {spec} is smaller than 257 = 256 bytes + one separator", "try bpe:8192")
    return int(match[1])


def check_separator(spec: str, separator: str | None) -> None:
    """Raises DataError where a separator is asked of a tokenizer that brings its own."""
    if separator is not None and (spec == "bytes" or bpe_size(spec)):
        way_out = "leave data.separator out; it is for a tokenizer.json"
        raise DataError(f"data.separator: {separator!r} is given, but {spec} has a separator of its own", way_out)


def load_tokenizer(
    spec: str | Path, *, documents: Iterable[str] | None = None, separator: str | None = None
) -> Tokenizer:
    """The tokenizer that the spec names.

    `spec` is "bytes", "bpe:N", the path of a tokenizer.json, or of a directory that `Tokenizer.save` wrote or that
    holds a tokenizer.json. `documents` are the texts that a "bpe:N" is trained on; the same documents in the same
    order give the same tokenizer. `separator` names the token that ends a document where none of SEPARATORS is in
    a tokenizer.json. Raises DataError.
    """
    spec = str(spec)
    check_separator(spec, separator)
    if spec == "bytes":
        return BytesTokenizer()
    if size := bpe_size(spec):
        if documents is None:
            raise DataError(f"data.tokenizer: {spec} is trained on a corpus, and none is given", _KINDS)
        return _train(spec, size, documents)
    path = Path(spec).expanduser()
    if (path / DESCRIPTION).is_file():
        return _load_saved(path)
    return _load_file(path / LEARNED if path.is_dir() else path, spec, separator)


def _train(spec: str, size: int, documents: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    return LearnedTokenizer(inner, spec, SEPARATORS[0])


def _load_saved(directory: Path) -> Tokenizer:
    path = directory / DESCRIPTION
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        spec, separator = str(described["spec"]), described["separator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.tokenizer: {path} does not describe a tokenizer ({error})", _KINDS) from error
    return BytesTokenizer() if spec == "bytes" else _load_file(directory / LEARNED, spec, separator)


def _load_file(path: Path, spec: str, separator: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Inner

    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as error:
        raise DataError(f"data.tokenizer: {path} cannot be read ({error.strerror})", _KINDS) from error
    except ValueError as error:
        raise DataError(f"data.tokenizer: {path} is not JSON ({error})", _KINDS) from error
    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"data.tokenizer: {path} is JSON, but not a tokenizer ({error})", _KINDS) from error
    found = next((token for token in SEPARATORS if inner.token_to_id(token) is not None), None)
    if separator is None and found is None:
        raise DataError(
            f"data.tokenizer: {path} has none of the end-of-text tokens {', '.join(SEPARATORS)}",
            'name one of its tokens, like data.separator = "<|eot|>"',
        )
    return LearnedTokenizer(inner, spec, separator or found or "")


def _id_of(inner: tokenizers.Tokenizer, token: str, spec: str) -> int:
    index = inner.token_to_id(token)
    if index is None:
        raise DataError(
            f"data.separator: {token!r} is not a token of {spec}", f"or leave it out: {', '.join(SEPARATORS)} are tried"
        )
    return index


def _pieces(text: str) -> Iterable[str]:
    data = text.encode()
    while (length := cut(data)) < len(data):
        yield data[:length].decode()
        data = data[length:]
    yield data.decode()


def _describe(directory: Path, spec: str, separator: str | None) -> None:
    # Written after the tokenizer itself, so a directory that has it is complete.
    write_text(directory / DESCRIPTION, json.dumps({"spec": spec, "separator": separator}) + "\n")
