"""The vocabulary that a recipe's data have, as far as it can be known without preparing them."""

from __future__ import annotations

from pathlib import Path

from shardwright.spec.data import DataSpec


def vocabulary_of(data: DataSpec) -> int | None:
    """The vocabulary of a prepared corpus or of a tokenizer's file; None where `data.expected_vocab` says it all.

    Raises DataError for a tokenizer that cannot be read.
    """
    corpus = Path(data.corpus).expanduser() if isinstance(data.corpus, str) else None
    # What reads them imports numpy, and a plan answers sooner without.
    if corpus is not None and corpus.is_dir():
        from shardwright.data.manifest import is_prepared, open_prepared

        if is_prepared(corpus):
            return open_prepared(corpus).vocab_size
    if data.corpus == "random" or data.expected_vocab is not None:
        return None
    from shardwright.data.tokenizer import load_tokenizer

    return load_tokenizer(data.tokenizer, separator=data.separator or None).vocab_size
