"""The numbers behind a comparison: mean, spread, and the paired permutation test.

Owns: these and nothing else; no file, no recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_EXACT = 14
"""Most pairs whose sign flips are all gone through: 2^14 of them."""
SAMPLES = 10_000
LEVEL = 0.05


class Spread(NamedTuple):
    """Mean, sample standard deviation and standard error of `size` values; no spread below two."""

    size: int
    mean: float
    std: float | None
    error: float | None


class Permutation(NamedTuple):
    """A two-sided paired permutation test of the mean difference."""

    pairs: int
    difference: float
    p: float
    exact: bool

    @property
    def too_few(self) -> bool:
        """Whether no outcome of so few pairs could have had p < .05."""
        return smallest_p(self.pairs) >= LEVEL


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Spread(1, float(array[0]), None, None)
    std = float(array.std(ddof=1))
    return Spread(len(array), float(array.mean()), std, std / len(array) ** 0.5)


def smallest_p(pairs: int) -> float:
    """The least p that so many pairs can give: only the flip of all signs is as extreme."""
    return min(1.0, 2.0 / 2.0**pairs)


def permutation_test(differences: Sequence[float]) -> Permutation | None:
    """How often a mean this far from 0 comes about when the two arms of every pair are swapped at random.

    Exact up to `MOST_EXACT` pairs; beyond, over `SAMPLES` flips that are always the same, the observed one included.
    None without pairs.
    """
    d = np.asarray(differences, np.float64)
    if not len(d):
        return None
    exact = len(d) <= MOST_EXACT
    flips = _all_flips(len(d)) if exact else _sampled_flips(len(d))
    # Sums that are equal in exact arithmetic must count as equal whatever the order of their terms.
    tolerance = 1e-9 * float(np.abs(d).sum())
    extreme = int(np.count_nonzero(np.abs(flips @ d) >= abs(float(d.sum())) - tolerance))
    p = extreme / len(flips) if exact else (extreme + 1) / (len(flips) + 1)
    return Permutation(len(d), float(d.mean()), p, exact)


def _all_flips(pairs: int) -> NDArray[np.float64]:
    """[2^pairs, pairs] every choice of signs."""
    bits = (np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1
    return np.asarray(1.0 - 2.0 * bits, np.float64)


def _sampled_flips(pairs: int) -> NDArray[np.float64]:
    return np.asarray(1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, (SAMPLES, pairs)), np.float64)
