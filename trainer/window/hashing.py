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
            state = np.asarray((state ^ word) + _GOLDEN)
            state = (state ^ (state >> np.uint64(30))) * _M1
            state = (state ^ (state >> np.uint64(27))) * _M2
            state = state ^ (state >> np.uint64(31))
    return state


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
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._keys = mix(key, np.arange(_ROUNDS))

    def _network(self, x: U64) -> U64:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right, key) & self._mask)
        return (left << self._half) | right

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values at `positions` (each in [0, n))."""
        x = self._network(np.asarray(positions).astype(np.uint64))
        while (outside := x >= self.n).any():
            x[outside] = self._network(x[outside])
        return x.astype(np.int64)
