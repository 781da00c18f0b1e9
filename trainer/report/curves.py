"""Curves over the windows: dev metrics, training loss, and what the machine and the optimizer did.

Owns: which numbers of the log are drawn, and what stands for a family: the mean over its tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.metrics.curves import Series, smooth
from trainer.report.chart import LARGE, Line, smoothed
from trainer.report.compared import Compared, charts
from trainer.report.markup import Markup, join, tag
from trainer.report.run_files import RunFiles
from trainer.report.scale import score, short

MACHINE = (
    ("tokens per second (without padding)", "train/tokens_per_second", 1.0),
    ("padding, % of all tokens", "train/padding", 100.0),
    ("seconds per window", "train/seconds_per_window", 1.0),
    ("learning rate", "train/lr", 1.0),
    ("learning rate of the heads", "train/lr_heads", 1.0),
    ("gradient norm before clipping", "train/grad_norm", 1.0),
)
"""Caption, key of the log, factor."""


def metric_curves(compared: Compared) -> Markup:
    """The dev metric of every task at every evaluation, and means."""
    cells = []
    if mean := compared.lines(lambda run: _percent(run.series("eval/mean"))):
        cells.append(compared.chart("mean dev metric, %", mean, LARGE, written=_tenths))
    for family, tasks in _families(compared):
        lines = compared.lines(lambda run, tasks=tasks: _percent(family_metric(run, tasks)))  # type: ignore[misc]
        cells.append(compared.chart(f"{family}, mean %", lines, LARGE, written=_tenths))
    grid = compared.grid(lambda task: _metric_chart(compared, task))
    if not grid:
        return tag("p", "No evaluation in the log yet.", class_="note")
    note = "Dashed: the majority baseline. Every chart has its own scale."
    found = [cell for cell in cells if cell is not None]
    return join(charts(found, LARGE), tag("h3", "Each task"), tag("p", note, class_="note"), grid)


def _metric_chart(compared: Compared, task: str) -> Markup | None:
    known = [run.scores[task] for run in compared.runs if task in run.scores]
    if not known:
        return None
    percent = known[0].percent
    factor = 100.0 if percent else 1.0
    lines = compared.lines(lambda run: _times(run.scores[task].series, factor) if task in run.scores else None)
    majority = next((s.majority * factor for s in known if s.majority is not None), None)
    caption = task if percent else f"{task} (perplexity)"
    written = _tenths if percent else short
    return compared.chart(caption, lines, compared.size, not percent, majority, task, written)


def loss_curves(compared: Compared) -> Markup:
    """Training loss in total, by family and by task."""
    cells = [compared.chart("all tasks", compared.lines(lambda run: run.series("train/loss"), smoothed), LARGE)]
    for family, tasks in _families(compared):
        lines = compared.lines(lambda run, tasks=tasks: family_loss(run, tasks))  # type: ignore[misc]
        cells.append(compared.chart(f"{family}, mean", lines, LARGE))
    found = [cell for cell in cells if cell is not None]
    if not found:
        return tag("p", "No training step in the log yet.", class_="note")
    note = (
        "Smoothed over a twentieth of the run, the numbers as logged faintly behind. The total is weighted as training "
        "weights it, that of a task or family is not. Where the recipe divides by log n, guessing a class costs 1."
    )
    grid = compared.grid(
        lambda task: compared.chart(
            task, compared.lines(lambda run: run.series(f"train/loss/{task}"), smoothed), compared.size, task=task
        )
    )
    return join(tag("p", note, class_="note"), charts(found, LARGE), tag("h3", "Each task"), grid)


def machine_curves(compared: Compared) -> Markup:
    """Throughput and the optimizer."""
    cells = []
    for caption, key, factor in MACHINE:
        make = Line if key.startswith("train/lr") else smoothed
        lines = compared.lines(lambda run, key=key, factor=factor: _times(run.series(key), factor), make)  # type: ignore[misc]
        cells.append(compared.chart(caption, lines, LARGE))
    found = [cell for cell in cells if cell is not None]
    return charts(found, LARGE) if found else tag("p", "No training step in the log yet.", class_="note")


def family_metric(run: RunFiles, tasks: Sequence[str]) -> Series | None:
    """Mean of the tasks' metrics at the evaluations that have all of them, perplexities left out."""
    found = [run.scores[task].series for task in tasks if task in run.scores and run.scores[task].percent]
    if not found:
        return None
    steps = found[0].steps
    for series in found[1:]:
        steps = np.intersect1d(steps, series.steps)
    values = [dict(zip(*series, strict=True)) for series in found]
    return Series(steps, np.array([np.mean([v[step] for v in values]) for step in steps], np.float64))


def family_loss(run: RunFiles, tasks: Sequence[str]) -> Series | None:
    """Mean of the tasks' smoothed losses at every step at which one was logged.

    A task that was not drawn for a while counts with its loss interpolated: else the mean would jump with the draws.
    """
    found = [smooth(series) for task in tasks if len((series := run.series(f"train/loss/{task}")).steps)]
    if not found:
        return None
    steps = np.unique(np.concatenate([series.steps for series in found]))
    return Series(steps, np.mean([np.interp(steps, *series) for series in found], axis=0))


def _percent(series: Series | None) -> Series | None:
    return None if series is None else _times(series, 100.0)


def _times(series: Series, factor: float) -> Series:
    return Series(series.steps, series.values * factor)


def _tenths(value: float) -> str:
    return score(value / 100, percent=True)


def _families(compared: Compared) -> list[tuple[str, list[str]]]:
    """Those that a mean says something new of: of several tasks, and not of all that there are."""
    families = compared.families
    return [(f.replace("_", " "), tasks) for f, tasks in families.items() if len(families) > 1 and len(tasks) > 1]
