"""The stream of samples: a shuffle that is a permutation, and rows that do not depend on who asks for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.data.batch import IGNORED
from shardwright.data.permutation import permute
from shardwright.data.samples import PackedSamples, RandomSamples, Samples

SEEDS = st.integers(0, 2**63)


def order(size, seed=0, epoch=0):
    return permute(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 9999, 65536])
def test_permutation_is_a_bijection(size):
    assert sorted(order(size, seed=size).tolist()) == list(range(size))


@given(st.integers(1, 5000), SEEDS, st.integers(0, 10**9))
@settings(max_examples=60)
def test_permutation_is_a_bijection_for_any_seed(size, seed, epoch):
    assert len(np.unique(order(size, seed, epoch))) == size
    assert order(size, seed, epoch).min() == 0 and order(size, seed, epoch).max() == size - 1


@given(st.integers(2, 2**52), SEEDS, st.data())
def test_permutation_is_pointwise(size, seed, data):
    """The same for a point alone as among others, also for sizes that no memory holds; distinct stay distinct."""
    points = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    together = permute(points, size, seed, 1)
    assert [int(permute(points[i : i + 1], size, seed, 1)[0]) for i in range(len(points))] == together.tolist()
    assert len(set(together.tolist())) == len(points)
    assert 0 <= together.min() and together.max() < size


def test_epochs_and_seeds_differ():
    orders = [order(50, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == 16
    assert all(o != list(range(50)) for o in orders)


def test_the_shuffle_is_even():
    """Over many epochs each sample comes at each position about equally often, and neighbours part."""
    size, epochs = 20, 4000
    seen = np.stack([order(size, 3, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(seen[:, column], minlength=size) for column in range(size)])
    expected = epochs / size
    chi2 = ((counts - expected) ** 2 / expected).sum() / (size - 1) ** 2
    assert 0.7 < chi2 < 1.35
    assert abs((np.diff(order(100_000)) == 1).mean()) < 1e-3


def make(kind: str, seed: int | None = 5) -> Samples:
    tokens = np.arange(1000, dtype=np.uint16)
    if kind == "random":
        return RandomSamples(50, 7, 5, 0.4, length=90)
    mask = None if kind == "packed" else (tokens % 3 > 0).astype(np.uint8)
    return PackedSamples(tokens, mask, 7, seed)


@pytest.mark.parametrize("kind", ["packed", "masked", "random"])
@given(st.data())
@settings(max_examples=40)
def test_rows_do_not_depend_on_the_layout(kind, data):
    samples = make(kind)
    start = data.draw(st.integers(0, 400))
    whole = samples.at(range(start, start + 24))
    cuts = sorted(data.draw(st.lists(st.integers(0, 24), max_size=5)))
    parts = [samples.at(range(start + a, start + b)) for a, b in zip([0, *cuts], [*cuts, 24], strict=True)]
    assert np.array_equal(np.concatenate([p.tokens for p in parts]), whole.tokens)
    assert np.array_equal(np.concatenate([p.targets for p in parts]), whole.targets)
    assert whole.tokens.dtype == whole.targets.dtype == np.int64 and whole.tokens.flags.c_contiguous


def test_fixed_order_reads_the_text():
    samples = make("packed", seed=None)
    assert len(samples) == 142  # 999 // 7
    batch = samples.at([0, 1, 141, 142])
    assert batch.tokens[:, 0].tolist() == [0, 7, 987, 0]
    assert np.array_equal(batch.targets, batch.tokens + 1)


def test_an_epoch_has_every_sample_once():
    samples = make("packed")
    first = samples.at(range(142)).tokens[:, 0].tolist()
    second = samples.at(range(142, 284)).tokens[:, 0].tolist()
    assert sorted(first) == sorted(second) == [7 * j for j in range(142)]
    assert first != second


@pytest.mark.parametrize(("size", "samples"), [(0, 0), (1, 0), (7, 0), (8, 1), (14, 1), (15, 2)])
def test_the_last_target_must_exist(size, samples):
    assert len(PackedSamples(np.zeros(size, np.uint16), None, 7, None)) == samples


def test_the_mask_is_of_the_target():
    batch = make("masked", seed=None).at([0, 1])
    assert batch.targets.tolist() == [[1, 2, -1, 4, 5, -1, 7], [8, -1, 10, 11, -1, 13, 14]]
    assert batch.tokens[0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_random_samples():
    plain = RandomSamples(50, 4000, 1)
    batch = plain.at([0, 1, 2**20, 2**20 + 1])
    assert np.array_equal(batch.tokens[:2], batch.tokens[2:]) and not np.array_equal(batch.tokens[0], batch.tokens[1])
    assert batch.tokens.min() == 0 and batch.tokens.max() == 49 and batch.num_targets() == 16000
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    others = [RandomSamples(50, 4000, 2), RandomSamples(50, 4000, 1, stream=1)]
    for other in others:
        assert (other.at([0]).tokens == batch.tokens[0]).mean() < 0.05


def test_random_samples_never_change():
    batch = RandomSamples(100, 8, 7, 0.4).at([1])
    assert batch.tokens.tolist() == [[73, 74, 31, 32, 68, 74, 46, 80]]
    assert batch.targets.tolist() == [[74, 31, -1, 68, 74, 46, 80, -1]]


def test_ignored_targets_are_unequal():
    batch = RandomSamples(50, 1000, 1, 0.4).at(range(200))
    shares = (batch.targets == IGNORED).mean(axis=1)
    assert shares.max() < 0.45 and 0.15 < shares.mean() < 0.25 and shares.min() < 0.05 and shares.std() > 0.08


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="not -1"):
        make("packed").at([3, -1])


def test_no_positions():
    assert make("packed").at([]).tokens.shape == (0, 7)
