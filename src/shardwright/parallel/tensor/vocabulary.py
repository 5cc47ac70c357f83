"""Embedding and output of which a rank has some rows of the vocabulary; whole logits never exist.

Note: cross-entropy over a sharded vocabulary. A rank computes the logits of its words for a chunk of tokens. What the
ranks exchange per token are two numbers: the logarithm of the sum of its exponentials, and the target's logit where a
rank has the target's word. Each then knows log p(target) and the gradient of its own logits. The loss is
returned by the axis's first rank and zero by the others, so that a sum over the world counts it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.comm.collectives import all_gather, share
from shardwright.cost.shapes import chunk_tokens
from shardwright.data.batch import IGNORED
from shardwright.layout.split import even_split
from shardwright.nn.cache import Places
from shardwright.nn.function import Function
from shardwright.nn.kernels import Kernels
from shardwright.nn.loss import WeightGradient, softmax_
from shardwright.nn.parameters import Declaration
from shardwright.nn.product import matmul_into, product
from shardwright.parallel.sink import GradientSink, sink_of
from shardwright.parallel.tensor.region import Region


def pad_positions(x_TB: Tensor, region: Region, value: int) -> Tensor:
    """Tokens or targets with their positions padded as the region needs them."""
    missing = region.padded(len(x_TB)) - len(x_TB)
    return F.pad(x_TB, (0, 0, 0, missing), value=value) if missing else x_TB


class VocabularyEmbedding(nn.Module):
    """A rank's words, from `begin`, of a token embedding: int64 [T, B] to [positions between products, B, hidden]."""

    delivers_rows = True

    def __init__(self, weight: nn.Parameter, begin: int, declaration: Declaration, region: Region) -> None:
        super().__init__()
        self.weight, self.begin = weight, begin
        self.declaration, self.region = declaration, region

    def forward(self, tokens_TB: Tensor) -> Tensor:
        """Look up the words that this rank has, and sum."""
        rows = pad_positions(tokens_TB, self.region, 0) - self.begin
        absent = None
        if self.region.axis.degree > 1:
            absent = (rows < 0) | (rows >= len(self.weight))
            rows = rows.masked_fill(absent, 0)
        # On GPUs rows are added in any order, and a run would not be repeated to the bit.
        sink = sink_of(self.weight) if self.weight.device.type == "cpu" else None
        return _Lookup.of(self.weight, rows, absent, self.region, None if sink is None or sink.shared else sink)


class _Lookup(Function):
    """Rows of a weight, zeros where a rank has none, summed over ranks."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, rows: Tensor, absent: Tensor | None, region: Region, sink: GradientSink | None
    ) -> Tensor:
        ctx.save_for_backward(rows, absent)
        ctx.words, ctx.region, ctx.sink = len(weight), region, sink
        if sink is not None:
            sink.use()
        x = F.embedding(rows, weight)
        if absent is not None:
            x.masked_fill_(absent.unsqueeze(-1), 0)
        return region.scatter_sum(x, "tensor/embedding")

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows, absent = ctx.saved_tensors
        whole = ctx.region.gather(grad, "tensor/embedding/backward")
        if ctx.sink is not None:
            present = slice(None) if absent is None else ~absent
            if ctx.sink.rows(rows[present].flatten(), whole[present].reshape(-1, whole.shape[-1])):
                return None, None, None, None, None
        if absent is not None:
            whole = whole.masked_fill(absent.unsqueeze(-1), 0)
        return torch.ops.aten.embedding_dense_backward(whole, rows, ctx.words, -1, False), None, None, None, None


class PositionsOfRank(nn.Module):
    """Learned positions, whole on every rank, added to the positions that a rank has between products."""

    places: Places | None = None
    """Where the tokens stand that come next; without it they are at 0..T-1. Positions are not sharded then."""

    def __init__(self, weight: nn.Parameter, declaration: Declaration, region: Region) -> None:
        super().__init__()
        self.weight = weight
        self.declaration, self.region = declaration, region

    def forward(self, x_TBC: Tensor) -> Tensor:
        """[positions between products, B, hidden] to the same."""
        if self.places is not None:
            at = self.places.of(len(x_TBC)).clamp(max=len(self.weight) - 1)
            return x_TBC + F.embedding(at, self.weight)
        begin = self.region.axis.index * len(x_TBC) if self.region.shards_positions else 0
        # Padding may reach past the last position there is; its values do not matter.
        rows = torch.arange(begin, begin + len(x_TBC), device=x_TBC.device).clamp(max=len(self.weight) - 1)
        return x_TBC + F.embedding(rows, self.weight)[:, None]


_ELSEWHERE = -1
"""In the place of a target's row where this rank has none: another rank has the word, or no loss is counted."""


