"""The picture of a study: a panel a task, a line an arm, with every seed as a dot, and mean ± standard error.

Owns: the drawing; colours and look are those of `trainer.metrics.picture`. Drawn without pyplot, like that one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from trainer.metrics.picture import BLUE, GREY, INK, SKY, heading, plain
from trainer.study.schema import Study
from trainer.study.summary import Cell, Row, Summary

PANEL, LINE, TITLE, AXIS, HEAD = 2.9, 0.32, 0.36, 0.34, 0.5
"""Inches: width of a panel, height of an arm's line, and room for its title, its axis and the heading."""
CHARACTER = 0.068
"""Inches of a letter of the arms' names."""
MOST_COLUMNS = 4
LONGEST_NAME = 40


def draw_study(study: Study, summary: Summary, out: Path) -> None:
    """Draw the finished runs to `out` (format by its ending)."""
    rows = [row for row in summary.rows if any(cell.spread for cell in row.cells.values())]
    columns = min(MOST_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    labels = 0.25 + CHARACTER * max(min(len(arm), LONGEST_NAME) for arm in study.arms)
    tall = LINE * len(study.arms)
    width = max(labels + columns * PANEL + 0.15, 6.2)
    height = HEAD + lines * (TITLE + tall + AXIS) + 0.1
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    part = figure.subfigures(1, 1, squeeze=False)[0, 0]
    heading(part, f"{study.name}: {study.metric} scores", height, width)
    _legend(part, width, height)
    cell = (width - labels - 0.15) / columns
    for index, row in enumerate(rows):
        line, column = divmod(index, columns)
        bottom = height - HEAD - line * (TITLE + tall + AXIS) - TITLE - tall
        place = ((labels + column * cell) / width, bottom / height, (cell - 0.25) / width, tall / height)
        _panel(part.add_axes(place), study, row, first=column == 0)
    figure.savefig(out)


def _panel(axes: Axes, study: Study, row: Row, first: bool) -> None:
    plain(axes, 7.5)
    scale = 100 if row.percent else 1
    unit = f"{row.metric}, %" if row.metric and row.percent else row.metric or "%"
    axes.set_title(f"{_short(row.task, 26)}  ({unit})", fontsize=8.5, color=INK, loc="left", pad=5)
    base = row.cells[study.baseline].spread
    if base is not None:
        axes.axvline(scale * base.mean, color=GREY, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    for y, arm in enumerate(study.arms):
        _arm(axes, y, row.cells[arm], scale, GREY if arm == study.baseline else BLUE)
    axes.set_ylim(len(study.arms) - 0.5, -0.5)
    axes.set_yticks(range(len(study.arms)), [_short(arm, LONGEST_NAME) for arm in study.arms] if first else [])
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.grid(axis="x", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.08)


def _arm(axes: Axes, y: int, cell: Cell, scale: float, color: str) -> None:
    if cell.spread is None:
        axes.text(
            0.5, y, "no run yet", transform=axes.get_yaxis_transform(), fontsize=7, color=GREY, ha="center", va="center"
        )
        return
    # The dots lie below the mean, on two lines, so that nothing covers anything.
    shifts = 0.15 + 0.13 * (np.arange(len(cell.values)) % 2)
    dots = SKY if color == BLUE else "#BBBBBB"
    axes.plot(scale * np.array(cell.values), y + shifts, "o", color=dots, markersize=3.2, alpha=0.9, zorder=2)
    error = scale * (cell.spread.error or 0.0)
    axes.errorbar(
        scale * cell.spread.mean,
        y - 0.14,
        xerr=error or None,
        fmt="o",
        color=color,
        markersize=6,
        linewidth=1.8,
        capsize=0,
        zorder=3,
    )


def _legend(part: SubFigure, width: float, height: float) -> None:
    handles = [
        Line2D([], [], marker="o", color=BLUE, linewidth=1.8, markersize=6, label="mean ± standard error"),
        Line2D([], [], marker="o", color=SKY, linestyle="none", markersize=3.2, label="a seed"),
        Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (3, 2)), label="baseline"),
    ]
    part.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.22 / width, 1 - 0.3 / height),
        fontsize=8,
        frameon=False,
        ncols=len(handles),
        columnspacing=1.2,
        borderaxespad=0,
    )


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
