"""Tokenizers: what they encode, what they refuse."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from shardwright.data import piece
from shardwright.data.dataset import check_vocab
from shardwright.data.tokenizer import LearnedTokenizer, load_tokenizer
from shardwright.errors import DataError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the quick brown fox\n\n  jumps over é 漢字 🦊\n" * 20]


def save_inner(path, tokens=("a", "b"), special=()):
    inner = Inner(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(path))
    return path


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.separator]) == text


def test_bytes_numbers():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.dtype) == (257, 256, np.uint16)
    assert tokenizer.decode([0xE6, 65]) == "\ufffdA"


@given(st.text())
def test_bpe_knows_every_text(text):
    tokenizer = BPE
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.separator]) == text


BPE = load_tokenizer("bpe:300", documents=TEXTS)


def test_a_separator_that_is_spelled_out(tmp_path):
    """In a corpus for our own BPE it is text, saved and loaded again too; for a tokenizer.json it is the token."""
    BPE.save(tmp_path)
    for tokenizer in (BPE, load_tokenizer(tmp_path)):
        ids = tokenizer.encode("a<|endoftext|>b").tolist()
        assert tokenizer.separator not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    ids = load_tokenizer(tmp_path / "tokenizer.json").encode("a<|endoftext|>b").tolist()
    assert ids[1:2] == [BPE.separator] and len(ids) == 3


def test_bpe_is_the_same_each_time(tmp_path):
    again = load_tokenizer("bpe:300", documents=TEXTS)
    assert isinstance(again, LearnedTokenizer) and isinstance(BPE, LearnedTokenizer)
    assert again.inner.to_str() == BPE.inner.to_str()
    assert BPE.vocab_size == 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_saved_tokenizers_come_back(tmp_path):
    eot = save_inner(tmp_path / "t.json", tokens=("a", "<|eot|>"))
    chosen = load_tokenizer(str(eot), separator="<|eot|>")
    for number, tokenizer in enumerate([load_tokenizer("bytes"), BPE, chosen]):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokenizer.save(directory)
        back = load_tokenizer(directory)
        assert (back.spec, back.vocab_size, back.separator) == (
            tokenizer.spec,
            tokenizer.vocab_size,
            tokenizer.separator,
        )
        assert back.encode("a a").tolist() == tokenizer.encode("a a").tolist()


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>"])
def test_separator_is_found(tmp_path, token):
    tokenizer = load_tokenizer(str(save_inner(tmp_path / "tokenizer.json", special=[token])))
    assert (tokenizer.separator, tokenizer.vocab_size) == (2, 3)
    assert load_tokenizer(tmp_path).separator == 2  # the directory of a Hugging Face model


def test_a_files_truncation_and_padding_are_ignored(tmp_path):
    tokenizer = load_tokenizer(str(save_inner(tmp_path / "t.json", special=["</s>"])))
    assert tokenizer.encode("a b a b a").tolist() == [0, 1, 0, 1, 0]


def test_a_file_that_adds_special_tokens_does_not(tmp_path):
    inner = Inner.from_file(str(save_inner(tmp_path / "t.json", special=["</s>"])))
    template = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 2)])
    inner.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
    inner.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).encode("a b").tolist() == [0, 1]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = load_tokenizer(str(save_inner(tmp_path / "t.json", [f"w{i}" for i in range(65536)], ["</s>"])))
    assert tokenizer.dtype == np.uint32 and tokenizer.encode("w65535").tolist() == [65535]


@given(st.text(alphabet="ab \n\té🦊", max_size=60), st.integers(4, 20))
def test_pieces_are_whole_characters_and_add_up(text, limit):
    data, pieces = text.encode(), []
    while data:
        length = piece.cut(data, limit)
        assert 0 < length <= limit
        pieces.append(data[:length].decode())
        data = data[length:]
    assert "".join(pieces) == text


def test_cutting_at_a_good_place_keeps_the_tokens():
    data = ("line of text\n\n  indented\nmore\n" * 50).encode()
    whole = BPE.encode(data.decode()).tolist()
    cuts = {piece.cut(data, limit) for limit in range(100, 1000, 7)}
    assert len(cuts) > 10
    for at in cuts:
        assert data[at - 1 : at] == b"\n" and not data[at - 2 : at - 1].isspace() and not data[at : at + 1].isspace()
        assert [*BPE.encode(data[:at].decode()), *BPE.encode(data[at:].decode())] == whole


def test_a_long_text_is_encoded_in_pieces():
    long = "some words\n" * 100_000  # 1.1 MB, and a piece is 1 MiB
    assert len(long) > piece.PIECE_BYTES
    asked = []

    class Spy:
        def encode_batch_fast(self, texts, add_special_tokens):
            asked.extend(texts)
            return inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    assert isinstance(BPE, LearnedTokenizer)
    inner = BPE.inner
    tokenizer: Any = copy.copy(BPE)
    tokenizer.inner = Spy()
    ids = tokenizer.encode_many(["a", long, "b"])
    assert [len(i) for i in ids] == [1, 100_000 * len(BPE.encode("some words\n")), 1]
    assert len(asked) == 4 and "".join(asked) == f"a{long}b"


def error(spec, **options):
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(spec), **options)
    return str(caught.value)


def test_errors(tmp_path):
    assert error("gpt2") == (
        "data.tokenizer: gpt2 cannot be read (No such file or directory)\n"
        '  write "bytes", "bpe:8192", or the path of a tokenizer.json'
    )
    (tmp_path / "text").write_text("hello")
    assert "is not JSON" in error(tmp_path / "text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "is not JSON" in error(tmp_path / "binary")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    assert "is JSON, but not a tokenizer" in error(tmp_path / "other.json")
    assert "No such file" in error(tmp_path)
    (tmp_path / "shardwright-tokenizer.json").write_text("{}")
    assert "does not describe a tokenizer" in error(tmp_path)
    assert "data.tokenizer: bpe:256 is smaller than 257" in error("bpe:256")
    assert "trained on a corpus, and none is given" in error("bpe:300")


def test_separator_errors(tmp_path):
    path = save_inner(tmp_path / "t.json")
    assert "has none of the end-of-text tokens" in error(path) and 'data.separator = "' in error(path)
    assert "data.separator: '<x>' is not a token of" in error(path, separator="<x>")
    assert "bytes has a separator of its own" in error("bytes", separator="<x>")
    assert "bpe:300 has a separator of its own" in error("bpe:300", separator="<x>", documents=TEXTS)


def test_vocab_too_small():
    with pytest.raises(DataError) as caught:
        check_vocab(100, load_tokenizer("bytes"))
    assert str(caught.value) == (
        "model.vocab: 100 is smaller than the tokenizer's 257\n  leave model.vocab out, or make it at least 257"
    )
    check_vocab(257, load_tokenizer("bytes"))
