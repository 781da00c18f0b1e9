"""Ticks, short numbers and thinned curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics.curves import Series
from trainer.report.scale import Axis, log_ticks, number, score, short, thin, tick_labels, ticks


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (0, 1, 6, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 12000, 5, ["0", "5k", "10k"]),
        (-12.3, 31, 6, ["−10", "0", "10", "20", "30"]),
        (0, 2.4e-4, 5, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0.988, 1.003, 4, ["0.990", "0.995", "1.000"]),
        (0, 3e6, 4, ["0", "1M", "2M", "3M"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, most: int, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high, most)) == labels


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 8))
def test_there_are_never_too_many_nor_too_few(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert most / 4 <= len(found) <= most
    slack = 1e-6 * max(abs(low), width)
    assert all(low - slack <= tick <= low + width + slack for tick in found)


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.02, 0.5, 6, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (1, 3e4, 6, [1, 10, 100, 1000, 10000]),
        (1, 1e12, 4, [1, 1e4, 1e8, 1e12]),
        (110, 190, 4, [120, 140, 160, 180]),
    ],
)
def test_ticks_of_a_logarithm(low: float, high: float, most: int, expected: list[float]) -> None:
    assert log_ticks(low, high, most) == pytest.approx(expected)


def test_an_axis_maps_its_ends() -> None:
    line, log = Axis(2.0, 4.0, 100.0, 0.0), Axis(1.0, 100.0, 0.0, 10.0, log=True)
    assert line(np.array([2.0, 3.0, 4.0])).tolist() == [100.0, 50.0, 0.0]
    assert log(np.array([1.0, 10.0, 100.0])) == pytest.approx([0.0, 5.0, 10.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.12345, "0.1235"), (12345.6, "12,346"), (-0.5, "−0.5"), (2e-5, "2e-5"), (1.5e9, "1.5e9")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_scores_for_people() -> None:
    assert score(0.5, percent=True) == "50.0"
    assert score(0.5, percent=True, sign=True) == "+50.0"
    assert score(-0.1234, percent=True, sign=True) == "−12.3"
    assert score(5.125, percent=False, sign=True) == "+5.125"
    assert score(None, percent=True) == score(math.inf, percent=False) == "-"
    assert short(0.12345) == "0.123"


@given(st.integers(3, 50), st.integers(3, 2000))
def test_a_thinned_curve_is_made_of_its_points(most: int, points: int) -> None:
    steps = np.arange(points, dtype=np.float64)
    series = Series(steps, np.sin(steps / 7) + (steps == points // 2))
    found = thin(series, most)
    assert len(found.steps) == min(points, most)
    assert (found.steps[0], found.steps[-1]) == (0, points - 1)
    assert (np.diff(found.steps) > 0).all()
    assert (found.values == series.values[found.steps.astype(int)]).all()


def test_a_spike_survives() -> None:
    steps = np.arange(10_000, dtype=np.float64)
    values = np.zeros(10_000)
    values[6_543] = 5.0
    assert thin(Series(steps, values), 80).values.max() == 5.0
