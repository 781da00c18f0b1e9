"""What the finished runs say together: a cell for every task and arm, and the comparison with the baseline.

Owns: which runs count in which number. The mean over tasks takes only seeds that are finished on all tasks, so that it
never mixes tasks unevenly; a comparison takes only pairs (same task, same seed) that both arms have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.scores import higher_is_better
from trainer.study.result import Result
from trainer.study.schema import Study
from trainer.study.statistics import Permutation, Spread, permutation_test, spread


@dataclass(frozen=True)
class Cell:
    """An arm on a task (or over all tasks). Scores are fractions, perplexities as they are."""

    values: tuple[float, ...]
    """One a seed."""
    spread: Spread | None
    test: Permutation | None
    """Against the baseline; None for the baseline itself and without pairs."""


@dataclass(frozen=True)
class Row:
    """A task, or the mean over tasks."""

    task: str
    metric: str
    cells: dict[str, Cell]
    is_mean: bool = False

    @property
    def percent(self) -> bool:
        """Whether scores are shown in percent."""
        return higher_is_better(self.metric)


@dataclass(frozen=True)
class Cost:
    """What an arm's runs take."""

    seconds: float | None
    """Mean training time of a run."""
    peak_gib: float | None
    finished: int
    planned: int


@dataclass(frozen=True)
class Summary:
    """All of a study's numbers."""

    rows: list[Row]
    costs: dict[str, Cost]
    results: list[Result]


def summarise(study: Study, results: Sequence[Result]) -> Summary:
    """The numbers of the runs that are finished, however few."""
    scores = {(r.task, r.arm, r.seed): r.value for r in results if r.value is not None}
    metrics = {r.task: r.metric for r in results}
    rows = []
    for task in study.tasks:
        tables = {
            arm: {s: scores[task, arm, s] for s in study.all_seeds if (task, arm, s) in scores} for arm in study.arms
        }
        cells = {arm: _cell(study, tables, arm) for arm in study.arms}
        rows.append(Row(task, metrics.get(task, ""), cells))
    # Perplexities live on another scale and are left out of the mean.
    tasks = [task for task in study.tasks if higher_is_better(metrics.get(task, ""))]
    if len(tasks) > 1:
        rows.append(Row("mean", "", _mean_cells(study, tasks, scores), is_mean=True))
    return Summary(rows, {arm: _cost(study, arm, results) for arm in study.arms}, list(results))


def _cell(study: Study, by_seed: dict[str, dict[int, float]], arm: str) -> Cell:
    own, base = by_seed[arm], by_seed[study.baseline]
    values = tuple(own.values())
    differences = [own[seed] - base[seed] for seed in own if seed in base]
    return Cell(values, spread(values), None if arm == study.baseline else permutation_test(differences))


def _mean_cells(study: Study, tasks: Sequence[str], scores: dict[tuple[str, str, int], float]) -> dict[str, Cell]:
    complete = {
        arm: [s for s in study.all_seeds if all((task, arm, s) in scores for task in tasks)] for arm in study.arms
    }
    cells = {}
    for arm, seeds in complete.items():
        values = tuple(sum(scores[task, arm, s] for task in tasks) / len(tasks) for s in seeds)
        paired = [s for s in seeds if s in complete[study.baseline]]
        differences = [scores[task, arm, s] - scores[task, study.baseline, s] for s in paired for task in tasks]
        cells[arm] = Cell(values, spread(values), None if arm == study.baseline else permutation_test(differences))
    return cells


def _cost(study: Study, arm: str, results: Sequence[Result]) -> Cost:
    own = [r for r in results if r.arm == arm]
    seconds = [r.seconds for r in own if r.seconds is not None]
    peaks = [r.peak_gib for r in own if r.peak_gib is not None]
    return Cost(
        sum(seconds) / len(seconds) if seconds else None,
        max(peaks, default=None),
        len(own),
        len(study.tasks) * len(study.all_seeds),
    )
