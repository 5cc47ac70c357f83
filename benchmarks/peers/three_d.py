"""pp x dp x tp as torchtitan composes them: tensor parallelism with sequence parallelism inside each stage, FSDP2 over
it without resharding after the forward, and 1F1B between the stages. Asynchronous gathers make no difference without
resharding (see peers/fsdp2.py).

Between stages hidden states travel as each rank's part of the sequence, [B, T / tp, C]; logits stay divided by words.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.harness import Step
from benchmarks.peers.fsdp2 import precision, sum_gradients
from benchmarks.peers.pipelining import LlamaStage
from benchmarks.peers.tensor import parallelize
from benchmarks.peers.training import adamw, batch, start
from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.plan import Plan


def _module(plan: Plan, split: Sequence[int], index: int, mesh: DeviceMesh, dtype: str) -> nn.Module:
    """A stage's layers, divided by tp, then by dp."""
    first = sum(split[:index])
    module = LlamaStage(plan.architecture, plan.sequence_length, first, first + split[index])
    start(module, plan)
    module.cos, module.sin = module.cos.to(torch_dtype(dtype)), module.sin.to(torch_dtype(dtype))
    parallelize(module, mesh["tp"], local_logits=True)
    options = {"mesh": mesh["dp"], "mp_policy": precision(dtype), "reshard_after_forward": False}
    for layer in module.layers.values():
        fully_shard(layer, **options)
    if module.tok_embeddings is not None:
        fully_shard(module.tok_embeddings, **options)
    if module.norm is not None and module.output is not None:
        fully_shard([module.norm, module.output], **options)
    fully_shard(module, **options)
    sum_gradients(module)
    return module


def _stage(plan: Plan, split: Sequence[int], mesh: DeviceMesh, dtype: str) -> PipelineStage:
    """This rank's stage, with the shapes of what passes through it."""
    a, length, size = plan.architecture, plan.sequence_length, plan.spec.train.micro_batch_size
    index, tp = mesh["pp"].get_local_rank(), mesh["tp"].size()
    carried = {"dtype": torch_dtype(dtype), "device": "meta", "requires_grad": True}
    tokens = torch.empty(size, length, dtype=torch.int64, device="meta")
    hidden = torch.empty(size, length // tp, a.hidden, **carried)
    logits = torch.empty(size, length, a.vocab // tp, **carried)
    return PipelineStage(
        _module(plan, split, index, mesh, dtype),
        index,
        len(split),
        torch.device("cpu"),
        input_args=tokens if index == 0 else hidden,
        output_args=logits if index == len(split) - 1 else hidden,
        group=mesh["pp"].get_group(),
    )


def _loss(logits: Tensor, targets: Tensor, *, tp: DeviceMesh, num_targets: int) -> Tensor:
    """From local logits, [B, T, vocab / tp]; to be called, and differentiated, under `loss_parallel`."""
    whole = DTensor.from_local(logits.flatten(0, 1).float(), tp, [Shard(-1)], run_check=False)
    return F.cross_entropy(whole, targets.flatten(), reduction="sum") / num_targets


def three_d(rank: int, world: int, *, plan: Plan, split: Sequence[int], dtype: str) -> Step:
    """A training step; `split` counts the layers of each stage, one stage to a rank of the pipeline."""
    train, t = plan.spec.train, plan.topology
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)  # none is changed
    mesh = init_device_mesh("cpu", (t.pp, t.dp, t.tp), mesh_dim_names=("pp", "dp", "tp"))
    mesh["dp", "tp"]._flatten("dp_tp")  # norms are then summed over both in one reduction
    stage = _stage(plan, split, mesh, dtype)
    loss_fn = partial(_loss, tp=mesh["tp"], num_targets=plan.tokens_per_step)
    runner = Schedule1F1B(stage, n_microbatches=plan.num_microbatches, loss_fn=loss_fn, scale_grads=False)
    parameters = list(stage.submod.parameters())
    optimizer = adamw(parameters, train)

    def clip(losses: Sequence[Tensor]) -> float:
        """Clip by the norm over all stages; the loss travels in the same reduction."""
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True).full_tensor()
        loss = sum(loss.to_local().item() for loss in losses) / t.tp
        scalars = torch.tensor([norm.item() ** 2 / (t.dp * t.tp), loss], dtype=torch.float64)
        dist.all_reduce(scalars)
        clip_grads_with_norm_(parameters, train.max_grad_norm, scalars[0].sqrt().to(norm.dtype), foreach=True)
        return float(scalars[1])

    def step(index: int) -> float:
        tokens, targets = batch(plan, index, mesh["dp"].get_local_rank(), t.dp)
        losses: list[Tensor] = []
        with loss_parallel():
            runner.step(
                *((tokens,) if stage.is_first else ()),
                target=targets if stage.is_last else None,
                losses=losses if stage.is_last else None,
                return_outputs=False,
            )
        total = clip(losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step
