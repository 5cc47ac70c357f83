"""What a rank sends in a step, by verb, axis and reason: the rows of its ledger, in closed form.

Note: how calls are counted. Everything is per microbatch or per step, so a step's calls are products of a few numbers:
microbatches, layers, units. The one thing that the order of actions decides is how often the last block of a stage
stays whole between a forward and the backward that follows it at once; the schedules have a closed form for that
(schedule/bounds.py). `tests/world/test_communication.py` compares every row with real steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwright.cost.shapes import Shapes, chunk_tokens
from shardwright.cost.units import UnitSize
from shardwright.layout.mesh import AXES, DATA_AXES, Topology
from shardwright.units import Bytes

Axes = tuple[str, ...]
TP: Axes = ("tp",)
_SCALAR = 8  # bytes: what ranks tell each other of a step is fp64


def axis_name(axes: Axes) -> str:
    """What the ledger calls the ranks that differ along these axes."""
    return "world" if len(axes) == len(AXES) else "x".join(axes)


class Tally:
    """Rows (verb, axis, reason) of calls and bytes, counted as comm/ counts them: the bytes of the ring, and nothing
    where an axis has one rank."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.rows: dict[tuple[str, str, str], tuple[int, Bytes]] = {}

    def all_reduce(self, size: int, axes: Axes, reason: str, calls: int = 1) -> None:
        """So many sums of a tensor of `size` bytes."""
        n = self.topology.degree(*axes)
        self._add("all_reduce", axes, reason, calls, 2 * (n - 1) * size // n)

    def all_gather(self, whole: int, axes: Axes, reason: str, calls: int = 1) -> None:
        """So many gathers of a tensor of `whole` bytes."""
        n = self.topology.degree(*axes)
        self._add("all_gather", axes, reason, calls, (n - 1) * (whole // n))

    def reduce_scatter(self, whole: int, axes: Axes, reason: str, calls: int = 1) -> None:
        """So many scattered sums of a tensor of `whole` bytes."""
        n = self.topology.degree(*axes)
        self._add("reduce_scatter", axes, reason, calls, (n - 1) * (whole // n))

    def send(self, size: int, reason: str, calls: int = 1) -> None:
        """So many messages of `size` bytes to another rank of the pipeline."""
        self._add("send", ("pp",), reason, calls, size)

    def _add(self, verb: str, axes: Axes, reason: str, calls: int, sent: int) -> None:
        if self.topology.degree(*axes) > 1 and calls:
            key = (verb, axis_name(axes), reason)
            before, so_far = self.rows.get(key, (0, 0))
            self.rows[key] = before + calls, Bytes(so_far + calls * sent)


@dataclass(frozen=True)
class TensorTraffic:
    """What tensor parallelism sends for one rank's microbatches of shape `s`; see parallel/tensor/."""

    tally: Tally
    s: Shapes
    num_microbatches: int

    def embedding(self) -> None:
        """The looked-up words, summed; the gradient of all positions."""
        self._scatter_sum("tensor/embedding", 1)
        self._gather("tensor/embedding/backward", 1)

    def layers(self, settings: Sequence[str]) -> None:
        """Layers, by their settings of recomputation: each is two pairs of products."""
        count, full, selective = len(settings), settings.count("full"), settings.count("selective")
        # A full recomputation ends before the last product: its sum over ranks is not made again.
        self._gather("tensor/colwise", 2 * (count + full))
        self._scatter_sum("tensor/rowwise", 2 * count + full)
        self._gather("tensor/rowwise/backward", 2 * count)
        self._gather("tensor/colwise/again", 2 * selective)
        self._scatter_sum("tensor/colwise/backward", 2 * count)
        self._shared_heads(count)

    def _shared_heads(self, layers: int) -> None:
        """Gradients of key-value heads that several ranks hold; see `SharedRows`."""
        a = self.s.a
        if a.kv_heads % self.s.tp:
            rows, calls = 2 * a.kv_heads * a.head_dim * self.s.element, layers * self.num_microbatches
            self.tally.all_reduce(rows * a.hidden, TP, "tensor/shared-heads", calls)
            if a.bias or a.qkv_bias:
                self.tally.all_reduce(rows, TP, "tensor/shared-heads", calls)

    def head(self) -> None:
        """The hidden states, two numbers of each token of a chunk, and the gradient of the hidden states."""
        s = self.s
        self._gather("tensor/output", 1)
        # Ranks must cut alike, so the chunks are those of the rank that has the most words.
        step = chunk_tokens(s.most_words, s.device)
        whole, rest = divmod(s.tokens, step)
        for tokens, chunks in ((step, whole), (rest, 1 if rest else 0)):
            self.tally.all_gather(s.tp * 2 * tokens * s.wide, TP, "tensor/loss", chunks * self.num_microbatches)
        self._scatter_sum("tensor/output/backward", 1)

    def _gather(self, reason: str, often: int) -> None:
        """See `Region.gather`."""
        if self.s.shards_positions:
            self.tally.all_gather(self.s.whole, TP, reason, often * self.num_microbatches)

    def _scatter_sum(self, reason: str, often: int) -> None:
        """See `Region.scatter_sum`."""
        verb = self.tally.reduce_scatter if self.s.shards_positions else self.tally.all_reduce
        verb(self.s.whole, TP, reason, often * self.num_microbatches)


@dataclass(frozen=True)
class StateTraffic:
    """What a ZeRO stage sends for units. `element` and `grad_element` are bytes of parameters and gradients;
    `per_microbatch` is that of parallel/zero/residency.py."""

    tally: Tally
    zero: int
    per_microbatch: bool
    element: int
    grad_element: int
    num_microbatches: int

    @property
    def owners(self) -> Axes:
        """The ranks that share one copy of the state."""
        return ("shard",) if self.zero >= 1 else ()

    @property
    def copies(self) -> Axes:
        """The ranks that hold the same share."""
        return ("replicate",) if self.zero >= 1 else DATA_AXES

    def unit(self, unit: UnitSize, num_stages: int = 1) -> None:
        """A unit that so many stages of the rank use: its gradient, and its values where they rest whole."""
        num_owners = self.tally.topology.degree(*self.owners)
        shards_gradients = self.zero >= 2 and num_owners > 1
        often = self.num_microbatches * num_stages if shards_gradients and self.per_microbatch else 1
        whole = unit.length * self.grad_element
        if unit.partial:
            self.tally.all_reduce(unit.partial * self.grad_element, TP, "tensor/replicated", often)
        self.tally.reduce_scatter(whole, self.owners, "zero/reduce", often)
        self.tally.all_reduce(whole // num_owners, self.copies, "data/reduce")
        if unit.has_twin:
            self.tally.send(whole // num_owners, "pipeline/tied")
        if self.zero < 3:
            self.tally.all_gather(unit.length * self.element, self.owners, "zero/publish")
        elif not self.per_microbatch:
            self._gather(unit, 1)

    def passages(self, blocks: Sequence[Sequence[UnitSize]], stays: int, tied: UnitSize | None = None) -> None:
        """Gathers of a stage's parameters for every forward and every backward, under ZeRO-3.

        Of `stays` microbatches the last block is whole already when the backward begins. `tied` is a unit that the last
        block uses too: where the stage's first block is the first to use it, the backward keeps it until there.
        """
        if self.zero < 3 or not self.per_microbatch:
            return
        m, last = self.num_microbatches, len(blocks) - 1
        for unit, count in Counter(unit for block in blocks[:-1] for unit in block).items():
            self._gather(unit, 2 * m * count)
        for unit in blocks[last]:
            self._gather(unit, 2 * m - stays)
        if tied is not None:
            self._gather(tied, (1 if tied in blocks[0] else 2) * m - stays)

    def _gather(self, unit: UnitSize, calls: int) -> None:
        self.tally.all_gather(unit.length * self.element, self.owners, "zero/gather", calls)


def pipeline_traffic(
    tally: Tally, placement: Sequence[int], stages: Mapping[int, object], boundary: int, num_microbatches: int
) -> None:
    """What goes from a rank's stages to the next and to the one before, where those are on other ranks."""
    for stage in stages:
        here = placement[stage]
        if stage + 1 < len(placement) and placement[stage + 1] != here:
            tally.send(boundary, "pipeline/activation", num_microbatches)
        if stage > 0 and placement[stage - 1] != here:
            tally.send(boundary, "pipeline/gradient", num_microbatches)


def step_traffic(tally: Tally) -> None:
    """What a step itself tells: the number of targets; then loss, norm and stop requests."""
    tally.all_reduce(_SCALAR, DATA_AXES, "loss/count")
    tally.all_reduce(5 * _SCALAR, AXES, "health")
