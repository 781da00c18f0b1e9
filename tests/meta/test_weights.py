"""Rules that move weights: pure functions of numbers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.schema import MetaConfig
from trainer.meta.weights import Aligned, Constant, Famo, Readings, weighting

NAMES = ["end", "good", "useless", "bad"]


def rule(**changes: object) -> Aligned:
    config = MetaConfig.model_validate({"end_task": "end", "floor": 0.05, **changes})
    made = weighting(config, NAMES, 100)
    assert isinstance(made, Aligned)
    return made


def readings(means: list[float], noise: float, count: int, seed: int = 0) -> Readings:
    draw = np.random.default_rng(seed)
    tasks = np.repeat(np.arange(len(means)), count)
    return Readings.of(tasks, np.repeat(means, count) + noise * draw.standard_normal(len(tasks)), len(means))


def test_weights_start_equal_or_as_told() -> None:
    assert rule().weights == pytest.approx([0.25] * 4)
    assert rule(initial={"end": 3.0, "bad": 0.0}).weights == pytest.approx([0.6, 0.2, 0.2, 0.0], abs=1e-4)


def test_equal_alignments_do_not_move_the_weights() -> None:
    for changes in ({}, {"rate": 0.5}):
        one = rule(**changes)
        for _ in range(5):
            one.observe(readings([0.3] * 4, 0.0, 7))
            one.update(10)
        assert one.weights == pytest.approx([0.25] * 4, abs=1e-12), changes


def test_noise_does_not_move_the_weights_and_signal_does() -> None:
    noise, signal = rule(), rule()
    for seed in range(10):
        noise.observe(readings([0.0] * 4, 0.1, 20, seed))
        signal.observe(readings([0.1, 0.05, 0.0, -0.05], 0.1, 20, seed))
        for one in (noise, signal):
            one.update(10)
    assert np.abs(np.log(noise.weights * 4)).max() < 0.6
    assert (np.diff(signal.weights) < 0).all()
    assert signal.weights[0] / signal.weights[3] > 5


def test_the_papers_rate() -> None:
    """log w += rate x windows x alignment, which softmax weights make of SGD on -alignment."""
    one = rule(rate=0.01)
    one.observe(readings([0.4, 0.2, 0.0, -0.2], 0.0, 3))
    one.update(10)
    expected = np.exp(0.01 * 10 * np.array([0.4, 0.2, 0.0, -0.2]))
    assert one.weights == pytest.approx(expected / expected.sum(), rel=1e-12)


def test_means_and_errors_are_those_of_the_readings() -> None:
    one = rule(memory=0.5)
    values = np.array([0.1, 0.5, 0.3, -0.2, 0.0])
    one.observe(Readings.of(np.zeros(3, np.int64), values[:3], 4))
    assert one.estimate.mean[0] == pytest.approx(0.3)
    assert one.estimate.error[0] == pytest.approx(values[:3].std(ddof=1) / np.sqrt(3))
    one.update(1)
    one.observe(Readings.of(np.zeros(2, np.int64), values[3:], 4))
    discounts = np.array([0.5, 0.5, 0.5, 1, 1])
    assert one.estimate.mean[0] == pytest.approx((discounts * values).sum() / discounts.sum())
    assert np.isnan(one.estimate.mean[1])


def test_readings_that_are_not_finite_are_left_out() -> None:
    one = rule()
    one.observe(Readings.of(np.array([0, 0, 1, 2]), np.array([np.nan, 0.2, np.inf, 0.1]), 4))
    one.update(10)
    assert np.isfinite(one.weights).all()
    assert one.count.tolist() == [0.9, 0.0, 0.9, 0.0]


def test_the_end_task_keeps_its_floor_and_comes_back() -> None:
    one = rule(floor=0.2, rate=1.0)
    for _ in range(50):
        one.observe(readings([-0.9, 0.9, 0.0, 0.0], 0.0, 2))
        one.update(10)
    assert one.weights[0] == pytest.approx(0.2)
    for _ in range(20):
        one.observe(readings([0.9, -0.9, 0.0, 0.0], 0.0, 2))
        one.update(10)
    assert one.weights[0] > 0.9, "what the floor held back has piled up"


@given(st.lists(st.floats(), min_size=4, max_size=4), st.floats(0.0, 1.0), st.sampled_from(["auto", 1.0]))
@settings(max_examples=100, deadline=None)
def test_weights_are_always_on_the_simplex(means: list[float], floor: float, rate: object) -> None:
    one = rule(floor=floor, rate=rate)
    for count in (1, 5):
        one.observe(readings(means, 0.0, count))
        one.update(10)
        assert one.weights.sum() == pytest.approx(1.0)
        assert (one.weights > 0).all() or floor == 1.0
        assert one.weights[0] >= floor - 1e-12


def test_famo_lifts_the_task_that_falls_behind() -> None:
    made = weighting(MetaConfig(end_task="end", weights="famo"), NAMES, 100)
    assert isinstance(made, Famo)
    losses = np.array([2.0, 2.0, 2.0, 2.0])
    for _ in range(30):
        made.observe(losses, np.array([1, 1, 1, 1]))
        made.update(1)
        losses *= [0.9, 0.9, 0.9, 1.0]  # the last one does not get better
    assert made.weights.argmax() == 3
    assert made.coefficients[3] < made.weights[3]  # a loss is divided by its size: the objective is its logarithm


@pytest.mark.parametrize("kind", ["alignment", "famo", "equal"])
def test_state_goes_through_json_exactly(kind: str) -> None:
    config = MetaConfig.model_validate({"end_task": "end", "weights": kind})
    one, other = weighting(config, NAMES, 50), weighting(config, NAMES, 50)

    def go(made: object, seed: int) -> None:
        if isinstance(made, Aligned):
            made.observe(readings([0.1, 0.2, 0.0, -0.1], 0.1, 5, seed))
        if isinstance(made, Famo):
            made.observe(np.random.default_rng(seed).random(4), np.array([1, 1, 0, 1]))

    for seed in range(3):
        go(one, seed)
        one.update(10)
    other.load(json.loads(json.dumps(one.state())))
    for made in (one, other):
        go(made, 9)
        made.update(10)
    assert one.weights.tolist() == other.weights.tolist()
    assert isinstance(one, Constant) == (one.weights.tolist() == [0.25] * 4)
