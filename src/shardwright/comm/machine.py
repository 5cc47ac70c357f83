"""What this machine computes well."""

from __future__ import annotations

import torch

from shardwright.plan.machine import cpu_computes_bf16


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_bf16(device: str) -> bool:
    """Whether bf16 matrix products run on hardware made for them: tensor cores, AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return cpu_computes_bf16()
