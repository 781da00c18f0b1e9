"""Finding hashes of evaluation rows among the hashes of all training rows.

Owns: the sorted index over all tasks' training keys. One sort and one binary search a key, instead of a comparison of
every train split with every evaluation split (117 tasks have 23,000 such pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Keys:
    """Hashes, and the row each belongs to (a row may have several)."""

    values: NDArray[np.uint64]
    rows: NDArray[np.int64]

    @staticmethod
    def empty() -> Keys:
        return Keys(np.empty(0, np.uint64), np.empty(0, np.int64))


class TrainIndex:
    """All training keys with the tasks that hold them."""

    def __init__(self, keys: Sequence[tuple[int, NDArray[np.uint64]]], tasks: int) -> None:
        unique = [(task, np.unique(values)) for task, values in keys]
        values = np.concatenate([v for _, v in unique]) if unique else np.empty(0, np.uint64)
        owners = np.concatenate([np.full(len(v), t) for t, v in unique]) if unique else np.empty(0, np.int64)
        order = np.argsort(values, kind="stable")
        self._values = values[order]
        self._owners = owners[order]
        self._tasks = tasks

    def count(self, keys: Keys) -> NDArray[np.int64]:
        """For each task, the number of rows of `keys` that have a key in the task's training split."""
        low = np.searchsorted(self._values, keys.values, "left")
        found = np.searchsorted(self._values, keys.values, "right") - low
        rows = np.repeat(keys.rows, found)
        # The matches of a key are consecutive in the index: its first one, then one further each.
        step = np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
        owners = self._owners[np.repeat(low, found) + step]
        pairs = np.unique(rows * self._tasks + owners)
        return np.bincount(pairs % self._tasks, minlength=self._tasks).astype(np.int64)
