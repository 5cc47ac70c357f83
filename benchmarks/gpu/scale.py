"""The model and the batch of every section: about a billion parameters on a GPU, next to nothing on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import SGD, AdamW, make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

LR = 1e-4

_BILLION: dict[str, Any] = {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 32768}
_SMALL: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512}


@dataclass(frozen=True)
class Scale:
    """A model and a batch. `microbatches` of `micro_batch_size` sequences make a step of one rank."""

    device: torch.device
    model: dict[str, Any]
    sequence_length: int
    micro_batch_size: int
    microbatches: int
    grad_dtype: str = "bf16"

    @staticmethod
    def of(device: torch.device) -> Scale:
        """The device's default."""
        if device.type == "cuda":
            return Scale(device, _BILLION, sequence_length=2048, micro_batch_size=4, microbatches=2)
        return Scale(device, _SMALL, sequence_length=32, micro_batch_size=2, microbatches=2)

    @property
    def tokens_per_step(self) -> int:
        """Of one rank."""
        return self.sequence_length * self.micro_batch_size * self.microbatches

    def plan(self, *, dp: int = 1, **sections: dict[str, Any]) -> Plan:
        """The plan of this model in bf16 on one rank, or in the layout of `parallel`; sections go over the recipe's.

        Raises LayoutError where the recipe asks for what is not built.
        """
        parallel = {"dp": dp, "zero": 0, **sections.pop("parallel", {})}
        train = {
            "sequence_length": self.sequence_length,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.micro_batch_size * self.microbatches * dp,
            "dtype": "bf16",
            "grad_dtype": self.grad_dtype,
            **sections.pop("train", {}),
        }
        model = self.model | sections.pop("model", {})
        spec = build({"model": model, "train": train, "parallel": parallel, **sections})
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        return resolve(spec, world_size=None, device=kind, native_bf16=True, tokenizer_vocab=None)


@dataclass
class Engine:
    """A plan composed on one rank, and its optimizer."""

    plan: Plan
    runtime: Runtime
    optimizer: AdamW | SGD

    @staticmethod
    def of(plan: Plan, device: torch.device) -> Engine:
        """The engine alone in the world."""
        runtime = compose(plan, Mesh(plan.topology, device, rank=0))
        return Engine(plan, runtime, make_optimizer(plan.spec.train, runtime.states.owned_tensors()))

    def step(self, index: int) -> float:
        """One step on global batch `index`; its loss."""
        batch = rank_batch(self.runtime, samples_of(self.plan), index)
        return train_step(self.runtime, self.optimizer, batch, LR).loss

    def settle(self) -> None:
        """Wait for updates that offload has still under way."""
        self.runtime.states.home.settle()


def samples_of(plan: Plan) -> RandomSamples:
    """Random tokens, the same for every contender."""
    return RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
