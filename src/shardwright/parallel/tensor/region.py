"""Note: two forms of tensor parallelism.

Between the matrix products of a layer every rank needs all of a token's vector; inside them each has a part of the
features. The seed's form (Shoeybi et al. 2019) keeps activations whole on every rank between the products and sums
partial results by an all-reduce, forward after each pair of products and backward before it. An all-reduce is a
reduce-scatter and an all-gather; sequence parallelism (Korthikanti et al. 2022) does the first half after a pair and
the second half before the next, so that between them each rank has only its positions: norms, residual sums and their
memory are divided as well, and the bytes sent are the same.

`Region` is that choice. A region between products is entered by `scatter_sum` (partial sums in, what rests between
products out) and left by `gather`. Tensors are [positions, ...]; positions are padded to a multiple of the degree, at
the end, where under a causal mask no other position sees them and no loss is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardwright.comm.collectives import DONE, Handle, all_gather, all_reduce, reduce_scatter, share
from shardwright.comm.mesh import Axis


@dataclass(frozen=True)
class Region:
    """The `tp` axis, and whether activations between products are sharded along the positions."""

    axis: Axis
    sequence_parallel: bool

    @property
    def shards_positions(self) -> bool:
        """Whether a rank has only some of the positions between products."""
        return self.sequence_parallel and self.axis.degree > 1

    def padded(self, positions: int) -> int:
        """Positions with padding, a multiple of the degree where they are sharded."""
        degree = self.axis.degree if self.shards_positions else 1
        return -(-positions // degree) * degree

    def local_positions(self, positions: int) -> tuple[int, int]:
        """(begin, end) of this rank's of the padded positions between products."""
        if not self.shards_positions:
            return 0, positions
        length = self.padded(positions) // self.axis.degree
        return self.axis.index * length, (self.axis.index + 1) * length

    def start_gather(self, x: Tensor, reason: str) -> tuple[Tensor, Handle]:
        """All positions of what rests between products; to be read after the handle's wait."""
        if not self.shards_positions:
            return x, DONE
        whole = x.new_empty(x.shape[0] * self.axis.degree, *x.shape[1:])
        flat = whole.view(-1)
        share(flat, self.axis, self.axis.index).copy_(x.reshape(-1))
        return whole, all_gather(flat, self.axis, reason=reason)

    def start_scatter_sum(self, x: Tensor, reason: str) -> tuple[Tensor, Handle]:
        """The sum over ranks of a tensor of all positions, as it rests between products; overwrites `x`."""
        x = x.contiguous()
        if not self.shards_positions:
            return x, all_reduce(x, self.axis, reason=reason)
        mine = share(x.view(-1), self.axis, self.axis.index).view(x.shape[0] // self.axis.degree, *x.shape[1:])
        return mine, reduce_scatter(x.view(-1), self.axis, reason=reason)

    def gather(self, x: Tensor, reason: str) -> Tensor:
        """See `start_gather`."""
        whole, handle = self.start_gather(x, reason)
        handle.wait()
        return whole

    def scatter_sum(self, x: Tensor, reason: str) -> Tensor:
        """See `start_scatter_sum`."""
        mine, handle = self.start_scatter_sum(x, reason)
        handle.wait()
        return mine
