"""One picture of a run: total loss and learning rate, the loss of every task, and what training did to each metric.

Owns: the drawing. Colours are Okabe and Ito's, which all common kinds of colour vision tell apart; better and worse
also differ by the shape of the marker. Drawn without pyplot, so no window system or global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trainer.metrics.curves import Evaluation, RunCurves, Series, load_curves, smooth
from trainer.metrics.scores import higher_is_better

BLUE, SKY, ORANGE, RED, GREY, INK = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#8C8C8C", "#333333"
WIDTH = 13.0
TOP, ROW, HEADING = 3.4, 0.215, 0.85
"""Inches: the loss panel, a line of the dumbbell plot, and what titles and axes of a panel need."""
BESIDE = 12
"""Most tasks whose dumbbell plot fits beside the loss; more get a panel of their own."""
LARGEST_IMAGE = 60_000
"""Pixels; Agg draws up to 65,535."""


def draw_curves(metrics_path: Path, out: Path, majority: Mapping[str, float] | None = None) -> None:
    """Draw `metrics.jsonl` to `out` (format by its ending); `majority` adds each task's baseline as a tick."""
    curves = load_curves(metrics_path)
    baselines = majority or {}
    scores = [e for e in curves.evaluations if higher_is_better(e.metric)]
    perplexities = [e for e in curves.evaluations if not higher_is_better(e.metric)]
    beside = 0 < len(scores) <= BESIDE
    # The loss of a single task is the total loss.
    tasks = len(curves.task_loss) if len(curves.task_loss) > 1 else 0
    columns = _columns(tasks)
    heights = {
        "loss": TOP if len(curves.loss.steps) or beside else 0.0,
        "tasks": HEADING + (1.2 if tasks <= 24 else 0.98) * math.ceil(tasks / columns) if tasks else 0.0,
        "scores": 0.0 if beside or not scores else HEADING + ROW * math.ceil(len(scores) / _split(len(scores))),
        "perplexities": HEADING + ROW * math.ceil(len(perplexities) / _split(len(perplexities))) if perplexities else 0,
    }
    heights = {name: height for name, height in heights.items() if height}
    total = sum(heights.values())
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, height_ratios=list(heights.values()), squeeze=False)[:, 0]
    for name, part in zip(heights, parts, strict=True):
        if name == "loss" and beside:
            left, right = part.subfigures(1, 2, width_ratios=[1.15, 1])
            _draw_loss(left, curves, TOP, WIDTH * 1.15 / 2.15)
            _draw_scores(right, scores, baselines, TOP, WIDTH / 2.15)
        elif name == "loss":
            _draw_loss(part, curves, TOP, WIDTH)
        elif name == "tasks":
            _draw_tasks(part, curves, columns, heights[name])
        elif name == "scores":
            _draw_scores(part, scores, baselines, heights[name], WIDTH)
        else:
            _draw_scores(part, perplexities, {}, heights[name], WIDTH)
    temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
    figure.savefig(temporary, dpi=min(130.0, LARGEST_IMAGE / total))
    temporary.replace(out)


def _columns(tasks: int) -> int:
    """Columns of the small multiples."""
    return 4 if tasks <= 8 else 6 if tasks <= 24 else 8


def _split(tasks: int) -> int:
    """Columns of the dumbbell plot."""
    return 1 if tasks <= 4 else 2


def heading(part: SubFigure, text: str, height: float, width: float) -> None:
    """Title of a part of `height` x `width` inches."""
    part.text(0.3 / width, 1 - 0.12 / height, text, fontsize=11, fontweight="bold", color=INK, va="top")


