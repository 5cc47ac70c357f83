"""torch's own tensor parallelism with sequence parallelism, as its tutorial uses `parallelize_module`: colwise and
rowwise products, sequence-parallel norms, the embedding and the output divided by words, and the loss computed on
divided logits (`loss_parallel`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from benchmarks.harness import Step
from benchmarks.peers.llama import Llama
from benchmarks.peers.training import Masters, adamw, microbatches, start
from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.plan import Plan


def parallelize(model: nn.Module, mesh: DeviceMesh, *, local_logits: bool = False) -> None:
    """Divide a `peers.llama` model, or a stage of one, over a mesh of one axis; logits stay divided."""
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=local_logits),
    }
    here = dict(model.named_children())
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if name in here})
    whole = {"desired_input_layouts": (Replicate(),)}
    inner = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), **whole),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
    for layer in model.get_submodule("layers").children():
        parallelize_module(layer, mesh, inner)


def torch_tensor_parallel(rank: int, world: int, *, plan: Plan, dtype: str, masters: bool = False) -> Step:
    """A training step, in one dtype throughout unless `masters` are kept; every rank sees the whole batch."""
    train = plan.spec.train
    model = Llama(plan.architecture, plan.sequence_length)
    start(model, plan)
    parallelize(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    kept = Masters(model) if masters else None
    model.to(torch_dtype(dtype))
    updated = kept.copies if kept else list(model.parameters())
    optimizer = adamw(updated, train)

    def step(index: int) -> float:
        total = torch.zeros(())
        for tokens, targets in microbatches(plan, index, 0, 1):
            with loss_parallel():
                logits = model(tokens).flatten(0, 1).float()
                loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / plan.tokens_per_step
                loss.backward()
            total += loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach()
        if kept:
            kept.take_gradients()
        nn.utils.clip_grad_norm_(updated, train.max_grad_norm, foreach=True)
        optimizer.step()
        if kept:
            kept.give_values()
        model.zero_grad(set_to_none=True)
        return float(total)

    return step
