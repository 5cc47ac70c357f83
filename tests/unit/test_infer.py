"""How tokens are drawn and where texts end."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from shardwright.cost.cache import cache_bytes
from shardwright.data.tokenizer import BytesTokenizer, LearnedTokenizer
from shardwright.errors import RunError
from shardwright.infer.generator import Completion, Pace
from shardwright.infer.out import check_out, write_out
from shardwright.infer.prepare import prompt_ids, read_prompts
from shardwright.infer.rank import Output, give
from shardwright.infer.sampling import choose
from shardwright.infer.settings import Finish, Settings
from shardwright.infer.text import Ends, Generated, text_of
from shardwright.nn.cache import LayerCache, Places
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

DRAWS = 20_000


def frequencies(logits: list[float], settings: Settings) -> torch.Tensor:
    """How often each token is drawn, over many prompts."""
    rows = torch.tensor([logits]).expand(DRAWS, -1)
    drawn = choose(rows, [(number, 0) for number in range(DRAWS)], settings)
    return torch.bincount(drawn, minlength=len(logits)).double() / DRAWS


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.5]
    for temperature in (0.7, 1.0, 2.0):
        expected = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
        found = frequencies(logits, Settings(temperature=temperature))
        # Four standard deviations of a binomial share.
        assert ((found - expected).abs() < 4 * (expected * (1 - expected) / DRAWS).sqrt()).all()


def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_shares() -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.5]
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0)
    for settings, kept in (
        (Settings(temperature=1.0, top_k=2), [0, 4]),
        (Settings(temperature=1.0, top_p=0.5), [0, 4]),  # the first has 0.46, so that the next is needed
        (Settings(temperature=1.0, top_p=0.4), [0]),
        (Settings(temperature=1.0, top_k=3, top_p=0.99), [0, 1, 4]),
    ):
        found = frequencies(logits, settings)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert set(found.nonzero().flatten().tolist()) == set(kept)
        assert torch.allclose(found, expected, atol=0.015)


def test_a_draw_depends_on_its_seed_prompt_and_place_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = Settings(temperature=1.5, seed=3)
    places = [(5, 0), (9, 2), (0, 7), (1, 1)]
    together = choose(logits, places, settings)
    alone = torch.cat([choose(logits[i : i + 1], [places[i]], settings) for i in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, choose(logits, places, Settings(temperature=1.5, seed=4)))


def test_the_coldest_temperature_is_greedy() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 30
    for temperature in (1e-12, 1e-300, 5e-324):
        drawn = choose(logits, [(i, 0) for i in range(6)], Settings(temperature=temperature, top_p=0.9))
        assert torch.equal(drawn, logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [float("inf"), float("nan")])
def test_a_temperature_is_a_finite_number(temperature: float) -> None:
    with pytest.raises(RunError, match=f"--temperature: {temperature} is not a finite number"):
        Settings(temperature=temperature)


def ends(stop: tuple[str, ...] = (), most: int = 99, context: int = 100) -> Ends:
    return Ends({256}, BytesTokenizer(), Settings(max_new_tokens=most, stop=stop), context)


def test_where_a_sequence_ends() -> None:
    sequence = Generated(0, (1, 2, 3), list(b"abc"))
    assert ends().after(sequence, 256) is Finish.STOP
    assert ends(("cd",)).after(sequence, ord("d")) is Finish.STOP
    assert ends(("cx",)).after(sequence, ord("d")) is None
    assert ends(most=4).after(sequence, ord("d")) is Finish.LENGTH
    assert ends(context=7).after(sequence, ord("d")) is Finish.LENGTH
    assert ends(context=8).after(sequence, ord("d")) is None


def test_text_that_goes_on_holds_back_what_may_still_change() -> None:
    def said(text: bytes, stop: str, finish: Finish | None = None) -> str:
        return text_of(Generated(0, (256,), list(text), finish), ends((stop,)))

    assert said(b"wait STO", "STOP") == "wait "
    assert said(b"wait STO", "STOP", Finish.LENGTH) == "wait STO"
    assert said(b"wait STOP", "STOP", Finish.STOP) == "wait "
    whole = "naïve".encode()
    assert said(whole[:3], "STOP") == "na"
    assert said(whole[:3], "STOP", Finish.LENGTH) == "na\ufffd"
    assert text_of(Generated(0, (256,), [*whole, 256], Finish.STOP), ends()) == "naïve"


def test_texts_as_they_come_only_grow() -> None:
    tokens = list("héllo STO wörld ST OP".encode())
    assert grown((256,), tokens, ends(("STOP", "OPEN"))) == "héllo STO wörld ST OP"


def grown(prompt: tuple[int, ...], tokens: list[int], of: Ends) -> str:
    """The text after all tokens, which each of them made no shorter."""
    sequence, shown = Generated(0, prompt), ""
    for token in tokens:
        sequence.tokens.append(token)
        sequence.finish = Finish.LENGTH if len(sequence.tokens) == len(tokens) else None
        text = text_of(sequence, of)
        assert text.startswith(shown)
        shown = text
    return shown


WORDS = ("▁", "a", "b", "▁say", "▁world")


def byte_fallback() -> LearnedTokenizer:
    """As Llama 2 has it: what is no word is bytes, a run of which is decoded as a whole, and the first space goes."""
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: 259 + index for index, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return LearnedTokenizer(inner, "tokenizer.json", "</s>")


def test_texts_of_byte_fallback_only_grow_and_keep_their_first_space() -> None:
    tokenizer = byte_fallback()
    of = Ends({2}, tokenizer, Settings(), 999)
    word = {text: 259 + index for index, text in enumerate(WORDS)}
    tokens = [word["a"], *(3 + byte for byte in "éé☃☃".encode()), word["b"], 2]
    assert grown((1, word["▁say"]), tokens, of) == tokenizer.decode(tokens) == "aéé☃☃b"
    assert grown((1, word["▁say"]), [word["▁world"], word["▁world"]], of) == " world world"
    assert grown((1,), [word["▁world"], word["▁world"]], of) == "world world"
    assert grown((1, word["▁say"]), [word["▁"], word["▁world"], 2], of) == "  world"
    # Bytes that never become a character, after one that has been shown, and before it.
    assert grown((1, word["▁say"]), [3 + 0xC3, 3 + 0xA9, 3 + 0xC3, word["▁world"]], of) == "é\ufffd world"
    assert grown((1, word["▁say"]), [3 + 0xC3, word["b"], 3 + 0xC3], of) == "\ufffdb\ufffd"
    assert grown((1, 3 + 0xC3), [3 + 0xA9, word["b"]], of).endswith("b")


def test_a_stop_string_is_found_in_the_text_that_is_shown() -> None:
    tokenizer, word = byte_fallback(), 259 + WORDS.index("▁world")
    of = Ends({2}, tokenizer, Settings(stop=(" wor",)), 999)
    sequence = Generated(0, (1, 259 + WORDS.index("▁say")))
    assert of.after(sequence, word) is Finish.STOP
    sequence.tokens, sequence.finish = [word], Finish.STOP
    assert text_of(sequence, of) == ""


def test_prompts_of_a_file_are_lines_that_end_with_a_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}'.encode())
    assert read_prompts(path) == {f"--prompts: {path}, line 1": "a\u2028b", f"--prompts: {path}, line 3": "c"}


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(RunError, match=r"prompt: number 2 is not Unicode text: '\\ud800' at character 2"):
        prompt_ids(BytesTokenizer(), ["a", "a\ud800"], 257, 99)


def test_out_follows_links_and_replaces_files_alone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    for text in ("old\n", "new\n"):
        check_out(str(tmp_path / "link"))
        write_out(str(tmp_path / "link"), text)
        assert (tmp_path / "there" / "real").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["real"]
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_out(str(pipe))
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_out(str(pipe), "lines\n")
    reader.join(10)
    assert read == ["lines\n"] and pipe.is_fifo()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "--out: an empty name"),
        ("here", "is a directory"),
        ("none/", "is a directory"),
        ("none/file", "there is no directory .*none"),
        ("file/file", "cannot be written: Not a directory"),
        ("loop", "cannot be written: Too many levels"),
    ],
)
def test_out_that_nothing_can_be_written_to_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RunError, match=problem):
        check_out(f"{tmp_path}/{name}" if name else "")


def test_out_that_cannot_be_written_to_at_last_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunError, match="cannot be written: no permission"):
        check_out(str(tmp_path / "file"))
    (tmp_path / "file").mkdir()  # since it was looked at
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        write_out(str(tmp_path / "file"), "lines\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_cache_holds_what_the_formula_says() -> None:
    spec = ModelSpec.model_validate({"layers": 3, "hidden": 24, "heads": 6, "kv_heads": 3, "vocab": 50})
    a = resolve_architecture(spec, sequence_length=8, tokenizer_vocab=None)
    places = Places(torch.zeros(5, dtype=torch.int64))
    caches = [LayerCache.empty(places, 17, 2, a.head_dim, torch.bfloat16) for _ in range(3)]
    estimated = cache_bytes(a, tp=2, index=0, layers=3, sequences=5, positions=17, dtype="bf16")
    assert sum(cache.num_bytes for cache in caches) == estimated


@pytest.mark.parametrize("starts", [[0, 0], [2, 2], [1, 4]])
@pytest.mark.parametrize("count", [1, 3])
def test_a_query_sees_its_own_past_and_nothing_else(starts: list[int], count: int) -> None:
    places = Places(torch.zeros(2, dtype=torch.int64))
    cache = LayerCache.empty(places, 8, 1, 4, torch.float32)
    cache.keys.fill_(torch.nan)  # what nobody has written
    places.move(starts)
    new = torch.ones(count, 2, 1, 4)
    keys, _ = cache.extend(new, new)
    mask = cache.mask(count)
    length = len(keys)
    if "attn_mask" in mask:
        seen = mask["attn_mask"].expand(2, 1, count, length)[:, 0]
    elif mask.get("is_causal"):
        seen = torch.ones(count, length).tril(length - count).bool().expand(2, -1, -1)
    else:
        seen = torch.ones(2, count, length, dtype=torch.bool)
    for row, start in enumerate(starts):
        for query in range(count):
            assert seen[row, query].nonzero().flatten().tolist() == list(range(start + query + 1))


@pytest.mark.parametrize("as_json", [False, True])
def test_what_cannot_be_written_at_last_is_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    said = Completion("a", "é", (1,), Finish.LENGTH)
    with pytest.raises(RunError, match="cannot be written: Is a directory\n  the lines are on standard output instead"):
        give([said], [Pace()], str(tmp_path), Output(alone=True), as_json=as_json)
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[0])["completions"] if as_json else [json.loads(line) for line in lines]
    assert rows == [{"prompt": "a", "text": "é", "tokens": [1], "finish_reason": "length"}]


def test_standard_output_that_takes_nothing_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout.write", full)
    with pytest.raises(RunError, match="standard output: cannot be written: No space left"):
        Output(alone=True).write("a")
