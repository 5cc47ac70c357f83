"""torch.distributed.pipelining on the model of the races, as a user who reads its documentation would run it.

The stages state the shapes of their inputs and outputs, so that no microbatch is run to find them; outputs are not kept
(`return_outputs=False`); the loss is a sum divided by the step's targets, so that gradients need no scaling afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional as F

from benchmarks.harness import Step
from benchmarks.peers.llama import Block, register_rotations
from benchmarks.peers.training import Masters, adamw, start
from shardwright.data.samples import RandomSamples
from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.plan import Plan
from shardwright.spec.architecture import Architecture

SINGLE = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
MULTI = {
    "interleaved": ScheduleInterleaved1F1B,
    "zb-h1": ScheduleInterleavedZeroBubble,  # with one stage on each rank it is the paper's ZB1P, 1F1B with I and W
    "zbv": ScheduleZBVZeroBubble,
}


class LlamaStage(nn.Module):
    """Layers `first` to `stop` of the model, with the embedding before the first layer and the head after the last."""

    def __init__(self, a: Architecture, length: int, first: int, stop: int) -> None:
        super().__init__()
        last = stop == a.layers
        self.tok_embeddings = nn.Embedding(a.vocab, a.hidden) if first == 0 else None
        self.layers = nn.ModuleDict({str(index): Block(a) for index in range(first, stop)})
        self.norm = nn.RMSNorm(a.hidden, a.norm_eps) if last else None
        self.output = nn.Linear(a.hidden, a.vocab, bias=False) if last else None
        register_rotations(self, a, length)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, int64 [B, T], or hidden states [B, T, hidden], to hidden states or logits [B, T, vocab]."""
        x = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        return self.output(self.norm(x)) if self.output is not None and self.norm is not None else x


def _loss(logits: Tensor, targets: Tensor, *, num_targets: int) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / num_targets


def _stage(
    plan: Plan, split: Sequence[int], index: int, dtype: torch.dtype, masters: list[Masters] | None
) -> PipelineStage:
    a, length, size = plan.architecture, plan.sequence_length, plan.spec.train.micro_batch_size
    first = sum(split[:index])
    module = LlamaStage(a, length, first, first + split[index])
    start(module, plan)  # by name, so that every split begins with the same model
    if masters is not None:
        masters.append(Masters(module))
    module.to(dtype)
    tokens = torch.empty(size, length, dtype=torch.int64, device="meta")
    hidden = torch.empty(size, length, a.hidden, dtype=dtype, device="meta", requires_grad=True)
    logits = torch.empty(size, length, a.vocab, dtype=dtype, device="meta", requires_grad=True)
    return PipelineStage(
        module,
        index,
        len(split),
        torch.device("cpu"),
        input_args=tokens if index == 0 else hidden,
        output_args=logits if index == len(split) - 1 else hidden,
    )


def _clip(parameters: Sequence[nn.Parameter], losses: Sequence[Tensor], most: float) -> float:
    """Clip by the norm over all stages; the loss travels in the same reduction."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    scalars = torch.tensor([norm.item() ** 2, sum(loss.item() for loss in losses)], dtype=torch.float64)
    dist.all_reduce(scalars)
    torch.nn.utils.clip_grads_with_norm_(parameters, most, scalars[0].sqrt().to(norm.dtype), foreach=True)
    return float(scalars[1])


def torch_pipeline(
    rank: int, world: int, *, plan: Plan, schedule: str, split: Sequence[int], dtype: str, masters: bool = False
) -> Step:
    """A training step of a torch schedule; `split` counts the layers of each stage, several per rank where they are
    more than the ranks. One dtype throughout unless `masters` are kept."""
    indices = [index for index in range(len(split)) if index % world == rank]
    if schedule == "zbv":
        indices = [rank, 2 * world - 1 - rank]
    kept: list[Masters] = []
    stages = [_stage(plan, split, index, torch_dtype(dtype), kept if masters else None) for index in indices]
    size, length = plan.spec.train.global_batch_size, plan.sequence_length
    loss = partial(_loss, num_targets=size * length)
    options = {"n_microbatches": plan.num_microbatches, "loss_fn": loss, "scale_grads": False}
    runner = SINGLE[schedule](stages[0], **options) if schedule in SINGLE else MULTI[schedule](stages, **options)
    parameters = [p for stage in stages for p in stage.submod.parameters()]
    updated = [copy for one in kept for copy in one.copies] if masters else parameters
    optimizer = adamw(updated, plan.spec.train)
    samples = RandomSamples(plan.architecture.vocab, length, 0)

    def step(index: int) -> float:
        batch = samples.at(range(index * size, (index + 1) * size))
        inputs = (torch.from_numpy(batch.tokens),) if 0 in indices else ()
        targets = torch.from_numpy(batch.targets) if len(split) - 1 in indices else None
        losses: list[Tensor] = []
        runner.step(*inputs, target=targets, losses=losses, return_outputs=False)
        for one in kept:
            one.take_gradients()
        total = _clip(updated, losses, plan.spec.train.max_grad_norm)
        optimizer.step()
        for one in kept:
            one.give_values()
        for stage in stages:
            stage.submod.zero_grad(set_to_none=True)
        return total

    return step
