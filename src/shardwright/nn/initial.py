"""Note: the initial value of an element depends on its seed, name and index alone.

A counter-based hash (splitmix64's finaliser, Steele, Lea and Flood 2014) turns (seed, name, element index) into 64
random bits, so a rank can make any box of any tensor by itself, and every layout starts from bitwise the same model.
A normal value is the sum of eight 16-bit uniforms (Irwin-Hall): integers add exactly, so that no transcendental
function's rounding can differ between vector widths or devices. Values are bounded by 4.9 standard deviations.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from shardwright.layout.box import Box, Fill

_GOLDEN, _STREAM = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIFORMS = 8
_CHUNK = 1 << 18  # elements at a time, so that the integers stay in a core's cache


class Values(Protocol):
    """Where the elements of named global tensors come from: a seed, a checkpoint, a Hugging Face directory."""

    def read(self, box: Box, out: torch.Tensor) -> None:
        """Write a box's elements into `out`, contiguous, of the box's sizes or flat, in any floating dtype and on any
        device. Raises ShardwrightError where the box's tensor is not there, or has another shape."""
        ...


@dataclass(frozen=True)
class Seeded:
    """Initial values: what `fill` writes for a seed."""

    seed: int

    def read(self, box: Box, out: torch.Tensor) -> None:
        """See `Values`."""
        fill(out.view(-1), box, self.seed)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts int64 arithmetically; the hash wants zeros from the left.
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _sum_of_uniforms(key: int, indices: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(indices)
    for stream in range(_UNIFORMS // 4):
        bits = _mix(indices * _signed(_GOLDEN) + _signed(key + stream * _STREAM))
        for quarter in range(4):
            total += (bits >> (16 * quarter)) & 0xFFFF
    return total


def uniform_bits(key: str, counters: torch.Tensor) -> torch.Tensor:
    """48 random bits, as int64, for each of some counters: a function of the key and the counter alone."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return _shift_right(_mix(counters * _signed(_GOLDEN) + _signed(number)), 16)


def _indices(box: Box, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """Row-major indices in the whole tensor of elements begin..end of a box."""
    local = torch.arange(begin, end, dtype=torch.int64, device=device)
    index = torch.zeros_like(local)
    stride_in_whole, stride_in_box = 1, 1
    for whole, size, offset in zip(reversed(box.tensor.shape), reversed(box.size), reversed(box.offset), strict=True):
        position = torch.div(local, stride_in_box, rounding_mode="floor") % size + offset
        index += position * stride_in_whole
        stride_in_whole, stride_in_box = stride_in_whole * whole, stride_in_box * size
    return index


def fill(out: torch.Tensor, box: Box, seed: int) -> None:
    """Write a box's initial values into `out`, flat, of the box's number of elements, in any floating dtype."""
    tensor = box.tensor
    if tensor.fill is not Fill.NORMAL:
        out.fill_(1.0 if tensor.fill is Fill.ONES else 0.0)
        return
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{tensor.name}".encode(), digest_size=8).digest(), "little")
    mean = _UNIFORMS * (2**16 - 1) / 2
    scale = tensor.std / math.sqrt(_UNIFORMS * (2**32 - 1) / 12)
    for begin in range(0, box.numel, _CHUNK):
        end = min(begin + _CHUNK, box.numel)
        total = _sum_of_uniforms(key, _indices(box, begin, end, out.device))
        # Through fp32 whatever the dtype, so that every precision starts from the same model.
        out[begin:end] = ((total.to(torch.float64) - mean) * scale).to(torch.float32)
