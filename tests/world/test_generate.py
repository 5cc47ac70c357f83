"""What a layout says is what transformers says, token for token, whatever else is in the batch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LLAMA
from layouts import plan_of as layouts_plan
from pool import Place, Pool
from test_hugging_face import DRY, GPT2, LLAMA3, SIZES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM

from shardwright.checkpoint.save import save
from shardwright.cli import main as command
from shardwright.data.tokenizer import BytesTokenizer
from shardwright.infer import engine
from shardwright.infer.generator import Generator, Pace
from shardwright.infer.prepare import plan_of, spec_of
from shardwright.infer.settings import Settings
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose

pytestmark = pytest.mark.world

VOCAB = 300
NEW = 64
SEPARATOR = BytesTokenizer.separator
PROMPTS = ("a", "def function(argument):", "The longest of these prompts has the most tokens", "x = 1", "hm")
LONG = {"max_position_embeddings": 160}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, **LONG, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", **SIZES, **LONG, "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **SIZES, **LONG, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, **LONG, "head_dim": 10, "num_key_value_heads": 1},
    "gpt2": {"model_type": "gpt2", **GPT2, **DRY, "n_positions": 160},
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one rank": (),
    "tp2": ("parallel.tp=2",),
    "pp2": ("parallel.pp=2",),
    "tp2-pp2": ("parallel.tp=2", "parallel.pp=2"),
    "dp2": ("parallel.dp=2",),
    "dp2-zero3-tp2": ("parallel.dp=2", "parallel.zero=3", "parallel.tp=2"),
    "dp2-pp2": ("parallel.dp=2", "parallel.pp=2"),
}

Said = list[tuple[tuple[int, ...], str]]
"""Tokens and finish of each prompt."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Random models that say something else at every step, with a tokenizer of bytes beside them."""
    folder = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        torch.manual_seed(1)
        own = {**fields, "vocab_size": VOCAB, "initializer_range": 0.3}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **own))
        model.save_pretrained(folder / name)
        BytesTokenizer().save(folder / name)
    yield {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Said]:
    """What transformers says to each prompt alone."""
    return {name: _said_by_transformers(path) for name, path in models.items()}


def _said_by_transformers(path: Path) -> Said:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    named = model.config.eos_token_id
    ends = [SEPARATOR, *([] if named is None else [named])]
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([BytesTokenizer().encode_prompt(prompt)])
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
        tokens = tuple(out[0, ids.shape[1] :].tolist())
        said.append((tokens, "stop" if tokens[-1] in ends else "length"))
    return said


def speak(
    place: Place, source: str, overrides: tuple[str, ...], world: int, settings: Settings, groups: int, batch: int
) -> tuple[Said, Pace]:
    plan = plan_of(spec_of(source, ("train.dtype=fp32", *overrides)), world, "cpu")
    generator = Generator(source, plan, place.mesh(plan.topology))
    found = generator.complete(PROMPTS, settings, groups=groups, batch_size=batch)
    assert [completion.prompt for completion in found] == list(PROMPTS)
    return [(completion.tokens, str(completion.finish)) for completion in found], generator.pace


def said_on(
    pool: Pool, path: Path, layout: str, settings: Settings, *, groups: int = 0, batch: int = 16
) -> tuple[Said, list[Pace]]:
    overrides = LAYOUTS[layout]
    world = 1
    for override in overrides:
        field, _, value = override.partition("=")
        world *= int(value) if field != "parallel.zero" else 1
    ranks = pool.run(world, speak, str(path), overrides, world, settings, groups, batch)
    assert all(said == ranks[0][0] for said, _ in ranks)  # every rank knows
    return ranks[0][0], [pace for _, pace in ranks]


