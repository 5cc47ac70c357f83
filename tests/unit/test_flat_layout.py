"""Flat layouts: owned ranges partition the buffer, matrices come first, and everything can be found again."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shardwright.layout.box import Box, GlobalTensor, Piece
from shardwright.layout.flat import ALIGNMENT, FlatLayout, Member

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
DEGREES = st.integers(1, 6)


def layout_of(given_shapes: list[tuple[int, ...]], divisor: int, partial: Collection[int] = ()) -> FlatLayout:
    """A layout of whole tensors; a first dimension over 1 is fused from two of them. `partial` numbers parameters."""
    members = []
    for number, shape in enumerate(given_shapes):
        first = shape[0] // 2
        rows = [n for n in (first, shape[0] - first) if n]
        pieces, start = [], 0
        for part, size in enumerate(rows):
            pieces.append(Piece(Box.whole(GlobalTensor(f"w{number}.{part}", (size, *shape[1:]))), start))
            start = pieces[-1].stop
        members.append(Member(shape, tuple(pieces), partial=number in partial))
    return FlatLayout.of(members, divisor)


layouts = st.tuples(st.lists(shapes, min_size=1, max_size=6), DEGREES)


@given(layouts)
def test_parameters_are_aligned_apart_and_all_there(case: tuple[list[tuple[int, ...]], int]) -> None:
    given_shapes, divisor = case
    layout = layout_of(given_shapes, divisor)
    assert sorted(slot.index for slot in layout.slots) == list(range(len(given_shapes)))
    assert all(slot.shape == given_shapes[slot.index] for slot in layout.slots)
    assert all(slot.start % ALIGNMENT == 0 for slot in layout.slots)
    edges = [edge for slot in layout.slots for edge in (slot.start, slot.stop)]
    assert edges == sorted(edges) and edges[-1] <= layout.length
    assert layout.length % (ALIGNMENT * divisor) == 0
    assert layout.length - edges[-1] < ALIGNMENT * divisor
    assert layout.numel == sum(map(math.prod, given_shapes))
    assert layout.padding == sum(end - begin for begin, end in layout.gaps) == layout.length - layout.numel


@given(layouts)
def test_matrices_are_a_prefix_and_that_prefix_decays(case: tuple[list[tuple[int, ...]], int]) -> None:
    layout = layout_of(*case)
    for slot in layout.slots:
        assert (slot.stop <= layout.decayed) == (len(slot.shape) >= 2)
        assert (slot.start >= layout.decayed) == (len(slot.shape) < 2)


@given(layouts, st.data())
def test_owned_ranges_partition_the_buffer(case: tuple[list[tuple[int, ...]], int], data: st.DataObject) -> None:
    given_shapes, divisor = case
    layout = layout_of(given_shapes, divisor)
    degree = data.draw(st.sampled_from([n for n in range(1, divisor + 1) if divisor % n == 0]))
    ranges = [layout.owned_range(degree, index) for index in range(degree)]
    assert ranges[0][0] == 0 and ranges[-1][1] == layout.length
    assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))
    assert len({end - begin for begin, end in ranges}) == 1
    owned = [elements(piece) for index in range(degree) for piece in layout.owned_pieces(degree, index)]
    expected = [elements(piece) for piece in layout.pieces]
    assert [e for part in owned for e in part] == [e for part in expected for e in part]


@given(layouts, st.sets(st.integers(0, 5)))
def test_partial_gradients_stand_together(case: tuple[list[tuple[int, ...]], int], partial: set[int]) -> None:
    layout = layout_of(*case, partial)
    begin, end = layout.partial
    marked = [slot for slot in layout.slots if slot.index in partial]
    assert (begin < end) == bool(marked)
    for slot in layout.slots:
        inside = begin <= slot.start and slot.stop <= end
        assert inside == (slot in marked)
        assert inside or slot.stop <= begin or end <= slot.start
    assert all(slot.stop <= layout.decayed or len(slot.shape) < 2 for slot in layout.slots)


def elements(piece: Piece) -> list[tuple[str, int]]:
    """The elements of a piece as (tensor, row-major index)."""
    shape, box = piece.box.tensor.shape, piece.box
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    indices = [0]
    for offset, size, stride in zip(box.offset, box.size, strides, strict=True):
        indices = [i + (offset + k) * stride for i in indices for k in range(size)]
    return [(box.name, i) for i in indices]
