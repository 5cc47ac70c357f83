"""`[memory]`: what is computed again instead of kept, and what lives on the host."""

from __future__ import annotations

from typing import Literal

from shardwright.spec.section import BytesText, Count, OptionalBytesText, Section


class MemorySpec(Section):
    """Recomputation of activations and offload of owned state."""

    recompute: Literal["none", "selective", "full"] = "none"
    recompute_layers: tuple[Count, ...] | Literal["all"] = "all"  # indices of layers
    offload: Literal["none", "state", "update"] = "none"
    offload_chunk: BytesText = "64 MiB"
    host_limit: OptionalBytesText = ""  # "": what the host has
