"""Names of dtypes in recipes, and torch's."""

from __future__ import annotations

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a recipe's bf16, fp32 or fp64."""
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A recipe's name for a torch dtype."""
    return next(name for name, known in _DTYPES.items() if known == dtype)
