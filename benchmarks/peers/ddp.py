"""torch's DistributedDataParallel on the plain Llama, at its best setting: gradients as views of the buckets, and a
static graph, which it takes where a step is one backward.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Step
from benchmarks.peers.plain import Llama
from benchmarks.peers.training import Masters, adamw, microbatches, plain_llama, summed
from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.plan import Plan


def ddp(
    rank: int,
    world: int,
    *,
    plan: Plan,
    dtype: str,
    autocast: bool = False,
    masters: bool = False,
    kind: type[Llama] = Llama,
) -> Step:
    """A training step: parameters and gradients in `dtype`; with `autocast` matrix products in bf16; with `masters`
    updated in fp32 copies kept beside the model, by hand, for DDP keeps none."""
    train = plan.spec.train
    model = plain_llama(plan, dtype, kind)
    kept = Masters(model) if masters else None
    model.to(torch_dtype(dtype))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=plan.num_microbatches == 1)
    updated = kept.copies if kept else list(model.parameters())
    optimizer = adamw(updated, train)

    def update() -> None:
        if kept:
            kept.take_gradients()
        nn.utils.clip_grad_norm_(updated, train.max_grad_norm, foreach=True)
        optimizer.step()
        if kept:
            kept.give_values()
        model.zero_grad(set_to_none=True)

    def step(index: int) -> float:
        total = torch.zeros(())
        parts = microbatches(plan, index, rank, world)
        for number, (tokens, targets) in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else parallel.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = parallel(tokens, targets) / plan.tokens_per_step
                (loss * world).backward()  # DDP averages over ranks
            total += loss.detach()
        update()
        return summed(total)

    return step
