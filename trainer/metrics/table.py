"""What training changed, task by task: the final table and `results.json`.

Owns: `TaskResult`, the marks, and the three forms (terminal, Markdown, JSON). Tables show percent, files fractions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from trainer.metrics.scores import higher_is_better, mean_score

LEGEND = "✓ better than before and than majority   ~ than one of them   ✗ than neither"
COLUMNS = ("task", "family", "metric", "rows", "majority", "before", "after", "change", "")

SHORT_FAMILY = {
    "classification": "class",
    "pair_classification": "pair",
    "regression": "regr.",
    "multiple_choice": "choice",
    "masked_lm": "mlm",
    "causal_lm": "clm",
}
"""Families as the terminal shows them, where they differ from their names."""


@dataclass(frozen=True)
class TaskResult:
    """A task's primary metric on its `rows` dev rows; None where a number was not measured or does not exist."""

    task: str
    family: str
    metric: str
    rows: int
    majority: float | None
    before: float | None
    after: float | None
    train_rows: int | None = None

    @property
    def change(self) -> float | None:
        """After minus before, whichever direction is the better one."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def better_than_before(self) -> bool | None:
        return self._better_than(self.before)

    @property
    def better_than_majority(self) -> bool | None:
        return self._better_than(self.majority)

    @property
    def mark(self) -> str:
        """✓ better than all there is to compare with, ~ than some of it, ✗ than none; empty without a comparison."""
        verdicts = [v for v in (self.better_than_before, self.better_than_majority) if v is not None]
        if not verdicts:
            return ""
        return "✓" if all(verdicts) else "~" if any(verdicts) else "✗"

    def _better_than(self, other: float | None) -> bool | None:
        if other is None or self.after is None:
            return None
        return self.after > other if higher_is_better(self.metric) else self.after < other


def final_table(results: Sequence[TaskResult]) -> Table:
    """The table for the terminal, with a line of means (perplexities left out)."""
    table = Table(
        title="Dev metrics in percent (perplexity as it is)",
        title_justify="left",
        title_style="bold",
        caption=f"{summary(results)}\n{LEGEND}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in COLUMNS:
        right = name in COLUMNS[3:8]
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    styles = {"✓": "green", "✗": "red"}
    for result in results:
        *cells, mark = _cells(result)
        # A table of nine columns has to fit 80 characters: short families, and metrics that break between words.
        cells[1] = SHORT_FAMILY.get(cells[1], cells[1])
        cells[2] = cells[2].replace("_", " ")
        style = styles.get(mark, "")
        table.add_row(*cells, f"[{style}]{mark}[/]" if style else mark)
    if len(results) > 1:
        table.add_section()
        table.add_row(*_mean_cells(results), style="bold")
    return table


def to_markdown(results: Sequence[TaskResult]) -> str:
    """The same table in Markdown, for model cards and reports."""
    lines = ["| " + " | ".join(COLUMNS).rstrip() + " |", "|---|---|---|" + "---:|" * 5 + "---|"]
    lines += ["| " + " | ".join(_cells(result)).rstrip() + " |" for result in results]
    if len(results) > 1:
        lines.append("| " + " | ".join(f"**{c}**" if c else "" for c in _mean_cells(results)).rstrip() + " |")
    return "\n".join([*lines, "", f"In percent (perplexity as it is). {summary(results)}. {LEGEND}."]) + "\n"


def summary(results: Sequence[TaskResult]) -> str:
    """One sentence: how many tasks training helped."""
    compared = [r for r in results if r.mark]
    won = sum(r.mark == "✓" for r in compared)
    return f"{won} of {len(compared)} tasks end better than before training and than the majority baseline"


def means(results: Sequence[TaskResult]) -> dict[str, float | None]:
    """Mean of majority, before and after, each over the tasks that have that number (perplexities left out)."""

    def mean(name: str) -> float | None:
        pairs = [(r.metric, getattr(r, name)) for r in results]
        return mean_score([(metric, value) for metric, value in pairs if value is not None])

    return {name: mean(name) for name in ("majority", "before", "after")}


def write_results(path: Path, results: Sequence[TaskResult]) -> None:
    """Write `results.json`: `{"tasks": [...], "mean": {...}}`, numbers as fractions, null for what is not there."""
    tasks = [
        {
            **{name: _finite(value) for name, value in asdict(result).items()},
            "change": _finite(result.change),
            "better_than_before": result.better_than_before,
            "better_than_majority": result.better_than_majority,
        }
        for result in results
    ]
    document = {"tasks": tasks, "mean": {name: _finite(value) for name, value in means(results).items()}}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(result: TaskResult) -> list[str]:
    numbers = (result.majority, result.before, result.after)
    return [
        result.task,
        result.family,
        result.metric,
        str(result.rows),
        *(_number(value, result.metric) for value in numbers),
        _number(result.change, result.metric, sign=True),
        result.mark,
    ]


def _mean_cells(results: Sequence[TaskResult]) -> list[str]:
    mean = means(results)
    both = [r for r in results if r.change is not None and higher_is_better(r.metric)]
    change = mean_score([(r.metric, r.change) for r in both if r.change is not None])
    values = [_number(mean[name], "") for name in ("majority", "before", "after")]
    return ["mean", "", "", str(sum(r.rows for r in results)), *values, _number(change, "", sign=True), ""]


def _number(value: float | None, metric: str, sign: bool = False) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if higher_is_better(metric):
        return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    if abs(value) >= 1e5:
        return f"{value:+.1e}" if sign else f"{value:.1e}"
    decimals = 2 if abs(value) < 100 else 0
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
