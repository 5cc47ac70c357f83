"""Sizes of what one rank computes on: of one microbatch, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shardwright.cost.memory import BYTES
from shardwright.layout.split import even_split, kv_heads_for
from shardwright.spec.architecture import Architecture

_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


def chunk_tokens(vocab: int, device_type: str) -> int:
    """Tokens whose logits are held at once; see nn/loss.py."""
    return max(64, _CHUNK_ELEMENTS.get(device_type, 1 << 27) // vocab)


def keeps_logit_gradients(tokens: int, chunk: int, hidden: int, element: int, wide: int) -> bool:
    """Whether the gradients of all chunks' logits are kept, for one product that makes the weight's gradient:
    where that takes no more memory than a sum over chunks in a wider dtype; see nn/loss.py."""
    return element < wide and tokens > chunk and tokens * element <= hidden * wide


@dataclass(frozen=True)
class Shapes:
    """What one rank of `tp` holds of one microbatch, in bytes. `positions` is the sequence's length."""

    a: Architecture
    positions: int
    sequences: int
    tp: int
    index: int
    sequence_parallel: bool
    dtype: str
    grad_dtype: str
    device: str

    @property
    def element(self) -> int:
        """Bytes of an element of activations."""
        return BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of an element of what is computed in at least fp32."""
        return max(self.element, 4)

    @property
    def shards_positions(self) -> bool:
        """Whether the rank has only some positions between products."""
        return self.sequence_parallel and self.tp > 1

    @cached_property
    def tokens(self) -> int:
        """Tokens inside products, padding included."""
        degree = self.tp if self.shards_positions else 1
        return -(-self.positions // degree) * degree * self.sequences

    @cached_property
    def between(self) -> int:
        """Elements of hidden states between products."""
        return self.tokens // (self.tp if self.shards_positions else 1) * self.a.hidden

    @property
    def hidden(self) -> int:
        """Bytes of hidden states between products."""
        return self.between * self.element

    @property
    def whole(self) -> int:
        """Bytes of hidden states of all positions."""
        return self.tokens * self.a.hidden * self.element

    def part(self, length: int) -> int:
        """This rank's part of a dimension that is divided over `tp`."""
        begin, end = even_split(length, self.tp, self.index)
        return end - begin

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads of the rank."""
        first, last = kv_heads_for(self.a.heads, self.a.kv_heads, self.tp, self.index)
        return self.part(self.a.heads), last - first

    def features(self, count: int) -> int:
        """Bytes of so many features of every token."""
        return self.tokens * count * self.element

    @property
    def queries(self) -> int:
        """Bytes of queries, or of attended heads."""
        return self.features(self.heads[0] * self.a.head_dim)

    @property
    def keys(self) -> int:
        """Bytes of keys, or of values."""
        return self.features(self.heads[1] * self.a.head_dim)

    @property
    def qkv(self) -> int:
        """Bytes of the fused product."""
        return self.queries + 2 * self.keys

    @property
    def log_sums(self) -> int:
        """Bytes of the softmax's normalisers that attention keeps."""
        return self.tokens * self.heads[0] * self.wide

    @property
    def inner(self) -> int:
        """Bytes of what the feed-forward's output product takes."""
        return self.features(self.part(self.a.ffn))

    @property
    def up(self) -> int:
        """Bytes of what the activation takes: gate and up side by side, or up alone."""
        return self.inner * (2 if self.a.activation == "swiglu" else 1)

    def converted(self, elements: int) -> int:
        """Bytes of a weight's gradient on its way to a buffer of another dtype."""
        return elements * self.element if self.dtype != self.grad_dtype else 0

    @property
    def words(self) -> int:
        """Words of the vocabulary that the rank has."""
        return self.part(self.a.vocab)

    @property
    def most_words(self) -> int:
        """Words that the rank with the most has."""
        return -(-self.a.vocab // self.tp)


def summed(s: Shapes) -> float:
    """Bytes in which a sum of hidden states over `tp` receives the others' parts: on CPUs; NCCL sums in place."""
    if s.tp == 1 or s.device != "cpu":
        return 0
    return s.whole * (s.tp - 1) / s.tp if s.shards_positions else s.whole * (s.tp == 2)
