"""The norm of gradients, exact enough for the proof."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm(flat: Tensor) -> Tensor:
    """Sum of squares, fp64. Rows first: one running fp32 sum over millions would lose what the proof checks."""
    if flat.dtype == torch.float64:
        return flat.dot(flat)
    if flat.dtype != torch.float32:
        flat = flat.float()
    rows = flat.numel() // 1024 * 1024
    norms = torch.linalg.vector_norm(flat[:rows].view(-1, 1024), dim=1).double()
    return norms.dot(norms) + flat[rows:].double().square().sum()
