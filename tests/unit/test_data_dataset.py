"""Opening: from the cache, from a prepared directory, at random; and everything that cannot be opened."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

from shardwright.data.batch import IGNORED
from shardwright.data.dataset import Dataset, open_dataset
from shardwright.data.prepare import ensure_prepared, prepare, prepared_dir
from shardwright.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(30):
        (root / f"{i:02}.txt").write_text(f"this is document {i}\n" * 4)
    return str(root)


def load(corpus, **options) -> Dataset:
    options = {"tokenizer": "bytes", "sequence_length": 16, "validation_fraction": 0.1, "seed": 0} | options
    return open_dataset(corpus=corpus, **options)


def error(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in caught.value.problem and caught.value.way_out
    return str(caught.value)


def test_opened_from_the_cache(corpus, cache):
    told = []
    data = load(corpus, progress=lambda *what: told.append(what))
    assert told and data.vocab == 257 and data.name == "corpus" and data.tokenizer is not None
    assert data.prepared is not None and data.prepared.directory.parent == cache
    assert data.prepared.directory.name == f"corpus-{data.fingerprint[:16]}"
    assert data.validation is not None and len(data.train) == (data.tokens - 1) // 16
    assert len(data.validation) == (data.validation_tokens - 1) // 16
    told.clear()
    again = load(corpus, progress=lambda *what: told.append(what))
    assert not told
    for name in ("train", "validation"):
        one, two = getattr(data, name).at(range(50)), getattr(again, name).at(range(50))
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.targets, two.targets)
    text = data.tokenizer.decode(data.validation.at(range(len(data.validation))).tokens.ravel())
    assert text.startswith("this is document")


def test_the_runs_seed_orders_but_does_not_split(corpus, cache):
    one, two = load(corpus, seed=1), load(corpus, seed=2)
    assert one.fingerprint == two.fingerprint and len(os.listdir(cache)) == 1
    assert not np.array_equal(one.train.at(range(20)).tokens, two.train.at(range(20)).tokens)
    assert one.validation is not None and two.validation is not None
    assert np.array_equal(one.validation.at([0]).tokens, two.validation.at([0]).tokens)


def test_what_the_cache_distinguishes(corpus, tmp_path):
    directories = [
        prepared_dir(corpus, "bytes", 0.1, 0),
        prepared_dir(corpus, "bpe:300", 0.1, 0),
        prepared_dir(corpus, "bytes", 0.2, 0),
        prepared_dir(corpus, "bytes", 0.1, 1),
        prepared_dir([corpus, corpus], "bytes", 0.1, 0),
        prepared_dir("stdlib", "bytes", 0.1, 0),
    ]
    os.utime(f"{corpus}/03.txt", (1, 1))
    directories.append(prepared_dir(corpus, "bytes", 0.1, 0))
    for tokens in (("a",), ("a", "b")):
        directories.append(prepared_dir(corpus, word_tokenizer(tmp_path / "t.json", tokens), 0.1, 0))
    directories.append(prepared_dir(corpus, str(tmp_path / "t.json"), 0.1, 0, separator="b"))
    assert len(set(directories)) == len(directories)
    assert prepared_dir((corpus,), "bytes", 0.1, 0) == prepared_dir([corpus], "bytes", 0.1, 0, separator="")


def test_home_is_the_default(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("SHARDWRIGHT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepared_dir(corpus, "bytes", 0, 0).parent == tmp_path / "home" / ".cache" / "shardwright" / "data"


def word_tokenizer(path, tokens, special=("</s>",)):
    inner = Inner(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    inner.save(str(path))
    return str(path)


def test_a_tokenizers_file(corpus, tmp_path):
    path = word_tokenizer(tmp_path / "t.json", ("?", "this", "is", "document"))
    data = load(corpus, tokenizer=path, validation_fraction=0)
    assert data.vocab == 5 and data.validation is None and data.prepared is not None
    assert data.prepared.tokens("train")[:13].tolist() == [1, 2, 3, 0] * 3 + [1]
    os.unlink(path)
    again = load(str(data.prepared.directory))  # which keeps the tokenizer
    assert again.tokenizer is not None and again.tokenizer.encode("document").tolist() == [3]


def test_a_prepared_directory_is_taken_as_it_is(corpus, tmp_path, cache):
    prepare(corpus, "bpe:270", tmp_path / "mine", validation_fraction=0.2, seed=3, progress=None)
    data = load(str(tmp_path / "mine"), tokenizer="bytes", validation_fraction=0.0)
    assert data.vocab == 270 and data.validation is not None and not cache.exists()
    assert ensure_prepared([tmp_path / "mine"], "bytes", 0, 0).directory == tmp_path / "mine"


def test_completion_only_targets(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "abcd", "completion": "ef"}) + "\n" + json.dumps({"text": "xyz"}) + "\n")
    batch = load(str(path), sequence_length=5, validation_fraction=0).train.at([0, 1])
    rows = dict(zip(map(tuple, batch.tokens.tolist()), batch.targets.tolist(), strict=True))
    assert rows == {
        (97, 98, 99, 100, 101): [IGNORED] * 3 + [101, 102],
        (102, 256, 120, 121, 122): [256, 120, 121, 122, 256],
    }


def test_random():
    data = load("random", vocab=50)
    assert (data.name, data.vocab, data.tokenizer, data.prepared) == ("random", 50, None, None)
    assert data.validation is not None
    assert data.train.at([0]).num_targets() == 16
    assert not np.array_equal(data.train.at([0]).tokens, data.validation.at([0]).tokens)
    assert load(["random"], vocab=50, validation_fraction=0).validation is None
    assert error(load, "random").startswith('model.vocab: data.corpus = "random" has no tokenizer')


def test_too_short(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("0123456789")
    assert error(load, str(path), validation_fraction=0) == (
        "data.corpus: x.txt has 11 training tokens, fewer than train.sequence_length + 1 = 17\n"
        "  give more text, or train.sequence_length of at most 10"
    )
    load(str(path), validation_fraction=0, sequence_length=10)
    assert "has 11 training tokens" in error(load, str(path), validation_fraction=0, sequence_length=11)
    path.write_text("0123456789" * 10)
    assert error(load, str(path)) == (
        "data.validation_fraction: 0.1 of x.txt is 10 tokens, fewer than train.sequence_length + 1 = 17\n"
        "  raise data.validation_fraction, or set it to 0 to switch validation off"
    )
    load(str(path), validation_fraction=0.17)
    load(str(path), validation_fraction=0)


def test_the_files_are_checked(corpus, tmp_path):
    mine = tmp_path / "mine"

    def fresh():
        if not mine.exists():
            prepare(corpus, "bytes", mine, validation_fraction=0.1, seed=0, progress=None)
        return json.loads((mine / "manifest.json").read_text())

    def manifest(text):
        (mine / "manifest.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return error(load, str(mine))

    good = fresh()
    size = (mine / "train.bin").stat().st_size
    os.truncate(mine / "train.bin", size - 2)
    assert f"train.bin: has {size - 2} bytes, and the manifest says {size} bytes" in error(load, str(mine))
    (mine / "train.bin").unlink()
    assert "train.bin: is missing, and the manifest says" in error(load, str(mine))
    assert manifest(good | {"format": 2}).startswith(f"{mine / 'manifest.json'}: its format is 2, and this version")
    assert "its format is None" in manifest([])
    assert "is not JSON" in manifest("{")
    assert "is not a manifest" in manifest({"format": 1})
    assert "is not a manifest" in manifest(good | {"dtype": "object?"})
    assert "is not a manifest" in manifest(good | {"files": []})
    counts = {split: dict(good["splits"][split]) for split in good["splits"]}
    counts["train"]["tokens"] += 1
    assert "do not agree" in manifest(good | {"splits": counts})
    mask = {"train.mask.bin": {"bytes": 5, "sha256": ""}}
    assert "tokens of train, 5 of its mask" in manifest(good | {"files": good["files"] | mask})


def test_damage_in_the_cache_is_named(corpus):
    directory = prepared_dir(corpus, "bytes", 0.1, 0)
    load(corpus)
    os.truncate(directory / "validation.bin", 0)
    assert "remove the directory and prepare it again" in error(load, corpus)


def test_a_tokenizer_that_cannot_be_read_leaves_nothing(corpus, tmp_path, cache):
    assert "data.tokenizer: none.json cannot be read" in error(load, corpus, tokenizer="none.json")
    (tmp_path / "t.json").write_text("{}")
    assert "is JSON, but not a tokenizer" in error(load, corpus, tokenizer=str(tmp_path / "t.json"))
    assert os.listdir(cache) == []
