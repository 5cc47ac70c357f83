"""The two ends of a model: token ids to vectors, and vectors to the loss over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.loss import linear_cross_entropy
from shardwright.nn.parameters import Declaration
from shardwright.nn.product import product


class TokenEmbedding(nn.Module):
    """A row of `weight` [vocab, hidden] for every token."""

    def __init__(self, vocab: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.declaration = Declaration(std=std)
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens_TB: Tensor) -> Tensor:
        """int64 [T, B] to [T, B, hidden]."""
        return F.embedding(tokens_TB, self.weight)


class PositionEmbedding(nn.Module):
    """Adds a row of `weight` [max_positions, hidden] to every position."""

    def __init__(self, max_positions: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.declaration = Declaration(std=std)
        self.weight = nn.Parameter(torch.empty(max_positions, hidden))

    def forward(self, x_TBC: Tensor) -> Tensor:
        """[T, B, hidden] to the same."""
        return x_TBC + self.weight[: len(x_TBC), None]


class Output(nn.Module):
    """The vocabulary product with `weight` [vocab, hidden], and the loss."""

    def __init__(self, hidden: int, vocab: int, *, std: float, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.declaration = Declaration(std=std)
        self.weight = nn.Parameter(torch.empty(vocab, hidden)) if weight is None else weight

    def logits(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab]."""
        return product(x, self.weight)

    def forward(self, x_TBC: Tensor, targets_TB: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one, a scalar of at least fp32."""
        return linear_cross_entropy(x_TBC.flatten(0, 1), self.weight, targets_TB.flatten())
