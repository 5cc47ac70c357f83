"""A unit: parameters that are communicated together, in one flat buffer of which every owner has one contiguous range.

Note: one rule, four stages. A ZeRO stage only says what a rank keeps between uses (`ZeroStage`). The buffers, the owned
range and the collectives are the same for all four: gradients are summed into their owner's range, owners update their
range, owners' ranges are gathered into whole parameters. Parameters and gradients are views of the buffers, so the
collectives need no copies. Where there is one owner its range is the whole buffer, and nothing is ever moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shardwright.comm.collectives import DONE, Handle, all_gather, all_reduce, reduce_scatter, share, sums_in_place
from shardwright.comm.line import exchange_sum
from shardwright.layout.box import Piece, cut
from shardwright.layout.chunk import UPDATE_ELEMENTS
from shardwright.layout.flat import FlatLayout, Member, Slot
from shardwright.nn.initial import Values
from shardwright.optim.owned import OwnedTensor
from shardwright.parallel.data import DataParallel, Twin
from shardwright.parallel.offload.home import Home
from shardwright.parallel.sink import Write
from shardwright.parallel.zero.residency import Residency, ZeroStage

CATEGORIES = ("parameters", "gradients", "optimizer", "communication", "offload", "host")
"""Of the ledger: `offload` is the device's buffers through which state streams, `host` what is not on the device."""


