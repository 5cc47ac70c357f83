"""A seeded shuffle of [0, n) that is computed element by element and never held in memory.

Note: the network. Numbers below a * b >= n, with a and b near the square root of n, are pairs (left, right). A round
adds a keyed hash of one half to the other, modulo the other's size; that can be undone, so it is a permutation of the
pairs, and so are eight rounds (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). A result of n or
more is put through again until it is below n ("cycle walking"), which makes it a permutation of [0, n); a * b exceeds
n by less than 2 sqrt(n) + 1, so few need that.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_ROUNDS = 8


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each index in [0, size) goes in the shuffle of (seed, epoch); int64 in and out, any shape."""
    left_size = math.isqrt(size - 1) + 1 if size > 1 else 1
    right_size = -(-size // left_size)
    keys = _keys(seed, epoch)
    result = index.astype(np.uint64)
    todo = np.ones(result.shape, bool)
    while todo.any():
        result[todo] = _network(result[todo], np.uint64(left_size), np.uint64(right_size), keys)
        todo = result >= size
    return result.astype(np.int64)


def _keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 [rounds]"""
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _network(value: np.ndarray, left_size: np.uint64, right_size: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = value // right_size, value % right_size
    for for_left, for_right in keys.reshape(-1, 2):
        left = (left + _hash(right, for_left) % left_size) % left_size
        right = (right + _hash(left, for_right) % right_size) % right_size
    return left * right_size + right


def _hash(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 over value and key; uint64 arithmetic wraps, as it should."""
    value = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
