"""Text to a prepared directory, in parts, so that an interrupted preparation goes on where it was.

Sources are read in order. About PART_BYTES of text at a time are encoded, appended to the two splits, and committed
to the journal. A document goes to the validation split by a seeded hash of its name, so adding documents moves none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import numpy as np

from shardwright.data.corpus import Corpus, Source, items
from shardwright.data.file import sha256
from shardwright.data.manifest import (
    MANIFEST,
    SPLITS,
    PreparedData,
    Split,
    is_prepared,
    mask_file,
    open_prepared,
    tokens_file,
)
from shardwright.data.partial import LOCK, Journal, Partial, discard, locked
from shardwright.data.piece import Piece, read
from shardwright.data.request import Request, make_request
from shardwright.data.tokenizer import DESCRIPTION, LEARNED, Tokenizer, load_tokenizer
from shardwright.errors import DataError

PART_BYTES = 4 << 20
"""Text between two commits, so at most what an interruption costs; the result does not depend on it."""

Progress = Callable[[int, int, str], None]
"""Called with the bytes of the corpus done, all of them, and what is being done."""


def prepare(
    corpus: Corpus,
    tokenizer: str,
    out: Path,
    *,
    validation_fraction: float,
    seed: int,
    progress: Progress | None = None,
    separator: str | None = None,
) -> PreparedData:
    """Turn a corpus into the prepared directory `out`, or check the one that is already there.

    Interrupted at any point, even by SIGKILL, the same call goes on and ends in the same bytes. Until it is complete
    nothing is seen at `out`; the work is in a hidden directory beside it. Raises DataError.
    """
    request = make_request(corpus, tokenizer, validation_fraction, seed, separator)
    return _prepare(request, Path(out).expanduser().resolve(), progress or _silent, check=True)


def prepared_dir(
    corpus: Corpus, tokenizer: str, validation_fraction: float, seed: int, separator: str | None = None
) -> Path:
    """Where the cache has, or would have, this corpus prepared in this way. Raises DataError."""
    return _cached(make_request(corpus, tokenizer, validation_fraction, seed, separator))


def ensure_prepared(
    corpus: Corpus,
    tokenizer: str,
    validation_fraction: float,
    seed: int,
    *,
    progress: Progress | None = None,
    separator: str | None = None,
) -> PreparedData:
    """The corpus prepared, from the cache where it is there already; a prepared directory is taken as it is.

    Processes that ask for the same at once prepare it once. Raises DataError.
    """
    alone, *others = items(corpus)
    if not others and is_prepared(directory := Path(alone).expanduser()):
        return open_prepared(directory)
    request = make_request(corpus, tokenizer, validation_fraction, seed, separator)
    return _prepare(request, _cached(request), progress or _silent, check=False)


def _silent(done: int, total: int, what: str) -> None:
    pass


def _cached(request: Request) -> Path:
    root = os.environ.get("SHARDWRIGHT_CACHE")
    cache = Path(root).expanduser() if root else Path.home() / ".cache" / "shardwright"
    return cache / "data" / f"{request.sources.name}-{request.fingerprint[:16]}"


def _prepare(request: Request, out: Path, progress: Progress, *, check: bool) -> PreparedData:
    try:
        return _prepare_locked(request, out, progress, check)
    except OSError as error:
        way_out = "what is done is kept: mend this and run again, or choose another place by SHARDWRIGHT_CACHE or --out"
        raise DataError(f"{error.filename or out}: {error.strerror or error}", way_out) from error


def _prepare_locked(request: Request, out: Path, progress: Progress, check: bool) -> PreparedData:
    if found := _existing(request, out, check):
        return found
    partial = out.with_name(f".{out.name}.partial")
    with locked(partial, lambda: progress(0, request.sources.size, "waiting for another preparation")):
        if found := _existing(request, out, check):  # it was completed while we waited
            discard(partial)
            return found
        try:
            _build(request, partial, progress)
        except DataError:
            discard(partial)  # the same corpus would fail again
            raise
        os.rename(partial, out)
        (out / LOCK).unlink(missing_ok=True)
    return open_prepared(out)


def _existing(request: Request, out: Path, check: bool) -> PreparedData | None:
    """What is at `out`, if it is what is asked for. Raises DataError if it is something else."""
    # Asked in this order: it may appear, complete, at any time.
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if not is_prepared(out):
        if occupied:
            raise DataError(f"{out}: exists and is not prepared data", "name another directory, or remove it")
        return None
    (out / LOCK).unlink(missing_ok=True)  # left by a process that ended right after its rename
    found = open_prepared(out)
    if found.fingerprint != request.fingerprint:
        way_out = "name another directory, or remove it"
        raise DataError(f"{out}: holds data prepared from another corpus or in another way", way_out)
    if check:
        found.check()
    return found


def _build(request: Request, directory: Path, progress: Progress) -> None:
    """Bring the partial directory to the state that is renamed: a manifest, what it lists, and the lock."""
    if not _finished(request, directory):
        partial = Partial(directory, request.fingerprint)
        tokenizer = _tokenizer(request, directory, progress)
        partial.restore(tokenizer.dtype)
        for part in _parts(request, partial.journal, progress):
            _append(request, partial, tokenizer, part)
            partial.commit()
        _balance(request, partial)
        partial.drop_masks()
        _check_unchanged(request)
        _manifest(request, partial, tokenizer).write()
    keep = {MANIFEST, LOCK, *open_prepared(directory).files}
    for path in directory.iterdir():
        if path.name not in keep:
            path.unlink()
    progress(request.sources.size, request.sources.size, "tokenizing")


def _finished(request: Request, directory: Path) -> bool:
    """Whether only the cleaning up and the renaming are missing."""
    try:
        return open_prepared(directory).fingerprint == request.fingerprint
    except DataError:
        return False


def _tokenizer(request: Request, directory: Path, progress: Progress) -> Tokenizer:
    """The request's tokenizer, kept in the directory: what was trained once is not trained again."""
    if (directory / DESCRIPTION).is_file():
        return load_tokenizer(directory)
    progress(0, request.sources.size, f"loading {request.tokenizer}")
    tokenizer = load_tokenizer(request.tokenizer, documents=request.sample(), separator=request.separator)
    tokenizer.save(directory)
    return tokenizer


