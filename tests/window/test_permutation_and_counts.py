"""Permutations and counts: exact, unbiased, and enterable at any position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.window.counts import LEVELS, CountTree
from trainer.window.hashing import Permutation, mix, permute

probabilities = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12).map(lambda p: np.array(p) / np.sum(p))


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_everything_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


def test_permutation_at_one_position_is_the_whole_ones() -> None:
    permutation = Permutation(1000, 7)
    whole = permutation(np.arange(1000))
    assert [int(permutation(np.array([i]))[0]) for i in (0, 1, 500, 999)] == whole[[0, 1, 500, 999]].tolist()


def test_many_permutations_in_one_pass_are_the_single_ones() -> None:
    sizes, keys = np.array([1, 2, 3, 1000, 10**9, 1000]), mix(1, np.arange(6))
    positions = np.array([0, 1, 2, 777, 123_456_789, 777])
    single = [Permutation(int(n), int(k))(p[None])[0] for n, k, p in zip(sizes, keys, positions, strict=True)]
    assert permute(positions, sizes, keys).tolist() == single
    assert single[3] != single[5]


def test_permutation_of_a_billion_costs_nothing() -> None:
    values = Permutation(10**9, 3)(np.arange(10**9 - 5, 10**9))
    assert len(set(values.tolist())) == 5
    assert ((values >= 0) & (values < 10**9)).all()


def test_permutations_of_different_keys_look_independent() -> None:
    """Chi-square of where element 0..9 goes over many keys; 99.9 % point of 90 degrees of freedom is 137.2."""
    counts = np.zeros((10, 10))
    places, keys = np.tile(np.arange(10), 2000), np.repeat(mix(np.arange(2000)), 10)
    np.add.at(counts, (places, permute(places, np.full(20_000, 10), keys)), 1)
    statistic = ((counts - 200) ** 2 / 200).sum()
    assert statistic < 137.2


@given(probabilities, st.integers(1, 64), st.integers(0, 2**31), st.integers(0, 2**22))
@settings(max_examples=100, deadline=None)
def test_counts_are_within_one_of_the_expectation_and_sum_up(p: np.ndarray, draws: int, seed: int, window: int) -> None:
    counts = CountTree(p, draws, seed).at(window)
    assert counts.sum() == draws
    assert (np.abs(counts - draws * p) < 1 + 1e-6).all()


@given(probabilities, st.integers(1, 16), st.integers(0, 2**31), st.integers(0, 2**20 - 40))
@settings(max_examples=40, deadline=None)
def test_before_is_the_sum_of_all_windows_before(p: np.ndarray, draws: int, seed: int, start: int) -> None:
    tree = CountTree(p, draws, seed)
    before, counts = tree.before(start), tree.at(start)
    assert before.sum() == start * draws
    for window in range(start + 1, start + 20):
        before = before + counts
        now, counts = tree.span(window)
        assert np.array_equal(now, before)


def test_before_goes_on_past_a_block() -> None:
    tree = CountTree(np.array([0.3, 0.7]), 3, 1)
    edge = 1 << LEVELS
    before = tree.before(edge - 1) + tree.at(edge - 1)
    assert np.array_equal(tree.before(edge), before)


@given(probabilities, st.integers(1, 64), st.integers(0, 2**31), st.integers(0, 2**16), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_a_run_of_windows_is_each_of_them(p: np.ndarray, draws: int, seed: int, place: int, levels: int) -> None:
    tree = CountTree(p, draws, seed)
    start = place << levels
    before, counts = tree.run(start, levels)
    assert np.array_equal(before, tree.before(start))
    assert np.array_equal(counts, np.stack([tree.at(start + i) for i in range(1 << levels)]))


@pytest.mark.parametrize("start", [0, 776])
def test_counts_are_unbiased_over_seeds(start: int) -> None:
    """Mean over seeds against the expectation, in standard errors of a variable whose variance is at most 1/4."""
    p = np.array([0.02, 0.05, 0.13, 0.3, 0.5])
    seeds = 1500
    means = np.mean([CountTree(p, 5, seed).run(start, 2)[1] for seed in range(seeds)], axis=0)  # of four windows
    fraction = (5 * p) % 1
    error = np.sqrt(np.maximum(fraction * (1 - fraction), 1e-9) / seeds)
    assert (np.abs(means - 5 * p) < 4.5 * error + 1e-9).all()
