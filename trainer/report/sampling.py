"""How often each task was drawn, beside how often it should have been.

Owns: the planned shares, by the recipe's sampling rule or, where learned weights are what tasks are drawn by, by these;
and the drawn ones, the mean of what the log has.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.config.schema import SamplingRule
from trainer.errors import ConfigError
from trainer.metrics.curves import Series
from trainer.report.compared import Compared
from trainer.report.markup import Markup, join, tag
from trainer.report.run_files import RunFiles
from trainer.report.scale import score
from trainer.window.mixture import example_shares

WIDTH, BAR = 160, 7
"""Units of a bar's drawing: its whole width, and the height of one run's bar."""


def sampling_section(compared: Compared) -> Markup | None:
    """A table with a bar for every task and run; None where the log has no shares."""
    drawn = [drawn_shares(run) for run in compared.runs]
    if not any(drawn):
        return None
    planned = [planned_shares(run) for run in compared.runs]
    largest = max(value for shares in (*drawn, *planned) for value in shares.values())
    rows = []
    for family, tasks in compared.families.items():
        for task in tasks:
            cells = [tag("th", task, scope="row"), tag("td", family)]
            for plan, draw in zip(planned, drawn, strict=True):
                cells += [_share(plan.get(task)), _share(draw.get(task))]
            bars = [(s, p.get(task), d.get(task)) for s, p, d in zip(compared.styles, planned, drawn, strict=True)]
            cells.append(tag("td", _bars(bars, largest), class_="bars"))
            rows.append(tag("tr", *cells, data_task=task))
    head = [tag("th", "task"), tag("th", "family")]
    for _ in compared.runs:
        head += [tag("th", "planned", class_="n"), tag("th", "drawn", class_="n")]
    lines = [tag("tr", *head, tag("td"), class_="sort")]
    if compared.several:
        names = [
            tag("th", label, colspan=2, class_=f"run {style}")
            for label, style in zip(compared.labels, compared.styles, strict=True)
        ]
        lines.insert(0, tag("tr", tag("td", colspan=2), *names, tag("td")))
    table = tag("table", tag("thead", *lines), tag("tbody", *rows), class_="sortable")
    note = (
        "Share of the rows, in percent. Bar: drawn over the whole run. Mark: planned, by the recipe's sampling rule "
        "or, with meta.action: sampling, the mean of the weights. A rule by size needs the sizes, which are known when "
        "a run is finished."
    )
    return join(tag("p", note, class_="note"), tag("div", table, class_="wide"))


def drawn_shares(run: RunFiles) -> dict[str, float]:
    """Task -> mean of the shares in the log."""
    return {task: _mean(series) for task, series in run.under("share/").items()}


def planned_shares(run: RunFiles) -> dict[str, float]:
    """Task -> the share that the recipe asks for; empty while the sizes that it depends on are not known."""
    if run.recipe.meta is not None and run.recipe.meta.action == "sampling":
        return {task: _mean(series) for task, series in run.under("weight/").items()}
    sizes: Mapping[str, int | None] = {row["task"]: row.get("train_rows") for row in run.results}
    if not sizes and run.recipe.sampling.rule in (SamplingRule.EQUAL, SamplingRule.FIXED):
        sizes = dict.fromkeys(run.under("share/"), 1)
    known = {task: size for task, size in sizes.items() if size is not None}
    if not known or len(known) < len(sizes):
        return {}
    names = list(known)
    try:
        shares = example_shares(names, np.array([known[name] for name in names], np.int64), run.recipe.sampling)
    except ConfigError:  # rates of tasks that the log does not name yet
        return {}
    return dict(zip(names, shares.tolist(), strict=True))


def _mean(series: Series) -> float:
    """Over all windows: each line of the log stands for those since the line before."""
    windows = np.diff(series.steps, prepend=0)
    return float(np.average(series.values, weights=windows)) if windows.sum() > 0 else float(series.values.mean())


def _share(value: float | None) -> Markup:
    return tag("td", score(value, percent=True), class_="n", data_v=value)


def _bars(bars: list[tuple[str, float | None, float | None]], largest: float) -> Markup:
    shapes = []
    for index, (style, planned, drawn) in enumerate(bars):
        top, scale = index * (BAR + 2) + 1, (WIDTH - 2) / (largest or 1.0)
        if drawn is not None:
            shapes.append(tag("rect", class_=style, x=0, y=top, width=f"{drawn * scale:.1f}", height=BAR))
        if planned is not None:
            mark = f"{planned * scale:.1f}"
            shapes.append(tag("line", class_="mark", x1=mark, x2=mark, y1=top - 1, y2=top + BAR + 1))
    said = "; ".join(f"planned {score(p, True)} %, drawn {score(d, True)} %" for _, p, d in bars)
    return tag(
        "svg", tag("title", said), *shapes, viewBox=f"0 0 {WIDTH} {len(bars) * (BAR + 2)}", class_="bar", role="img"
    )
