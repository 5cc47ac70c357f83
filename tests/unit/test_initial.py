"""Initial values: a function of seed, name and element index alone, with a normal's moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwright.layout.box import Box, Fill, GlobalTensor
from shardwright.nn import initial
from shardwright.nn.initial import fill


def values(box: Box, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((box.numel,), math.nan, dtype=dtype)
    fill(out, box, seed)
    return out.view(box.size)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    tensor = GlobalTensor("w", draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)))
    offset = tuple(draw(st.integers(0, n - 1)) for n in tensor.shape)
    return Box(tensor, offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(tensor.shape, offset, strict=True)))


@given(boxes(), st.integers(0, 2**70), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_box_is_bitwise_a_slice_of_the_whole(box: Box, seed: int, dtype: torch.dtype) -> None:
    assert torch.equal(values(box, seed, dtype), values(Box.whole(box.tensor), seed, dtype)[box.slices()])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(GlobalTensor("w", (50, 30)), (3, 2), (40, 20))
    whole = values(box)
    monkeypatch.setattr(initial, "_CHUNK", 7)
    assert torch.equal(values(box), whole)


def test_every_precision_starts_from_the_same_model() -> None:
    box = Box.whole(GlobalTensor("w", (64, 64)))
    single = values(box)
    assert torch.equal(values(box, dtype=torch.float64), single.double())
    assert torch.equal(values(box, dtype=torch.bfloat16), single.bfloat16())


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("shape", [(700, 700), (490_000,)])
def test_values_have_a_normals_moments(shape: tuple[int, ...], std: float) -> None:
    x = values(Box.whole(GlobalTensor("w", shape, Fill.NORMAL, std)), 3).double().flatten() / std
    n = x.numel()
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert float(x.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / n)
    # A sum of eight uniforms: kurtosis 3 - 6 / (5 x 8), bounded by sqrt(24).
    assert float((x**4).mean()) == pytest.approx(2.85, abs=0.03)
    assert 4 < float(x.abs().max()) < math.sqrt(24)


def test_neighbours_are_not_correlated() -> None:
    x = values(Box.whole(GlobalTensor("w", (512, 512)))).double() / 0.02
    pairs = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x.tril(-1), x.T.tril(-1))]
    assert all(abs(float((a * b).sum())) < 5 * 512 for a, b in pairs)  # 5 standard deviations or more


def test_names_and_seeds_give_different_values() -> None:
    tensors = [GlobalTensor(name, (200, 200)) for name in ("a.weight", "b.weight")]
    samples = [values(Box.whole(tensor), seed).double() for tensor in tensors for seed in (0, 1, 2**64)]
    for i, a in enumerate(samples):
        for b in samples[i + 1 :]:
            assert abs(float((a * b).mean()) / 0.02**2) < 0.03
            assert float((a == b).double().mean()) < 0.001


def test_ones_and_zeros() -> None:
    assert torch.equal(values(Box.whole(GlobalTensor("w", (5,), Fill.ONES))), torch.ones(5))
    assert torch.equal(values(Box.whole(GlobalTensor("w", (5,), Fill.ZEROS))), torch.zeros(5))


def test_the_values_are_those_of_every_version() -> None:
    x = values(Box.whole(GlobalTensor("layers.0.attention.q.weight", (2, 2))), 7)
    expected = [0.025290263816714287, -0.033259253948926926, 0.008827148005366325, 0.0018557306611910462]
    assert [float(v) for v in x.flatten()] == expected
