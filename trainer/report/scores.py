"""The table of metrics: every task and family before training, after it and at its best, run beside run.

Owns: what is compared with what. A difference is to the first run; a mean is over tasks whose metric is a fraction
(perplexities live on another scale), and a difference of means over those tasks that both runs have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.metrics.scores import mean_score
from trainer.report.compared import Compared
from trainer.report.markup import Child, Markup, join, tag
from trainer.report.run_files import RunFiles, TaskScore
from trainer.report.scale import score

Families = Mapping[str, list[str]]
TEXT = ("task", "family", "metric")
"""Columns that are not numbers."""


def scores_section(compared: Compared) -> Markup:
    """Means by family, then all tasks."""
    runs = compared.runs
    if not any(run.scores for run in runs):
        return tag("p", "No evaluation in the log yet.", class_="note")
    judged = {f: [t for t in ts if any(t in run.scores for run in runs)] for f, ts in compared.families.items()}
    judged = {family: tasks for family, tasks in judged.items() if tasks}
    parts: list[Child] = [tag("p", _legend(runs), class_="note")]
    count = sum(len(tasks) for tasks in judged.values())
    if count > 1:
        parts.append(_family_table(compared, judged, count))
    parts.append(_task_table(compared, judged))
    return join(*parts)


def _legend(runs: Sequence[RunFiles]) -> str:
    finished = all(run.results for run in runs)
    after = "the checkpoint that the run chose" if finished else "the chosen checkpoint, or the last evaluation so far"
    difference = " Difference: after, less the first run's." if len(runs) > 1 else ""
    return (
        f"Dev metrics in percent (perplexity as it is). After: {after}. Best: at the evaluation that was best for this "
        f"task.{difference} Click a heading to sort."
    )


def _family_table(compared: Compared, families: Families, count: int) -> Markup:
    runs, rows = compared.runs, []
    for family, tasks in families.items():
        rows.append(tag("tr", _name(family), _value(len(tasks)), *_mean_cells(runs, tasks)))
    everything = [task for tasks in families.values() for task in tasks]
    last = tag("tr", _name("all tasks"), _value(count), *_mean_cells(runs, everything))
    return _table(["family", "tasks"], compared, rows, tag("tfoot", last) if len(rows) > 1 else None)


def _mean_cells(runs: Sequence[RunFiles], tasks: Sequence[str]) -> list[Markup]:
    def mean(run: RunFiles, number: Callable[[TaskScore], float | None], among: Sequence[str] = tasks) -> float | None:
        found = [(s.metric, number(s)) for task in among if (s := run.scores.get(task)) is not None]
        return mean_score((metric, value) for metric, value in found if value is not None)

    cells = []
    for index, run in enumerate(runs):
        changed = [t for t in tasks if (s := run.scores.get(t)) and s.before is not None and s.after is not None]
        before, after = mean(run, lambda s: s.before), mean(run, lambda s: s.after)
        change = _less(mean(run, lambda s: s.after, changed), mean(run, lambda s: s.before, changed))
        cells += [_score(before), _score(after), _score(change, sign=True), _score(mean(run, lambda s: s.best))]
        if index:
            both = [t for t in tasks if _after(runs[0], t) is not None and _after(run, t) is not None]
            cells.append(
                _score(_less(mean(run, lambda s: s.after, both), mean(runs[0], lambda s: s.after, both)), sign=True)
            )
    return cells


def _task_table(compared: Compared, families: Families) -> Markup:
    runs, rows = compared.runs, []
    for family, tasks in families.items():
        for task in tasks:
            known = next(run.scores[task] for run in runs if task in run.scores)
            about = [_name(task), _text(family), _text(_metric_name(runs, task, known))]
            about += [_value(known.rows), _score(known.majority, known.percent)]
            rows.append(tag("tr", *about, *_score_cells(runs, task), data_task=task))
    return _table(["task", "family", "metric", "rows", "majority"], compared, rows)


def _metric_name(runs: Sequence[RunFiles], task: str, known: TaskScore) -> str:
    return next((str(r["metric"]) for run in runs for r in run.results if r["task"] == task), known.metric)


def _score_cells(runs: Sequence[RunFiles], task: str) -> list[Markup]:
    cells = []
    for index, run in enumerate(runs):
        found = run.scores.get(task)
        if found is None:
            cells += [_score(None)] * (5 if index else 4)
            continue
        cells += [_score(found.before, found.percent), _score(found.after, found.percent)]
        cells.append(_score(_less(found.after, found.before), found.percent, sign=True))
        title = None if found.best_step is None else f"window {found.best_step:,}"
        cells.append(_score(found.best, found.percent, title=title))
        if index:
            cells.append(_score(_less(found.after, _after(runs[0], task)), found.percent, sign=True))
    return cells


def _table(about: Sequence[str], compared: Compared, rows: Sequence[Markup], foot: Child = None) -> Markup:
    """A table that sorts by a click on its headings; with several runs these are in two lines."""
    head: list[Child] = []
    if compared.several:
        spans = [
            tag("th", label, colspan=5 if index else 4, class_=f"run {style}")
            for index, (label, style, _) in enumerate(compared.each())
        ]
        head.append(tag("tr", tag("td", colspan=len(about)), *spans))
    names = [tag("th", name, class_=None if name in TEXT else "n") for name in about]
    for index in range(len(compared.runs)):
        names.append(tag("th", "before", class_="n first"))
        names += [tag("th", name, class_="n") for name in ("after", "change", "best")]
        names += [tag("th", "difference", class_="n")] if index else []
    head.append(tag("tr", *names, class_="sort"))
    return tag("div", tag("table", tag("thead", *head), tag("tbody", *rows), foot, class_="sortable"), class_="wide")


def _name(text: str) -> Markup:
    return tag("th", text, scope="row")


def _text(text: str) -> Markup:
    return tag("td", text)


def _value(value: int | None) -> Markup:
    return tag("td", "-" if value is None else f"{value:,}", class_="n", data_v=value)


def _score(value: float | None, percent: bool = True, sign: bool = False, title: str | None = None) -> Markup:
    better = None
    if sign and value:
        better = "better" if (value > 0) == percent else "worse"
    classes = " ".join(filter(None, ["n", better]))
    return tag("td", score(value, percent, sign), class_=classes, data_v=value, title=title)


def _after(run: RunFiles, task: str) -> float | None:
    found = run.scores.get(task)
    return None if found is None else found.after


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
