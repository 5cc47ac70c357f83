"""The model of the races as users of plain PyTorch write it: separate products, sequences first.

The same sizes and mathematics as `shardwright.nn`'s Llama-like decoder, for peers that need `nn.Linear` modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.spec.architecture import Architecture


class Attention(nn.Module):
    """Causal attention with rotary positions; the number of heads follows from the products' outputs."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        self.wq = nn.Linear(a.hidden, a.heads * a.head_dim, bias=False)
        self.wk = nn.Linear(a.hidden, a.kv_heads * a.head_dim, bias=False)
        self.wv = nn.Linear(a.hidden, a.kv_heads * a.head_dim, bias=False)
        self.wo = nn.Linear(a.heads * a.head_dim, a.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(attended.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def register_rotations(module: nn.Module, a: Architecture, length: int) -> None:
    """Give a module the buffers `cos` and `sin`, each [length, 1, head_dim / 2]."""
    frequencies = a.rope_theta ** (-torch.arange(0, a.head_dim, 2, dtype=torch.float64) / a.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)[:, None]
    module.register_buffer("cos", angles.cos().float(), persistent=False)
    module.register_buffer("sin", angles.sin().float(), persistent=False)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.w1 = nn.Linear(a.hidden, a.ffn, bias=False)
        self.w2 = nn.Linear(a.ffn, a.hidden, bias=False)
        self.w3 = nn.Linear(a.hidden, a.ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A layer."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(a), FeedForward(a)
        self.attention_norm = nn.RMSNorm(a.hidden, a.norm_eps)
        self.ffn_norm = nn.RMSNorm(a.hidden, a.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Tokens to logits."""

    def __init__(self, a: Architecture, length: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(a.vocab, a.hidden)
        self.layers = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.norm = nn.RMSNorm(a.hidden, a.norm_eps)
        self.output = nn.Linear(a.hidden, a.vocab, bias=False)
        register_rotations(self, a, length)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, a.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to [B, T, vocab]."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.output(self.norm(x))