def plain(axes: Axes, size: float) -> None:
    """The look that all panels share: two spines, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=size, colors=INK, length=2.5, color="#BBBBBB")


def _robust_limits(axes: Axes, raw: Series, smoothed: Series) -> None:
    """Room for the whole smoothed curve and for all but the rare outliers of the raw one."""
    low, high = np.percentile(raw.values, [1, 99])
    low, high = min(low, smoothed.values.min()), max(high, smoothed.values.max())
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)


def _draw_loss(part: SubFigure, curves: RunCurves, height: float, width: float) -> None:
    heading(part, "Training loss and learning rate", height, width)
    axes = part.add_axes((0.75 / width, 0.52 / height, (width - 1.6) / width, (height - 1.1) / height))
    plain(axes, 8)
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.set_ylabel("loss", fontsize=8, color=BLUE)
    axes.set_xlim(0, max(curves.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    if not len(curves.loss.steps):
        axes.text(0.5, 0.5, "no training steps logged", transform=axes.transAxes, ha="center", color=GREY)
        return
    smoothed = smooth(curves.loss)
    few = "." if len(curves.loss.steps) < 30 else ""
    axes.plot(*curves.loss, color=SKY, alpha=0.45, linewidth=0.8, marker=few, label="loss")
    axes.plot(*smoothed, color=BLUE, linewidth=2, marker=few, label="loss, smoothed")
    _robust_limits(axes, curves.loss, smoothed)
    lines = list(axes.get_lines())
    if len(curves.lr.steps):
        lines += _draw_rates(axes, curves, few)
    # Above the axes, where no curve can run through it.
    axes.legend(
        lines,
        [str(line.get_label()) for line in lines],
        fontsize=8,
        frameon=False,
        ncols=len(lines),
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        borderaxespad=0.2,
        handlelength=1.8,
    )


def _draw_rates(axes: Axes, curves: RunCurves, marker: str) -> list[Line2D]:
    rates = axes.twinx()
    rates.spines[["top", "left", "bottom"]].set_visible(False)
    rates.spines["right"].set_color("#BBBBBB")
    rates.tick_params(labelsize=8, colors=INK, length=2.5, color="#BBBBBB")
    rates.set_ylabel("learning rate", fontsize=8, color="#9A6A00")
    label, heads = "learning rate", curves.head_lr
    ratio = heads.values / np.maximum(curves.lr.values, 1e-30) if len(heads.steps) == len(curves.lr.steps) else None
    used = curves.lr.values > 0
    if ratio is not None and used.any() and np.allclose(ratio[used], ratio[used][0]):
        # A multiple of the same curve is said in words: drawn on one axis, the smaller of the two would look flat.
        label += "" if math.isclose(ratio[used][0], 1) else f" (heads {ratio[used][0]:g}x)"
    elif len(heads.steps):
        rates.plot(*heads, color=ORANGE, linewidth=1.3, linestyle=":", marker=marker, label="of the heads")
    rates.plot(*curves.lr, color=ORANGE, linewidth=1.3, linestyle=(0, (4, 2)), marker=marker, label=label)
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-")))
    return list(rates.get_lines())


def _draw_tasks(part: SubFigure, curves: RunCurves, columns: int, height: float) -> None:
    heading(part, "Loss per task (smoothed; last value at the right; each on its own scale)", height, WIDTH)
    rows = math.ceil(len(curves.task_loss) / columns)
    grid = part.add_gridspec(
        rows,
        columns,
        left=0.55 / WIDTH,
        right=1 - 0.2 / WIDTH,
        bottom=0.4 / height,
        top=1 - 0.62 / height,
        wspace=0.28,
        hspace=0.62,
    )
    size = 8.5 if columns == 4 else 7.5 if columns == 6 else 6.8
    for index, (task, raw) in enumerate(curves.task_loss.items()):
        axes = part.add_subplot(grid[divmod(index, columns)])
        plain(axes, size - 1.5)
        axes.set_xlim(0, max(curves.last_step, 1))
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(2))
        last_of_column = index + columns >= len(curves.task_loss)
        if not last_of_column:
            axes.xaxis.set_major_formatter(NullFormatter())
        axes.set_title(_short(task, 19 if columns == 8 else 24), fontsize=size, loc="left", color=INK, pad=3)
        if not len(raw.steps):
            continue
        smoothed = smooth(raw)
        dots = "." if len(raw.steps) < 10 else ""
        axes.plot(*raw, color=SKY, alpha=0.35, linewidth=0.6)
        axes.plot(*smoothed, color=BLUE, linewidth=1.4, marker=dots, markersize=4)
        last = smoothed.values[-1]
        axes.set_title(
            f"{last:.2f}" if abs(last) < 10 else f"{last:.3g}", fontsize=size, loc="right", color=BLUE, pad=3
        )
        _robust_limits(axes, raw, smoothed)


def _draw_scores(
    part: SubFigure, evaluations: Sequence[Evaluation], majority: Mapping[str, float], height: float, width: float
) -> None:
    """Dumbbells: a line a task from before to after, best first, in as many columns as keep it short."""
    up = higher_is_better(evaluations[0].metric)
    measured = [e.before for e in evaluations if e.before is not None]
    title = "Dev metric per task, in percent" if up else "Dev perplexity per task (lower is better)"
    if up and len(measured) == len(evaluations) > 1:
        mean = float(np.mean([e.after for e in evaluations]))
        title += f" (mean {100 * np.mean(measured):.1f} → {100 * mean:.1f})"
    heading(part, title, height, width)
    ordered = sorted(evaluations, key=lambda e: -e.after if up else e.after)
    columns = 1 if width < WIDTH else _split(len(ordered))
    rows = math.ceil(len(ordered) / columns)
    values = [v for e in ordered for v in (e.before, e.after, majority.get(e.task)) if v is not None and np.isfinite(v)]
    labels, numbers, cell = 2.15, 0.95, (width - 0.2) / columns
    for column in range(columns):
        chunk = ordered[column * rows : (column + 1) * rows]
        left = (column * cell + labels) / width
        # A short last column keeps the line height of the others.
        tall = min((height - HEADING) / rows, 0.5) * len(chunk)
        top = height - 0.62
        axes = part.add_axes((left, (top - tall) / height, (cell - labels - numbers) / width, tall / height))
        _dumbbells(axes, chunk, majority, up)
        _score_axis(axes, values, up)
    _score_legend(part, ordered, majority, height, width)


def _dumbbells(axes: Axes, chunk: Sequence[Evaluation], majority: Mapping[str, float], up: bool) -> None:
    scale = 100 if up else 1
    for y, evaluation in enumerate(chunk):
        after = evaluation.after * scale
        better = True
        number = f"{after:.1f}" if up else f"{after:.3g}"
        if evaluation.before is not None:
            before = evaluation.before * scale
            better = after >= before if up else after <= before
            axes.plot([before, after], [y, y], color=BLUE if better else RED, linewidth=1.6, alpha=0.5, zorder=2)
            axes.plot(before, y, "o", color="white", markeredgecolor=GREY, markeredgewidth=1.2, markersize=5, zorder=3)
            number += f"  {after - before:+.1f}" if up else f"  from {before:.3g}"
        if evaluation.task in majority:
            axes.plot(majority[evaluation.task] * scale, y, "|", color=INK, markersize=8, markeredgewidth=1.3, zorder=1)
        axes.plot(
            after, y, "o" if better else "D", color=BLUE if better else RED, markersize=5.5 if better else 5, zorder=4
        )
        axes.text(
            1.03, y, number, transform=axes.get_yaxis_transform(), fontsize=7, va="center", color=INK if better else RED
        )
    axes.set_ylim(len(chunk) - 0.5, -0.5)
    axes.set_yticks(
        range(len(chunk)), [f"{_short(e.task, 34 - min(len(e.metric), 16))}  {_short(e.metric, 16)}" for e in chunk]
    )
    axes.tick_params(axis="y", labelsize=7, length=0)


def _score_axis(axes: Axes, values: Sequence[float], up: bool) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.tick_params(axis="x", labelsize=7, colors=INK, length=2.5, color="#BBBBBB")
    axes.grid(axis="x", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    if up:
        axes.set_xlim(min(0.0, 100 * min(values, default=0.0)) - 2, 102)
    elif values:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.3, max(values) * 1.3)


def _score_legend(
    part: SubFigure, ordered: Sequence[Evaluation], majority: Mapping[str, float], height: float, width: float
) -> None:
    def marker(shape: str, color: str, label: str, face: str = "") -> Line2D:
        return Line2D(
            [],
            [],
            marker=shape,
            color="none",
            markeredgecolor=color,
            markerfacecolor=face or color,
            markersize=5.5,
            label=label,
        )

    handles = [marker("o", BLUE, "after")]
    changes = [e.after - e.before for e in ordered if e.before is not None]
    if changes:
        handles.insert(0, marker("o", GREY, "before", "white"))
    if any(change * (1 if higher_is_better(ordered[0].metric) else -1) < 0 for change in changes):
        handles.append(marker("D", RED, "after, worse"))
    if any(e.task in majority for e in ordered):
        handles.append(marker("|", INK, "majority"))
    part.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.22 / width, 1 - 0.3 / height),
        fontsize=8,
        frameon=False,
        ncols=len(handles),
        handletextpad=0.1,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
