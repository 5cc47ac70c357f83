"""The plain Llama under DDP, in fp32, with `torch.utils.checkpoint` around each layer or without."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Step
from benchmarks.peers.plain import Llama, starting_values
from shardwright.data.samples import RandomSamples
from shardwright.plan.plan import Plan


class CheckpointedLlama(Llama):
    """A Llama that keeps a layer's input and runs the layer again in the backward."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one."""
        x = self.embedding.tokens(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False, preserve_rng_state=False)
        return self.head(x, targets)


def ddp_llama(rank: int, world: int, *, plan: Plan, checkpointed: bool) -> Step:
    """A training step of DDP at its best setting, from the engine's initial values, on the engine's tokens."""
    train, length = plan.spec.train, plan.sequence_length
    model = (CheckpointedLlama if checkpointed else Llama)(plan.architecture, length).to(torch.float32)
    model.load_state_dict(starting_values(model, plan.architecture, train.seed), strict=False)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=train.betas, eps=train.eps, fused=True)
    samples, size = RandomSamples(plan.architecture.vocab, length, 0), train.global_batch_size // world

    def step(index: int) -> float:
        first = (index * world + rank) * size
        batch = samples.at(range(first, first + size))
        count = torch.tensor(float(batch.num_targets()), dtype=torch.float64)
        dist.all_reduce(count)
        loss = parallel(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)) * (world / count)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach() / world  # DDP averages gradients over ranks
        dist.all_reduce(mean)
        return float(mean)

    return step
