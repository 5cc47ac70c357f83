"""Preparing: what each form of corpus becomes, and which document goes where."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright.data
from shardwright.data import piece, prepare, request
from shardwright.data.corpus import find_sources
from shardwright.data.manifest import open_prepared
from shardwright.data.piece import read
from shardwright.errors import DataError

END = 256


def run(corpus, out, tokenizer="bytes", fraction=0.0, seed=0, **options):
    return prepare.prepare(corpus, tokenizer, out, validation_fraction=fraction, seed=seed, **options)


def ids(*texts):
    return [i for text in texts for i in ([text] if isinstance(text, int) else list(text.encode()))]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tree(root: Path, count: int) -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i:03}.txt").write_text(f"document {i}\n" * (i % 7 + 1))
    return root


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def documents(prepared, split) -> list[str]:
    parts = "".join(chr(i) if i < END else "\0" for i in prepared.tokens(split)).split("\0")
    assert parts.pop() == ""
    return parts


def test_text_tree(tmp_path):
    root = tmp_path / "corpus"
    (root / "b" / ".git").mkdir(parents=True)
    (root / "b" / "one.md").write_text("one\r\n")
    (root / "a.txt").write_bytes(b"\xef\xbb\xbf" + "é".encode())
    (root / "bad.py").write_bytes(b"\xff")
    (root / "blank.txt").write_text(" \n")
    (root / "c.PNG").write_bytes(b"")
    (root / "LICENSE").write_text("x")
    (root / "b" / ".git" / "z.txt").write_text("hidden")
    prepared = run(str(root), tmp_path / "out")
    assert prepared.tokens("train").tolist() == ids("é", END, "one\r\n", END)
    assert prepared.skipped == {".png": 1, "not UTF-8": 1, "empty": 1, "without a suffix": 1}
    assert prepared.splits["train"].documents == 2 and prepared.splits["validation"].tokens == 0
    assert prepared.mask("train") is None
    assert sorted(content(prepared.directory)) == [
        "manifest.json",
        "shardwright-tokenizer.json",
        "train.bin",
        "validation.bin",
    ]


def test_completion_only_loss(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "plain"},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "", "completion": "all"},
        {"text": "end", "other": 1},
    )
    prepared = run(str(path), tmp_path / "out")
    assert prepared.tokens("train").tolist() == ids("plain", END, "2+2=", "4", END, "all", END, "end", END)
    mask = prepared.mask("train")
    assert mask is not None and mask.tolist() == [1] * 6 + [0] * 4 + [1] * 2 + [1] * 4 + [1] * 4
    assert vars(prepared.splits["train"]) == {"documents": 4, "tokens": 20, "loss_tokens": 16}


def test_prompts_with_bpe(tmp_path):
    records = [{"prompt": f"what is {i} ", "completion": f"it is {i * i}!"} for i in range(50)]
    prepared = run(str(jsonl(tmp_path / "x.jsonl", *records)), tmp_path / "out", "bpe:280")
    tokenizer, tokens, mask = prepared.load_tokenizer(), prepared.tokens("train"), prepared.mask("train")
    assert mask is not None
    ends = np.flatnonzero(tokens == tokenizer.separator)
    assert len(ends) == 50 and mask[ends].all()
    start = 0
    for record, end in zip(records, ends, strict=True):
        document, loss = tokens[start:end], mask[start:end]
        assert tokenizer.decode(document[loss == 0]) == record["prompt"]
        assert tokenizer.decode(document[loss == 1]) == record["completion"]
        start = end + 1


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_result_does_not_depend_on_the_parts(tmp_path, monkeypatch, tokenizer):
    root = tree(tmp_path / "corpus", 40)
    jsonl(root / "z.jsonl", *[{"prompt": "p" * i, "completion": "c"} for i in range(20)])
    lines = 50_000 if tokenizer == "bytes" else 100  # 1.3 MB is two pieces
    (root / "long.txt").write_text("a line of a long document\n" * lines)
    corpus = [str(root), str(root / "005.txt")]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and no power fails here
    run(corpus, tmp_path / "large", tokenizer, fraction=0.3)
    monkeypatch.setattr(prepare, "PART_BYTES", 1)
    run(corpus, tmp_path / "small", tokenizer, fraction=0.3)
    assert content(tmp_path / "large") == content(tmp_path / "small")


def test_moved_and_untouched(tmp_path):
    """A prepared directory may be moved, and so may the corpus; only its content and the settings count."""
    root = tree(tmp_path / "corpus", 5)
    first = run(str(root), tmp_path / "out")
    root.rename(tmp_path / "elsewhere")
    (tmp_path / "out").rename(tmp_path / "moved")
    again = run(str(tmp_path / "elsewhere"), tmp_path / "moved")
    assert again.fingerprint == first.fingerprint
    assert str(tmp_path) not in (tmp_path / "moved" / "manifest.json").read_text()
    assert again.tokens("train").tolist() == run(str(tmp_path / "elsewhere"), tmp_path / "new").tokens("train").tolist()


def test_the_split_is_a_function_of_names(tmp_path):
    root = tree(tmp_path / "corpus", 200)
    before = run(str(root), tmp_path / "before", fraction=0.2)
    held_out = set(documents(before, "validation"))
    assert 20 < before.splits["validation"].documents < 60
    assert before.splits["train"].documents + before.splits["validation"].documents == 200
    (root / "0000.txt").write_text("new\n")
    (root / "100.txt").write_text("changed\n")
    after = set(documents(run(str(root), tmp_path / "after", fraction=0.2), "validation"))
    assert after - {"changed\n"} == held_out - {"document 100\n" * 3}
    other = run(str(root), tmp_path / "other", fraction=0.2, seed=1)
    assert set(documents(other, "validation")) != after


@given(count=st.integers(2, 6), fraction=st.floats(0.001, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_both_splits_have_a_document(tmp_path_factory, count, fraction, seed):
    base = tmp_path_factory.mktemp("split")
    records = [{"prompt": "p" * i, "completion": f"c{i}"} for i in range(count)]
    path = jsonl(base / "x.jsonl", *records)
    if seed % 2:  # then no document is at position 0
        path.write_text("\n" + path.read_text())
    prepared = run(str(path), base / "out", fraction=fraction, seed=seed)
    got = {split: documents(prepared, split) for split in prepared.splits}
    assert got["train"] and got["validation"]
    assert sorted(got["train"] + got["validation"]) == sorted("p" * i + f"c{i}" for i in range(count))
    for split, counts in prepared.splits.items():
        mask = prepared.mask(split)
        without = sum(document.count("p") for document in got[split])
        assert counts.documents == len(got[split])
        assert counts.tokens == len(prepared.tokens(split)) == sum(len(d) + 1 for d in got[split])
        assert counts.loss_tokens == counts.tokens - without
        assert (mask is None) == (without == 0)
        if mask is not None:
            is_prompt = prepared.tokens(split) == ord("p")
            assert np.array_equal(mask == 0, is_prompt)


def test_a_document_of_several_pieces_moves_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("first")
    (tmp_path / "a" / "2.txt").write_text("a long line\n" * 100_000)  # 1.2 MB
    prepared = run(str(tmp_path / "a"), tmp_path / "out", fraction=1e-9)
    assert documents(prepared, "train") == ["first"]
    assert documents(prepared, "validation") == ["a long line\n" * 100_000]


@pytest.mark.parametrize("seed", range(5))
def test_a_single_document_is_cut(tmp_path, seed):
    path = tmp_path / "book.txt"
    path.write_text("0123456789" * 100)
    prepared = run(str(path), tmp_path / "out", fraction=0.1, seed=seed)
    train, validation = prepared.tokens("train").tolist(), prepared.tokens("validation").tolist()
    assert train + validation == [*ids("0123456789" * 100), END]
    assert len(validation) == 100
    assert [prepared.splits[split].documents for split in ("train", "validation")] == [1, 0]


def test_bpe_is_trained_on_training_documents(tmp_path):
    root = tree(tmp_path / "corpus", 60)
    found = request.make_request(str(root), "bpe:300", 0.3, 0)
    sample = list(found.sample())
    prepared = run(str(root), tmp_path / "out", fraction=0.3)
    assert sample == documents(prepared, "train")
    (tmp_path / "book.txt").write_text("abcdefghij")
    assert list(request.make_request(str(tmp_path / "book.txt"), "bpe:300", 0.3, 0).sample()) == ["abcdefg"]


def test_the_bpe_sample_is_bounded_and_even(tmp_path, monkeypatch):
    root = tree(tmp_path / "corpus", 400)
    monkeypatch.setattr(request, "SAMPLE_BYTES", 3000)
    found = request.make_request(str(root), "bpe:300", 0.1, 0)
    sample = list(found.sample())
    assert 1500 < sum(map(len, sample)) <= 3000 < found.sources.size / 4
    numbers = [int(text.split()[1]) for text in sample if text]
    assert min(numbers) < 100 and max(numbers) > 300


def test_stdlib():
    sources = find_sources("stdlib")
    names = {file.name for file in sources.files}
    assert {"ast.py", "asyncio/events.py", "json/decoder.py"} <= names and sources.name == "stdlib"
    folders = {part for name in names for part in Path(name).parts}
    assert not folders & {"site-packages", "dist-packages", "__pycache__", "test", "idlelib"}
    assert sources.size > 5e6
    assert [file.name for file in sources.files] == sorted(names)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_parquet(tmp_path, rows):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [f"text {i}" if i % 3 else None for i in range(30)], "other": list(range(30))})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=rows)
    prepared = run(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert documents(prepared, "train") == [f"text {i}" for i in range(30) if i % 3]
    assert prepared.skipped == {"null": 10}
    source = find_sources(str(tmp_path / "x.parquet")).files[0]
    pieces = list(read(source))
    for number, at in enumerate(pieces):
        assert list(read(source, at.after)) == pieces[number + 1 :]
    pairs = arrow.table({"prompt": ["ask"], "completion": ["say"]})
    parquet.write_table(pairs, tmp_path / "y.parquet")
    prepared = run(str(tmp_path / "y.parquet"), tmp_path / "out2")
    mask = prepared.mask("train")
    assert mask is not None and mask.tolist() == [0, 0, 0, 1, 1, 1, 1]
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "z.parquet")
    assert "has the columns body" in error(run, str(tmp_path / "z.parquet"), tmp_path / "out3")
    parquet.write_table(arrow.table({"text": [5]}), tmp_path / "n.parquet")
    assert 'row 1: "text" is int instead of a string' in error(run, str(tmp_path / "n.parquet"), tmp_path / "out3")
    (tmp_path / "w.parquet").write_text("no")
    assert "is not a parquet file" in error(run, str(tmp_path / "w.parquet"), tmp_path / "out3")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_reading_goes_on_from_any_piece(tmp_path, kind):
    path = tmp_path / ("x.txt" if kind == "text" else "x.jsonl")
    line = "né " * 20 + "\n"
    path.write_text(line * 40_000 if kind == "text" else '{"text": "é"}\n\n' * 9)
    source = find_sources(str(path)).files[0]
    pieces = list(read(source))
    assert len(pieces) == (4 if kind == "text" else 9)
    for number, at in enumerate(pieces):
        assert len(at.text.encode()) <= piece.PIECE_BYTES
        # After the last piece a text file has nothing; asked again at its end it must not begin a new document.
        assert list(read(source, at.after)) == pieces[number + 1 :]
    if kind == "text":
        assert "".join(p.text for p in pieces) == path.read_text()
        assert [(p.first, p.last) for p in pieces] == [(True, False), (False, False), (False, False), (False, True)]


def test_a_long_file_with_a_bad_end_is_skipped_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.txt").write_bytes(b"good line\n" * 200_000 + b"\xff")
    (tmp_path / "a" / "z.txt").write_text("z")
    prepared = run(str(tmp_path / "a"), tmp_path / "out")
    assert documents(prepared, "train") == ["z"] and prepared.skipped == {"not UTF-8": 1}


def test_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 100)
    root = tree(tmp_path / "corpus", 20)
    told = []
    run(str(root), tmp_path / "out", progress=lambda *what: told.append(what))
    done = [d for d, _, what in told if what == "tokenizing"]
    assert done == sorted(done) and done[0] == 0 and len(done) > 5
    assert {total for _, total, _ in told} == {done[-1]} == {find_sources(str(root)).size}


# errors


def error(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in caught.value.problem
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON: Expecting"),
        ('["a"]', "list instead of an object"),
        ('{"body": "a"}', 'neither "text" nor both of "prompt" and "completion" (no "prompt" and "completion")'),
        ('{"prompt": "a"}', '(no "completion")'),
        ('{"text": null}', '"text" is NoneType instead of a string'),
        ('{"text": "a", "prompt": "b"}', 'both "text" and "prompt"'),
        ('{"text": "\\ud800"}', '"text" holds half of a surrogate pair'),
    ],
)
def test_bad_line(tmp_path, line, reason, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 1)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    message = error(run, str(path), tmp_path / "out")
    assert message.startswith(f"data.corpus: {path}, line 3: ") and reason in message
    assert message.endswith('each line is {"text": ...} or {"prompt": ..., "completion": ...}')
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_bad_encoding_in_jsonl(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert "line 1: 'utf-8' codec can't decode" in error(run, str(tmp_path / "x.jsonl"), tmp_path / "out")


def test_missing_and_empty(tmp_path):
    assert error(run, str(tmp_path / "no"), tmp_path / "out").startswith(f"data.corpus: {tmp_path / 'no'} does not")
    assert "data.corpus: it is empty" in error(run, [], tmp_path / "out")
    assert "data.corpus: it is empty" in error(run, "", tmp_path / "out")
    assert '"random" is not prepared' in error(run, ["random"], tmp_path / "out")
    (tmp_path / "d").mkdir()
    assert "no text in" in error(run, str(tmp_path / "d"), tmp_path / "out")
    (tmp_path / "d" / "x.png").write_bytes(b"")
    assert "(1 .png)" in error(run, str(tmp_path / "d"), tmp_path / "out")
    (tmp_path / "d" / "x.txt").write_text("")
    assert "no text in d (1 empty)" in error(run, str(tmp_path / "d"), tmp_path / "out")
    (tmp_path / "d" / "x.txt").unlink()
    (tmp_path / "d" / "x.jsonl").write_text("\n\n")
    assert "no text in d (its files are empty)" in error(run, str(tmp_path / "d"), tmp_path / "out")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fraction(tmp_path, fraction):
    assert f"data.validation_fraction: {fraction} is not in [0, 1)" in error(
        run, str(tree(tmp_path / "c", 2)), tmp_path / "out", fraction=fraction
    )


def test_pyarrow_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    message = error(run, str(tmp_path / "x.parquet"), tmp_path / "out")
    assert "needs pyarrow" in message and "pip install 'shardwright[parquet]'" in message


def test_what_is_at_out_already(tmp_path):
    root = tree(tmp_path / "corpus", 3)
    (tmp_path / "out").mkdir()
    run(str(root), tmp_path / "out")  # an empty directory is fine
    told = []
    run(str(root), tmp_path / "out", progress=lambda *what: told.append(what))
    assert told == []
    assert "holds data prepared from another corpus or in another way" in error(
        run, str(root), tmp_path / "out", fraction=0.5
    )
    assert "exists and is not prepared data" in error(run, str(root), root)
    assert "is prepared already" in error(run, str(tmp_path / "out"), tmp_path / "again")
    path = tmp_path / "out" / "train.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    open_prepared(tmp_path / "out")  # opening compares sizes alone
    assert "its content is not what was prepared (SHA-256)" in error(run, str(root), tmp_path / "out")


def test_a_corpus_that_changes_meanwhile(tmp_path):
    root = tree(tmp_path / "corpus", 3)

    def meddle(done, total, what):
        (root / "002.txt").write_text("changed")

    assert "002.txt changed while it was being prepared" in error(run, str(root), tmp_path / "out", progress=meddle)


def test_a_place_that_cannot_be_written(tmp_path):
    root = tree(tmp_path / "corpus", 3)
    (tmp_path / "file").write_text("")
    message = error(run, str(root), tmp_path / "file" / "out")
    assert "file" in message and "SHARDWRIGHT_CACHE" in message
    (tmp_path / ".out.partial").write_text("in the way")
    assert "Not a directory" in error(run, str(root), tmp_path / "out")
    assert "/proc" in error(run, str(root), Path("/proc/nowhere/out"))


# what the folder may import


def test_no_torch():
    code = "import shardwright.data.dataset, sys; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for path in Path(shardwright.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in {"torch", "pickle"}, path
                own = name.startswith(("shardwright.data", "shardwright.errors", "shardwright.units"))
                assert own or not name.startswith("shardwright"), path
