"""A task's rows cut into parcels: token-budgeted, length-grouped groups that cover the task once an epoch.

Owns: `Parcels`. Rows are sorted by length and cut from the long end into *buckets* of similar length; every bucket is
a whole number of parcels of the same row count, so the number of parcels of an epoch is fixed, whatever the shuffle.
Each epoch permutes the rows inside each bucket and the order of the parcels; parcel i of epoch e is computed in
O(its size), nothing is stored per epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.window.hashing import Permutation, mix

_SPREAD = 0.9
"""Rows of a bucket are at least this share of its longest one: bounds the padding inside a parcel."""
_MIN_PARCELS = 2
"""Parcels a bucket has at least, so that small tasks are reshuffled too."""


class Parcels:
    """The parcels of one task.

    Args:
        lengths: [n] tokens of each row's longest sequence.
        counts: [n] sequences of each row (choices, windows).
        budget: most tokens of a parcel, padding included; a single row over it is a parcel of its own.
        key: hash of seed and task.
    """

    def __init__(self, lengths: NDArray[np.int32], counts: NDArray[np.int32], budget: int, key: int) -> None:
        self.key = key
        self.order = np.argsort(-lengths.astype(np.int64), kind="stable")
        self._cut(lengths[self.order].astype(np.int64), counts[self.order].astype(np.int64), budget)
        self.rows = len(lengths)

    def _cut(self, lengths: NDArray[np.int64], counts: NDArray[np.int64], budget: int) -> None:
        starts, sizes, parcels = [], [], []
        start, n = 0, len(lengths)
        widest = int(counts.max(initial=1))
        while start < n:
            # The widest row anywhere bounds the bucket's: a simple bound that keeps the budget hard.
            size = max(1, budget // max(1, int(lengths[start]) * widest))
            similar = int(np.searchsorted(-lengths[start:], -lengths[start] * _SPREAD, side="right"))
            whole = max(similar // size, min(_MIN_PARCELS, -(-(n - start) // size)))
            stop = min(n, start + whole * size)
            starts.append(start)
            sizes.append(size)
            parcels.append(-(-(stop - start) // size))
            start = stop
        self._starts = np.array([*starts, n], np.int64)
        self._sizes = np.array(sizes, np.int64)
        self._first = np.concatenate([[0], np.cumsum(parcels)]).astype(np.int64)

    def __len__(self) -> int:
        """Parcels of an epoch."""
        return int(self._first[-1])

    @property
    def mean_rows(self) -> float:
        return self.rows / len(self)

    def get(self, number: int) -> tuple[NDArray[np.int64], int]:
        """Row indices of the `number`-th parcel ever drawn from the task, and the epoch it belongs to."""
        epoch, index = divmod(number, len(self))
        slot = int(Permutation(len(self), int(mix(self.key, epoch)))(np.array([index]))[0])
        bucket = int(np.searchsorted(self._first, slot, side="right")) - 1
        low, high = int(self._starts[bucket]), int(self._starts[bucket + 1])
        size = int(self._sizes[bucket])
        first = (slot - int(self._first[bucket])) * size
        inside = np.arange(first, min(first + size, high - low))
        shuffled = Permutation(high - low, int(mix(self.key, epoch, bucket + 1)))(inside)
        return self.order[low + shuffled], epoch
