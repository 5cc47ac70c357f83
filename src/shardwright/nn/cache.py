"""Keys and values of the positions that a sequence has had, so that a new token costs one position and not all.

Note: sequences of different lengths in one batch. A prompt is filled up behind its end, so that every sequence begins
at position 0. What the filling leaves in the cache lies behind the sequence's own end: no query looks there before the
sequence's next token has been written over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Places:
    """Where the tokens of the next forward stand: `starts` [B] is the position of each sequence's first one.

    One object is shared by all modules of a model. `common` is the start of all sequences where it is the same.
    """

    starts: Tensor
    common: int | None = 0

    def move(self, starts: list[int]) -> None:
        """Let the next forward begin at these positions."""
        self.starts = torch.tensor(starts, dtype=torch.int64, device=self.starts.device)
        self.common = starts[0] if len(set(starts)) == 1 else None

    def of(self, count: int) -> Tensor:
        """Positions [T, B] of `count` tokens of each sequence; [T, 1] where they are the same for all."""
        steps = torch.arange(count, device=self.starts.device)[:, None]
        return steps + (self.starts[None] if self.common is None else self.common)


@dataclass
class LayerCache:
    """Keys and values of one layer, each [B, K, capacity, D]: a rank's own key-value heads of its own layers."""

    places: Places
    keys: Tensor
    values: Tensor
    length: int = field(default=0, init=False)

    @staticmethod
    def empty(places: Places, capacity: int, heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
        """Memory for sequences of up to `capacity` positions."""
        shape = (len(places.starts), heads, capacity, head_dim)
        made = (torch.zeros(shape, dtype=dtype, device=places.starts.device) for _ in range(2))
        return LayerCache(places, *made)

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, k_TBKD: Tensor, v_TBKD: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens; those of all positions so far, each [L, B, K, D]."""
        count, places = len(k_TBKD), self.places
        if places.common is not None:
            begin = places.common
            self.length = begin + count
            for cache, new in ((self.keys, k_TBKD), (self.values, v_TBKD)):
                cache.narrow(2, begin, count).copy_(new.permute(1, 2, 0, 3))
        else:
            at = places.of(count).T  # [B, T]
            self.length = int(places.starts.max()) + count
            rows = torch.arange(len(at), device=at.device)[:, None]
            for cache, new in ((self.keys, k_TBKD), (self.values, v_TBKD)):
                cache[rows, :, at] = new.transpose(0, 1)
        keys, values = (cache.narrow(2, 0, self.length).permute(2, 0, 1, 3) for cache in (self.keys, self.values))
        return keys, values

    def mask(self, count: int) -> dict[str, Any]:
        """What attention of `count` new tokens to all positions so far is told of which it may see."""
        if self.places.common == 0:
            return {"is_causal": count > 1}
        if self.places.common is not None and count == 1:
            return {}
        seen = torch.arange(self.length, device=self.keys.device) <= self.places.of(count).T[..., None]  # [B, T, L]
        return {"attn_mask": seen[:, None]}
