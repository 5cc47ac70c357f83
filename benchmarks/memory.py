"""The memory ledger, estimated beside measured, rank by rank.

    python -m benchmarks.memory [--record] [--only N ...]
    python -m benchmarks.memory --formulas [--record]

Every layout of a model of 25 M parameters runs one step on this machine's gloo ranks. What rests between microbatches
must be the estimate to the byte, category by category; the peak of activations and the peak of all live bytes may
differ by 3 %. The first 13 layouts were at hand while the estimate was written; the last 7 were chosen after it. With
--formulas: the bytes per parameter of every ZeRO stage, with and without offload, which must equal the ZeRO paper's
formulas. The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RECORDS, environment
from benchmarks.worlds import launched
from shardwright.comm.mesh import Groups, Mesh
from shardwright.comm.worker import Worker
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import MemoryRecord
from shardwright.record.store import read_json, write_json
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.ledger import StepMemory
from shardwright.train.step import train_step

EXACT = ("parameters", "gradients", "optimizer", "communication", "offload", "host")
BAR = 0.03

QWEN = {"kv_heads": 2, "qk_norm": True, "qkv_bias": True}
GPT2 = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True, "vocab": 5003}

# dp, tp, pp, the rest of [parallel], [train], [memory], [model]
LAYOUTS: list[tuple[int, int, int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (1, 1, 1, {}, {"micro_batch_size": 4}, {}, {}),
    (1, 1, 1, {}, {"micro_batch_size": 2}, {"recompute": "full"}, {}),
    (1, 1, 1, {}, {"micro_batch_size": 4}, {"recompute": "selective"}, {}),
    (2, 1, 1, {"zero": 0}, {"micro_batch_size": 2}, {}, {}),
    (2, 1, 1, {"zero": 2}, {"micro_batch_size": 2}, {}, {"kv_heads": 2}),
    (2, 1, 1, {"zero": 3}, {"micro_batch_size": 2, "dtype": "bf16"}, {"recompute": "full"}, {}),
    (1, 2, 1, {}, {"micro_batch_size": 2}, {}, {}),
    (1, 2, 1, {"sequence_parallel": False}, {"micro_batch_size": 2}, {"recompute": "selective"}, {}),
    (1, 1, 2, {}, {"micro_batch_size": 2}, {}, {}),
    (1, 1, 2, {"pipeline_schedule": "zb-h1"}, {"micro_batch_size": 2}, {"recompute": "selective"}, {}),
    (2, 2, 2, {"zero": 1, "pipeline_schedule": "interleaved", "virtual_stages": 2}, {"micro_batch_size": 1}, {}, {}),
    (2, 1, 2, {"zero": 2, "pipeline_schedule": "zbv", "virtual_stages": 2}, {}, {"recompute": "full"}, {}),
    (2, 2, 1, {"zero": 3}, {"dtype": "bf16", "grad_dtype": "bf16"}, {"offload": "state", "offload_chunk": "4 MiB"}, {}),
    # Chosen after the estimate was written.
    (1, 1, 1, {}, {"micro_batch_size": 3}, {}, QWEN | {"tied_embeddings": True}),
    (4, 1, 1, {"zero": 2, "dp_shard": 2}, {"micro_batch_size": 2}, {"recompute": "selective"}, GPT2),
    (1, 4, 1, {}, {"micro_batch_size": 2}, {"recompute": "full", "recompute_layers": [0, 2, 5]}, GPT2),
    (
        1,
        1,
        4,
        {"pipeline_schedule": "gpipe"},
        {"micro_batch_size": 2},
        {"offload": "update"},
        {"tied_embeddings": True},
    ),
    (2, 1, 4, {"zero": 3, "zero_pipeline": "save_communication"}, {}, {"recompute": "selective"}, {"kv_heads": 1}),
    (4, 2, 1, {"zero": 1, "dp_shard": 2, "sequence_parallel": False}, {"micro_batch_size": 2}, {}, QWEN),
    (2, 2, 2, {"zero": 3, "pipeline_schedule": "zb-h1"}, {"micro_batch_size": 2}, {}, {"tied_embeddings": True}),
]


@dataclass(frozen=True)
class Pair:
    """One rank's records of one layout."""

    estimated: MemoryRecord
    measured: MemoryRecord

    def ratio(self, category: str) -> float:
        """Estimated over measured."""
        return getattr(self.estimated, category) / getattr(self.measured, category)

    @property
    def wrong(self) -> list[str]:
        """The categories that do not hold."""
        pairs = {name: (getattr(self.estimated, name), getattr(self.measured, name)) for name in EXACT}
        wrong = [name for name, (estimated, measured) in pairs.items() if estimated != measured]
        return wrong + [name for name in ("activations", "peak") if abs(self.ratio(name) - 1) > BAR]


