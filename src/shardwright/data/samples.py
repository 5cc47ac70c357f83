"""Sequences for training, addressed by one integer.

Position p of the stream is sample p % len of epoch p // len. What it holds is a pure function of that and the seed, so
the stream is the same for every layout, and resuming needs the position alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from shardwright.data.batch import IGNORED, Batch
from shardwright.data.permutation import permute


class Samples(ABC):
    """An endless stream of samples of `sequence_length` tokens; len() is the samples of one epoch."""

    sequence_length: int

    @abstractmethod
    def __len__(self) -> int: ...

    def at(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """The samples at these positions of the stream, in this order. Raises ValueError for a negative one."""
        asked = np.asarray(positions, dtype=np.int64).reshape(-1)
        if (asked < 0).any():
            raise ValueError(f"a position in the stream is at least 0, not {asked.min()}")
        tokens = np.empty((len(asked), self.sequence_length), np.int64)
        targets = np.empty_like(tokens)
        for row, sample in enumerate(self.order(asked)):
            self._fill(int(sample), tokens[row], targets[row])
        return Batch(tokens, targets)

    @abstractmethod
    def order(self, positions: np.ndarray) -> np.ndarray:
        """Which sample, in [0, len), is at each position; int64 [n] in and out."""

    @abstractmethod
    def _fill(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        """Write one sample into a row of tokens and of targets, both int64 [sequence_length]."""


class PackedSamples(Samples):
    """Stretches of packed documents: sample j is tokens[jT : jT + T], and its targets are the tokens one further on.

    `tokens` is any integer array [n] with n > T = sequence_length; `mask`, uint8 [n], is 0 where a token carries no
    loss as a target. Each epoch has every sample once, in an order drawn from (seed, epoch), or with `seed` None in
    the order of the text.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray | None, sequence_length: int, seed: int | None) -> None:
        self.tokens = tokens
        self.mask = mask
        self.sequence_length = sequence_length
        self.seed = seed
        self._length = max(0, len(tokens) - 1) // sequence_length

    def __len__(self) -> int:
        return self._length

    def order(self, positions: np.ndarray) -> np.ndarray:
        epochs, samples = np.divmod(positions, self._length)
        if self.seed is None:
            return samples
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permute(samples[here], self._length, self.seed, int(epoch))
        return samples

    def _fill(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        start = sample * self.sequence_length
        window = slice(start + 1, start + self.sequence_length + 1)
        tokens[:] = self.tokens[start : start + self.sequence_length]
        targets[:] = self.tokens[window]
        if self.mask is not None:
            targets[self.mask[window] == 0] = IGNORED


class RandomSamples(Samples):
    """Uniform tokens in [0, vocab), a pure function of (seed, sample, stream); every epoch is the same.

    Of a sample's targets a share drawn from [0, max_ignored_fraction] is IGNORED, so samples differ in how many carry
    loss. Streams of one seed are independent of each other.
    """

    def __init__(
        self,
        vocab: int,
        sequence_length: int,
        seed: int,
        max_ignored_fraction: float = 0.0,
        length: int = 1 << 20,
        stream: int = 0,
    ) -> None:
        self.vocab = vocab
        self.sequence_length = sequence_length
        self.seed = seed
        self.max_ignored_fraction = max_ignored_fraction
        self.stream = stream
        self._length = length

    def __len__(self) -> int:
        return self._length

    def order(self, positions: np.ndarray) -> np.ndarray:
        return positions % self._length

    def _fill(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        length = self.sequence_length
        # Raw words: numpy promises that they never change, which it does not of the distributions built on them.
        key = np.array([self.seed % 2**64, sample], np.uint64)
        words = np.random.Philox(key=key, counter=self.stream << 128).random_raw(2 * length + 2)
        text = (words[: length + 1] % np.uint64(self.vocab)).astype(np.int64)
        tokens[:], targets[:] = text[:-1], text[1:]
        uniform = (words[length + 1 :] >> np.uint64(11)) * 2.0**-53
        targets[uniform[1:] < uniform[0] * self.max_ignored_fraction] = IGNORED
