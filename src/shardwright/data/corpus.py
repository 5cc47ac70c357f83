"""Which files a corpus is made of, in a fixed order, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shardwright.errors import DataError

Corpus = str | Path | Sequence[str | Path]
"""What data.corpus says: "stdlib", a directory, a file, or a list of these."""

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".org", ".adoc", ".tex", ".html", ".css", ".toml", ".yaml", ".yml"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".cs"}
    | {".js", ".jsx", ".ts", ".tsx", ".sh", ".sql", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift"}
)

# Distributions of Python differ in whether they ship the last five: without them the corpus is nearly the same on
# every machine. `test` alone is more than half of it: 17 of 31 MB in Python 3.11.
_STDLIB_SKIPS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
)


@dataclass(frozen=True)
class Source:
    """One file of a corpus. `name` is relative to where the corpus was given, with slashes; `size` is in bytes."""

    path: Path
    name: str
    kind: Literal["text", "jsonl", "parquet"]
    size: int
    mtime_ns: int


@dataclass
class Sources:
    """The files of a corpus in their order; `skipped` counts the others by reason; `name` is fit for a path."""

    name: str
    files: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def digest(self) -> str:
        """A hash of names, sizes and modification times, so it does not change when the corpus is moved whole."""
        rows = [[file.name, file.kind, file.size, file.mtime_ns] for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def items(corpus: Corpus) -> list[str]:
    """The corpus as a list of "stdlib" and paths. Raises DataError when there is none."""
    listed = [str(corpus)] if isinstance(corpus, (str, Path)) else [str(item) for item in corpus]
    if not listed or not all(listed):
        raise DataError("data.corpus: it is empty", 'give "stdlib", "random", or paths of text')
    return listed


def find_sources(corpus: Corpus) -> Sources:
    """The files of a corpus, sorted by name within each item. Raises DataError for a missing or an empty one."""
    listed = items(corpus)
    more = f"-and-{len(listed) - 1}-more" if len(listed) > 1 else ""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(listed[0]).expanduser().resolve().name)
    found = Sources(f"{plain[:40] or 'root'}{more}")
    for item in listed:
        _add(found, item)
    if not found.files:
        skipped = ", ".join(f"{count} {reason}" for reason, count in found.skipped.most_common(5)) or "nothing else"
        raise DataError(
            f"data.corpus: no text in {', '.join(listed)} ({skipped})",
            "text is .txt, .md, .py and other sources, .jsonl or .parquet",
        )
    return found


def _add(found: Sources, item: str) -> None:
    if item == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in _walk(root, _STDLIB_SKIPS) if path.suffix == ".py"]
    elif item == "random":
        raise DataError('data.corpus: "random" is not prepared', "its tokens are drawn when they are needed")
    else:
        root = Path(item).expanduser()
        if not root.exists():
            way_out = 'give the path of text, or "stdlib" for the Python sources on this machine'
            raise DataError(f"data.corpus: {root} does not exist", way_out)
        paths = list(_walk(root, frozenset())) if root.is_dir() else [root]
    base = root if root.is_dir() else root.parent
    for path in paths:
        kind = _kind(path)
        if kind is None:
            found.skipped[f"{path.suffix.lower() or 'without a suffix'}"] += 1
            continue
        try:
            status = path.stat()
        except OSError:
            found.skipped["unreadable"] += 1
            continue
        name = path.relative_to(base).as_posix()
        found.files.append(Source(path, name, kind, status.st_size, status.st_mtime_ns))


def _kind(path: Path) -> Literal["text", "jsonl", "parquet"] | None:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    return "text" if suffix in TEXT_SUFFIXES else None


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    """Files below root in an order that depends on their names alone; hidden files and folders are left out."""
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return iter(sorted(paths, key=lambda path: path.relative_to(root).as_posix()))
