"""The vocabulary of a recipe's data, as far as it can be known without preparing them."""

from __future__ import annotations

from pathlib import Path


def vocabulary_of(corpus: str | tuple[str, ...], tokenizer: str, separator: str = "") -> int | None:
    """The vocabulary of a prepared corpus, else of a tokenizer's file; None for one that says it by its name, or none.

    Raises DataError for a tokenizer that cannot be read.
    """
    folder = Path(corpus).expanduser() if isinstance(corpus, str) else None
    # What reads them imports numpy, and a plan answers sooner without.
    if folder is not None and folder.is_dir():
        from shardwright.data.manifest import is_prepared, open_prepared

        if is_prepared(folder):
            return open_prepared(folder).vocab_size
    if corpus == "random" or tokenizer == "bytes" or tokenizer.startswith("bpe:"):
        return None
    from shardwright.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer, separator=separator or None).vocab_size
