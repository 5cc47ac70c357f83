"""Causal attention: torch's own kernels, but on some CPUs tiles of queries.

Note: why not flash attention there. torch's CPU kernel multiplies one head's tile at a time, and in bf16 converts it to
fp32 first. With AVX-512 on a processor that is not Intel's, and heads of 64 or more, products batched over the heads
take half of its time (docs/performance.md). Only query, key and value are kept; the shares of attention are computed
again. Scores and their gradients are of at least fp32.

Shapes: B sequences, H query heads, K key-value heads, T positions, D head size; R positions of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shardwright.nn.product import fast_products, prefers_onednn
from shardwright.plan.machine import cpu_computes_bf16

_SHORTEST, _LONGEST, _SMALLEST_HEAD = 128, 2048, 64
_LARGEST_TILE = 128
_MOST_SCORES = 1 << 20
"""Scores of a tile that are held at once, twice in the backward: less than the logits that the loss holds."""


@cache
def _pays(dtype: torch.dtype) -> bool:
    """Whether tiles were measured to be faster on machines like this. A rule, so that a run's bits do not vary."""
    return prefers_onednn() and (dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_computes_bf16()))


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V under a causal mask, [B, H, T, D]; consecutive query heads share a key-value head."""
    (_, heads, length, size), device = q_BHTD.shape, q_BHTD.device
    fits = _SHORTEST <= length <= _LONGEST and size >= _SMALLEST_HEAD
    if device.type == "cpu" and torch.is_grad_enabled() and fits and _pays(q_BHTD.dtype):
        return _Tiled.apply(q_BHTD, k_BKTD, v_BKTD)  # type: ignore[return-value]
    grouped = heads != k_BKTD.shape[1]
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=grouped)


def _tiles(length: int) -> Iterator[tuple[slice, slice]]:
    """(queries of a tile, the keys that some of them see): fewer, larger tiles are fewer operations; smaller ones make
    fewer scores that are masked."""
    size = min(max(64, length // 4), _LARGEST_TILE)
    for begin in range(0, length, size):
        end = min(begin + size, length)
        yield slice(begin, end), slice(0, end)


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(sequence, query heads, key-value heads) whose scores are computed together."""
    (b, h, t, _), kv_heads = q.shape, k.shape[1]
    share = h // kv_heads
    step = max(1, _MOST_SCORES // (share * _LARGEST_TILE * t))
    for i in range(b):
        for begin in range(0, kv_heads, step):
            end = min(begin + step, kv_heads)
            yield i, slice(begin * share, end * share), slice(begin, end)


def _rows(x_HTD: Tensor, queries: slice, kv_heads: int) -> Tensor:
    """A tile [K, H / K * R, D]: the query heads of a key-value head one after the other."""
    return x_HTD[:, queries].reshape(kv_heads, -1, x_HTD.shape[-1]).contiguous()


def _shares(asked: Tensor, keys: Tensor, queries: slice) -> Tensor:
    """How much of each key's value a query takes, [K, H / K * R, keys], by rows of queries scaled already."""
    wide, r = torch.promote_types(asked.dtype, torch.float32), queries.stop - queries.start
    scores = torch.bmm(asked.to(wide), keys.to(wide).mT)
    later = torch.full((r, r), -torch.inf, dtype=wide).triu_(1)
    scores.view(len(keys), -1, r, keys.shape[1])[..., queries].add_(later)
    return torch.softmax(scores, dim=-1, out=scores)


class _Tiled(torch.autograd.Function):
    """Copies of slices are made here, once: oneDNN takes contiguous matrices."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        b, h, t, d = q.shape
        out = q.new_empty(t, b, h, d).permute(1, 2, 0, 3)  # positions first, as the layers around have them
        wide = torch.promote_types(q.dtype, torch.float32)
        with fast_products(q.device):
            for i, asking, asked in _groups(q, k):
                q_HTD, k_KTD, v_KTD, out_HTD = q[i, asking], k[i, asked], v[i, asked], out[i, asking]
                for queries, seen in _tiles(t):
                    rows = _rows(q_HTD, queries, len(k_KTD)).to(wide) * d**-0.5
                    shares = _shares(rows, k_KTD[:, seen].contiguous(), queries).to(v.dtype)
                    attended = torch.bmm(shares, v_KTD[:, seen].contiguous())
                    out_HTD[:, queries] = attended.view(len(q_HTD), -1, d)
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = [x.new_empty(x.shape[2], x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3) for x in (q, k, v)]
        with fast_products(q.device):
            for i, asking, asked in _groups(q, k):
                parts = (q[i, asking], k[i, asked], v[i, asked])
                _differentiate(*parts, grad[i, asking], (grads[0][i, asking], grads[1][i, asked], grads[2][i, asked]))
        return tuple(grads)


def _differentiate(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, grad_HTD: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write the gradients of a group's query, key and value."""
    (h, t, d), kv_heads = q_HTD.shape, len(k_KTD)
    wide = torch.promote_types(q_HTD.dtype, torch.float32)
    grad_q, grad_k, grad_v = grads[0], *(torch.zeros(kv_heads, t, d, dtype=wide) for _ in "kv")
    for queries, seen in _tiles(t):
        rows, back = _rows(q_HTD, queries, kv_heads), _rows(grad_HTD, queries, kv_heads)
        keys, values = k_KTD[:, seen].contiguous(), v_KTD[:, seen].contiguous()
        shares = _shares(rows.to(wide) * d**-0.5, keys, queries)
        scores = torch.bmm(back.to(wide), values.to(wide).mT)
        scores = torch.ops.aten._softmax_backward_data(scores, shares, -1, wide).to(q_HTD.dtype)
        _add_product(grad_v[:, seen], shares.to(q_HTD.dtype).mT, back)
        _add_product(grad_k[:, seen], scores.mT, rows)
        torch.mul(torch.bmm(scores, keys).view(h, -1, d), d**-0.5, out=grad_q[:, queries])
    torch.mul(grad_k, d**-0.5, out=grads[1])
    grads[2].copy_(grad_v)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))
