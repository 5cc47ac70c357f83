"""What training reads: samples for training and for validation, from a corpus, a prepared directory or a seed."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.data.corpus import Corpus, items
from shardwright.data.manifest import PreparedData
from shardwright.data.prepare import Progress, ensure_prepared
from shardwright.data.samples import PackedSamples, RandomSamples, Samples
from shardwright.data.tokenizer import Tokenizer
from shardwright.errors import DataError

SPLIT_SEED = 0
"""Seeds the choice of validation documents: it is not the run's seed, or runs that differ in that could not compare."""

_RANDOM_VALIDATION = 256  # samples


@dataclass(frozen=True)
class Dataset:
    """An opened corpus; `tokens` and `validation_tokens` count the splits, 0 for random ones, which have no end.

    `vocab` is the tokenizer's, or the one that random tokens are drawn from. `fingerprint` is equal on two ranks only
    if they read the same data. `prepared` is None for random tokens, `validation` where there is no such split.
    """

    train: Samples
    validation: Samples | None
    vocab: int
    tokenizer: Tokenizer | None
    name: str
    fingerprint: str
    tokens: int
    validation_tokens: int
    prepared: PreparedData | None


def open_dataset(
    *,
    corpus: Corpus,
    tokenizer: str,
    sequence_length: int,
    validation_fraction: float,
    seed: int,
    vocab: int | None = None,
    progress: Progress | None = None,
    separator: str | None = None,
) -> Dataset:
    """Open a corpus, preparing it in the cache first where that has not been done.

    `seed` shuffles the training samples; the validation samples keep the order of the text. `vocab` is for the corpus
    "random" alone. A corpus that is a prepared directory is taken with the tokenizer and the split it has. Raises
    DataError.
    """
    if items(corpus) == ["random"]:
        return _random(sequence_length, validation_fraction, seed, vocab)
    prepared = ensure_prepared(
        corpus, tokenizer, validation_fraction, SPLIT_SEED, progress=progress, separator=separator
    )
    _check_lengths(prepared, sequence_length)
    validation = None
    if prepared.splits["validation"].tokens:
        validation = _packed(prepared, "validation", sequence_length, None)
    return Dataset(
        train=_packed(prepared, "train", sequence_length, seed),
        validation=validation,
        vocab=prepared.vocab_size,
        tokenizer=prepared.load_tokenizer(),
        name=prepared.name,
        fingerprint=prepared.fingerprint,
        tokens=prepared.splits["train"].tokens,
        validation_tokens=prepared.splits["validation"].tokens,
        prepared=prepared,
    )


def check_vocab(vocab: int, tokenizer: Tokenizer) -> None:
    """Raises DataError where a model's vocabulary cannot hold the tokenizer's ids."""
    if vocab < tokenizer.vocab_size:
        raise DataError(
            f"model.vocab: {vocab} is smaller than the tokenizer's {tokenizer.vocab_size}",
            f"leave model.vocab out, or make it at least {tokenizer.vocab_size}",
        )


def _random(sequence_length: int, validation_fraction: float, seed: int, vocab: int | None) -> Dataset:
    if vocab is None:
        raise DataError('model.vocab: data.corpus = "random" has no tokenizer to take it from', "give model.vocab")
    validation = None
    if validation_fraction > 0:
        validation = RandomSamples(vocab, sequence_length, SPLIT_SEED, length=_RANDOM_VALIDATION, stream=1)
    return Dataset(
        train=RandomSamples(vocab, sequence_length, seed),
        validation=validation,
        vocab=vocab,
        tokenizer=None,
        name="random",
        fingerprint=f"random-{vocab}-{seed}",
        tokens=0,
        validation_tokens=0,
        prepared=None,
    )


def _packed(prepared: PreparedData, split: str, sequence_length: int, seed: int | None) -> Samples:
    return PackedSamples(prepared.tokens(split), prepared.mask(split), sequence_length, seed)


def _check_lengths(prepared: PreparedData, sequence_length: int) -> None:
    train, validation = prepared.splits["train"].tokens, prepared.splits["validation"].tokens
    need = f"fewer than train.sequence_length + 1 = {sequence_length + 1}"
    if train <= sequence_length:
        way_out = f"give more text, or train.sequence_length of at most {train - 1}" if train > 1 else "give more text"
        raise DataError(f"data.corpus: {prepared.name} has {train} training tokens, {need}", way_out)
    if prepared.validation_fraction > 0 and validation <= sequence_length:
        part = f"{prepared.validation_fraction} of {prepared.name} is {validation} tokens"
        way_out = "raise data.validation_fraction, or set it to 0 to switch validation off"
        raise DataError(f"data.validation_fraction: {part}, {need}", way_out)
