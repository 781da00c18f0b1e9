"""Mean average precision and mean reciprocal rank of grouped candidates.

Owns: ranking with ties. Candidates with equal scores have no order, so both numbers are the mean over all orders of
the tied ones (McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the
presence of tied scores"); otherwise a model that scores everything alike would be judged by the order of the file.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def map_mrr(scores: NDArray[np.float64], positive: NDArray[np.bool_], groups: Sequence[Hashable]) -> dict[str, float]:
    """MAP and MRR over the groups that have a positive candidate (the others say nothing about a ranking).

    Both are 0.0 when no group has one. A score that is not a number ranks last.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    precision: list[float] = []
    reciprocal: list[float] = []
    for indices in members.values():
        if positive[indices].any():
            ties = _tied_levels(scores[indices], positive[indices])
            precision.append(_average_precision(ties))
            reciprocal.append(_reciprocal_rank(ties))
    if not precision:
        return {"map": 0.0, "mrr": 0.0}
    return {"map": math.fsum(precision) / len(precision), "mrr": math.fsum(reciprocal) / len(reciprocal)}


def _tied_levels(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(candidates, positives) of each distinct score, best score first."""
    _, level = np.unique(scores, return_inverse=True)
    size = np.bincount(level)[::-1]
    hits = np.bincount(level, weights=positive)[::-1]
    return [(int(n), int(p)) for n, p in zip(size, hits, strict=True)]


def _average_precision(levels: list[tuple[int, int]]) -> float:
    ranked = found = 0
    total = 0.0
    for size, hits in levels:
        # The candidate at place i of a tied level is positive with probability hits / size; given that, each of the
        # i earlier places of the level holds one of the other positives with probability (hits - 1) / (size - 1).
        others = (hits - 1) / (size - 1) if size > 1 else 0.0
        total += sum(hits / size * (found + 1 + i * others) / (ranked + i + 1) for i in range(size))
        ranked += size
        found += hits
    return total / found


def _reciprocal_rank(levels: list[tuple[int, int]]) -> float:
    ranked = 0
    for size, hits in levels:
        if hits:
            # P(the first positive is at place i) = ways to put the other positives behind it / ways to put all.
            ways = math.comb(size, hits)
            return sum(math.comb(size - i - 1, hits - 1) / ways / (ranked + i + 1) for i in range(size - hits + 1))
        ranked += size
    raise ValueError("reciprocal rank of a group without a positive candidate")