def _summarise(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=1)
    at_target = torch.where(own >= 0, logits.gather(1, own.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    shares, log_sum = softmax_(logits, largest)
    return shares, torch.stack((log_sum, at_target))


def _gradient(shares: Tensor, own_log_sum: Tensor, log_sum: Tensor, own: Tensor, counted: Tensor) -> Tensor:
    # Where no loss is counted there is no gradient; elsewhere the softmax, less one at the target.
    grad = shares.mul_(torch.where(counted, (own_log_sum - log_sum).exp(), 0.0).unsqueeze(1))
    return grad.scatter_add_(1, own.clamp(min=0).unsqueeze(1), -(own >= 0).to(grad.dtype).unsqueeze(1))


def _summarise_formula(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(dim=1)
    log_sum = largest + (wide - largest.unsqueeze(1)).exp().sum(dim=1).log()
    at_target = torch.where(own >= 0, wide.gather(1, own.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    return logits, torch.stack((log_sum, at_target))


def _gradient_formula(logits: Tensor, own_log_sum: Tensor, log_sum: Tensor, own: Tensor, counted: Tensor) -> Tensor:
    softmax = (logits - log_sum.unsqueeze(1)).exp()
    is_target = torch.arange(logits.shape[1], device=own.device) == own.unsqueeze(1)
    return torch.where(counted.unsqueeze(1), softmax - is_target.to(softmax.dtype), 0.0).to(logits.dtype)


@dataclass(frozen=True)
class LossKernels(Kernels):
    """A chunk of tokens, before and after the exchange; `own` [tokens] are the targets' rows on this rank.

    summarise: (logits, own) to what the gradient needs of the logits, in their place or the logits themselves, and the
    two numbers per token [2, tokens]. gradient: (that, own_log_sum, log_sum, own, counted) to the logits' gradient.
    """

    summarise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _summarise
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = _gradient

    def formulas(self) -> LossKernels:
        """See `Kernels`."""
        return LossKernels(_summarise_formula, _gradient_formula)


class VocabularyOutput(nn.Module):
    """A rank's rows of the output product: [positions between products, B, hidden] and targets [T, B] to the loss."""

    delivers_gradient = True

    def __init__(self, weight: nn.Parameter, begin: int, declaration: Declaration, region: Region) -> None:
        super().__init__()
        self.weight, self.begin = weight, begin
        self.declaration, self.region = declaration, region
        self.kernels = LossKernels()
        # As many words as any rank has, so that all cut the tokens into the same chunks.
        words = declaration.locals["weight"][0].shape[0] if declaration.locals else len(weight)
        self.most_words = -(-words // region.axis.degree)

    def logits(self, x: Tensor) -> Tensor:
        """[..., hidden], the same on every rank, to [..., vocab] on every rank; for inference."""
        axis, words = self.region.axis, self.declaration.locals["weight"][0].shape[0]
        own = product(x, self.weight)
        if axis.degree == 1:
            return own
        parts = own.new_zeros(axis.degree, *own.shape[:-1], self.most_words)
        parts[axis.index, ..., : own.shape[-1]] = own
        all_gather(parts.view(-1), axis, reason="tensor/logits").wait()
        ranges = [even_split(words, axis.degree, index) for index in range(axis.degree)]
        return torch.cat([part[..., : end - begin] for part, (begin, end) in zip(parts, ranges, strict=True)], dim=-1)

    def forward(self, x_TBC: Tensor, targets_TB: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one, on the first rank of the axis; zero on the others."""
        targets = pad_positions(targets_TB, self.region, IGNORED).flatten()
        needs_grad = torch.is_grad_enabled()
        chunk = chunk_tokens(self.most_words, x_TBC.device.type)
        sink = sink_of(self.weight)
        arguments = (self.weight, targets, self.begin, self.region, self.kernels, chunk, sink, needs_grad)
        return _VocabularyCrossEntropy.apply(x_TBC, *arguments)  # type: ignore[return-value]


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        begin: int,
        region: Region,
        kernels: LossKernels,
        chunk: int,
        sink: GradientSink | None,
        needs_grad: bool,
    ) -> Tensor:
        ctx.sink = sink
        if sink is not None and ctx.needs_input_grad[1]:
            sink.use()
        needs_grad = needs_grad and any(ctx.needs_input_grad[:2])
        whole = region.gather(x, "tensor/output")
        hidden = whole.flatten(0, 1)
        accumulate = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=x.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        chunks: WeightGradient | None = WeightGradient(hidden, weight, chunk)
        for first in range(0, len(hidden), chunk):
            h, t = hidden[first : first + chunk], targets[first : first + chunk]
            loss, grad_logits = _chunk_loss(h, weight, t, begin, region, kernels, needs_grad)
            total += loss
            if grad_hidden is not None and grad_logits is not None:
                grad_logits = chunks.narrow(first, grad_logits)
                matmul_into(grad_hidden[first : first + chunk], grad_logits, weight)
                chunks.add(first, grad_logits)
            del grad_logits  # or it would be there beside the next chunk's
        if grad_hidden is not None:
            mine, handle = region.start_scatter_sum(grad_hidden.view_as(whole), "tensor/output/backward")
            weights, chunks = chunks.total(), None  # meanwhile
            handle.wait()
            ctx.save_for_backward(mine, weights)
        return total if region.axis.index == 0 else torch.zeros_like(total)

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        grad_x = grad_x * grad_total.to(grad_x.dtype)
        delivered = ctx.sink is not None and ctx.sink.scaled(grad_weight, grad_total)
        grad_weight = None if delivered else grad_weight * grad_total.to(grad_weight.dtype)
        return grad_x, grad_weight, None, None, None, None, None, None, None


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    begin: int,
    region: Region,
    kernels: LossKernels,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of a chunk, and the gradient of this rank's logits."""
    counted = targets != IGNORED
    own = targets - begin
    own = own.masked_fill(~counted | (own < 0) | (own >= len(weight)), _ELSEWHERE)
    # The kernel gets the only reference to the logits, so that they are gone where it does not keep them.
    kept, numbers = kernels.summarise(product(hidden, weight), own)
    log_sum, at_target = _exchange(numbers, region)
    loss = torch.where(counted, log_sum - at_target, 0.0).sum()
    return loss, kernels.gradient(kept, numbers[0], log_sum, own, counted) if needs_grad else None


def _exchange(mine: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """log of the sum of exponentials over all words, and the target's logit, from each rank's [2, tokens]."""
    axis = region.axis
    everyone = mine.new_empty(axis.degree, *mine.shape)
    share(everyone.view(-1), axis, axis.index).copy_(mine.view(-1))
    all_gather(everyone.view(-1), axis, reason="tensor/loss").wait()
    log_sums, at_target = everyone.unbind(1)
    return log_sums.logsumexp(dim=0), at_target.sum(dim=0)