GREEDY = Settings(max_new_tokens=NEW)
CASES = [(model, layout) for model in MODELS for layout in ("one rank", "tp2", "pp2", "tp2-pp2", "dp2")]
CASES += [("llama", "dp2-zero3-tp2"), ("gpt2", "dp2-pp2")]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_batch_of_mixed_lengths_says_what_transformers_says(
    pool: Pool, models: dict[str, Path], expected: dict[str, Said], model: str, layout: str
) -> None:
    said, paces = said_on(pool, models[model], layout, GREEDY)
    assert said == expected[model]
    assert len({token for tokens, _ in said for token in tokens}) > 20  # it says something
    for pace in paces:
        assert pace.cache_measured == pace.cache_estimated > 0


@pytest.mark.parametrize(("groups", "batch"), [(1, 16), (4, 16), (2, 2), (1, 1)])
def test_neither_groups_nor_batches_change_anything(
    pool: Pool, models: dict[str, Path], expected: dict[str, Said], groups: int, batch: int
) -> None:
    assert said_on(pool, models["qwen3"], "pp2", GREEDY, groups=groups, batch=batch)[0] == expected["qwen3"]


SAMPLED = {
    "temperature": Settings(max_new_tokens=24, temperature=0.9, seed=7),
    "top-k": Settings(max_new_tokens=24, temperature=1.2, top_k=5, seed=7),
    "top-p": Settings(max_new_tokens=24, temperature=1.1, top_p=0.7, seed=7),
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_one_seed_draws_the_same_on_every_layout(pool: Pool, models: dict[str, Path], kind: str) -> None:
    alone, _ = said_on(pool, models["llama"], "one rank", SAMPLED[kind])
    for layout in ("tp2", "pp2", "tp2-pp2", "dp2"):
        assert said_on(pool, models["llama"], layout, SAMPLED[kind])[0] == alone
    assert said_on(pool, models["llama"], "one rank", SAMPLED[kind], batch=1)[0] == alone
    other = replace(SAMPLED[kind], seed=8)
    assert said_on(pool, models["llama"], "one rank", other)[0] != alone


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_cache_gives_what_the_whole_sequence_gives(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    seen: list[torch.Tensor] = []
    choose = engine.choose

    def watching(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(logits.clone())
        return choose(logits, *rest)

    monkeypatch.setattr(engine, "choose", watching)
    generator = Generator.alone(str(models[model]), overrides=("train.dtype=fp32",))
    found = generator.complete(PROMPTS, replace(GREEDY, max_new_tokens=40))
    whole = Generator.alone(str(models[model]), overrides=("train.dtype=fp32",))._runtime.model
    for row, completion in enumerate(found):
        prompt = BytesTokenizer().encode_prompt(completion.prompt)
        with torch.no_grad():
            logits = whole.logits(torch.tensor([[*prompt, *completion.tokens]]))[0]
        for index in range(len(completion.tokens)):
            difference = (seen[index][row] - logits[len(prompt) + index - 1]).abs().max()
            assert difference < 1e-5 * max(1.0, float(logits.abs().max()))


def leave(place: Place, folder: Path) -> None:
    """In two ranks: a model of bytes as training leaves it, sharded over both."""
    model = LLAMA | {"kv_heads": 3, "vocab": 257, "max_positions": 90, "init_std": 0.3}
    plan = layouts_plan(model, {"tp": 2, "zero": 1}, dtype="fp32")
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    save(folder, runtime, optimizer, step=3)


def test_a_checkpoint_of_ours_speaks_on_any_layout(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    BytesTokenizer().save(tmp_path / "model")
    pool.run(2, leave, tmp_path)
    path = tmp_path / "step-00000003"
    alone, _ = said_on(pool, path, "one rank", replace(GREEDY, max_new_tokens=20))
    assert len({token for tokens, _ in alone for token in tokens}) > 10
    for layout in ("tp2-pp2", "dp2-zero3-tp2"):
        assert said_on(pool, path, layout, replace(GREEDY, max_new_tokens=20))[0] == alone


# As a user meets it


def shardwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "shardwright", "generate", *arguments]
    return subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)


def test_lines_in_lines_out_and_stop_strings(
    models: dict[str, Path], expected: dict[str, Said], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    files = ("--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"))
    row, stop = next(
        (row, chr(tokens[i]) + chr(tokens[i + 1]))
        for row, (tokens, _) in enumerate(expected["llama"])
        for i in range(2, len(tokens) - 1)
        if 32 < tokens[i] < 127 and 32 < tokens[i + 1] < 127
    )
    arguments = ("train.dtype=fp32", "parallel.tp=2", "--max-new-tokens", str(NEW), "--stop", stop)
    done = shardwright(str(models["llama"]), *files, *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert rows[row]["finish_reason"] == "stop" and stop not in rows[row]["text"]
    said, tokens = rows[row]["tokens"], expected["llama"][row][0]
    assert tuple(said) == tokens[: len(said)] and BytesTokenizer().decode(said) == rows[row]["text"] + stop
    assert "tokens/s; first after" in done.stderr and "cache" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere", "--prompt", "a"], "generate: nowhere: no such directory"),
        (["{empty}", "--prompt", "a"], "has neither manifest.json nor config.json"),
        (["{other}", "--prompt", "a"], 'model_type "mamba" is not built'),
        (["{bare}", "--prompt", "a"], "no tokenizer in"),
        (["{llama}", "--prompt", "a" * 160], "--prompt: number 1 has 160 tokens, and the model's context is 160"),
        (["{llama}", "--prompts", "{long}"], "long, line 2 has 160 tokens, and the model's context is 160"),
        (["{llama}", "--prompts", "{half}"], "half, line 1 is not Unicode text: '\\ud800' at character 1"),
        (["{llama}", "--prompt", "a", "--out", "{empty}"], "empty: is a directory"),
        (["{wide}", "--prompt", "a"], "and [model] wants [301, "),
        (["{cut}", "--prompt", "a"], "not a whole safetensors file"),
        (["{broken}", "--prompt", "a"], "generation_config.json: not JSON"),
        (["{llama}", "--prompt", "a", "data.separator=x"], "has one of its own"),
        (["{llama}", "--prompt", "a", "train.global_batch_size=2"], "train.global_batch_size: only training reads it"),
        (["{llama}", "--prompt", "a", 'run.trackers=["tensorboard"]'], "run.trackers: only training reads it"),
        (["{llama}", "--prompt", "a", "model.layers=1"], "model.layers: the model is the one that lies there"),
        (["{llama}", "--prompt", "a", "model.init_from=x"], "model.init_from: the model is the one that lies there"),
        (["{llama}", "--prompt", "a", "parallel.pipeline_schedule=zbv"], "parallel.pipeline_schedule: only training"),
        (["{llama}", "--prompt", "a", "parallel.virtual_stages=2"], "generation has one stage on each rank, not 2"),
        (["{llama}", "--prompt", "a", "parallel=3"], "parallel: 3 is not a table"),
        (["{llama}", "--prompt", "a", "--temperature", "-1"], "--temperature: -1 is not at least 0"),
        (["{llama}", "--prompt", "a", "--top-p", "0"], "--top-p: 0 is not above 0"),
        (["{llama}", "--prompt", "a", "--top-k", "-2"], "--top-k: -2 is negative"),
        (["{llama}", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["{llama}", "--prompt", "a", "--stop", ""], "--stop: an empty text"),
        (["{llama}"], "--prompt: none was given"),
        (["{llama}", "--prompts", "{empty}/none.jsonl"], "cannot be read: No such file"),
        (["{llama}", "--prompts", "{bad}"], "line 2: has no text under prompt"),
        (["{llama}", "--prompt", "a", "parallel.tp=3"], "parallel.tp: 3 does not divide model.heads = 4"),
        (["{llama}", "--prompt", "a", "parallel.pp=3"], "parallel.pp"),
        (["{llama}", "--prompt", "a", "parallel.tpp=2"], "parallel.tpp: no such field"),
        (["{llama}", "--prompt", "a", "--batch-size", "0"], "--batch-size: 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40],
)
def test_bad_input_is_one_clear_line(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    for name in ("empty", "other", "bare"):
        (tmp_path / name).mkdir()
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    for name in ("wide", "cut", "broken"):
        shutil.copytree(models["llama"], tmp_path / name)
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    os.truncate(tmp_path / "cut" / "model.safetensors", 20_000)
    (tmp_path / "broken" / "generation_config.json").write_text("{")
    (tmp_path / "long").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a" * 160}))
    (tmp_path / "half").write_text('{"prompt": "\\ud800"}')
    (tmp_path / "bad").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    paths = {path.name: str(path) for path in tmp_path.iterdir()} | {"llama": str(models["llama"])}
    given = ["shardwright", "generate", *(argument.format(**paths) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as left:  # before any rank is started
        command.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and problem in said
    assert said.count("error:") == 1 and len(said.strip().splitlines()) <= 3


def test_a_killed_rank_ends_the_job(models: dict[str, Path]) -> None:
    asked = [sys.executable, "-m", "shardwright", "generate", str(models["llama"]), "parallel.pp=2"]
    many = [argument for _ in range(400) for argument in ("--prompt", "go on")]
    process = subprocess.Popen(
        [*asked, *many, "--max-new-tokens", "150", "--batch-size", "1"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    ranks: list[int] = []
    while len(ranks) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(c) for c in children if b"comm.rank" in Path(f"/proc/{c}/cmdline").read_bytes()]
        time.sleep(0.1)
    time.sleep(3)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(30) == 1
    assert process.stderr is not None and "lower --batch-size or shard more" in process.stderr.read()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


LIVE = (sys.executable, "-m", "shardwright", "generate")
ENDLESS = ("--prompt", "go on", "--max-new-tokens", "150", "--batch-size", "1")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reader_that_leaves_ends_it_quietly(models: dict[str, Path], ranks: int) -> None:
    asked = [*LIVE, str(models["llama"]), f"parallel.pp={ranks}", *ENDLESS]
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert "Traceback" not in told and "Broken" not in told


def test_characters_that_a_terminal_lacks_are_replaced(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = shardwright(str(models["llama"]), "--prompt", "é", "--max-new-tokens", "3")
    assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr
    done = shardwright(str(models["llama"]), "--prompt", "é", "--max-new-tokens", "3", "--json")
    assert json.loads(done.stdout)["completions"][0]["prompt"] == "é"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_is_heard_at_once(models: dict[str, Path], ranks: int) -> None:
    many = [argument for _ in range(2000) for argument in ENDLESS[:2]]
    asked = [*LIVE, str(models["llama"]), f"parallel.tp={ranks}", *many, *ENDLESS]
    process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(12)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(30) == 130 and time.monotonic() - began < 10
    assert process.stderr is not None and "stopped by SIGINT" in process.stderr.read()


def test_the_end_of_texts_may_be_named(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "named")
    (tmp_path / "named" / "shardwright-tokenizer.json").unlink()
    letters = {chr(33 + index): index for index in range(90)}
    inner = Tokenizer(WordLevel(letters | {"<|eot|>": 90}, unk_token="!"))
    inner.save(str(tmp_path / "named" / "tokenizer.json"))
    done = shardwright(str(tmp_path / "named"), "--prompt", "a")
    assert done.returncode == 2 and 'data.separator = "<|eot|>"' in done.stderr
    done = shardwright(str(tmp_path / "named"), "--prompt", "a", "--max-new-tokens", "2", "data.separator=<|eot|>")
    assert done.returncode == 0, done.stderr


def test_torchrun_tells_an_error_once(models: dict[str, Path]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = [*torchrun, "--no-python", *LIVE, str(models["llama"]), "--prompt", "a", "parallel.tp=3"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.count("parallel.tp: 3 does not divide") == 1