def plan_of(index: int) -> Plan:
    """The plan of a layout."""
    dp, tp, pp, parallel, train, memory, model = LAYOUTS[index]
    micro = train.get("micro_batch_size", 1)
    recipe = {
        "model": {"preset": "small-25m"} | model,
        "train": {"dtype": "fp32", "sequence_length": 128, "global_batch_size": 4 * dp * micro} | train,
        "parallel": {"dp": dp, "tp": tp, "pp": pp, "zero": 0} | parallel,
        "memory": memory,
    }
    recipe["train"]["micro_batch_size"] = micro
    return resolve(build(recipe), world_size=None, device="cpu", native_bf16=False, tokenizer_vocab=None)


def title(index: int) -> str:
    """A layout in words."""
    dp, tp, pp, *tables = LAYOUTS[index]
    values = [f"{name} {value}" for table in tables for name, value in table.items()]
    return ", ".join([f"dp {dp} x tp {tp} x pp {pp}", *values]).replace("_", " ")


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """A rank: run one step of each folder's plan and write what was measured."""
    groups = Groups()
    for folder in map(Path, arguments):
        plan = Plan.model_validate(read_json(folder / "plan.json"))
        mesh = Mesh(plan.topology, worker.device, groups=groups)
        runtime = compose(plan, mesh)
        optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
        samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
        memory = StepMemory(runtime, optimizer)
        with memory:
            train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
        runtime.states.owned_tensors()  # no update is under way
        assert memory.record is not None
        write_json(folder / f"{mesh.rank}.json", memory.record.as_json())
        del runtime, optimizer, memory


def measure(plans: list[Plan]) -> list[list[Pair]]:
    """By plan and rank, what was estimated and what was measured."""
    with tempfile.TemporaryDirectory() as path:
        folders = launched(plans, "benchmarks.memory", (), Path(path))
        return [
            [
                Pair(estimated_memory(plan, rank), MemoryRecord.from_json(read_json(folder / f"{rank}.json")))
                for rank in range(plan.world_size)
            ]
            for plan, folder in zip(plans, folders, strict=True)
        ]


