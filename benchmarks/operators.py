"""What Shardwright's operators for CPUs bring beside torch's own: products, attention, the head with its loss.

    python -m benchmarks.operators [--rounds 15] [--record]

On one core, in turns, forward and backward; the sizes are those of the two models that are raced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RECORDS, environment
from shardwright.comm.process import keep_freed_memory
from shardwright.nn.causal import attend
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.loss import linear_cross_entropy
from shardwright.nn.product import matmul, matmul_into, product
from shardwright.plan.machine import cpu_computes_bf16

Call = Callable[[], object]


@dataclass
class Pair:
    """The same by two ways, and the seconds that each took, by round."""

    what: str
    size: str
    dtype: str
    ways: tuple[Call, Call]
    flop: float = 0.0
    ours: list[float] = field(default_factory=list)
    torchs: list[float] = field(default_factory=list)

    def run(self) -> None:
        """One more round."""
        for found, way in zip((self.ours, self.torchs), self.ways, strict=True):
            began = time.perf_counter()
            way()
            found.append(time.perf_counter() - began)

    def kept(self) -> dict[str, Any]:
        """For the record."""
        return {name: getattr(self, name) for name in ("what", "size", "dtype", "flop", "ours", "torchs")}

    def row(self) -> str:
        """What came of it, for people."""
        cells = [self.what, self.size, self.dtype]
        for found in (self.ours, self.torchs):
            middle = statistics.median(found)
            cells.append(f"{middle * 1e3:.2f} ms" + (f" ({self.flop / middle / 1e9:.0f} GFLOP/s)" if self.flop else ""))
        ratios = [theirs / own for own, theirs in zip(self.ours, self.torchs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return "| " + " | ".join([*cells, f"**{middle:.2f}** ({low:.2f} to {high:.2f})"]) + " |"


def _differentiated(of: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> Call:
    """Forward and backward."""
    return lambda: torch.autograd.grad(of(*inputs), inputs, grad)


def products(rows: int, inputs: int, outputs: int) -> list[Pair]:
    """A layer's three products in fp32; the weight's gradient is added to a buffer."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    total = torch.zeros_like(weight)
    ways = {
        "product": (partial(product, x, weight), partial(F.linear, x, weight)),
        "gradient of its input": (partial(matmul, grad, weight), partial(torch.matmul, grad, weight)),
        "gradient of its weight, added": (
            partial(matmul_into, total, grad.T, x, add=True),
            partial(total.addmm_, grad.T, x),
        ),
    }
    size = f"{rows} x {inputs} to {outputs}"
    return [Pair(what, size, "fp32", way, 2.0 * rows * inputs * outputs) for what, way in ways.items()]


def attention(sequences: int, heads: int, kv_heads: int, length: int, size: int, dtype: str) -> Pair:
    """Attention of one layer, positions first in memory."""
    fused = torch.randn(length, sequences, heads + 2 * kv_heads, size, dtype=torch_dtype(dtype))
    parts = [part.permute(1, 2, 0, 3).requires_grad_() for part in fused.split([heads, kv_heads, kv_heads], dim=2)]
    grad = torch.randn(length, sequences, heads, size, dtype=fused.dtype).permute(1, 2, 0, 3)
    torchs = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != kv_heads)
    shown = f"{sequences} x {length}, {heads} heads of {size}" + (f" on {kv_heads}" if heads != kv_heads else "")
    ways = (_differentiated(attend, parts, grad), _differentiated(torchs, parts, grad))
    return Pair("attention", shown, dtype, ways)


def head(tokens: int, hidden: int, words: int, dtype: str) -> Pair:
    """The output product and the cross-entropy."""
    made = torch_dtype(dtype)
    inputs = [torch.randn(n, hidden, dtype=made).mul_(0.1).requires_grad_() for n in (tokens, words)]
    targets = torch.randint(words, (tokens,))

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets)

    ways = (_differentiated(ours, inputs), _differentiated(torchs, inputs))
    return Pair("head and loss", f"{tokens} x {hidden}, {words} words", dtype, ways)


def pairs() -> list[Pair]:
    """Everything that is measured."""
    found = []
    with torch.no_grad():
        found += products(1024, 512, 1536) + products(512, 2048, 768)
    for dtype in ["fp32", *(["bf16"] if cpu_computes_bf16() else [])]:
        found += [attention(2, 8, 8, 512, 64, dtype), attention(2, 4, 4, 512, 64, dtype)]
        found += [attention(2, 12, 4, 256, 64, dtype), attention(1, 8, 8, 2048, 128, dtype)]
        found += [head(1024, 512, 8192, dtype)]
    return found


def measure(rounds: int) -> list[Pair]:
    """All pairs in turns; two rounds before warm up."""
    found = pairs()
    for index in range(rounds + 2):
        for pair in found:
            with torch.set_grad_enabled(pair.flop == 0):
                pair.run()
            if index < 2:
                pair.ours.clear()
                pair.torchs.clear()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/operators.*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    measured = measure(asked.rounds)
    lines = ["| what | size | dtype | ours | torch's | times as fast |", "|---|---|---|---|---|---|"]
    told = "\n".join([*lines, *(pair.row() for pair in measured)])
    print(told)
    if asked.record:
        command = f"python -m benchmarks.operators --rounds {asked.rounds}"
        content = {
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "environment": environment(1) | {"cores": 1},
            "pairs": [pair.kept() for pair in measured],
        }
        (RECORDS / "operators.json").write_text(json.dumps(content, indent=1) + "\n")
        (RECORDS / "operators.md").write_text(f"`{command}`\n\n{told}\n")
