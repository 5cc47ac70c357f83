"""Preparing survives: SIGKILL at any line, crashes in between, several processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shardwright.data import partial, prepare
from shardwright.data.file import write_text
from shardwright.data.manifest import is_prepared, open_prepared
from shardwright.errors import DataError

WATCHED = ("prepare.py", "partial.py", "file.py", "manifest.py")


def make_corpus(root: Path) -> Path:
    root.mkdir()
    for i in range(7):
        (root / f"{i:02}.txt").write_text(f"document {i}\n" * 5)
    (root / "bad.txt").write_bytes(b"\xff")
    records = [{"prompt": f"p{i}", "completion": "c"} for i in range(4)]
    (root / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "long.txt").write_text("a line of a long document\n" * 50_000)  # two pieces
    return root


def run(corpus, out, **options):
    options = {"tokenizer": "bytes", "validation_fraction": 0.0001, "seed": 0} | options
    return prepare.prepare(str(corpus), options.pop("tokenizer"), out, **options)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Killed at any line. A process of its own forks one child per attempt; a child counts the lines that it runs in the
# files watched and kills itself at a given one.


def attempt(corpus: Path, out: Path, kill_at: int) -> tuple[int, int]:
    """How many lines ran, or -1 for a killed child, and the bytes that it found done when it began to tokenize."""
    report = out.parent / "report"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        lines, began = [0], []

        def trace(frame, event, argument):
            if Path(frame.f_code.co_filename).name not in WATCHED:
                return None
            if event == "line":
                lines[0] += 1
                if lines[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def progress(done, total, what):
            if what == "tokenizing":
                began.append(done)

        try:
            sys.settrace(trace)
            run(corpus, out, progress=progress)
            sys.settrace(None)
            report.write_text(json.dumps([lines[0], began[0] if began else -1]))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1, 0
    assert os.WEXITSTATUS(status) == 0
    lines, began = json.loads(report.read_text())
    return lines, began


def kill_everywhere(base: Path) -> None:
    prepare.PART_BYTES = 100
    os.fsync = lambda descriptor: None  # no power fails here
    corpus, out = make_corpus(base / "corpus"), base / "out"
    total, began = attempt(corpus, out, 0)
    assert total > 500 and began == 0
    expected = content(out)
    assert {"train.bin", "train.mask.bin", "validation.bin"} <= expected.keys()
    tail = range(total - 160, total + 1, 8)  # the last lines are those that balance, write and rename
    kept = []
    for kill_at in [*range(1, total - 160, total // 25), *tail]:
        shutil.rmtree(out)
        assert attempt(corpus, out, kill_at) == (-1, 0)
        assert not is_prepared(out) or content(out).items() >= expected.items()
        lines, began = attempt(corpus, out, total // 3 if len(kept) % 4 == 0 else 0)  # some are killed twice
        if lines < 0:
            lines, began = attempt(corpus, out, 0)
        assert content(out) == expected, kill_at
        assert sorted(path.name for path in base.iterdir()) == ["corpus", "out", "report"], kill_at
        kept.append((kill_at, lines, began))
    # Later kills leave less to do.
    assert all(began for kill_at, _, began in kept if kill_at > total / 2)
    assert all(lines < total / 2 for kill_at, lines, _ in kept if kill_at > total * 0.8)
    assert all(lines < 150 for kill_at, lines, _ in kept if kill_at > total - 20)
    print(f"{len(kept)} kills within {total} lines")


def test_sigkill_at_any_line(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kills within" in done.stdout


# Interrupted in process, for what a kill would not show.


class Stop(BaseException):
    pass


def interrupted(corpus, out, after: int, **options) -> None:
    """Prepare, and stop at the n-th report of tokenizing."""
    told = []

    def progress(done, total, what):
        told.append(what)
        if told.count("tokenizing") == after:
            raise Stop

    with pytest.raises(Stop):
        run(corpus, out, progress=progress, **options)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 150)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def corpus(tmp_path):
    root = make_corpus(tmp_path / "corpus")
    (root / "long.txt").unlink()
    return root


def test_a_trained_tokenizer_is_not_trained_again(tmp_path, small_parts, corpus):
    run(corpus, tmp_path / "whole", tokenizer="bpe:300")
    interrupted(corpus, tmp_path / "out", 3, tokenizer="bpe:300")
    assert not (tmp_path / "out").exists()
    told = []
    run(corpus, tmp_path / "out", tokenizer="bpe:300", progress=lambda *what: told.append(what[2]))
    assert set(told) == {"tokenizing"}
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_unfinished_work_on_other_data_is_thrown_away(tmp_path, small_parts, corpus):
    interrupted(corpus, tmp_path / "out", 3)
    (corpus / "00.txt").write_text("changed since")
    prepared = run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert bytes(prepared.tokens("train")[:13].astype(np.uint8)) == b"changed since"


@pytest.mark.parametrize("damage", ["shorter", "gone", "journal"])
def test_unfinished_work_that_is_damaged_is_done_again(tmp_path, small_parts, corpus, damage):
    interrupted(corpus, tmp_path / "out", 4)
    directory = tmp_path / ".out.partial"
    if damage == "shorter":
        os.truncate(directory / "train.bin", 10)
    elif damage == "gone":
        (directory / "train.bin").unlink()
    else:
        (directory / "journal.json").write_text("{")
    run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_unfinished_work_can_have_been_moved_on_to_disk_only_in_part(tmp_path, small_parts, corpus):
    """What a crash left behind the journal's end is cut off."""
    interrupted(corpus, tmp_path / "out", 3)
    directory = tmp_path / ".out.partial"
    for name in ("train.bin", "validation.bin", "validation.mask.bin"):
        with (directory / name).open("ab") as file:
            file.write(b"rubbish")
    run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_cut_that_was_made_is_not_made_again(tmp_path, monkeypatch):
    """Of a single document the validation split has no document, so it does not show that it was served."""
    (tmp_path / "book.txt").write_text("0123456789" * 10)

    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_manifest", stop)
        with pytest.raises(Stop):
            run(tmp_path / "book.txt", tmp_path / "out", validation_fraction=0.2)
    prepared = run(tmp_path / "book.txt", tmp_path / "out", validation_fraction=0.2)
    assert [prepared.splits[split].tokens for split in ("train", "validation")] == [81, 20]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")

    def stop(*arguments):
        raise Stop

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, stop)
            with pytest.raises(Stop):
                write_text(tmp_path / "file", "new")
            assert (tmp_path / "file").read_text() == "old"
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_at_once(tmp_path, small_parts, corpus, monkeypatch):
    """Of several that want the same, one prepares and the others wait and take it."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    told: list[tuple[int, str]] = []
    results = []
    start = threading.Barrier(6)

    def ask(number):
        def progress(done, total, what):
            told.append((number, what))
            time.sleep(0.005)

        start.wait()
        results.append(prepare.ensure_prepared(str(corpus), "bytes", 0.1, 0, progress=progress))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.directory for result in results}) == 1 and len(results) == 6
    assert len({number for number, what in told if what == "tokenizing"}) == 1
    assert "waiting for another preparation" in {what for _, what in told}
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    assert entry == prepare.prepared_dir(str(corpus), "bytes", 0.1, 0) == results[0].directory
    assert "lock" not in content(entry)
    open_prepared(entry).check()


@pytest.mark.parametrize("good", [True, False])
def test_at_once_many_times(tmp_path, monkeypatch, good):
    """Short preparations, so that they end while others begin."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "short"}\n' + ("" if good else "{"))
    start = threading.Barrier(8)
    results = []

    def ask():
        for seed in range(20):
            start.wait()
            try:
                prepare.ensure_prepared(str(path), "bytes", 0.0, seed)
                results.append("prepared")
            except DataError as error:
                results.append(error.problem)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160 and len(set(results)) == 1
    assert results[0] == "prepared" if good else "line 2: not JSON" in results[0]
    left = [entry.name for entry in (tmp_path / "cache" / "data").iterdir()]
    assert len(left) == (20 if good else 0) and not [name for name in left if name.startswith(".")]


def test_a_killed_holder_leaves_no_lock(tmp_path):
    directory = tmp_path / "held"
    code = "import sys, time, pathlib\nfrom shardwright.data.partial import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1]), lambda: None): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    waited = threading.Event()
    got = threading.Event()

    def take():
        with partial.locked(directory, waited.set):
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert waited.wait(10) and not got.wait(0.2)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert got.wait(10)
    thread.join()


def test_a_lock_that_moved_away_is_not_held(tmp_path):
    """Whoever waited while the directory was renamed must not believe that it holds the new one."""
    directory, moved = tmp_path / "held", tmp_path / "moved"
    waiting = threading.Event()
    inodes = []

    def take():
        with partial.locked(directory, waiting.set):
            inodes.append((directory / "lock").stat().st_ino)

    thread = threading.Thread(target=take)
    with contextlib.ExitStack() as stack:
        stack.enter_context(partial.locked(directory, lambda: None))
        thread.start()
        assert waiting.wait(10)
        directory.rename(moved)
    thread.join(10)
    assert inodes and inodes[0] != (moved / "lock").stat().st_ino


if __name__ == "__main__":
    kill_everywhere(Path(sys.argv[1]))
