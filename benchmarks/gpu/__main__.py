"""One GPU, no network: `python -m benchmarks.gpu [--only SECTION ...] [--record]`; on a CPU a tiny model runs it all.

Sections: throughput, ranks, recompute, offload, capacity (the largest model under a cap); see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu import capacity, memory, ranks, record, throughput
from benchmarks.gpu.record import Section
from benchmarks.gpu.scale import Scale
from benchmarks.harness import RECORDS
from shardwright.units import parse_bytes

Run = Callable[[Scale, argparse.Namespace], Section]

SECTIONS: dict[str, Run] = {
    "throughput": lambda scale, given: throughput.run(scale, given.rounds, given.steps, given.cases, given.profile),
    "ranks": lambda scale, given: ranks.run(scale, given.rounds, given.steps, given.cases),
    "recompute": lambda scale, given: memory.recompute(scale, given.rounds, given.steps),
    "offload": lambda scale, given: memory.offload(scale, given.rounds, given.steps),
    "capacity": lambda scale, given: capacity.run(scale, given.cap, given.cases, given.seconds),
}


DEFAULTS = {"throughput": (7, 5), "ranks": (3, 1), "recompute": (5, 3), "offload": (5, 3), "capacity": (1, 1)}
"""Rounds, and steps in each, on a GPU."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="cases whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=None, help="default: the section's own; 2 on a CPU")
    parser.add_argument("--steps", type=int, default=None, help="in each round; default: the section's own; 1 on a CPU")
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"))
    parser.add_argument("--model", nargs="+", default=[], metavar="FIELD=N", help="sizes over the default: layers=8")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--grad-dtype", choices=("bf16", "fp32"))
    parser.add_argument("--cap", type=parse_cap, default=None, help="of capacity; default: 8 GiB, on a CPU 8 MiB")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which capacity starts no further trial")
    parser.add_argument("--profile", action="store_true", help="throughput: where one step of each goes")
    parser.add_argument("--record", action="store_true", help="keep the figures as gpu_<section>.{json,md}")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the records")
    return parser.parse_args()


def parse_cap(text: str) -> int:
    """Bytes of a quantity such as "8 GiB"."""
    return int(parse_bytes(text, "--cap"))


def _scale(given: argparse.Namespace) -> Scale:
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    scale = Scale.of(device)
    fields = ("sequence_length", "micro_batch_size", "microbatches", "grad_dtype")
    changes = {name: getattr(given, name) for name in fields if getattr(given, name) is not None}
    sizes = {name: int(number) for name, _, number in (field.partition("=") for field in given.model)}
    return replace(scale, model=scale.model | sizes, **changes)


def main() -> int:
    """Run the sections, print each, keep them with --record."""
    given = _arguments()
    # Contenders of different shapes take turns in one process: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    scale = _scale(given)
    asked = given.rounds, given.steps
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    for name in given.only:
        began = time.perf_counter()
        usual = DEFAULTS[name] if scale.device.type == "cuda" else (2, 1)
        given.rounds, given.steps = (own or default for own, default in zip(asked, usual, strict=True))
        section = SECTIONS[name](scale, given)
        print(f"## {name} ({time.perf_counter() - began:.0f} s)\n")
        print(record.markdown(section, command, scale.device), flush=True)
        if given.record:
            print(record.write(section, command, scale.device, given.out), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
