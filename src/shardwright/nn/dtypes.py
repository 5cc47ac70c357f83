"""Names of dtypes in recipes, and torch's."""

from __future__ import annotations

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a recipe's bf16, fp32 or fp64."""
    return _DTYPES[name]
