"""The planner: epochs, budgets, shares, world sizes, denominators."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.schema import Heterogeneity, SamplingConfig, SamplingRule, WindowConfig
from trainer.errors import ConfigError
from trainer.window import Planner, Pool, Window
from trainer.window.mixture import example_shares
from trainer.window.parcels import Parcels

ALL = list(Heterogeneity)


def pool(name: str, n: int, count: int = 1, seed: int = 0, units: int = 1) -> Pool:
    lengths = np.random.default_rng(seed).lognormal(3.3, 0.5, n).astype(np.int32).clip(5, 120)
    return Pool(name, lengths, np.full(n, count, np.int32), np.full(n, units, np.int64))


def planner(heterogeneity: Heterogeneity, micro_batches: int = 8, group: int = 2, seed: int = 0) -> Planner:
    pools = [pool("a", 300), pool("b", 1200, seed=1), pool("c", 150, count=4), pool("d", 2500, seed=3, units=7)]
    shares = example_shares([p.name for p in pools], np.array([len(p.lengths) for p in pools]), SamplingConfig())
    config = WindowConfig(micro_batches=micro_batches, tokens=1024, heterogeneity=heterogeneity)
    return Planner(pools, shares, config, seed, group)


def rows_of(window: Window) -> Counter:
    return Counter(
        (int(t), int(r), int(e))
        for step in window.micro_steps
        for b in step
        for t, r, e in zip(b.tasks, b.rows, b.epochs, strict=True)
    )


@pytest.mark.parametrize(
    ("heterogeneity", "micro_batches", "steps"), [*((h, 8, 60) for h in ALL), (Heterogeneity.ROW, 2, 301)]
)
def test_every_example_once_per_epoch(heterogeneity: Heterogeneity, micro_batches: int, steps: int) -> None:
    plan = planner(heterogeneity, micro_batches)
    seen: Counter = Counter()
    for step in range(steps):
        seen.update(rows_of(plan.window(step, 2)))
    assert max(seen.values()) == 1
    finished = plan.epochs_after(steps).astype(int)
    for task, epochs in enumerate(finished):
        for epoch in range(epochs):
            rows = sorted(r for t, r, e in seen if (t, e) == (task, epoch))
            assert rows == list(range(len(plan.pools[task].lengths)))
    assert finished.max() >= 2  # the test covers more than one epoch


@pytest.mark.parametrize("heterogeneity", ALL)
def test_same_global_batch_for_every_world_size(heterogeneity: Heterogeneity) -> None:
    plan = planner(heterogeneity, micro_batches=8, group=4)
    for step in (0, 3, 1000):
        windows = [plan.window(step, ranks) for ranks in (1, 2, 4)]
        assert rows_of(windows[0]) == rows_of(windows[1]) == rows_of(windows[2])
        assert [len(w.micro_steps) for w in windows] == [8, 4, 2]
        by_index = [{b.index: b.rows.tolist() for s in w.micro_steps for b in s} for w in windows]
        assert by_index[0] == by_index[1] == by_index[2]


def test_step_windows_share_a_task_within_a_micro_step() -> None:
    plan = planner(Heterogeneity.STEP, group=2)
    for step in range(20):
        for micro_step in plan.window(step, 2).micro_steps:
            assert len({int(t) for b in micro_step for t in b.tasks}) == 1


def test_rank_windows_have_one_task_a_micro_batch_and_row_windows_several() -> None:
    plans = {h: planner(h) for h in (Heterogeneity.RANK, Heterogeneity.ROW)}
    tasks_per_batch = {
        h: [len(set(b.tasks.tolist())) for s in range(20) for ms in plan.window(s, 2).micro_steps for b in ms]
        for h, plan in plans.items()
    }
    assert set(tasks_per_batch[Heterogeneity.RANK]) == {1}
    assert np.mean(tasks_per_batch[Heterogeneity.ROW]) > 2


@pytest.mark.parametrize("heterogeneity", [Heterogeneity.RANK, Heterogeneity.STEP])
def test_token_budget_is_hard(heterogeneity: Heterogeneity) -> None:
    plan = planner(heterogeneity)
    assert max(b.tokens for s in range(50) for ms in plan.window(s, 2).micro_steps for b in ms) <= 1024


@pytest.mark.parametrize("heterogeneity", ALL)
def test_shares_of_examples_are_what_the_rule_says(heterogeneity: Heterogeneity) -> None:
    plan = planner(heterogeneity)
    rows = sum(plan.window(s, 2).rows for s in range(160))
    sizes = np.array([300, 1200, 150, 2500])
    assert np.abs(rows / rows.sum() - sizes / sizes.sum()).max() < 0.01


@pytest.mark.parametrize("heterogeneity", ALL)
def test_denominators_are_exact(heterogeneity: Heterogeneity) -> None:
    plan = planner(heterogeneity)
    for step in range(10):
        window = plan.window(step, 2)
        seen = rows_of(window)
        for task in range(4):
            rows = sum(n for (t, _, _), n in seen.items() if t == task)
            assert window.rows[task] == rows
            assert window.units[task] == rows * (7 if task == 3 else 1)
        # With every unit's loss equal to one the window's loss is one.
        assert (window.unit_weights() * window.units).sum() == pytest.approx(1.0)


def test_resuming_is_calling_it() -> None:
    first, second = planner(Heterogeneity.RANK), planner(Heterogeneity.RANK)
    for step in range(5):
        first.window(step, 2)
    assert rows_of(first.window(123_456, 2)) == rows_of(second.window(123_456, 2))
    assert rows_of(first.window(5, 2)) != rows_of(planner(Heterogeneity.RANK, seed=1).window(5, 2))


def test_a_tasks_order_does_not_depend_on_the_other_tasks() -> None:
    a = Parcels(pool("a", 300).lengths, pool("a", 300).counts, 1024, 5)
    assert a.get(3)[0].tolist() == Parcels(pool("a", 300).lengths, pool("a", 300).counts, 1024, 5).get(3)[0].tolist()


def test_uneven_windows_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"window.micro_batches: 8 .* 3 ranks"):
        planner(Heterogeneity.RANK).window(0, 3)
    with pytest.raises(ConfigError, match=r"not a multiple of window\.group"):
        planner(Heterogeneity.STEP, micro_batches=8, group=3)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=300), st.integers(16, 4000), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_parcels_cover_any_lengths_within_budget(lengths: list[int], budget: int, count: int) -> None:
    array = np.array(lengths, np.int32)
    parcels = Parcels(array, np.full(len(array), count, np.int32), budget, 1)
    for epoch in range(2):
        seen = []
        for i in range(len(parcels)):
            rows, in_epoch = parcels.get(epoch * len(parcels) + i)
            assert in_epoch == epoch
            assert len(rows) == 1 or array[rows].max() * len(rows) * count <= budget
            seen += rows.tolist()
        assert sorted(seen) == list(range(len(array)))


def test_sampling_rules() -> None:
    names, sizes = ["a", "b", "c"], np.array([100, 400, 1600])

    def shares(**kwargs: object) -> list[float]:
        return example_shares(names, sizes, SamplingConfig(**kwargs)).round(6).tolist()

    assert shares() == pytest.approx([1 / 21, 4 / 21, 16 / 21], abs=1e-6)
    assert shares(rule=SamplingRule.TEMPERATURE, temperature=2) == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=1e-6)
    assert shares(rule=SamplingRule.TEMPERATURE, temperature=2, cap=400) == pytest.approx([0.2, 0.4, 0.4], abs=1e-6)
    assert shares(rule=SamplingRule.CAPPED, cap=400) == pytest.approx([1 / 9, 4 / 9, 4 / 9], abs=1e-6)
    assert shares(rule=SamplingRule.EQUAL) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert shares(rule=SamplingRule.FIXED, rates={"a": 1, "b": 0, "c": 3}) == [0.25, 0, 0.75]
    with pytest.raises(ConfigError, match=r"sampling.rates.d: no task .*"):
        shares(rule=SamplingRule.FIXED, rates={"a": 1, "b": 1, "c": 1, "d": 1})
    with pytest.raises(ConfigError, match="no rate for task 'c'"):
        shares(rule=SamplingRule.FIXED, rates={"a": 1, "b": 1})
    with pytest.raises(ConfigError, match="all rates are 0"):
        shares(rule=SamplingRule.FIXED, rates={"a": 0, "b": 0, "c": 0})


def test_micro_steps_of_one_task_where_they_can_be_had_are_the_same_batch() -> None:
    plain = planner(Heterogeneity.RANK, micro_batches=16)
    shares = np.array([0.1, 0.4, 0.1, 0.4])
    together = Planner(plain.pools, shares, plain.config, 0, together=True)
    apart = Planner(plain.pools, shares, plain.config, 0)
    for step in range(20):
        ours, theirs = together.window(step, 4), apart.window(step, 4)
        assert rows_of(ours) == rows_of(theirs)
        counts = Counter(int(b.tasks[0]) for micro_step in ours.micro_steps for b in micro_step)
        alone = Counter(
            int(micro_step[0].tasks[0])
            for micro_step in ours.micro_steps
            if len({int(b.tasks[0]) for b in micro_step}) == 1
        )
        assert all(alone[task] >= count // 4 for task, count in counts.items())


@pytest.mark.parametrize("heterogeneity", [Heterogeneity.RANK, Heterogeneity.STEP])
def test_phases_go_on_with_the_next_rows(heterogeneity: Heterogeneity) -> None:
    """Other shares from some window on: no row comes twice in an epoch, and none is left out."""
    plan = planner(heterogeneity)
    seen: Counter = Counter()
    drawn = np.zeros(4)
    shares = [np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.1, 0.1, 0.1, 0.7]), np.array([0.25, 0.25, 0.25, 0.25])]
    for step in range(60):
        if step % 7 == 3:
            phase = plan.phase(step, shares[(step // 7) % 3])
            plan = plan.entering(phase)
            again = planner(heterogeneity).entering(phase)  # as a resumed run makes it
            assert rows_of(again.window(step + 2, 2)) == rows_of(plan.window(step + 2, 2))
        window = plan.window(step, 2)
        seen.update(rows_of(window))
        drawn += window.rows
    assert max(seen.values()) == 1
    for task in range(4):
        epochs = Counter(e for t, _, e in seen if t == task)
        for epoch in range(max(epochs)):
            assert epochs[epoch] == len(plan.pools[task].lengths), "rows were left out"
    assert drawn[0] > 300


def test_a_phase_draws_what_it_says() -> None:
    plan = planner(Heterogeneity.RANK)
    shares = np.array([0.5, 0.2, 0.2, 0.1])
    plan = plan.entering(plan.phase(10, shares))
    rows = sum(plan.window(step, 2).rows for step in range(10, 410))
    assert rows / rows.sum() == pytest.approx(shares, abs=0.02)
