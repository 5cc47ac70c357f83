"""Many layouts proved in one world of ranks, and the table of their errors.

    python -m benchmarks.proof tensor [--record]
    python -m benchmarks.proof pipeline [--record]
    python -m benchmarks.proof memory [--record]

Every layout is compared with one device as `shardwright verify` does it: loss, gradients and parameters of 3 steps of
clipped AdamW in fp64, with unequal numbers of target tokens. The exit code is 1 if any of them differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RECORDS, environment
from benchmarks.worlds import launched
from shardwright.plan.plan import Device, Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.verify.proof import Proof, prove
from shardwright.verify.trace import read_traces

STEPS = 3
MEMORY = ("offload", "offload_chunk", "recompute", "recompute_layers")

# Sizes that divide by nothing: a vocabulary of 509 words, 27 features, sequences of 13 tokens.
LLAMA = {"layers": 2, "hidden": 24, "head_dim": 4, "ffn": 27, "vocab": 509}
QWEN = {**LLAMA, "head_dim": 6, "qk_norm": True, "qkv_bias": True}
GPT2 = {**LLAMA, "norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True}
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "gpt2": GPT2}


@dataclass(frozen=True)
class Layout:
    """A recipe to prove: the family's name and the tables of the recipe."""

    family: str
    model: dict[str, Any]
    train: dict[str, Any]
    parallel: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks that the recipe asks for."""
        p = self.parallel
        return p["dp"] * p.get("tp", 1) * p.get("pp", 1)

    def plan(self, device: Device = "cpu") -> Plan:
        """The plan of the recipe, on as many ranks as it asks for."""
        train = {
            "dtype": "fp64",
            "sequence_length": 13,
            "micro_batch_size": 1,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            **self.train,
        }
        spec = build({"model": self.model, "train": train, "parallel": self.parallel, "memory": self.memory})
        return resolve(spec, world_size=self.world_size, device=device, native_bf16=False, tokenizer_vocab=None)


def tensor() -> Iterator[Layout]:
    """Every (dp, tp) with product up to 8, ZeRO 0 to 3, with and without sequence parallelism; the rest takes turns."""
    heads = {5: 5, 7: 7}  # 24 heads divide by every other degree
    pairs = [(dp, tp) for tp in range(1, 9) for dp in range(1, 8 // tp + 1)]
    turns = itertools.cycle(range(60))
    for (dp, tp), zero, sequence_parallel in itertools.product(pairs, range(4), (True, False)):
        turn = next(turns)
        h = heads.get(tp, 24)
        kv_heads = [n for n in (1, 2, 3, 8, h) if h % n == 0]
        family = list(FAMILIES)[turn % 3]
        model = {**FAMILIES[family], "heads": h, "kv_heads": kv_heads[turn % len(kv_heads)]}
        model["tied_embeddings"] = bool(turn // 3 % 2)
        microbatches = 1 + turn // 2 % 2
        shards = [n for n in range(1, dp + 1) if dp % n == 0]
        parallel = {"dp": dp, "tp": tp, "zero": zero, "sequence_parallel": sequence_parallel}
        parallel["dp_shard"] = shards[turn % len(shards)] if turn % 4 == 0 else dp
        yield Layout(family, model, {"global_batch_size": dp * microbatches}, parallel)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv")
PIPELINE_LAYOUTS = 150


def pipeline() -> Iterator[Layout]:
    """150 layouts, each (dp, tp, pp) with product up to 8 among them, most with a pipeline; the rest is drawn."""
    draw = random.Random(20)
    triples = [
        (dp, tp, pp) for pp in range(1, 9) for tp in range(1, 8 // pp + 1) for dp in range(1, 8 // (pp * tp) + 1)
    ]
    piped = [triple for triple in triples if triple[2] > 1]
    every = [triple for triple in triples if triple[2] == 1] + piped
    turns = itertools.chain(every, itertools.cycle(piped))
    for turn, (dp, tp, pp) in enumerate(itertools.islice(turns, PIPELINE_LAYOUTS)):
        yield drawn_layout(draw, dp, tp, pp, zero=turn % 4)


def drawn_layout(draw: random.Random, dp: int, tp: int, pp: int, zero: int) -> Layout:
    """Everything but the degrees and the ZeRO stage drawn at random, schedule and split included."""
    heads = {5: 5, 7: 7}.get(tp, 24)
    family = draw.choice(list(FAMILIES))
    schedule = draw.choice(SCHEDULES) if pp > 1 else "1f1b"
    virtual_stages = {"zbv": 2, "interleaved": draw.randint(1, 3)}.get(schedule, 1)
    count = pp * virtual_stages
    layers = count + draw.randint(0, 3)
    parallel = {"dp": dp, "tp": tp, "pp": pp, "zero": zero, "sequence_parallel": draw.random() < 0.7}
    parallel["dp_shard"] = draw.choice([n for n in range(1, dp + 1) if dp % n == 0])
    parallel["zero_pipeline"] = draw.choice(("save_memory", "save_communication"))
    parallel |= {"pipeline_schedule": schedule, "virtual_stages": virtual_stages}
    if draw.random() < 0.5:
        cuts = [0, *sorted(draw.sample(range(1, layers), count - 1)), layers]
        parallel["stages"] = [end - begin for begin, end in itertools.pairwise(cuts)]
    model = {**FAMILIES[family], "layers": layers, "heads": heads, "tied_embeddings": draw.random() < 0.5}
    model["kv_heads"] = draw.choice([n for n in (1, 2, 3, 8, heads) if heads % n == 0])
    return Layout(family, model, {"global_batch_size": dp * draw.randint(1, 9)}, parallel)


def memory() -> Iterator[Layout]:
    """Offload and recomputation on 2 x 2 x 2: each form and each setting with each ZeRO stage, then both together."""
    draw = random.Random(5)
    settings = [{"offload": form} for form in ("state", "update")]
    settings += [{"recompute": setting} for setting in ("none", "selective", "full")]
    settings += [{"offload": o, "recompute": r} for o in ("state", "update") for r in ("selective", "full")]
    for setting, zero in itertools.product(settings, range(4)):
        layout = drawn_layout(draw, 2, 2, 2, zero=zero)
        own = dict(setting)
        if "offload" in own:
            own["offload_chunk"] = draw.choice(("64 MiB", "16 KiB"))
        if own.get("recompute", "none") != "none" and draw.random() < 0.3:
            layers = range(layout.model["layers"])
            own["recompute_layers"] = sorted(draw.sample(layers, draw.randint(1, len(layers) - 1)))
        yield replace(layout, memory=own, parallel=layout.parallel | {"dp_shard": draw.choice((1, 2, 2))})


MATRICES: dict[str, Callable[[], Iterator[Layout]]] = {"tensor": tensor, "pipeline": pipeline, "memory": memory}


def prove_all(layouts: list[Layout], device: Device = "cpu") -> list[Proof]:
    """Trace the layouts of each size in one world of ranks, then compare each with one device."""
    torch.set_num_threads(1)  # the one device's tensors are tiny
    plans = [layout.plan(device) for layout in layouts]
    with tempfile.TemporaryDirectory() as folder:
        folders = launched(plans, "shardwright.verify.rank", (str(STEPS),), Path(folder))
        return [prove(p, read_traces(f, p.world_size), STEPS) for p, f in zip(plans, folders, strict=True)]


def _row(layout: Layout, proof: Proof) -> dict[str, Any]:
    errors = proof.comparison.errors()
    return {
        "family": layout.family,
        **{name: layout.model.get(name) for name in ("heads", "kv_heads", "tied_embeddings")},
        **layout.parallel,
        **({name: layout.memory.get(name, "") for name in MEMORY} if layout.memory else {}),
        **({"stages": list(proof.plan.layers_per_stage)} if "pp" in layout.parallel else {}),
        "microbatches": proof.plan.num_microbatches,
        "passed": proof.passed,
        **errors,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a layout, Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{value:.0e}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Prove a matrix, print its table, and keep it with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", choices=MATRICES)
    parser.add_argument("--every", type=int, default=1, help="prove only every n-th layout")
    parser.add_argument("--most-ranks", type=int, default=8, help="leave out layouts of more ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--record", action="store_true", help="keep the table under benchmarks/records/")
    arguments = parser.parse_args()
    began = time.perf_counter()
    layouts = [layout for layout in MATRICES[arguments.matrix]() if layout.world_size <= arguments.most_ranks]
    layouts = layouts[:: arguments.every]
    proofs = prove_all(layouts, arguments.device)
    rows = [_row(layout, proof) for layout, proof in zip(layouts, proofs, strict=True)]
    passed = sum(row["passed"] for row in rows)
    print(table(rows))
    print(f"\n{passed} of {len(rows)} layouts compute what one device computes ({time.perf_counter() - began:.0f} s)")
    for proof in proofs:
        if not proof.passed:
            print(proof.comparison.missing, proof.comparison.first_difference, file=sys.stderr)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        command = f"python -m benchmarks.proof {arguments.matrix} --record"
        record = {"command": command, "environment": environment(8), "bar": 1e-10, "rows": rows}
        (RECORDS / f"proof_{arguments.matrix}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = f"`{command}`: {passed} of {len(rows)} layouts passed at 1e-10\n\n{table(rows)}\n"
        (RECORDS / f"proof_{arguments.matrix}.md").write_text(text)
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
