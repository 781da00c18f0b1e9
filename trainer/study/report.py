"""The report of a study: RESULTS.md, results.csv, summary.csv, results.png, and the table on the terminal.

Owns: these files and how numbers are written in them. Files have fractions, tables percent (perplexity as it is).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from trainer.metrics.progress import duration
from trainer.study.curve import critical_point, curves_of, draw_curves
from trainer.study.grid import Run
from trainer.study.picture import draw_study
from trainer.study.result import Result, read_result
from trainer.study.schema import Study
from trainer.study.statistics import MOST_EXACT, SAMPLES, Permutation
from trainer.study.summary import Cell, Row, Summary, summarise

TABLE, RUNS, SUMMARY, PICTURE, CURVES = "RESULTS.md", "results.csv", "summary.csv", "results.png", "curves.png"


def write_report(study: Study, runs: Sequence[Run]) -> Summary:
    """Write all files of the report into the study's directory, from the runs that are finished."""
    results = [result for run in runs if (result := read_result(run, study.metric)) is not None]
    summary = summarise(study, results)
    folder = study.directory
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TABLE, to_markdown(study, summary))
    columns = [field.name for field in fields(Result)]
    _write_csv(folder / RUNS, columns, (asdict(result) for result in results))
    rows = list(_summary_rows(study, summary))
    _write_csv(folder / SUMMARY, list(rows[0]), rows)
    if results:
        draw_study(study, summary, _aside(folder / PICTURE))
        os.replace(_aside(folder / PICTURE), folder / PICTURE)
    if results and curves_of(study):
        draw_curves(study, summary, _aside(folder / CURVES))
        os.replace(_aside(folder / CURVES), folder / CURVES)
    return summary


def to_markdown(study: Study, summary: Summary) -> str:
    """The one table of the study, and what its numbers mean."""
    header, *body = _cells(study, summary)
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * len(study.arms)]
    lines += [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in body]
    picture = [f"![Scores by task and arm]({PICTURE})", ""] if summary.results else []
    if summary.results and curves_of(study):
        picture += [*_critical_points(study, summary), "", f"![Scores along {study.x_label or 'x'}]({CURVES})", ""]
    return "\n".join([f"# {study.name}", "", *lines, "", *_legend(study, summary), "", *picture])


def _critical_points(study: Study, summary: Summary) -> list[str]:
    """From which x on each curve stays above its first point, by the means over seeds."""
    lines = []
    for curve, arms in curves_of(study).items():
        found = {row.task: critical_point(study, row, curve) for row in summary.rows}
        told = ", ".join(f"{task} {'nowhere' if x is None else f'{x:g}'}" for task, x in found.items())
        lines.append(f"- {f'{curve}: ' if curve else ''}better than {arms[0]} from {study.x_label or 'x'} = {told}")
    return lines


def terminal_table(study: Study, summary: Summary) -> Table:
    """The same table for the terminal."""
    header, *body = _cells(study, summary)
    legend = " ".join(_legend(study, summary)).replace("`", "").replace("**", "")
    table = Table(
        title=f"{study.name}: {study.metric} scores", title_justify="left", box=box.SIMPLE_HEAD, caption=legend
    )
    table.caption_justify = "left"
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in body:
        table.add_row(*(_narrow(cell) for cell in row))
    return table


def _narrow(cell: str) -> str:
    """A cell on two lines, without Markdown."""
    return cell.replace("**", "").replace(" (+", "\n(+").replace(" (-", "\n(-").replace(" = ", "=").replace(" < ", "<")


def _cells(study: Study, summary: Summary) -> list[list[str]]:
    """The table's header and lines as text."""
    names = [f"{arm} (baseline)" if arm == study.baseline else arm for arm in study.arms]
    lines = [["task", "metric", *names]]
    for row in summary.rows:
        task = f"**{row.task}**" if row.is_mean else row.task
        lines.append([task, row.metric, *(_score(row, row.cells[arm]) for arm in study.arms)])
    costs = [summary.costs[arm] for arm in study.arms]
    lines.append(
        ["training time of a run", "", *(duration(c.seconds) if c.seconds is not None else "-" for c in costs)]
    )
    lines.append(["peak memory", "GiB", *(f"{c.peak_gib:.2f}" if c.peak_gib is not None else "-" for c in costs)])
    lines.append(["runs finished", "", *(f"{c.finished} of {c.planned}" for c in costs)])
    return lines


def _score(row: Row, cell: Cell) -> str:
    """`75.0 ± 0.9 (+0.8, p = .031, n = 6)`."""
    if cell.spread is None:
        return "-"
    scale, digits = (100, 1) if row.percent else (1, 2)
    text = f"{scale * cell.spread.mean:.{digits}f}"
    if cell.spread.std is not None:
        text += f" ± {scale * cell.spread.std:.{digits}f}"
    if cell.test is None:
        return text
    return f"{text} ({scale * cell.test.difference:+.{digits}f}, p {_p(cell.test)}, n = {cell.test.pairs})"


def _p(test: Permutation) -> str:
    """`= .031`, `< .001`; an asterisk where no result could have been below .05."""
    shown = "< .001" if test.p < 0.0005 else f"= {test.p:.3f}".replace("= 0.", "= .")
    return shown + ("*" if test.too_few else "")


def _legend(study: Study, summary: Summary) -> list[str]:
    split = "test scores of the best checkpoint" if study.metric == "test" else "dev scores of the best checkpoint"
    percent = "in percent" if all(row.percent for row in summary.rows) else "in percent (perplexity as it is)"
    lines = [
        f"Mean ± standard deviation over seeds, {percent}: {split}. In brackets the mean difference to "
        f"**{study.baseline}** over n pairs of the same task and seed, and p of the two-sided paired permutation test."
    ]
    tests = [cell.test for row in summary.rows for cell in row.cells.values() if cell.test is not None]
    if any(not test.exact for test in tests):
        lines.append(f"Above {MOST_EXACT} pairs p is from {SAMPLES:,} sampled sign flips, else from all of them.")
    if any(test.too_few for test in tests):
        lines.append("*: fewer than 6 pairs cannot give p < .05, whatever the difference.")
    if any(row.is_mean for row in summary.rows):
        lines.append("The mean over tasks counts the seeds that are finished on all of them.")
    lines.append("Training time leaves out evaluation and start-up; memory is the first rank's.")
    return lines


def _summary_rows(study: Study, summary: Summary) -> Iterable[dict[str, Any]]:
    for row in summary.rows:
        for arm, cell in row.cells.items():
            yield {
                "task": row.task,
                "metric": row.metric,
                "arm": arm,
                "seeds": len(cell.values),
                "mean": cell.spread.mean if cell.spread else None,
                "std": cell.spread.std if cell.spread else None,
                "standard_error": cell.spread.error if cell.spread else None,
                "difference": cell.test.difference if cell.test else None,
                "p": cell.test.p if cell.test else None,
                "pairs": cell.test.pairs if cell.test else None,
                "exact": cell.test.exact if cell.test else None,
            }


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    temporary = _aside(path)
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = _aside(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _aside(path: Path) -> Path:
    """Where this process writes a file before it takes its place: two studies may end at the same time."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
