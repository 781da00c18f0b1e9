"""Means, spreads and the paired permutation test, against brute force and known values."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.study.statistics import MOST_EXACT, SAMPLES, permutation_test, smallest_p, spread


def brute_force(differences: list[float]) -> float:
    """In exact arithmetic on thousandths."""
    whole = [round(1000 * d) for d in differences]
    sums = [
        abs(sum(s * d for s, d in zip(signs, whole, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(whole))
    ]
    return sum(s >= abs(sum(whole)) for s in sums) / len(sums)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
def test_exact_p_is_that_of_all_sign_flips(thousandths: list[int]) -> None:
    differences = [t / 1000 for t in thousandths]
    test = permutation_test(differences)
    assert test is not None
    assert test.exact
    assert test.p == brute_force(differences)
    assert test.difference == pytest.approx(statistics.fmean(differences))


def test_known_values() -> None:
    """All of n differences with one sign are as extreme as it gets: 2 of 2^n flips."""
    for n in (1, 2, 5, 6, 10, MOST_EXACT):
        test = permutation_test([0.1 * (i + 1) for i in range(n)])
        assert test is not None
        assert test.p == 2 / 2**n == smallest_p(n)
        assert test.too_few == (n < 6)
    assert permutation_test([0.0, 0.0, 0.0]) == (3, 0.0, 1.0, True)
    assert permutation_test([0.1, -0.1]) == (2, 0.0, 1.0, True)
    assert permutation_test([]) is None


def test_more_pairs_are_sampled_always_alike_and_near_the_truth() -> None:
    draw = np.random.default_rng(3)
    differences = list(draw.normal(0.3, 1.0, MOST_EXACT + 1))
    first, second = permutation_test(differences), permutation_test(differences)
    assert first == second
    assert first is not None
    assert not first.exact
    signs = 1 - 2 * ((np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1)
    truth = np.mean(np.abs(signs @ np.array(differences)) >= abs(sum(differences)) - 1e-9)
    assert abs(first.p - truth) < 4 * np.sqrt(truth * (1 - truth) / SAMPLES)
    sure = permutation_test([1.0] * 30)
    assert sure is not None
    assert sure.p == 1 / (SAMPLES + 1)


def test_the_direction_does_not_matter_but_the_size_does() -> None:
    a, b = permutation_test([0.2, 0.3, -0.1, 0.4]), permutation_test([-0.2, -0.3, 0.1, -0.4])
    assert a is not None
    assert b is not None
    assert a.p == b.p
    assert a.difference == -b.difference == pytest.approx(0.2)


def test_spread() -> None:
    values = [0.5, 0.7, 0.9]
    assert spread(values) == pytest.approx((3, 0.7, statistics.stdev(values), statistics.stdev(values) / 3**0.5))
    assert spread([0.4]) == (1, 0.4, None, None)
    assert spread([]) is None
