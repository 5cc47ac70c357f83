"""What the peers share: the engine's starting values, its data, the optimizer that all of them use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.peers.plain import Llama, starting_values
from shardwright.data.samples import RandomSamples
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.plan.plan import Plan
from shardwright.spec.train import TrainSpec

TENSORS = {
    "tok_embeddings": "embedding.tokens",
    "attention.wq": "attention.q",
    "attention.wk": "attention.k",
    "attention.wv": "attention.v",
    "attention.wo": "attention.out",
    "feed_forward.w1": "mlp.gate",
    "feed_forward.w3": "mlp.up",
    "feed_forward.w2": "mlp.down",
    "ffn_norm": "mlp_norm",
    "norm": "head.norm",
    "output": "head.output",
}
"""The engine's names of the global tensors of `peers.llama`'s modules, where they differ."""


def batch(plan: Plan, step: int, index: int, degree: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [sequences, T], of part `index` of `degree` of a step's global batch."""
    total = plan.spec.train.global_batch_size
    size = total // degree
    first = step * total + index * size
    found = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0).at(range(first, first + size))
    return torch.from_numpy(found.tokens), torch.from_numpy(found.targets)


def microbatches(plan: Plan, step: int, index: int, degree: int) -> list[tuple[Tensor, Tensor]]:
    """The same, as microbatches."""
    parts = (tensor.split(plan.spec.train.micro_batch_size) for tensor in batch(plan, step, index, degree))
    return list(zip(*parts, strict=True))


def adamw(parameters: Iterable[nn.Parameter], train: TrainSpec) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices alone."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, fused=True)


def _local(tensor: Tensor, like: Tensor) -> Tensor:
    """A rank's part of a tensor, as `like` is divided."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.redistribute(placements=like.placements).to_local()
    return tensor


class Masters:
    """fp32 copies of parameters, kept beside a model by hand: made before the model goes to bf16, updated in the place
    of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for copy in self.copies:
            copy.grad = torch.empty_like(copy)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Those of the model, in fp32."""
        pairs = list(zip(self.copies, self._model.parameters(), strict=True))
        torch._foreach_copy_([_local(c.grad, c) for c, _ in pairs], [_local(p.grad, p) for _, p in pairs])

    @torch.no_grad()
    def give_values(self) -> None:
        """To the model, in its dtype."""
        pairs = list(zip(self._model.parameters(), self.copies, strict=True))
        torch._foreach_copy_([_local(p, p) for p, _ in pairs], [_local(c, c) for _, c in pairs])


def summed(loss: Tensor) -> float:
    """The sum over all ranks; `loss` is used up."""
    dist.all_reduce(loss)
    return float(loss)


def plain_llama(plan: Plan, dtype: str, kind: type[Llama] = Llama) -> Llama:
    """The plain Llama with fp32 parameters, as the engine starts it; `dtype` is that of its products to be."""
    model = kind(plan.architecture, plan.sequence_length).to(torch.float32)
    model.load_state_dict(starting_values(model, plan.architecture, plan.spec.train.seed), strict=False)
    model.cos, model.sin = model.cos.to(torch_dtype(dtype)), model.sin.to(torch_dtype(dtype))
    return model


def _tensor(parameter: str) -> str:
    """layers.3.feed_forward.w1.weight to layers.3.mlp.gate.weight."""
    parts = parameter.split(".")
    before, after = (parts[:2], parts[2:]) if parts[0] == "layers" else ([], parts)
    path, name = ".".join(after[:-1]), after[-1]
    return ".".join([*before, TENSORS.get(path, path), name])


@torch.no_grad()
def start(module: nn.Module, plan: Plan) -> None:
    """Give a whole `peers.llama` model, or a stage of one, the engine's starting values."""
    with torch.device("meta"):
        decoder = Decoder(plan.architecture)
    boxes = {piece.box.tensor.name: piece.box for pieces in pieces_of(decoder).values() for piece in pieces}
    for name, parameter in module.named_parameters():
        fill(parameter.data.view(-1), boxes[_tensor(name)], plan.spec.train.seed)
