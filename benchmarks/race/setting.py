"""What is raced: a model, a precision, and the plans that both sides take their sizes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Case
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build

SEQUENCES = 2
"""Per rank of the data axis, in one microbatch; pipelines have more microbatches of one sequence each."""


@dataclass(frozen=True)
class Model:
    """A `[model]` table and the length of its sequences."""

    table: dict[str, Any]
    length: int
    says: str


MODELS = {
    "small-25m": Model(
        {"preset": "small-25m"}, 512, "25 M parameters: 8 layers, hidden 512, 8 heads, ffn 680, vocabulary 8192, untied"
    ),
    "llama-100m": Model(
        {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "ffn": 2048, "vocab": 16384},
        256,
        "100 M parameters: 12 layers, hidden 768, 12 heads on 4 key-value heads, ffn 2048, vocabulary 16384, untied",
    ),
}


@dataclass(frozen=True)
class Setting:
    """A model by its name and the dtype that computes."""

    model: str
    dtype: str

    def plan(
        self, world: int, *, micro_batches: int = 1, micro_batch: int = SEQUENCES, grad_dtype: str = "", **parallel: Any
    ) -> Plan:
        """A plan for some ranks; gradients are of the dtype that computes unless told."""
        parallel = {"zero": 0, **parallel}
        data = world // (parallel.get("tp", 1) * parallel.get("pp", 1))
        chosen = MODELS[self.model]
        train = {
            "sequence_length": chosen.length,
            "global_batch_size": micro_batch * micro_batches * data,
            "micro_batch_size": micro_batch,
            "lr": 1e-3,
            "dtype": self.dtype,
            "grad_dtype": grad_dtype or self.dtype,
        }
        tables = {"model": chosen.table, "train": train, "parallel": {"dp": data, **parallel}}
        return resolve(build(tables), world_size=world, device="cpu", native_bf16=True, tokenizer_vocab=None)

    def precision(self, *, masters: bool = True, grad_dtype: str = "") -> str:
        """What is kept and reduced in which dtype, of a side that computes in the setting's; `masters` under bf16."""
        gradients = grad_dtype or self.dtype
        kept = "-" if self.dtype == "fp32" else "fp32" if masters else "none"
        return f"{self.dtype} / {gradients} / {gradients} / {kept}"


@dataclass(frozen=True)
class Race:
    """Cases that take turns, on `world` ranks; a step of each is `tokens` of the global batch."""

    name: str
    title: str
    world: int
    tokens: int
    cases: Sequence[Case]


def tokens_of(plan: Plan) -> int:
    """Tokens of a global batch."""
    return plan.spec.train.global_batch_size * plan.sequence_length
