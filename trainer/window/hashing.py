"""Randomness as a pure function: hashes of integers, and permutations one can enter at any position.

Owns: `mix` (SplitMix64 over several words) and `Permutation` (a Feistel network with cycle walking), so that sampling
needs no generator state: resuming at step n is calling the same function with n.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6

U64 = NDArray[np.uint64]


def mix(*parts: int | np.uint64 | NDArray[np.integer]) -> U64:
    """Hash integers (broadcast against each other) to uniform uint64 words: SplitMix64's finaliser, chained."""
    state: U64 = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.uint64(part % 2**64) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
            state = _finalise(np.asarray((state ^ word) + _GOLDEN))
    return state


def _finalise(state: U64) -> U64:
    """SplitMix64's finaliser; of numbers (not arrays) numpy warns that they overflow, as they should."""
    state = (state ^ (state >> np.uint64(30))) * _M1
    state = (state ^ (state >> np.uint64(27))) * _M2
    return np.asarray(state ^ (state >> np.uint64(31)))


def seed32(*parts: int) -> int:
    """A hash below 2**31, for generators that take a small seed."""
    return int(mix(*parts)) % (2**31 - 1)


def name_key(name: str) -> int:
    """A 63-bit hash of a name: a task's randomness must not depend on which other tasks are in the recipe."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


class Permutation:
    """A pseudo-random permutation of range(n), evaluated at any position in O(1) without being stored.

    A balanced Feistel network on the smallest even number of bits that holds n; values outside the range are walked
    back into it (fewer than four steps on average).
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self.key = key

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values at `positions` (each in [0, n))."""
        return permute(positions, np.full(len(positions), self.n), np.full(len(positions), self.key, np.uint64))


def permute(positions: NDArray[np.integer], sizes: NDArray[np.integer], keys: U64) -> NDArray[np.int64]:
    """[n] where `Permutation(sizes[i], keys[i])` puts `positions[i]`: many permutations in one pass."""
    half = (np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1].astype(np.uint64) + np.uint64(1)) // np.uint64(2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = [mix(keys, number) for number in range(_ROUNDS)]
    most = sizes.astype(np.uint64)
    x = positions.astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        h, m = half[outside], mask[outside]
        left, right = x[outside] >> h, x[outside] & m
        for key in rounds:
            mixed = _finalise((_finalise(right + _GOLDEN) ^ key[outside]) + _GOLDEN)  # mix(right, key), in short
            left, right = right, left ^ (mixed & m)
        x[outside] = (left << h) | right
        outside = outside[x[outside] >= most[outside]]
    return x.astype(np.int64)
