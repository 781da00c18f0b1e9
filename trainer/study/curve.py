"""Scores along a number that arms differ in, such as how many tasks their origin was trained on.

Owns: `draw_curves` (a panel a task, a line a `curve`, a point an arm with an `x`) and `critical_point`, where a line
begins to pay.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.metrics.picture import GREY, INK, heading, plain
from trainer.study.schema import Study
from trainer.study.summary import Row, Summary

COLORS = ("#0B6E99", "#C7522A", "#6A8D3C", "#7B5EA7")
WIDTH, HEIGHT, HEAD = 3.4, 2.7, 0.45
MOST_COLUMNS = 3


def curves_of(study: Study) -> dict[str, list[str]]:
    """The arms of each curve, by ascending `x`; empty where no arm has one."""
    found: dict[str, list[str]] = {}
    for name, arm in study.arms.items():
        if arm.x is not None:
            found.setdefault(arm.curve, []).append(name)
    return {curve: sorted(arms, key=lambda name: _x(study, name)) for curve, arms in found.items()}


def critical_point(study: Study, row: Row, curve: str) -> float | None:
    """The smallest x from which on every score is better than that of the curve's first arm; None without one."""
    arms = [arm for arm in curves_of(study)[curve] if row.cells[arm].spread is not None]
    if len(arms) < 2:
        return None
    sign = 1.0 if row.percent else -1.0
    scores = [sign * spread.mean for arm in arms if (spread := row.cells[arm].spread) is not None]
    best = None
    for arm, score in reversed(list(zip(arms[1:], scores[1:], strict=True))):
        if score <= scores[0]:
            break
        best = _x(study, arm)
    return best


def draw_curves(study: Study, summary: Summary, out: Path) -> None:
    """Draw the finished runs to `out` (format by its ending)."""
    rows = summary.rows
    columns = min(MOST_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    width, height = max(columns * WIDTH + 0.4, 6.2), lines * HEIGHT + HEAD  # a heading needs its room
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    part = figure.subfigures(1, 1, squeeze=False)[0, 0]
    heading(part, f"{study.name}: {study.metric} scores, mean ± standard error over seeds", height, width)
    for index, row in enumerate(rows):
        line, column = divmod(index, columns)
        bottom = height - HEAD - (line + 1) * HEIGHT + 0.55
        place = ((0.55 + column * WIDTH) / width, bottom / height, (WIDTH - 0.6) / width, (HEIGHT - 0.95) / height)
        _panel(part.add_axes(place), study, row, legend=index == 0)
    figure.savefig(out)


def _panel(axes: Axes, study: Study, row: Row, legend: bool) -> None:
    plain(axes, 7.5)
    scale = 100 if row.percent else 1
    numbers = sorted({_x(study, name) for arms in curves_of(study).values() for name in arms})
    places = {number: place for place, number in enumerate(numbers)}  # evenly: numbers of tasks double
    for color, (curve, arms) in zip(_colors(len(curves_of(study))), curves_of(study).items(), strict=True):
        found = [(places[_x(study, arm)], spread) for arm in arms if (spread := row.cells[arm].spread) is not None]
        if not found:
            continue
        x = np.array([place for place, _ in found])
        means = scale * np.array([spread.mean for _, spread in found])
        errors = scale * np.array([spread.error or 0.0 for _, spread in found])
        axes.errorbar(x, means, yerr=errors, fmt="o-", color=color, markersize=4, linewidth=1.5, label=curve or None)
        axes.axhline(means[0], color=color, linewidth=0.9, linestyle=(0, (3, 2)), alpha=0.7)
        if (point := critical_point(study, row, curve)) is not None:
            axes.axvline(places[point], color=color, linewidth=0.9, linestyle=":", alpha=0.9)
    axes.set_title(
        f"{row.task}  ({row.metric or 'mean'}{', %' if row.percent else ''})", fontsize=8.5, color=INK, loc="left"
    )
    axes.set_xticks(range(len(numbers)), [f"{number:g}" for number in numbers])
    axes.set_xlabel(study.x_label, fontsize=7.5, color=GREY)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    if legend and any(curves_of(study)):
        axes.legend(fontsize=7, frameon=False)


def _x(study: Study, arm: str) -> float:
    x = study.arms[arm].x
    assert x is not None
    return x


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
