"""Causal attention: torch's own kernels, but on some CPUs tiles of queries.

Note: why not flash attention there. torch's CPU kernel multiplies one head's tile at a time, and in bf16 converts it to
fp32 first. With AVX-512 on a processor that is not Intel's, and heads of 64 or more, batched products over the heads
take three quarters of its time in fp32 and two thirds in bf16, for lengths at which the scores of one tile of all heads
fit the cache (docs/performance.md): in bf16 attention is two fifths of a small model's step. What is kept is what flash
attention keeps (Dao et al. 2022): query, key, value, output, and the logarithm of each row's sum. Scores and their
gradients are of at least fp32.

Shapes: B sequences, H query heads, K key-value heads, T positions, D head size; R positions of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shardwright.plan.machine import cpu_computes_bf16, fp32_products_by_onednn

TILE = 64
"""Queries of a tile: of 64, 128 and 256 the fastest at 256 to 1024 positions, as it makes the fewest masked scores."""
_LONGEST, _SMALLEST_HEAD = 1024, 64

_NOTHING = -80.0
"""Exponents are at least this: exp of less is nothing beside 1, and where it is denormal takes thirty times as long."""


@cache
def _pays(dtype: torch.dtype) -> bool:
    """Whether tiles were measured to be faster on machines like this, with AVX-512 and not Intel's. A rule, so that a
    run's bits do not vary."""
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_computes_bf16())
    return fast and fp32_products_by_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V under a causal mask, [B, H, T, D]; consecutive query heads share a key-value head."""
    (_, heads, length, size), device = q_BHTD.shape, q_BHTD.device
    fits = TILE < length <= _LONGEST and size >= _SMALLEST_HEAD
    if device.type == "cpu" and torch.is_grad_enabled() and fits and _pays(q_BHTD.dtype):
        return _Tiled.apply(q_BHTD, k_BKTD, v_BKTD)  # type: ignore[return-value]
    grouped = heads != k_BKTD.shape[1]
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=grouped)


def _tiles(length: int) -> Iterator[tuple[slice, slice]]:
    """(queries of a tile, the keys that some of them see)."""
    for begin in range(0, length, TILE):
        end = min(begin + TILE, length)
        yield slice(begin, end), slice(0, end)


def _rows(x_HTD: Tensor, queries: slice, kv_heads: int) -> Tensor:
    """A tile [K, H / K * R, D]: the query heads of a key-value head one after the other."""
    return x_HTD[:, queries].reshape(kv_heads, -1, x_HTD.shape[-1])


def _mask(scores: Tensor, queries: slice, value: float) -> None:
    """Overwrite the scores [K, H / K * R, keys] of keys that come after their query."""
    r = queries.stop - queries.start
    last = scores.view(scores.shape[0], -1, r, scores.shape[-1])[..., queries]
    last.masked_fill_(torch.ones(r, r, dtype=torch.bool).triu_(1), value)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        b, h, t, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(b, t, h, d).transpose(1, 2)
        log_sums = torch.empty(b, h, t, dtype=wide)
        for i in range(b):
            asked, keys = q[i].to(wide) * d**-0.5, k[i].to(wide).mT
            for queries, seen in _tiles(t):
                scores = _rows(asked, queries, len(k[i])) @ keys[..., seen]
                _mask(scores, queries, torch.finfo(wide).min / 2)
                largest = scores.amax(dim=-1, keepdim=True)
                total = scores.sub_(largest).clamp_min_(_NOTHING).exp_().sum(dim=-1, keepdim=True)
                attended = (scores.to(v.dtype) @ v[i, :, seen]).div_(total)
                out[i, :, queries] = attended.view(h, -1, d)
                log_sums[i, :, queries] = largest.add_(total.log_()).view(h, -1)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, out, log_sums = ctx.saved_tensors
        (b, h, t, d), wide = q.shape, log_sums.dtype
        grads = [x.new_empty(b, t, x.shape[1], d).transpose(1, 2) for x in (q, k, v)]
        for i in range(b):
            asked, keys, back, values = q[i].to(wide) * d**-0.5, k[i].to(wide).mT, grad[i].to(wide), v[i].to(wide).mT
            grad_k, grad_v = keys.new_zeros(len(k[i]), t, d), keys.new_zeros(len(k[i]), t, d)
            # The mean of a query's gradient of shares under its shares is that of the output along itself.
            means = (back * out[i]).sum(dim=-1, keepdim=True)
            for queries, seen in _tiles(t):
                rows, rows_back, mean, log_sum = (
                    _rows(x, queries, len(k[i])) for x in (q[i], grad[i], means, log_sums[i].unsqueeze(-1))
                )
                shares = (_rows(asked, queries, len(k[i])) @ keys[..., seen]).sub_(log_sum)
                shares.clamp_min_(_NOTHING).exp_()
                _mask(shares, queries, 0.0)
                scores = (_rows(back, queries, len(k[i])) @ values[..., seen]).sub_(mean).mul_(shares).to(q.dtype)
                _add_product(grad_v[:, seen], shares.to(q.dtype).mT, rows_back)
                _add_product(grad_k[:, seen], scores.mT, rows)
                grads[0][i, :, queries] = (scores @ k[i, :, seen]).mul_(d**-0.5).view(h, -1, d)
            grads[1][i] = grad_k.mul_(d**-0.5)
            grads[2][i] = grad_v
        return tuple(grads)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)