def table(found: dict[int, list[Pair]]) -> str:
    """Of each layout the rank whose estimate is worst, as a Markdown table."""
    heads = ["", "layout", "state, MB", "activations, MB", "estimated", "peak, MB", "estimated", "off"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for index, pairs in found.items():
        worst = max(pairs, key=lambda pair: max(abs(pair.ratio(name) - 1) for name in ("activations", "peak")))
        wrong = sorted({name for pair in pairs for name in pair.wrong})
        cells = [str(index + 1), title(index), f"{worst.measured.total / 1e6:.1f}"]
        for name in ("activations", "peak"):
            cells += [f"{getattr(worst.measured, name) / 1e6:.1f}", f"{worst.ratio(name) - 1:+.2%}".replace("%", " %")]
        lines.append("| " + " | ".join([*cells, ", ".join(wrong)]) + " |")
    return "\n".join(lines)


def run() -> int:
    """Measure, print, and keep the record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/memory.*")
    parser.add_argument("--formulas", action="store_true", help="bytes per parameter of ZeRO stages and offload")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of layouts, from 1")
    arguments = parser.parse_args()
    if arguments.formulas:
        return _formulas(arguments.record)
    chosen = [number - 1 for number in arguments.only or range(1, len(LAYOUTS) + 1)]
    began = time.perf_counter()
    found = dict(zip(chosen, measure([plan_of(index) for index in chosen]), strict=True))
    text = table(found)
    print(text)
    wrong = sum(bool(pair.wrong) for pairs in found.values() for pair in pairs)
    ranks = sum(len(pairs) for pairs in found.values())
    summary = f"{ranks - wrong} of {ranks} ranks of {len(found)} layouts hold"
    print(f"\n{summary}, in {time.perf_counter() - began:.0f} s")
    if arguments.record:
        _write(found, f"{summary}.\n\n{text}\n")
    return 1 if wrong else 0


def _formulas(record: bool) -> int:
    """Measured bytes per parameter, bf16 AdamW with bf16 gradients, as a table; 1 where one is not the formula's."""
    model = {"layers": 4, "hidden": 128, "heads": 4, "ffn": 256, "vocab": 256}  # nothing needs padding
    train = {"dtype": "bf16", "grad_dtype": "bf16", "sequence_length": 16, "micro_batch_size": 1}
    cases = list(itertools.product(range(4), ("none", "state", "update"), (1, 2, 4)))
    plans = [
        resolve(
            build(
                {
                    "model": model,
                    "train": train | {"global_batch_size": 2 * n},
                    "parallel": {"dp": n, "zero": zero},
                    "memory": {"offload": offload, "offload_chunk": "64 KiB"},
                }
            ),
            world_size=None,
            device="cpu",
            native_bf16=False,
            tokenizer_vocab=None,
        )
        for zero, offload, n in cases
    ]
    wrong, cells = 0, {}
    for (zero, offload, n), plan, pairs in zip(cases, plans, measure(plans), strict=True):
        count, measured = plan.architecture.num_parameters, pairs[0].measured
        state, moved = (12 / n if zero else 12), 0 if offload == "none" else 1
        held = 4 if zero < 2 else 2 + 2 / n if zero == 2 else 4 / n
        host = state * moved + (2 / (n if zero else 1) if offload == "update" else 0)
        device = (measured.total - measured.offload) / count
        wrong += (device, measured.host / count) != (held + state * (1 - moved), host)
        cells[zero, offload, n] = f"{device:g} + {measured.host / count:g} on the host" if moved else f"{device:g}"
    lines = ["| zero | offload | N = 1 | N = 2 | N = 4 |", "|---|---|---|---|---|"]
    for zero, offload in itertools.product(range(4), ("none", "state", "update")):
        lines.append(f"| {zero} | {offload} | " + " | ".join(cells[zero, offload, n] for n in (1, 2, 4)) + " |")
    text = "\n".join(lines)
    print(f"{text}\n\n{wrong} of {len(cases)} differ from the formula")
    if record:
        note = "Measured bytes per parameter between microbatches, slots apart; all equal the formula."
        (RECORDS / "memory_formulas.md").write_text(
            f"`python -m benchmarks.memory --formulas --record`\n\n{note}\n\n{text}\n"
        )
    return 1 if wrong else 0


def _write(found: dict[int, list[Pair]], text: str) -> None:
    rows = [
        {
            "layout": title(index),
            "ranks": [{"estimated": p.estimated.as_json(), "measured": p.measured.as_json()} for p in pairs],
        }
        for index, pairs in found.items()
    ]
    command = "python -m benchmarks.memory --record"
    content = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(8), "rows": rows}
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / "memory.json").write_text(json.dumps(content, indent=1) + "\n")
    note = "State, activations and peak as measured on the rank whose estimate is worst; beside them how far it is off."
    (RECORDS / "memory.md").write_text(f"`{command}`\n\n{note} {text}")


if __name__ == "__main__":
    sys.exit(run())
