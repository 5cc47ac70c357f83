"""One device, written plainly: the model, autograd and torch's own optimizer, with nothing of the engine.

It shares with the engine what is not in question: the model's code, the initial values, the tokens and the schedule.
Gradients are accumulated in `grad_dtype` and updates made on fp32 masters under bf16, as a recipe says.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwright.data.batch import Batch
from shardwright.layout.box import Box, Piece
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.optim.schedule import learning_rate
from shardwright.plan.plan import Plan
from shardwright.train.batches import global_positions
from shardwright.verify.trace import Part, Trace, samples_for


def _microbatches(batch: Batch, size: int, backwards: bool) -> list[tuple[Tensor, Tensor]]:
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    if backwards:
        tokens, targets = tokens.flip(0), targets.flip(0)
    return list(zip(tokens.split(size), targets.split(size), strict=True))


def _optimizer(plan: Plan, masters: list[nn.Parameter]) -> torch.optim.Optimizer:
    train = plan.spec.train
    matrices = {"params": [p for p in masters if p.dim() >= 2], "weight_decay": train.weight_decay}
    others = {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, others) if group["params"]]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps)


def _record(trace: Trace, step: int, kind: str, tensors: list[Tensor], pieces: list[tuple[Piece, ...]]) -> None:
    for tensor, held in zip(tensors, pieces, strict=True):
        for piece in held:
            values = tensor.detach().flatten()[piece.start : piece.stop].clone().view(piece.box.size)
            trace.parts.append(Part(step, kind, Box.whole(piece.box.tensor), 0, values))


def trace_one_device(plan: Plan, steps: int, *, backwards: bool = False) -> Trace:
    """Run `steps` steps of a plan's global batches on one device.

    `backwards` takes the sequences in the opposite order, one at a time where microbatches have several and two where
    they have one: the same sums in another order, inside products too, so that the difference of two such traces is
    rounding noise and nothing else.
    """
    train = plan.spec.train
    dtype, grad_dtype = torch_dtype(plan.dtype), torch_dtype(plan.grad_dtype)
    model = Decoder(plan.architecture).to(dtype)
    held = pieces_of(model)
    parameters = list(held)
    pieces = [held[p] for p in parameters]
    masters = [nn.Parameter(torch.empty_like(p, dtype=torch.promote_types(dtype, torch.float32))) for p in parameters]
    with torch.no_grad():
        for master, parameter, own in zip(masters, parameters, pieces, strict=True):
            for piece in own:
                fill(master.view(-1)[piece.start : piece.stop], piece.box, train.seed)
            parameter.copy_(master)
    optimizer, samples, trace = _optimizer(plan, masters), samples_for(plan), Trace()
    for step in range(steps):
        batch = samples.at(global_positions(plan, step))
        num_targets = max(batch.num_targets(), 1)
        size = (2 if train.micro_batch_size == 1 else 1) if backwards else train.micro_batch_size
        gradients = [torch.zeros_like(p, dtype=grad_dtype) for p in parameters]
        loss_sum = 0.0
        for tokens, targets in _microbatches(batch, size, backwards):
            loss = model(tokens, targets) / num_targets
            loss.backward()
            loss_sum += float(loss.detach())
            for gradient, parameter in zip(gradients, parameters, strict=True):
                if parameter.grad is not None:
                    gradient.add_(parameter.grad)
                    parameter.grad = None
        _record(trace, step + 1, "gradients", gradients, pieces)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.to(master.dtype, copy=True)
        norm = torch.linalg.vector_norm(torch.stack([m.grad.double().norm() for m in masters if m.grad is not None]))
        if train.max_grad_norm:
            scale = min(1.0, train.max_grad_norm / (float(norm) + 1e-6))
            for master in masters:
                assert master.grad is not None
                master.grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        _record(trace, step + 1, "parameters", [*masters], pieces)
        trace.losses.append(loss_sum)
        trace.norms.append(float(norm))
    return trace
