"""Sizes of a model's parameters on one rank, block by block, and of the flat buffers that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.layout.flat import ALIGNMENT
from shardwright.layout.split import even_split, kv_heads_for
from shardwright.spec.architecture import Architecture


def padded(numels: Sequence[int], divisor: int) -> int:
    """Elements of a unit's buffer that `divisor` ranks share; see layout/flat.py."""
    block = ALIGNMENT * divisor
    return -(-sum(map(_aligned, numels)) // block) * block


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class UnitSize:
    """Elements of a unit's buffer. `length`: all of it, padding included. `partial`: of the range whose gradients are
    sums of parts along the `tp` axis. `has_twin`: another rank of the pipeline has the same parameter."""

    length: int
    partial: int = 0
    has_twin: bool = False

    @staticmethod
    def of(numels: Sequence[int], divisor: int, partial: Sequence[int] = (), *, has_twin: bool = False) -> UnitSize:
        """The unit of parameters of so many elements, those of `partial` among them in the buffer's order."""
        # From the first one's beginning to the last one's end, the gaps between them included.
        reach = sum(map(_aligned, partial[:-1])) + partial[-1] if partial else 0
        return UnitSize(padded(numels, divisor), reach, has_twin)


def word_parameters(a: Architecture, tp: int, index: int) -> int:
    """Elements of rank `index`'s part of the embedding, or of the output product."""
    begin, end = even_split(a.vocab, tp, index)
    return (end - begin) * a.hidden


def embedding_parameters(a: Architecture) -> list[int]:
    """Elements of what the embedding has beside its words: learned positions, whole on every rank."""
    return [a.max_positions * a.hidden] if a.positions == "learned" else []


def norm_parameters(a: Architecture) -> list[int]:
    """Elements of a norm's tensors."""
    return [a.hidden] if a.norm == "rmsnorm" else [a.hidden, a.hidden]


def layer_parameters(a: Architecture, tp: int, index: int) -> list[int]:
    """Elements of a layer's tensors: rank `index`'s part of the matrices, and all of what is replicated."""
    d = a.head_dim
    begin, end = even_split(a.ffn, tp, index)
    ffn = end - begin
    first, last = kv_heads_for(a.heads, a.kv_heads, tp, index)
    queries = a.heads // tp * d
    qkv, up = queries + 2 * (last - first) * d, ffn * (2 if a.activation == "swiglu" else 1)
    attention = [a.hidden * qkv, a.hidden * queries]
    attention += ([qkv] if a.bias or a.qkv_bias else []) + ([a.hidden] if a.bias else [])
    attention += [d, d] if a.qk_norm else []
    feed_forward = [a.hidden * up, a.hidden * ffn] + ([up, a.hidden] if a.bias else [])
    return [*norm_parameters(a), *attention, *norm_parameters(a), *feed_forward]


def layer_partials(a: Architecture, shards_positions: bool) -> list[int]:
    """Elements of a layer's tensors that every rank of `tp` has and whose gradients are parts of a sum, in order.

    The norms of heads see a rank's heads alone; the others see all of a token, and where positions are sharded not all
    tokens.
    """
    per_head = [a.head_dim, a.head_dim] if a.qk_norm else []
    if not shards_positions:
        return per_head
    bias = [a.hidden] if a.bias else []
    return [*norm_parameters(a), *per_head, *bias, *norm_parameters(a), *bias]
