"""A Llama and its training step as plain PyTorch writes them: nn.Linear, SDPA, fused AdamW on fp32 masters, no engine.

The fused products (q, k and v; gate and up) and the order of memory are what a careful user chooses. Parameters have
the names of `shardwright.nn`'s decoder, so that both start from the same values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwright.data.batch import IGNORED, Batch
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.plan.plan import Plan
from shardwright.spec.architecture import Architecture


class Norm(nn.Module):
    """RMSNorm by torch's own function."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.sizes = [n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]
        self.head_dim = a.head_dim
        self.qkv = nn.Linear(a.hidden, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], a.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(attended.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of [B, H, T, D] by the angles of `cos` and `sin`, each [T, D / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_up = nn.Linear(a.hidden, 2 * a.ffn, bias=False)
        self.down = nn.Linear(a.ffn, a.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = Norm(a.hidden, a.norm_eps), Norm(a.hidden, a.norm_eps)
        self.attention, self.mlp = Attention(a), FeedForward(a)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nn.Module):
    """Holds the token embedding under the decoder's name."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.tokens = nn.Embedding(a.vocab, a.hidden)


class Head(nn.Module):
    """The final norm and the output product."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.norm = Norm(a.hidden, a.norm_eps)
        self.output = nn.Linear(a.hidden, a.vocab, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one; whole logits fit, and are fastest."""
        logits = self.output(self.norm(x)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Llama(nn.Module):
    """Tokens and targets, int64 [B, T], to the summed loss."""

    def __init__(self, a: Architecture, length: int) -> None:
        super().__init__()
        self.embedding, self.head = Embedding(a), Head(a)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        if a.tied_embeddings:
            self.head.output.weight = self.embedding.tokens.weight
        frequencies = a.rope_theta ** (-torch.arange(0, a.head_dim, 2, dtype=torch.float64, device="cpu") / a.head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one."""
        x = self.embedding.tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(x, targets)


class CheckpointedLlama(Llama):
    """A Llama that keeps a layer's input and runs the layer again in the backward."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one."""
        x = self.embedding.tokens(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False, preserve_rng_state=False)
        return self.head(x, targets)


def starting_values(model: nn.Module, a: Architecture, seed: int) -> dict[str, Tensor]:
    """fp32 initial values of a plain model's parameters, those that the engine's decoder starts from."""
    with torch.device("meta"):
        decoder = Decoder(a)
    pieces, values = pieces_of(decoder), {}
    own = dict(decoder.named_parameters())
    for name, parameter in model.named_parameters():
        values[name] = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        for piece in pieces[own[name]]:
            fill(values[name].view(-1)[piece.start : piece.stop], piece.box, seed)
    return values


class Trainer:
    """bf16 parameters and gradients, fp32 masters under torch's fused AdamW, clipped by the global norm."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        train, self.plan, self.device = plan.spec.train, plan, device
        self.model = Llama(plan.architecture, plan.sequence_length).to(device, torch_dtype(plan.dtype))
        values = starting_values(self.model, plan.architecture, train.seed)
        self.parameters = [p for _, p in self.model.named_parameters()]
        self.masters = [nn.Parameter(values[name]) for name, _ in self.model.named_parameters()]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self._publish()
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": train.weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, fused=True
        )

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(self.parameters, [master.data for master in self.masters])

    def microbatches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(tokens, targets) on the device."""
        size = self.plan.spec.train.micro_batch_size
        tokens, targets = (torch.from_numpy(array).to(self.device) for array in (batch.tokens, batch.targets))
        return list(zip(tokens.split(size), targets.split(size), strict=True))

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The mean loss over the batch's targets, without an update."""
        total = sum(self.model(*microbatch).double() for microbatch in self.microbatches(batch))
        return float(total) / batch.num_targets()

    def step(self, batch: Batch, forward: Callable[[Tensor, Tensor], Tensor] | None = None) -> float:
        """One optimizer step; `forward` takes the model's place, compiled say."""
        forward = self.model if forward is None else forward
        scale, total = 1.0 / batch.num_targets(), torch.zeros((), device=self.device)
        for tokens, targets in self.microbatches(batch):
            loss = forward(tokens, targets) * scale
            loss.backward()
            total += loss.detach()
        with torch.no_grad():
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.plan.spec.train.max_grad_norm, foreach=True)
        self.optimizer.step()
        self._publish()
        return float(total)

    def by_layer(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A forward whose layers and head are compiled, each as a whole."""
        layers = [torch.compile(layer, dynamic=False) for layer in self.model.layers]
        head = torch.compile(self.model.head, dynamic=False)

        def forward(tokens: Tensor, targets: Tensor) -> Tensor:
            x = self.model.embedding.tokens(tokens)
            for layer in layers:
                x = layer(x, self.model.cos, self.model.sin)
            return head(x, targets)

        return forward

    def whole(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The model compiled as one graph."""
        return torch.compile(self.model, dynamic=False)