Part = list[tuple[Source, Piece]]


def _parts(request: Request, journal: Journal, progress: Progress) -> Iterator[Part]:
    """What the journal does not have yet, about PART_BYTES at a time, each entered into the journal as done."""
    files, total = request.sources.files, request.sources.size
    done = sum(source.size for source in files[: journal.source])
    part: Part = []
    size = 0
    progress(done, total, "tokenizing")
    for index in range(journal.source, len(files)):
        source = files[index]
        for piece in read(source, journal.position if index == journal.source else 0):
            part.append((source, piece))
            size += len(piece.text) + len(piece.prompt)
            if size >= PART_BYTES:
                journal.source, journal.position = index, piece.after
                yield part
                part, size = [], 0
                progress(min(done + piece.done, total), total, "tokenizing")
        done += source.size
    journal.source, journal.position = len(files), 0
    if part:
        yield part


def _append(request: Request, partial: Partial, tokenizer: Tokenizer, part: Part) -> None:
    texts = chain.from_iterable((piece.prompt, piece.text) for _, piece in part)
    ids = iter(tokenizer.encode_many(list(texts)))
    end = np.array([tokenizer.separator], tokenizer.dtype)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    spans: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}  # tokens without loss, tokens with
    journal = partial.journal
    skipped = Counter(journal.skipped)
    for source, piece in part:
        prompt, text = next(ids), next(ids)
        if piece.skipped:
            skipped[piece.skipped] += 1
            continue
        # The first document is always for training, so the training split is never the empty one.
        split = request.split(source, piece.document) if journal.splits["train"].documents else "train"
        tokens[split] += [prompt, text, end] if piece.last else [prompt, text]
        spans[split].append((len(prompt), len(text) + piece.last))
        journal.splits[split].documents += piece.last
        if split == "train":
            journal.last_document = sum(spans[split][-1]) + (0 if piece.first else journal.last_document)
    journal.skipped = dict(skipped)
    for split in SPLITS:
        if tokens[split]:
            partial.append(split, np.concatenate(tokens[split]), _mask(spans[split]))


def _mask(spans: Sequence[tuple[int, int]]) -> np.ndarray | None:
    """uint8, ones where a token carries loss as a target; None where all do."""
    if not any(without for without, _ in spans):
        return None
    lengths = np.array(spans, np.int64)
    return np.repeat(np.tile(np.array([0, 1], np.uint8), len(spans)), lengths.ravel())


def _balance(request: Request, partial: Partial) -> None:
    """Where the hash sent nothing to validation, move the last training document there, or the end of the only one."""
    journal = partial.journal
    train, validation = (journal.splits[split] for split in SPLITS)
    if train.documents == 0:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(journal.skipped.items()))
        raise DataError(f"data.corpus: no text in {request.sources.name} ({skipped or 'its files are empty'})")
    if journal.balanced or validation.documents or request.validation_fraction == 0:
        return
    journal.balanced = True
    if train.documents == 1:
        partial.move_tail(round(train.tokens * request.validation_fraction))
    else:
        train.documents -= 1
        validation.documents += 1
        partial.move_tail(journal.last_document)


def _check_unchanged(request: Request) -> None:
    for source in request.sources.files:
        now = source.path.stat() if source.path.exists() else None
        if now is None or (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
            raise DataError(f"data.corpus: {source.path} changed while it was being prepared", "prepare it again")


def _manifest(request: Request, partial: Partial, tokenizer: Tokenizer) -> PreparedData:
    directory, journal = partial.directory, partial.journal
    names = [tokens_file(split) for split in SPLITS] + [mask_file(split) for split in journal.masked]
    names += [DESCRIPTION] + [LEARNED] * (directory / LEARNED).is_file()
    files = {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in names}
    return PreparedData(
        directory=directory,
        name=request.sources.name,
        fingerprint=request.fingerprint,
        tokenizer=request.tokenizer,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        dtype=tokenizer.dtype.name,
        validation_fraction=request.validation_fraction,
        seed=request.seed,
        splits={split: Split(**vars(journal.splits[split])) for split in SPLITS},
        skipped=dict(sorted((request.sources.skipped + Counter(journal.skipped)).items())),
        files=dict(sorted(files.items())),
        shardwright=_version(),
    )


def _version() -> str:
    try:
        return version("shardwright")
    except PackageNotFoundError:
        return "not installed"
