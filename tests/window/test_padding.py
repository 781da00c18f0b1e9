"""Padding, and what must not be paid for it: budgets, counts, and a random order."""

from functools import lru_cache

import numpy as np
import pytest

from trainer.config.schema import Heterogeneity, SamplingConfig, SamplingRule, WindowConfig
from trainer.window import Planner, Pool
from trainer.window.exchange import SLACK
from trainer.window.mixture import example_shares

RANK, STEP, ROW = Heterogeneity.RANK, Heterogeneity.STEP, Heterogeneity.ROW


def mixture(tasks: int, longest: int = 256) -> list[Pool]:
    """Tasks as they are: 150 to 12000 rows, medians of 9 to 120 tokens, some with several sequences, some cut off."""
    pools = []
    for i in range(tasks):
        rng = np.random.default_rng(i)
        rows = int(np.exp(rng.uniform(5.0, 9.4)))
        lengths = rng.lognormal(rng.uniform(2.2, np.log(0.47 * longest)), rng.uniform(0.2, 0.6), rows)
        lengths = lengths.clip(3, longest).astype(np.int32)
        counts = np.full(rows, int(rng.choice([1, 1, 1, 1, 2, 4])), np.int32)
        if i % 8 == 3:  # spans: long contexts make several full windows
            counts = np.where(lengths == longest, rng.integers(1, 4, rows), 1).astype(np.int32)
        pools.append(Pool(f"task{i}", lengths, counts, np.ones(rows, np.int64)))
    return pools


def planner(
    pools: list[Pool], heterogeneity: Heterogeneity, micro_batches: int, tokens: int, t: float = 1.0
) -> Planner:
    sampling = SamplingConfig(rule=SamplingRule.TEMPERATURE, temperature=t)
    shares = example_shares([p.name for p in pools], np.array([len(p.lengths) for p in pools]), sampling)
    config = WindowConfig(micro_batches=micro_batches, tokens=tokens, heterogeneity=heterogeneity)
    return Planner(pools, shares, config, 0, 2)


@lru_cache
def row_planner(micro_batches: int, tokens: int) -> Planner:
    return planner(mixture(8, longest=128), ROW, micro_batches, tokens)


def padding(plan: Planner, steps: range) -> float:
    real = padded = 0
    for step in steps:
        for batch in (b for micro_step in plan.window(step, 1).micro_steps for b in micro_step):
            sizes = [
                (plan.pools[t].lengths[r], plan.pools[t].counts[r])
                for t, r in zip(batch.tasks, batch.rows, strict=True)
            ]
            lengths, counts = np.array(sizes, np.int64).T
            assert batch.tokens == lengths.max() * counts.sum()  # what the collator makes of it
            real += int((lengths * counts).sum())
            padded += batch.tokens
    return 1 - real / padded


@pytest.mark.parametrize(("tokens", "bound"), [(1024, 0.025), (4096, 0.05)])
@pytest.mark.parametrize("heterogeneity", [RANK, STEP])
def test_micro_batches_of_one_task_are_padded_little(heterogeneity: Heterogeneity, tokens: int, bound: float) -> None:
    for temperature in (1.0, 2.0):
        assert padding(planner(mixture(40), heterogeneity, 8, tokens, temperature), range(25)) < bound


def test_micro_batches_of_one_task_are_full() -> None:
    plan = planner(mixture(40), RANK, 8, 4096)
    tokens = [b.tokens for s in range(25) for micro_step in plan.window(s, 2).micro_steps for b in micro_step]
    assert np.mean(tokens) > 0.8 * 4096


@pytest.mark.parametrize(("micro_batches", "tokens", "bound"), [(2, 768, 0.15), (4, 1024, 0.15), (8, 2048, 0.10)])
def test_micro_batches_of_many_tasks_are_padded_little(micro_batches: int, tokens: int, bound: float) -> None:
    plan = row_planner(micro_batches, tokens)
    assert padding(plan, range(640, 640 + 128 // micro_batches)) < bound


@pytest.mark.parametrize(("micro_batches", "tokens", "full"), [(1, 768, 0.35), (2, 768, 0.55), (8, 2048, 0.65)])
def test_row_windows_keep_the_budget(micro_batches: int, tokens: int, full: float) -> None:
    """Windows after those that were looked at to choose the number of draws: few are over, by little."""
    plan = row_planner(micro_batches, tokens)
    steps = range(512, 512 + 320 // micro_batches)
    loads = [b.tokens / tokens for s in steps for micro_step in plan.window(s, 1).micro_steps for b in micro_step]
    assert max(loads) < 1.05
    assert np.mean(np.array(loads) > 1) < 0.01
    assert np.mean(loads) > full


def test_a_row_larger_than_the_budget_sets_the_budget_of_row_windows() -> None:
    plan = planner(
        [Pool("long", np.full(50, 100, np.int32), np.full(50, 4, np.int32), np.ones(50, np.int64))], ROW, 2, 64
    )
    assert {b.tokens for s in range(20) for micro_step in plan.window(s, 1).micro_steps for b in micro_step} == {400}


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_draws_of_row_windows_stay_near_the_expectation(micro_batches: int) -> None:
    plan = row_planner(micro_batches, 768)
    assert plan._rows is not None
    cycle = plan._rows.windows
    slack = 1 + (SLACK if micro_batches <= 2 else 0)
    for first in (0, 9 * cycle):
        drawn = np.array([np.bincount([d.task for d in plan._rows.at(first + i)], minlength=8) for i in range(cycle)])
        assert (np.abs(drawn - plan.expected_draws()) < slack).all()
        assert (drawn.sum(1) == plan.tree.draws).all()
        # Over a cycle the counts are the tree's, which are unbiased.
        assert np.array_equal(drawn.sum(0), plan.tree.before(first + cycle) - plan.tree.before(first))


@pytest.mark.parametrize("heterogeneity", [RANK, ROW])
def test_lengths_come_in_no_order(heterogeneity: Heterogeneity) -> None:
    """Lengths of a task over its epoch: no trend, and a window does not foretell the next."""
    plan = planner(mixture(8, longest=128), heterogeneity, 2, 768)
    largest = int(np.argmax([len(p.lengths) for p in plan.pools]))
    lengths = np.log(plan.pools[largest].lengths)
    batches = [[b for micro_step in plan.window(s, 1).micro_steps for b in micro_step] for s in range(192)]
    rows = [np.concatenate([b.rows[b.tasks == largest] for b in window]) for window in batches]
    means = np.array([lengths[r].mean() for r in rows if len(r)])
    assert len(means) > 80
    bound = 4 / np.sqrt(len(means))
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < bound
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < bound


def test_a_row_window_of_two_micro_batches_holds_short_and_long_rows() -> None:
    plan = row_planner(2, 768)
    ratios, together = [], []
    for step in range(128, 192):
        batches = [b for micro_step in plan.window(step, 1).micro_steps for b in micro_step]
        means = [np.mean([plan.pools[t].lengths[r] for t, r in zip(b.tasks, b.rows, strict=True)]) for b in batches]
        ratios.append(max(means) / min(means))
        together.append(len(set(np.concatenate([b.tasks for b in batches]).tolist())))
    assert np.median(ratios) > 1.8
    assert np.mean(together) > 3.5  # of 8 tasks, some of which are small
