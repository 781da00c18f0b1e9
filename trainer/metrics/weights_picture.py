"""The picture of learned weights: every task's weight over the windows, and the alignment that it rests on.

Owns: the drawing. Tasks beyond the few that differ most from the start are drawn in grey and not named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from trainer.metrics.log import read_metrics

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, the darker ones first."""
_GREY = "#B0B0B0"
_KEYS = ("weight", "alignment", "alignment_error")


def draw_weights(metrics_path: Path, out: Path) -> bool:
    """Draw `metrics.jsonl` of a run with `meta` to `out`; False, and nothing drawn, where it has no weights."""
    series = _load(metrics_path)
    weights = series["weight"]
    if not weights:
        return False
    moved = sorted(weights, key=lambda name: -_movement(weights[name]))
    colours = dict(zip(moved, _COLOURS, strict=False))
    with_alignment = bool(series["alignment"])
    figure = Figure(figsize=(13.0 if with_alignment else 7.5, 4.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if with_alignment else 1, squeeze=False)[0]
    _draw(axes[0], weights, {}, colours, "Weights", log=True)
    if with_alignment:
        _draw(axes[1], series["alignment"], series["alignment_error"], colours, "Alignment with the held-out gradient")
        axes[1].axhline(0.0, color="#333333", linewidth=0.8, zorder=0)
    ends = sorted(colours, key=lambda name: -weights[name][-1][1])
    lines = [Line2D([], [], color=colours[name], linewidth=1.8, label=name) for name in ends]
    if others := len(weights) - len(colours):
        lines.append(Line2D([], [], color=_GREY, linewidth=0.9, label=f"{others} others"))
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)
    return True


def _load(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Kind -> task -> [(windows, value)]."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {kind: {} for kind in _KEYS}
    for record in read_metrics(path):
        for key, value in record.items():
            kind, _, task = key.partition("/")
            if kind in found and isinstance(value, int | float):
                found[kind].setdefault(task, []).append((int(record["step"]), float(value)))
    return found


def _movement(points: Sequence[tuple[int, float]]) -> float:
    return abs(math.log(points[-1][1] / points[0][1]))


def _draw(
    axes: Axes, series: Mapping[str, Any], errors: Mapping[str, Any], colours: Mapping[str, str], title: str,
    log: bool = False,
) -> None:  # fmt: skip
    for name in sorted(series, key=lambda n: n in colours):  # the coloured on top
        steps, values = zip(*series[name], strict=True)
        colour = colours.get(name, _GREY)
        axes.plot(steps, values, color=colour, linewidth=1.8 if name in colours else 0.9)
        spread = dict(errors.get(name, ()))
        if name in colours and spread:
            known = [(s, v, spread[s]) for s, v in series[name] if s in spread]
            at, low, high = zip(*((s, v - e, v + e) for s, v, e in known), strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("windows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
