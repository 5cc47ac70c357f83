"""Note: the head and the cross-entropy are one operation, computed in chunks of tokens.

The logits of a microbatch are its largest tensor (tokens x vocabulary) and are needed for a moment only. A chunk's
logits become the loss, then their own gradient in place, then the gradients of the hidden states and of the weight,
and are gone: three matrix products, as many as without chunks, and no logits kept for the backward. The backward has
only to scale. (The idea is that of Liger's fused linear cross-entropy, Hsu et al. 2024.)

In bf16 the weight's gradient would be a sum over chunks in fp32, with a cast for each of them. Where the tokens are no
more than twice the hidden size, the gradients of all logits take less memory in bf16 than that sum does: they are kept
to the end, and one product makes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.cost.shapes import chunk_tokens, keeps_logit_gradients
from shardwright.data.batch import IGNORED
from shardwright.nn.product import matmul, matmul_into, product


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:  # type: ignore[override]
        needs_hidden, needs_weight = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        total = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=hidden.device)
        step = chunk_tokens(weight.shape[0], hidden.device.type)
        grad_weight = WeightGradient(hidden, weight, step)
        for begin in range(0, len(hidden), step):
            h, t = hidden[begin : begin + step], targets[begin : begin + step]
            loss, grad_logits = _chunk_loss(product(h, weight), t, needs_hidden or needs_weight)
            total += loss
            if grad_logits is None:
                continue
            grad_logits = grad_weight.narrow(begin, grad_logits) if needs_weight else grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                matmul_into(grad_hidden[begin : begin + step], grad_logits, weight)
            if needs_weight:
                grad_weight.add(begin, grad_logits)
            del grad_logits  # or it would be there beside the next chunk's
        ctx.save_for_backward(grad_hidden, grad_weight.total())
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[override]
        def scaled(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else grad * grad_total.to(grad.dtype)

        grad_hidden, grad_weight = ctx.saved_tensors
        return scaled(grad_hidden), scaled(grad_weight), None, None


def _chunk_loss(logits: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of -log p(target) over a chunk, and the gradient of that sum by the logits, in their place."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORED
    index = targets.clamp(min=0).unsqueeze(1)
    at_target = logits.gather(1, index).squeeze(1)
    grad, log_sum = softmax_(logits, logits.amax(dim=1))
    loss = torch.where(counted, log_sum - at_target, 0.0).sum()
    if not needs_grad:
        return loss, None
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.mul_(counted.unsqueeze(1))


def softmax_(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of each row in the memory of the logits, and the logarithms of the rows' sums of exponentials; one
    operation in the place of four. `largest`: of each row."""
    shares = torch.softmax(logits, dim=1, out=logits)
    # The largest logit's share is 1 over the sum of exponentials beside it.
    return shares, largest - shares.amax(dim=1).log()


class WeightGradient:
    """The gradient of the output's weight from the chunks of a microbatch: hidden states [N, hidden], chunks of `step`.

    A sum over chunks is made in at least fp32: in bf16 it would lose bits that one product keeps.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, step: int) -> None:
        self._hidden, self._weight = hidden, weight
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        sizes = weight.element_size(), self._wide.itemsize
        self._keeps = keeps_logit_gradients(len(hidden), step, hidden.shape[1], *sizes)
        self._logits: Tensor | None = None
        self._sum: Tensor | None = None

    def narrow(self, begin: int, grad_logits: Tensor) -> Tensor:
        """The gradient of a chunk's logits, from token `begin`, in the weight's dtype; to be given to `add`."""
        if not self._keeps:
            return grad_logits.to(self._weight.dtype)
        if self._logits is None:
            self._logits = self._weight.new_empty(len(self._hidden), len(self._weight))
        return self._logits[begin : begin + len(grad_logits)].copy_(grad_logits)

    def add(self, begin: int, narrow: Tensor) -> None:
        """Count a chunk. The wider gradient that it was made of is better gone by now."""
        if self._keeps:
            return
        a, b = narrow.T, self._hidden[begin : begin + len(narrow)]
        if self._sum is None:
            self._sum = matmul(a, b)
        else:
            self._sum = self._sum.to(self._wide)
            matmul_into(self._sum, a, b, add=True)

    def total(self) -> Tensor | None:
        """The gradient in the weight's dtype; None where no chunk was taken."""
        if self._logits is not None:
            return matmul(self._logits.T, self._hidden)
        return None if self._sum is None else self._sum.to(self._weight.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum over targets of -log softmax(hidden W^T)[target], a scalar of at least fp32.

    hidden [N, hidden], weight [vocab, hidden], targets int64 [N] with IGNORED (-1) where there is no loss.
    """
    # Inside the function gradients are always switched off: whether any is asked for is known here.
    return _LinearCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())  # type: ignore[return-value]
