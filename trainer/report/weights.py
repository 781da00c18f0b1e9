"""Learned weights: how much each task came to count, and the alignments that this rests on.

Owns: the charts about `meta`. Where runs are overlaid their colours tell runs apart; in the overview, where all tasks
of one run are in one chart, they tell apart the tasks that moved most.
"""

from __future__ import annotations

import numpy as np

from trainer.report.chart import LARGE, Line, figure, line_chart
from trainer.report.compared import COLOURS, Compared, charts
from trainer.report.markup import Child, Markup, join, tag
from trainer.report.run_files import RunFiles

HELD_OUT = (
    ("held-out loss of the end task", "meta/held_out_loss"),
    ("accuracy of the dev head", "meta/dev_head_accuracy"),
    ("norm of the held-out gradient", "meta/held_out_norm"),
)


def weights_section(compared: Compared) -> Markup | None:
    """All about the weights; None where no run has any."""
    with_weights = [(label, run) for label, _, run in compared.each() if run.under("weight/")]
    if not with_weights:
        return None
    large = [_overview(f"weights of {label}" if compared.several else "weights", run) for label, run in with_weights]
    for caption, key in HELD_OUT:
        chart = compared.chart(caption, compared.lines(lambda run, key=key: run.series(key)), LARGE)  # type: ignore[misc]
        large += [chart] if chart is not None else []
    ends = ", ".join(dict.fromkeys(run.recipe.meta.end_task for _, run in with_weights if run.recipe.meta is not None))
    note = f"End task: {ends}. Weights sum to 1 over the tasks; on a logarithmic scale in the overview."
    parts: list[Child] = [tag("p", note, class_="note"), charts(large, LARGE), tag("h3", "Weight of each task")]
    parts.append(compared.grid(lambda task: _weight_chart(compared, task)))
    if any(run.under("alignment/") for run in compared.runs):
        note = (
            "Cosine (or what meta.signal says) of the task's gradient with the held-out gradient, averaged; the band "
            "is one standard error to each side, the dashed line 0."
        )
        parts += [tag("h3", "Alignment of each task"), tag("p", note, class_="note")]
        parts.append(compared.grid(lambda task: _alignment_chart(compared, task)))
    return join(*parts)


def _overview(caption: str, run: RunFiles) -> Markup:
    weights = run.under("weight/")
    moved = sorted(weights, key=lambda task: -_movement(weights[task].values))
    styles = {task: f"c{i}" if i < COLOURS else "rest" for i, task in enumerate(moved)}
    # The coloured ones are drawn last, on top.
    lines = [Line(task, weights[task], styles[task]) for task in reversed(moved)]
    named = sorted(moved[:COLOURS], key=lambda task: -weights[task].values[-1])
    keys = [tag("span", task, class_=f"key {styles[task]}") for task in named]
    if len(moved) > COLOURS:
        keys.append(tag("span", f"{len(moved) - COLOURS} others", class_="key rest"))
    chart = line_chart(caption, lines, run.last_step, LARGE, log=True)
    return figure(caption, join(chart, tag("p", *keys, class_="keys")))


def _movement(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """How far the logarithm of a weight has come; a weight at 0 has nowhere to come from."""
    return abs(float(np.log(values[-1] / values[0]))) if min(values[0], values[-1]) > 0 else 0.0


def _weight_chart(compared: Compared, task: str) -> Markup | None:
    lines = compared.lines(lambda run: run.series(f"weight/{task}"))
    return compared.chart(task, lines, compared.size, task=task)


def _alignment_chart(compared: Compared, task: str) -> Markup | None:
    lines = []
    for label, style, run in compared.each():
        series = run.series(f"alignment/{task}")
        if len(series.steps):
            lines.append(Line(label, series, style, error=run.series(f"alignment_error/{task}")))
    return compared.chart(task, lines, compared.size, reference=0.0, task=task)
