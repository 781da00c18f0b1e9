"""The runs of one report, side by side.

Owns: what they are called, which colour each has on the whole page, and what they share: tasks by family, one axis of
windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from trainer.metrics.curves import Series
from trainer.report.chart import MEDIUM, SMALL, Line, Size, figure, line_chart
from trainer.report.markup import Markup, join, tag
from trainer.report.run_files import RunFiles, by_family
from trainer.report.scale import short

COLOURS = 8
"""Colours of the style sheet; runs beyond them are dashed."""
MANY = 16
"""Tasks from which on the grids of charts are small."""


@dataclass(frozen=True)
class Compared:
    """Several runs, or one."""

    runs: Sequence[RunFiles]

    @cached_property
    def labels(self) -> list[str]:
        """The names of the run directories, or their paths where two have the same."""
        names = [run.path.resolve().name for run in self.runs]
        return [str(run.path) if names.count(n) > 1 else n for run, n in zip(self.runs, names, strict=True)]

    @cached_property
    def styles(self) -> list[str]:
        """The classes of the runs' colours."""
        return [f"run{i} c{i % COLOURS}" + (" dashed" if i >= COLOURS else "") for i in range(len(self.runs))]

    @cached_property
    def families(self) -> dict[str, list[str]]:
        return by_family(self.runs)

    @cached_property
    def last_step(self) -> int:
        return max(run.last_step for run in self.runs)

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def size(self) -> Size:
        """Of a chart in a grid of all tasks."""
        return SMALL if sum(map(len, self.families.values())) > MANY else MEDIUM

    def each(self) -> Iterator[tuple[str, str, RunFiles]]:
        """Label, style and files of every run."""
        return zip(self.labels, self.styles, self.runs, strict=True)

    def lines(
        self, find: Callable[[RunFiles], Series | None], make: Callable[[str, Series, str], Line] = Line
    ) -> list[Line]:
        """A line for every run in which `find` finds points."""
        found = [(label, find(run), style) for label, style, run in self.each()]
        return [
            make(label, series, style) for label, series, style in found if series is not None and len(series.steps)
        ]

    def chart(
        self,
        caption: str,
        lines: Sequence[Line],
        size: Size,
        log: bool = False,
        reference: float | None = None,
        task: str | None = None,
        written: Callable[[float], str] = short,
    ) -> Markup | None:
        """A chart with what each line ends at, by `written`; None without lines."""
        if not lines:
            return None
        drawn = line_chart(caption, lines, self.last_step, size, log, reference)
        return figure(caption, drawn, [(line.style, written(line.series.values[-1])) for line in lines], data_task=task)

    def grid(self, cell: Callable[[str], Markup | None]) -> Markup | None:
        """A chart for every task, grouped by family; None without charts."""
        groups = []
        for family, tasks in self.families.items():
            cells = [made for task in tasks if (made := cell(task)) is not None]
            if cells:
                name = f"{family.replace('_', ' ')} ({len(cells)})"
                kind = "family of-small" if self.size is SMALL else "family"
                content = join(tag("h4", name), charts(cells, self.size))
                groups.append(tag("div", content, class_=kind, style=f"--charts: {len(cells)}"))
        return tag("div", *groups, class_="families") if groups else None


def charts(cells: Sequence[Markup], size: Size) -> Markup:
    """Charts beside each other, as many as the page is wide."""
    kind = {SMALL: "small", MEDIUM: "medium"}.get(size, "large")
    return tag("div", *cells, class_=f"charts {kind}")