class Unit:
    """Parameters, gradients and masters of some modules, kept as a ZeRO stage says.

    `parameters` are views of its buffer, in the order of `layout.slots`. Without `trains` there are parameters alone.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        stage: ZeroStage,
        data: DataParallel,
        *,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        device: torch.device,
        home: Home,
        twin: Twin | None = None,
        trains: bool = True,
    ) -> None:
        self.name, self.stage, self.data, self.home, self.twin = name, stage, data, home, twin
        self.layout = FlatLayout.of(members, data.degree)
        self.grad_dtype = grad_dtype
        owners = data.owners
        self.begin, self.end = self.layout.owned_range(owners.degree, owners.index)
        # One owner owns everything, and whole and owned are the same memory.
        self.shards_parameters = stage.owns_parameters and owners.degree > 1
        self.shards_gradients = stage.owns_gradients and owners.degree > 1
        self.whole = torch.zeros(self.layout.length, dtype=dtype, device=device)
        self.residency = Residency.WHOLE
        self._gathering: Handle = DONE
        self._arrival: Handle = DONE
        self.parameters = [self._view(slot) for slot in self.layout.slots]

        mine = self.whole[self.begin : self.end]
        self.owned_values = mine.clone() if self.shards_parameters else mine
        self.masters = home.masters(self.owned_values) if trains else self.owned_values

        self._whole_gradient: Tensor | None = None if self.shards_gradients or not trains else self._new_gradient()
        if not trains:
            self.owned_gradient = mine.new_empty(0, dtype=grad_dtype)
        elif self._whole_gradient is None:
            self.owned_gradient = torch.zeros_like(mine, dtype=grad_dtype)
        else:
            self.owned_gradient = self._owned(self._whole_gradient)
        self._written = [False] * len(self.layout.slots)
        self._owned_written = False
        self._summing: Handle = DONE
        self._scattering: Handle | None = None
        self._scatter_is_last = False
        self.is_reduced = False
        if self.shards_parameters:
            self.release()

    def _view(self, slot: Slot) -> nn.Parameter:
        """A parameter that is a view of the whole buffer. `.data` gives it a version counter of its own, so that
        writing to the buffer between uses does not look to autograd like a change of what it saved."""
        parameter = nn.Parameter(torch.empty(0, dtype=self.whole.dtype, device=self.whole.device))
        parameter.data = self.whole[slot.start : slot.stop].view(slot.shape)
        return parameter

    def _owned(self, whole: Tensor) -> Tensor:
        return share(whole, self.data.owners, self.data.owners.index)

    @property
    def owned_pieces(self) -> list[Piece]:
        """The boxes of global tensors in this rank's range, starts counted from its beginning."""
        return self.layout.owned_pieces(self.data.owners.degree, self.data.owners.index)

    # Parameters

    def initialise(self, source: Values) -> None:
        """Fill the owned range, then make the parameters whole where they rest so."""
        pieces, length = self.owned_pieces, self.masters.numel()
        for begin in range(0, length, UPDATE_ELEMENTS):
            window = slice(begin, min(begin + UPDATE_ELEMENTS, length))
            masters, own = self.masters[window], self.owned_values[window]
            # Made where the parameters are, which under offload is faster than where the masters are.
            values = masters if masters.device == own.device else torch.zeros_like(masters, device=own.device)
            for piece in cut(pieces, window.start, window.stop):
                source.read(piece.box, values[piece.start : piece.stop])
            if values is not masters:
                masters.copy_(values)
            if self.masters is not self.owned_values:
                own.copy_(values)
        self.arrives(DONE)
        self.publish()

    def arrives(self, arrival: Handle) -> None:
        """After an update, or at one's beginning: the owned values are new once `arrival` has been waited for, and the
        other owners' are old."""
        self._arrival = arrival
        if not self.shards_parameters:
            self.residency = Residency.OWNED

    def publish(self) -> None:
        """After an update: begin to gather the new values where they rest whole, if nobody has."""
        if not self.shards_parameters:
            self.gather()

    def gather(self) -> None:
        """Begin to make the parameters whole, if nobody has."""
        if self.residency is not Residency.OWNED:
            return
        self._arrival.wait()
        if self.shards_parameters:
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
            self._owned(self.whole).copy_(self.owned_values)
        reason = "zero/gather" if self.shards_parameters else "zero/publish"
        self._gathering = all_gather(self.whole, self.data.owners, reason=reason)
        self.residency = Residency.GATHERING

    def need(self) -> None:
        """Return with whole parameters."""
        self.gather()
        if self.residency is Residency.GATHERING:
            self._arrival.wait()  # once more: what is gathered in a lane of its own has arrived there alone
            self._gathering.wait()
            self._arrival, self._gathering, self.residency = DONE, DONE, Residency.WHOLE

    def release(self) -> None:
        """Keep the owned share alone, where the stage shards parameters. Their memory is freed in place: what autograd
        saved stays valid and finds its values again after the next `gather`."""
        if self.shards_parameters and self.residency is not Residency.OWNED:
            self.need()
            self.whole.untyped_storage().resize_(0)
            self.residency = Residency.OWNED

    # Gradients

    def begin_step(self) -> None:
        """Forget the last step's gradients; their memory is written over, not cleared."""
        if self._scattering is not None:  # that step failed before it came to an end
            self._scattering.wait()
            self._scattering = None
            if self.shards_gradients:
                self._whole_gradient = None
        self.finish_sum()
        self._written = [False] * len(self.layout.slots)
        self._owned_written = False
        self.is_reduced = False

    def _new_gradient(self) -> Tensor:
        gradient = torch.empty(self.layout.length, dtype=self.grad_dtype, device=self.whole.device)
        if self.shards_gradients:
            self.data.owners.ledger.buffer(gradient)
        for begin, end in self.layout.gaps:
            gradient[begin:end].zero_()
        return gradient

    def accumulate(self, index: int, write: Write | None = None) -> None:
        """Take a gradient of the parameter in slot `index`: the first one of a step is written, later ones are added.

        `write` does so; without it the gradient is what a backward left on the parameter.
        """
        parameter, view = self.parameters[index], self._gradient_view(self.layout.slots[index])
        if write is not None:
            write(view, self._written[index])
        else:
            assert parameter.grad is not None
            (view.add_ if self._written[index] else view.copy_)(parameter.grad)
            parameter.grad = None
        self._written[index] = True

    def _gradient_view(self, slot: Slot) -> Tensor:
        self.finish_scatter()  # the last microbatch's sum may still be under way in this memory
        self._arrival.wait()  # and the last update may still read it
        if self._whole_gradient is None:
            self._whole_gradient = self._new_gradient()
        return self._whole_gradient[slot.start : slot.stop].view(slot.shape)

    def reduce(self, last: bool) -> None:
        """Begin to sum the accumulated gradients into their owners; `last` ends the step's accumulation."""
        if not (last or self.shards_gradients):
            return  # they rest whole: every sum waits for the step's end
        self.finish_scatter()
        for written, slot in zip(self._written, self.layout.slots, strict=True):
            if not written:
                self._gradient_view(slot).zero_()  # no gradient in this step, or in this microbatch, is zero
        whole = self._whole_gradient
        assert whole is not None
        begin, end = self.layout.partial
        if begin < end:
            all_reduce(whole[begin:end], self.data.partials, reason="tensor/replicated").wait()
        self._scattering = reduce_scatter(whole, self.data.owners, reason="zero/reduce")
        self._scatter_is_last = last
        if self._scattering is DONE:
            self.finish_scatter()

    def finish_scatter(self) -> None:
        """Wait for the sum over the owners; at the step's end begin the sum over the copies."""
        if self._scattering is None:
            return
        self._scattering.wait()
        self._scattering = None
        if self.shards_gradients:
            assert self._whole_gradient is not None
            mine = self._owned(self._whole_gradient)
            if self._owned_written:
                self.owned_gradient.add_(mine)
            else:
                self.owned_gradient.copy_(mine)
            self._owned_written, self._whole_gradient = True, None
            self._written = [False] * len(self.layout.slots)
        if self._scatter_is_last:
            self._summing = all_reduce(self.owned_gradient, self.data.copies, reason="data/reduce")
            self.is_reduced = True

    def finish_sum(self) -> None:
        """Wait for the sum over the copies: the owned gradient is complete, but for a twin's."""
        self._summing.wait()
        self._summing = DONE

    def bound_memory(self) -> None:
        """Wait for the sum over the copies where what arrives takes memory of its own."""
        if not sums_in_place(self.data.copies):
            self.finish_sum()

    def finish_reduction(self) -> None:
        """Return with the owned gradient complete and no transfer under way that an update could disturb."""
        self.finish_scatter()
        self.finish_sum()
        self._arrival.wait()
        if not self.shards_parameters or self.residency is Residency.GATHERING:
            self.need()

    def exchange(self) -> Handle:
        """Begin to sum the complete owned gradient with that of the twin, where there is one."""
        if self.twin is None:
            return DONE
        return exchange_sum(self.owned_gradient, self.twin.line, self.twin.other, reason="pipeline/tied")

    def owned_tensor(self, *, settled: bool = True) -> OwnedTensor:
        """What the optimizer updates. `settled`: once no update is under way, so that it may be read."""
        if settled:
            self.home.settle()
        decayed = min(max(self.layout.decayed - self.begin, 0), self.end - self.begin)
        return OwnedTensor(self.name, self.masters, self.owned_gradient, decayed, self.home)

    def updated_values(self) -> Tensor:
        """The owned range as the last update left it, where it is exact: the values that compute, or the masters where
        those are more exact."""
        if self.masters.dtype != self.owned_values.dtype:
            return self.owned_tensor().values
        self._arrival.wait()
        return self.owned_values

    def counted_gradient(self) -> list[Tensor]:
        """The parts of the owned gradient that this rank counts in the norm: copies divide it among themselves."""
        mine = share(self.owned_gradient, self.data.copies, self.data.copies.index)
        begin = self.begin + self.data.copies.index * mine.numel()
        end = begin + mine.numel()
        ranges = [(max(begin, low), min(end, high)) for low, high in self.layout.counted]
        return [mine[low - begin : high - begin] for low, high in ranges if low < high]

    # Ledger

    def resident(self) -> dict[str, list[Tensor]]:
        """Live tensors by category, each memory once; of the optimizer's state the masters alone."""
        found: dict[str, list[Tensor]] = {category: [] for category in CATEGORIES}
        if self.whole.untyped_storage().nbytes():
            # Sharded parameters that are whole just now are a transfer's buffer, not a resting place.
            found["communication" if self.shards_parameters else "parameters"].append(self.whole)
        if self.shards_parameters:
            found["parameters"].append(self.owned_values)
        if self.masters is not self.owned_values:
            found[self.home.category].append(self.masters)
        if self.shards_gradients:
            found["gradients"].append(self.owned_gradient)
            if self._whole_gradient is not None:
                found["communication"].append(self._whole_gradient)
        elif self._whole_gradient is not None:
            found["gradients"].append(self._whole_gradient)
        for category, tensors in self.home.held_for(self.name).items():
            found[category] += tensors
        return found
