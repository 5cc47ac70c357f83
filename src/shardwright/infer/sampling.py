"""Choosing tokens from logits, alike on every rank and whatever the layout.

Note: chance by counting. The random numbers of a choice depend on (seed, prompt, place in its text, token) alone: those
of a batch's other prompts, the number of ranks and the order of work do not matter. The token is the largest of logit
plus Gumbel noise, which draws from the softmax (Gumbel 1954; Maddison, Tarlow and Minka 2014) without summing it up, so
that the rounding of a sum over the vocabulary, which differs between layouts, decides nothing. Logits themselves are
rounded: in fp32 too little to matter, in bf16 so much that another layout or batch may choose another token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwright.infer.settings import Settings
from shardwright.nn.initial import uniform_bits


def choose(logits_BV: Tensor, places: Sequence[tuple[int, int]], settings: Settings) -> Tensor:
    """The next token of each sequence, int64 [B]. `places`: (number of the prompt, tokens generated before)."""
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits = logits_BV.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / settings.temperature  # the largest is 0, however cold
    logits = _among_largest(logits, settings.top_k)
    logits = _within_mass(logits, settings.top_p)
    return (logits + _gumbel(logits, places, settings.seed)).argmax(dim=-1)


def _among_largest(logits: Tensor, top_k: int) -> Tensor:
    """Leave out all but the k largest."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def _within_mass(logits: Tensor, top_p: float) -> Tensor:
    """Leave out the least probable tokens beyond the first whose probabilities reach p (Holtzman et al. 2020)."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _gumbel(like: Tensor, places: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Independent Gumbel noise [B, V]."""
    tokens = torch.arange(like.shape[-1], device=like.device)
    rows = [uniform_bits(f"{seed}:{prompt}:{place}", tokens) for prompt, place in places]
    uniform = (torch.stack(rows).double() + 0.5) * 2.0**-48
    return -(-uniform.log()).log()
