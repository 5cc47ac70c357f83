"""Generation beside transformers' own, and what stages at work at the same time are worth.

    python -m benchmarks.generate [--rounds 5] [--record]

One rank and both cores: the same model of the same weights, a Llama of 25 M parameters in fp32, greedy, 64 new tokens,
at batch 1 and 16, in turns in one process; transformers generates with its cache. Then two ranks, one core each: pp = 2
with a batch of 64 in four parts beside one part: with fewer than 16 rows a part reads the weights and hardly computes.
Last, the time of one token at place 10 and at place 500, with what attention itself takes at both, measured by its own
operations at those lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.nn import functional as F

from benchmarks.harness import RECORDS, environment, quartiles
from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.worker import Worker
from shardwright.data.tokenizer import BytesTokenizer
from shardwright.infer.generator import Generator
from shardwright.infer.settings import Settings

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "bos_token_id": None,
}
PROMPT = "The quick brown fox jumps over the lazy dog. "  # 45 tokens
NEW, PIPELINED = 64, 64
FP32 = ("train.dtype=fp32",)


def make_model(path: Path) -> None:
    """Random weights that say something else at every step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **MODEL, initializer_range=0.05)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    BytesTokenizer().save(path)


def prompts(count: int) -> list[str]:
    """Prompts of one length, all different."""
    return [f"{PROMPT}{number:03d}" for number in range(count)]


def beside_transformers(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both, in turns, at each batch size."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = Generator.alone(str(path), overrides=FP32)
    rows = []
    for batch in (1, 16):
        ids = torch.tensor([BytesTokenizer().encode_prompt(prompt) for prompt in prompts(batch)])

        def them(ids: torch.Tensor = ids) -> list[list[int]]:
            out = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            return out[:, ids.shape[1] :].tolist()

        def us(batch: int = batch) -> list[list[int]]:
            return [list(c.tokens) for c in ours.complete(prompts(batch), Settings(max_new_tokens=NEW))]

        assert us() == them(), "both must say the same"
        seconds = in_turns({"ours": us, "transformers": them}, rounds)
        rows.append({"batch": batch, "tokens": batch * NEW, **seconds})
    return rows


def in_turns(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name in cases if index % 2 else reversed(cases):
            began = time.perf_counter()
            cases[name]()
            if index:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """A rank of pp = 2: a batch of 16 in one part and in four, in turns."""
    folder, rounds = Path(arguments[0]), int(arguments[1])
    torch.set_num_threads(1)
    generator = Generator.of(str(folder / "model"), worker, (*FP32, "parallel.pp=2"))
    cases = {
        f"{groups} parts": lambda groups=groups: generator.complete(
            prompts(PIPELINED), Settings(max_new_tokens=24), groups=groups, batch_size=PIPELINED
        )
        for groups in (1, 4)
    }
    seconds = in_turns(cases, rounds)
    if worker.rank == 0:
        (folder / "pipeline.json").write_text(json.dumps(seconds))


def token_times(path: Path) -> dict[str, float]:
    """Seconds of one token at two places, the best of three runs, and of attention's own operations there."""
    generator = Generator.alone(str(path), overrides=FP32)
    runs = []
    for _ in range(3):
        arrivals = []
        for _ in generator.stream([PROMPT[:5]], Settings(max_new_tokens=520)):
            arrivals.append(time.perf_counter())
        runs.append([later - earlier for earlier, later in pairwise(arrivals)])
    at = {place: min(statistics.median(steps[place - 8 : place + 12]) for steps in runs) for place in (10, 500)}
    return {f"token {place}": seconds for place, seconds in at.items()} | {
        f"attention {place}": attention_seconds(place + 5) for place in (10, 500)
    }


def attention_seconds(length: int) -> float:
    """Of all layers at one length: the product of one query with the keys, and of its weights with the values."""
    heads, kv, d = 8, 4, 64
    k, v = (torch.randn(1, kv, 1024, d)[:, :, :length] for _ in range(2))
    q = torch.randn(1, kv, heads // kv, d)
    found = []
    for _ in range(200):
        began = time.perf_counter()
        for _ in range(MODEL["num_hidden_layers"]):  # type: ignore[arg-type]
            F.scaled_dot_product_attention(q, k, v)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def told(rows: list[dict[str, Any]], pipeline: dict[str, list[float]], tokens: dict[str, float]) -> str:
    """The record for people."""
    lines = ["| | tokens/s | beside |", "|---|---|---|"]
    for row in rows:
        ratios = [theirs / ours for ours, theirs in zip(row["ours"], row["transformers"], strict=True)]
        low, middle, high = quartiles(ratios)
        rate = {name: row["tokens"] / statistics.median(row[name]) for name in ("ours", "transformers")}
        beside = f"**{middle:.2f}** ({low:.2f} to {high:.2f}) x {rate['transformers']:,.0f}"
        lines.append(f"| one rank, batch {row['batch']}, beside transformers | {rate['ours']:,.0f} | {beside} |")
    one, four = pipeline["1 parts"], pipeline["4 parts"]
    low, middle, high = quartiles([a / b for a, b in zip(one, four, strict=True)])
    rate, alone = (PIPELINED * 24 / statistics.median(seconds) for seconds in (four, one))
    beside = f"**{middle:.2f}** ({low:.2f} to {high:.2f}) x {alone:,.0f}"
    lines.append(f"| pp = 2, batch 64 in 4 parts beside 1 | {rate:,.0f} | {beside} |")
    grows = (tokens["token 500"] - tokens["token 10"]) * 1e3
    share = (tokens["attention 500"] - tokens["attention 10"]) * 1e3
    lines += [
        "",
        f"A token takes {tokens['token 10'] * 1e3:.2f} ms at place 10 and {tokens['token 500'] * 1e3:.2f} ms at place "
        f"500: {grows:.2f} ms more; attention alone takes {share:.2f} ms more there.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/generate.*")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardwright-generate-") as temporary:
        home = Path(temporary)
        make_model(home / "model")
        by_batch = beside_transformers(home / "model", asked.rounds)
        if code := launch(Job(2, "benchmarks.generate", (temporary, str(asked.rounds)))):
            raise SystemExit(code)
        by_parts = json.loads((home / "pipeline.json").read_text())
        times = token_times(home / "model")
    text = told(by_batch, by_parts, times)
    print(text)
    if asked.record:
        record = {"environment": environment(2), "beside": by_batch, "pipeline": by_parts, "tokens": times}
        (RECORDS / "generate.json").write_text(json.dumps(record, indent=1) + "\n")
        command = f"python -m benchmarks.generate --rounds {asked.rounds}"
        machine = f"{environment(2)['cpu']}, {os.cpu_count()} cores"
        (RECORDS / "generate.md").write_text(f"`{command}`, {machine}\n\n{text}\n")
    sys.exit(0)
