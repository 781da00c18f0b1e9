"""A task's rows cut into parcels: token-budgeted, length-grouped groups that cover the task once an epoch.

Owns: `Parcels`. Rows are sorted by length and cut into *buckets*, every bucket into parcels of the same row count (give
or take one), so the number of parcels of an epoch is fixed, whatever the shuffle. Each epoch permutes the rows inside
each bucket and the order of the parcels; parcel i of epoch e is computed in O(its size), nothing is stored per epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.window.hashing import mix, permute

_COSTS = (0.12, 0.3)
"""What two things are worth in padding, as shares of the budget. First, one parcel less: narrow buckets pad little, but
end in parcels that are far from full, for which the other ranks of a micro-step wait. Second, that a bucket has more
than one parcel, so that its rows meet others in the next epoch."""
_COSTS_MIXED = (0.003, 0.006)
"""The same where parcels join others in a micro-batch: both matter little then."""
_MAX_CUTS = 256
"""Places considered for a cut between buckets: the search is quadratic in them."""

Indices = NDArray[np.int64]


class Parcels:
    """The parcels of one task.

    Args:
        lengths: [n] tokens of each row's longest sequence.
        counts: [n] sequences of each row (choices, windows).
        budget: most tokens of a parcel, padding included; a single row over it is a parcel of its own.
        key: hash of seed and task.
        mixed: a parcel is no micro-batch but joins others in one: how full it is then matters little.
    """

    def __init__(
        self, lengths: NDArray[np.int32], counts: NDArray[np.int32], budget: int, key: int, mixed: bool = False
    ) -> None:
        self.key = key
        self.rows = len(lengths)
        self.order = np.lexsort((-counts.astype(np.int64), -lengths.astype(np.int64)))
        longest, widest = lengths[self.order].astype(np.int64), counts[self.order].astype(np.int64)
        self._starts = _best_cuts(longest, widest, budget, *(_COSTS_MIXED if mixed else _COSTS))
        low, high = self._starts[:-1], self._starts[1:]
        sizes = _rows_allowed(longest[low], np.maximum.reduceat(widest, low), budget)
        self._parcels = -(-(high - low) // sizes)
        self._first = np.concatenate([[0], np.cumsum(self._parcels)]).astype(np.int64)

    def __len__(self) -> int:
        """Parcels of an epoch."""
        return int(self._first[-1])

    @property
    def mean_rows(self) -> float:
        return self.rows / len(self)

    def get(self, number: int) -> tuple[Indices, int]:
        """Row indices of the `number`-th parcel ever drawn from the task, and the epoch it belongs to."""
        return self.run(number, 1)[0]

    def run(self, first: int, draws: int) -> list[tuple[Indices, int]]:
        """`get` of `draws` numbers from `first` on, in one pass."""
        epochs, indices = np.divmod(first + np.arange(draws), len(self))
        slots = permute(indices, np.full(draws, len(self)), mix(self.key, epochs))
        buckets = np.searchsorted(self._first, slots, side="right") - 1
        low, rows = self._starts[buckets], self._starts[buckets + 1] - self._starts[buckets]
        # Parcels of equal size instead of full ones and a rest: a rest of two rows is a micro-step hardly used.
        places, parcels = slots - self._first[buckets], self._parcels[buckets]
        begin, end = rows * places // parcels, rows * (places + 1) // parcels
        owner = np.repeat(np.arange(draws), end - begin)
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(end - begin) - end, end - begin)
        shuffled = permute(inside, rows[owner], mix(self.key, epochs, buckets + 1)[owner])
        parts = np.split(self.order[low[owner] + shuffled], np.cumsum(end - begin)[:-1])
        return list(zip(parts, epochs.tolist(), strict=True))


def _rows_allowed(width: Indices, widest: Indices, budget: int) -> Indices:
    """Rows a parcel may have in buckets of `width` tokens and `widest` sequences a row: keeps the budget hard."""
    return np.asarray(np.maximum(1, budget // np.maximum(1, width * widest)))


def _best_cuts(lengths: Indices, counts: Indices, budget: int, parcel_cost: float, single_cost: float) -> Indices:
    """[buckets + 1] where buckets begin and end, of rows sorted by falling length.

    The cuts with the least padding, and the fewest parcels, by dynamic programming over all places where rows of
    another size begin (or the `_MAX_CUTS` most evenly spread ones of them).
    """
    changes = np.flatnonzero((np.diff(lengths) != 0) | (np.diff(counts) != 0)) + 1
    if len(changes) > _MAX_CUTS:
        changes = changes[np.unique(np.linspace(0, len(changes) - 1, _MAX_CUTS).astype(np.int64))]
    places = np.concatenate([[0], changes, [len(lengths)]])
    sequences = np.concatenate([[0], np.cumsum(counts)])[places]
    widest = np.maximum.reduceat(counts, places[:-1])
    cost = np.full(len(places), np.inf)
    cost[0] = 0.0
    best = np.zeros(len(places), np.int64)
    for i in range(len(places) - 1):  # a bucket from place i to any later one
        width = lengths[places[i]]
        size = _rows_allowed(width, np.maximum.accumulate(widest[i:]), budget)
        parcels = -(-(places[i + 1 :] - places[i]) // size)
        padded = (sequences[i + 1 :] - sequences[i]) * width
        price = cost[i] + padded + budget * (parcel_cost * parcels + single_cost * (parcels == 1))
        better = price < cost[i + 1 :]
        cost[i + 1 :][better] = price[better]
        best[i + 1 :][better] = i
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(int(best[cuts[-1]]))
    return np.asarray(places[cuts[::-1]], np.int64)
