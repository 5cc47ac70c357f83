"""FSDP2 (`fully_shard`) on the plain Llama, applied as torchtitan does: each layer, the embedding, the head without
resharding after its forward, then the root.

On gloo nothing runs beside the computation unless asked for: FSDP2 overlaps by CUDA streams. Fastest, and used here,
are asynchronous gathers (`_set_unshard_async_op`) with each unit fetching the next one's parameters in the forward; the
backward does so of itself. Reductions block. On the 25 M-parameter model, 2 ranks on 2 cores, 3 to 5 interleaved steps,
ZeRO-3 then takes 3 % less than at the defaults in bf16 and 4 to 9 % less in fp32; without resharding the difference is
within the noise. Tried, and no different: asynchronous gathers without fetching ahead, and fetching two units ahead in
either direction. Gradients are summed, so that no pass divides them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.harness import Step
from benchmarks.peers.training import adamw, microbatches, plain_llama, summed
from shardwright.plan.plan import Plan


def precision(dtype: str) -> MixedPrecisionPolicy:
    """bf16 products, gradients and reductions over fp32 parameters, or fp32 throughout."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if dtype == "bf16" else MixedPrecisionPolicy()


def sum_gradients(model: nn.Module) -> None:
    """Add gradients where FSDP2 averages: losses are divided by the global batch's targets already."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies


def fsdp2(rank: int, world: int, *, plan: Plan, dtype: str, reshard_after_forward: bool = True) -> Step:
    """A training step; parameters are gathered again in the backward (ZeRO-3), or kept from the forward (ZeRO-2)."""
    train = plan.spec.train
    model = plain_llama(plan, dtype)
    options = {"mesh": init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)), "mp_policy": precision(dtype)}
    for unit in (*model.layers, model.embedding.tokens):
        fully_shard(unit, **options, reshard_after_forward=reshard_after_forward)
    fully_shard(model.head, **options, reshard_after_forward=False)
    fully_shard(model, **options, reshard_after_forward=reshard_after_forward)
    sum_gradients(model)
    model._set_unshard_async_op(True)
    for unit, following in pairwise([model.embedding.tokens, *model.layers, model.head]):
        unit.set_modules_to_forward_prefetch([following])
    parameters = list(model.parameters())
    optimizer = adamw(parameters, train)

    def step(index: int) -> float:
        total = torch.zeros(())
        parts = microbatches(plan, index, rank, world)
        for number, (tokens, targets) in enumerate(parts, 1):
            model.set_requires_gradient_sync(number == len(parts))
            loss = model(tokens, targets) / plan.tokens_per_step
            loss.backward()
            total += loss.detach()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True).full_tensor()
        clip_grads_with_norm_(parameters, train.max_grad_norm, norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return summed(total)

    return step
