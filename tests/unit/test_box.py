"""Boxes: ranges of flat storage as boxes, and their intersection."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.layout.box import Box, GlobalTensor, Piece, cut, flat_range

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a range of its elements, empty ones included."""
    shape = draw(shapes)
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, begin, draw(st.integers(begin, math.prod(shape)))


@st.composite
def boxes(draw: st.DrawFn, tensor: GlobalTensor) -> Box:
    """A box within a tensor."""
    offset = tuple(draw(st.integers(0, n - 1)) for n in tensor.shape)
    return Box(tensor, offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(tensor.shape, offset, strict=True)))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    tensor = GlobalTensor("w", draw(shapes))
    return draw(boxes(tensor)), draw(boxes(tensor))


@given(ranges())
def test_a_flat_range_is_covered_exactly_and_in_order_by_few_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = case
    elements = np.arange(math.prod(shape)).reshape(shape)
    found = list(flat_range(shape, begin, end))
    covered = [elements[tuple(slice(o, o + s) for o, s in zip(*part, strict=True))].ravel() for part in found]
    assert [int(i) for part in covered for i in part] == list(range(begin, end))
    assert all(part.size for part in covered)
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_a_matrix_is_a_partial_row_whole_rows_and_a_partial_row() -> None:
    assert list(flat_range((5, 4), 3, 18)) == [((0, 3), (1, 1)), ((1, 0), (3, 4)), ((4, 0), (1, 2))]
    assert list(flat_range((5, 4), 4, 12)) == [((1, 0), (2, 4))]
    assert list(flat_range((), 0, 1)) == [((), ())]
    assert list(flat_range((5, 4), 7, 7)) == []


@given(two_boxes())
def test_the_intersection_is_what_both_boxes_hold(pair: tuple[Box, Box]) -> None:
    a, b = pair
    held = [np.zeros(a.tensor.shape, bool) for _ in pair]
    for mask, box in zip(held, pair, strict=True):
        mask[box.slices()] = True
    common = a.intersect(b)
    expected = held[0] & held[1]
    if common is None:
        assert not expected.any()
    else:
        found = np.zeros(a.tensor.shape, bool)
        found[common.slices()] = True
        assert (found == expected).all() and common.numel == expected.sum() > 0
        assert common == b.intersect(a)


def test_boxes_of_two_tensors_do_not_meet() -> None:
    assert Box.whole(GlobalTensor("a", (2,))).intersect(Box.whole(GlobalTensor("b", (2,)))) is None


def test_a_box_prints_as_it_is_written_in_reports() -> None:
    box = Box(GlobalTensor("layers.3.attention.q.weight", (8, 8)), (2, 0), (3, 8))
    assert str(box) == "layers.3.attention.q.weight[2:5, 0:8]"
    assert (box.name, box.numel, GlobalTensor("x", ()).numel) == ("layers.3.attention.q.weight", 24, 1)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """Pieces of several tensors in a flat buffer, with gaps before, between and after; and the buffer's length."""
    pieces, end = [], draw(st.integers(0, 3))
    for number in range(draw(st.integers(1, 4))):
        tensor = GlobalTensor(f"w{number}", draw(shapes))
        pieces.append(Piece(draw(boxes(tensor)), end))
        end = pieces[-1].stop + draw(st.integers(0, 3))
    return pieces, end


@given(buffers(), st.data())
def test_cutting_a_buffer_keeps_every_element_once_and_where_it_was(
    buffer: tuple[list[Piece], int], data: st.DataObject
) -> None:
    pieces, length = buffer
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=4))), length]
    whole = contents(pieces, 0, length)
    for begin, end in pairwise(edges):
        parts = cut(pieces, begin, end)
        assert contents(parts, 0, end - begin) == whole[begin:end]
        assert all(0 <= part.start < part.stop <= end - begin for part in parts)


def contents(pieces: list[Piece], begin: int, end: int) -> list[tuple[str, int] | None]:
    """For every place of a buffer, the tensor and the element of it that lies there."""
    places: list[tuple[str, int] | None] = [None] * (end - begin)
    for piece in pieces:
        tensor = piece.box.tensor
        elements = np.arange(tensor.numel).reshape(tensor.shape)[piece.box.slices()].ravel()
        for place, element in enumerate(elements, piece.start - begin):
            assert places[place] is None
            places[place] = (tensor.name, int(element))
    return places
