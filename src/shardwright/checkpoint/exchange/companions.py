"""The small files that travel with weights: a model's config, its tokenizer, how to generate with it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.data.file import write_json, write_text
from shardwright.data.tokenizer import DESCRIPTION, LEARNED, BytesTokenizer, bpe_size, load_tokenizer
from shardwright.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    LEARNED,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    DESCRIPTION,
)
MAX_BYTES = 64 << 20  # of one companion


@dataclass(frozen=True)
class Copied:
    """The names of what was copied, and why what is there was not, a line each."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def copy_companions(source: Path, target: Path) -> Copied:
    """Copy the companions in one directory into another, which exists. Raises OSError."""
    names, left_out = [], []
    for name in COMPANIONS:
        path = source / name
        if not os.path.lexists(path):
            continue
        if not _is_own(path):
            left_out.append(f"{name} is not a regular file of {source}")
        elif (size := path.stat().st_size) > MAX_BYTES:
            left_out.append(f"{name} has {size} bytes, more than {MAX_BYTES}")
        else:
            shutil.copyfile(path, target / name)
            names.append(name)
    return Copied(tuple(names), tuple(left_out))


def _is_own(path: Path) -> bool:
    """Whether a path is a regular file of its directory.

    What is copied may be published later, so that a link out of the directory is not followed; but a snapshot of the
    Hugging Face cache consists of links into the `blobs` beside `snapshots`.
    """
    if not os.path.isfile(path):
        return False
    blobs = path.parent.resolve().parent.parent / "blobs"
    return not path.is_symlink() or path.resolve().parent == blobs


def read_companion(path: Path) -> dict[str, Any]:
    """The object in a companion in JSON. Raises CheckpointError."""
    way_out = "take another copy of it"
    try:
        if not os.path.isfile(path):
            raise CheckpointError(f"{path}: no such file", way_out)
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than {MAX_BYTES}", way_out)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", way_out) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not JSON", way_out) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object", way_out)
    return content


def complete_tokenizer(directory: Path, max_positions: int) -> dict[str, int]:
    """Write what transformers needs beside a tokenizer of our own; the ids of special tokens that a config should have.

    Nothing is done for a tokenizer that came with files of its own. Raises DataError and OSError.
    """
    if not (directory / DESCRIPTION).is_file() or (directory / TOKENIZER_CONFIG).is_file():
        return {}
    tokenizer = load_tokenizer(directory)
    if isinstance(tokenizer, BytesTokenizer):
        token = _write_bytes(directory, tokenizer)
    else:
        token = str(read_companion(directory / DESCRIPTION)["separator"])
    made_here = tokenizer.spec == BytesTokenizer.spec or bpe_size(tokenizer.spec) is not None
    # Where the separator is the only special token, every document begins after one.
    edges = ("bos", "eos") if made_here else ("eos",)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{edge}_token": token for edge in edges},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "split_special_tokens": made_here,  # a text that spells the separator out does not end there
    }
    write_json(directory / TOKENIZER_CONFIG, content)
    return {f"{edge}_token_id": tokenizer.separator for edge in edges}


def _write_bytes(directory: Path, tokenizer: BytesTokenizer) -> str:
    """Bytes as a byte-level BPE without merges: every byte is a token. Returns the separator's text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    separator = "<|endoftext|>"
    vocabulary = _letters_of_bytes() | {separator: tokenizer.separator}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = level  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens([separator])
    write_text(directory / LEARNED, inner.to_str(pretty=True))
    return separator


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's letter for each byte: those that print stand for themselves, the others for letters from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
