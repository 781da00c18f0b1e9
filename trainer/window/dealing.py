"""Rows of one task in batches by length, dealt to ranks so that all run equally many.

Owns: what evaluation and the held-out gradient share: every row once over all ranks, and no rank without a batch when
the others have one, because under ZeRO-3 every rank must run as many forwards of the same kind.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def length_batches(lengths: NDArray[np.int64], counts: NDArray[np.int64], budget: int) -> list[Rows]:
    """Rows in batches of at most `budget` tokens, padding included, longest first; a row alone may have more.

    Args:
        lengths: [n] tokens of each row's longest sequence.
        counts: [n] sequences of each row.
        budget: tokens of a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        width = np.cumsum(counts[order[start:]]) * lengths[order[start]]
        stop = start + max(1, int(np.searchsorted(width, budget, side="right")))
        batches.append(order[start:stop])
        start = stop
    return batches


def deal(batches: list[Rows], rank: int, world_size: int) -> list[tuple[Rows, bool]]:
    """This rank's batches, and whether each counts: ranks that are short of one repeat the last."""
    mine = []
    for first in range(0, len(batches), world_size):
        real = first + rank < len(batches)
        mine.append((batches[first + rank if real else -1], real))
    return mine
