"""A decoder-only transformer as one device would write it.

It knows nothing of other devices. `blocks()` lists its parts in the order of execution; what passes between them is a
tensor [positions, sequences, hidden], so any run of consecutive blocks can live somewhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.attention import Attention, Rotary
from shardwright.nn.loss import linear_cross_entropy
from shardwright.nn.mlp import make_mlp
from shardwright.nn.norm import make_norm
from shardwright.nn.parameters import Declaration
from shardwright.spec.architecture import Architecture


class Embedding(nn.Module):
    """Token ids to vectors, with learned positions added where the architecture has them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.declaration = Declaration(std=a.init_std)
        self.weight = nn.Parameter(torch.empty(a.vocab, a.hidden))
        self.positions = nn.Parameter(torch.empty(a.max_positions, a.hidden)) if a.positions == "learned" else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] to [T, B, hidden]."""
        x = F.embedding(tokens_BT.T, self.weight)
        return x if self.positions is None else x + self.positions[: len(x), None]


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, architecture: Architecture, rotary: Rotary | None) -> None:
        super().__init__()
        a = architecture
        self.attention_norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.attention = Attention(a, rotary)
        self.mlp_norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.mlp = make_mlp(a)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, hidden] to [T, B, hidden]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """The final norm, the vocabulary product and the loss; `weight` may be the embedding's own."""

    def __init__(self, architecture: Architecture, tied: nn.Parameter | None) -> None:
        super().__init__()
        a = architecture
        self.declaration = Declaration(std=a.init_std)
        self.norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.weight = nn.Parameter(torch.empty(a.vocab, a.hidden)) if tied is None else tied

    def logits(self, x_TBC: Tensor) -> Tensor:
        """[T, B, hidden] to [B, T, vocab]."""
        return F.linear(self.norm(x_TBC), self.weight).transpose(0, 1)

    def forward(self, x_TBC: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one."""
        return linear_cross_entropy(self.norm(x_TBC).flatten(0, 1), self.weight, targets_BT.T.flatten())


class Decoder(nn.Module):
    """Embedding, layers, head. The loss is a sum over targets; whoever calls divides by their global number."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        rotary = Rotary(architecture) if architecture.positions == "rotary" else None
        self.embedding = Embedding(architecture)
        self.layers = nn.ModuleList(Layer(architecture, rotary) for _ in range(architecture.layers))
        self.head = Head(architecture, self.embedding.weight if architecture.tied_embeddings else None)

    def blocks(self) -> list[nn.Module]:
        """The parts in order of execution; the parameters of each are communicated together."""
        return [self.embedding, *self.layers, self.head]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The last layer's output, [T, B, hidden]."""
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        return x

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, vocab]; for inspection and inference, not for training."""
        return self.head.logits(self.hidden(tokens_BT))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one (IGNORED is -1), a scalar of at least fp32."""
        return self.head(self.hidden(tokens_BT), targets_BT)
