"""Tasks and what was found in them, printed.

Owns: the tables of `sett tasks list` and `sett tasks check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.tasks.cards import SPLITS
from trainer.tasks.rows import dropped_text
from trainer.tasks.spec import Family, TaskSpec

if TYPE_CHECKING:
    from trainer.tasks.check import CheckReport, TaskFacts

PAIRS_SHOWN = 40


def render_list(specs: Sequence[TaskSpec], console: Console) -> None:
    """The tasks as declared; no row is read."""
    table = _table(_count(len(specs), "task"))
    columns: dict[str, list[str]] = {
        "task": [spec.name for spec in specs],
        "family": [spec.family.value for spec in specs],
        "metric": [spec.primary_metric for spec in specs],
        "classes": [str(spec.classes or "") for spec in specs],
        "splits": [" ".join(split for split in SPLITS if spec.source(split) is not None) for spec in specs],
    }
    if console.width < 110:
        del columns["metric"]
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name == "classes" else "left")
    # A licence is often a sentence: it gets the room that the others leave.
    taken = sum(max(map(len, [name, *cells])) + 2 for name, cells in columns.items())
    table.add_column("licence", no_wrap=True, overflow="ellipsis", max_width=max(8, console.width - taken - 3))
    for row in zip(*columns.values(), [spec.licence for spec in specs], strict=True):
        table.add_row(*_cells(*row))
    console.print(table)


def render_report(report: CheckReport, console: Console) -> None:
    """Tasks, pairs of tasks that share rows, bad rows, and a last line that says how it went."""
    console.print(_tasks_table(report, console.width))
    _print_pairs(report, console)
    for task in report.tasks:
        for split, facts in task.splits.items():
            if not facts.bad.total:
                continue
            console.print(Text(f"{task.spec.name}, {split}: {_count(facts.bad.total, 'bad row')}", "bold red"))
            for place, reason in facts.bad.rows:
                console.print(Text(f"  {place}: {reason}"), soft_wrap=True)
            if facts.bad.total > len(facts.bad.rows):
                console.print(f"  ... and {facts.bad.total - len(facts.bad.rows):,} more")
    _print_dropped(report, console)
    rows = sum(facts.rows for task in report.tasks for facts in task.splits.values())
    bad = sum(task.bad for task in report.tasks)
    line = f"{_count(len(report.tasks), 'task')}, {_count(rows, 'good row')}, {_count(bad, 'bad row')}."
    console.print(Text(line, "bold green" if report.ok else "bold red"))


def _print_dropped(report: CheckReport, console: Console) -> None:
    for task in report.tasks:
        for split, facts in task.splits.items():
            if facts.dropped:
                console.print(Text(f"{task.spec.name}, {split}: {dropped_text(facts.dropped)}"), soft_wrap=True)


def _tasks_table(report: CheckReport, width: int) -> Table:
    table = _table("Tasks")
    table.caption = (
        "classes: in brackets, those that occur in train. words: mean of an input in train. duplicates: inputs "
        "repeated within train / dev rows whose input is also in train / test rows likewise."
    )
    # What says least goes first when the terminal is narrow.
    named = ["task"] + ["family"] * (width >= 100) + ["metric"] * (width >= 120)
    for name in named:
        table.add_column(name, no_wrap=True)
    for name in ("train", "dev", "test", "classes", "words", "duplicates", "bad"):
        table.add_column(name, justify="right", overflow="fold")
    for task in report.tasks:
        train = task.splits.get("train")
        rows = [f"{task.splits[split].rows:,}" if split in task.splits else "-" for split in SPLITS]
        words = f"{train.words / train.rows:.0f}" if train and train.rows else "-"
        names = (task.spec.name, task.spec.family.value, task.spec.primary_metric)[: len(named)]
        bad = Text(f"{task.bad:,}", "bold red") if task.bad else Text("0", "dim")
        table.add_row(*_cells(*names, *rows, _classes(task), words, _duplicates(report, task)), bad)
    return table


def _classes(task: TaskFacts) -> str:
    train = task.splits.get("train")
    seen = train.labels if train else set()
    if task.spec.family is Family.MULTIPLE_CHOICE and seen:
        return str(min(seen)) if len(seen) == 1 else f"{min(seen)}-{max(seen)}"
    if not task.spec.classes:
        return ""
    return f"{task.spec.classes} ({len(seen)})" if len(seen) < task.spec.classes else str(task.spec.classes)


def _duplicates(report: CheckReport, task: TaskFacts) -> str:
    name = task.spec.name
    counts = [
        f"{report.overlap(name, name, split).inputs:,}" if split in task.splits else "-" for split in ("dev", "test")
    ]
    return " / ".join([f"{task.train_duplicates:,}", *counts])


def _print_pairs(report: CheckReport, console: Console) -> None:
    pairs = [pair for pair in report.overlaps if pair.train_task != pair.eval_task]
    if not pairs:
        return
    pairs.sort(key=lambda pair: (-max(pair.inputs, pair.texts), pair))
    table = _table("Rows of one task's dev or test split that stand in another task's train split")
    for name in ("trained on", "evaluated on", "split"):
        table.add_column(name, no_wrap=True)
    for name in ("same input", "share a text", "of rows"):
        table.add_column(name, justify="right")
    rows = {(t.spec.name, split): facts.rows for t in report.tasks for split, facts in t.splits.items()}
    for pair in pairs[:PAIRS_SHOWN]:
        numbers = (pair.inputs, pair.texts, rows[pair.eval_task, pair.split])
        table.add_row(*_cells(*pair[:3], *(f"{number:,}" for number in numbers)))
    table.caption = (
        "same input: the whole input, character for character. share a text: a text of 24 characters or more "
        "but for case, spacing and punctuation. Harmless where both tasks split the same data alike."
    )
    if len(pairs) > PAIRS_SHOWN:
        table.caption += f" {len(pairs) - PAIRS_SHOWN} smaller pairs are not shown."
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))


def _cells(*values: str) -> list[Text]:
    """Names and licences are data: brackets in them are no rich markup."""
    return [Text(value) for value in values]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
