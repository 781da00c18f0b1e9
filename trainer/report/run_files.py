"""What a run directory says, read once.

Owns: reading the recipe, the log, `results.json`, `environment.json`, the newest checkpoint's `sett.json`, and the
state they add up to. Nothing is written, and no file of a checkpoint but its marker is opened, so torch is not needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Recipe, load_recipe
from trainer.config.mixture import tasks_of
from trainer.errors import RunError, SettError, shortened
from trainer.metrics.curves import Series
from trainer.metrics.log import FILE_NAME, read_metrics
from trainer.metrics.scores import higher_is_better
from trainer.tasks.spec import Family

RECIPE, RESULTS, MARKER, ENVIRONMENT = "recipe.yaml", "results.json", "sett.json", "environment.json"
NO_FAMILY = "other"
QUIET_SECONDS = 600.0
"""An unfinished run that has written nothing for so long counts as stopped, unless its lines are that far apart."""


@dataclass(frozen=True)
class TaskScore:
    """A task's main metric (the first that its evaluation logs), on its dev rows."""

    task: str
    metric: str
    series: Series
    rows: int | None
    majority: float | None
    before: float | None
    after: float | None
    """At the checkpoint that the run chose; of a run without `results.json`, at its last evaluation."""
    best: float | None
    """At the evaluation after step 0 that was best for this task, `best_step`."""
    best_step: int | None

    @property
    def percent(self) -> bool:
        """Whether it is a fraction, larger is better; else a perplexity."""
        return higher_is_better(self.metric)


@dataclass(frozen=True)
class RunFiles:
    """A run directory's files as they are at one moment."""

    path: Path
    recipe: Recipe
    records: list[dict[str, Any]]
    results: list[dict[str, Any]]
    """The lines of `results.json`; empty while the run is not finished."""
    checkpoint: dict[str, Any]
    """`sett.json` of the newest checkpoint; empty without one."""
    environment: dict[str, Any]
    """What it was last started on: device, versions, commit; empty for a run that did not say."""
    read_at: float

    @cached_property
    def numbers(self) -> dict[str, Series]:
        """Every key of the log, in order of appearance, over the steps at which it has a finite number."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.records:
            for key, value in record.items():
                if isinstance(value, int | float) and np.isfinite(value):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(record["step"])
                    values.append(float(value))
        return {key: Series(np.array(s, np.float64), np.array(v, np.float64)) for key, (s, v) in found.items()}

    def series(self, key: str) -> Series:
        """The numbers under a key; none where the log has none."""
        return self.numbers.get(key, Series(np.empty(0), np.empty(0)))

    def under(self, prefix: str) -> dict[str, Series]:
        """Task -> the numbers of `prefix`TASK."""
        return {key.removeprefix(prefix): s for key, s in self.numbers.items() if key.startswith(prefix)}

    @cached_property
    def scores(self) -> dict[str, TaskScore]:
        """Task -> its main metric."""
        rows = {row["task"]: row for row in self.results}
        found: dict[str, TaskScore] = {}
        for key, series in self.numbers.items():
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            if key.startswith("eval/") and task and task not in found:
                found[task] = _score(task, metric, series, rows.get(task, {}))
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """Every task that the log or the results name."""
        named = [row["task"] for row in self.results]
        for prefix in ("train/loss/", "share/", "weight/"):
            named += self.under(prefix)
        return list(dict.fromkeys([*named, *self.scores]))

    @cached_property
    def families(self) -> dict[str, str]:
        """Task -> family: from the results, before there are some from the tasks' cards where these can be read."""
        found = {row["task"]: row["family"] for row in self.results}
        if not found:
            try:
                found = {spec.name: spec.family.value for spec in tasks_of(self.recipe)}
            except SettError:  # the data may be on another machine
                return {}
        return found

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def times(self) -> list[float]:
        """When the lines of the log were written, seconds since 1970."""
        return [t for record in self.records if isinstance(t := record.get("time"), int | float)]

    @property
    def seconds(self) -> float:
        """Time of all windows: each line of the log has the mean of those since the line before."""
        steps, values = self.series("train/seconds_per_window")
        return float((values * np.diff(steps, prepend=0)).sum())

    @property
    def tokens(self) -> float:
        """Real tokens trained on, padding not counted."""
        steps, values = self.series("train/seconds_per_window")
        rates = self.series("train/tokens_per_second")
        if not np.array_equal(steps, rates.steps):
            return 0.0
        return float((values * np.diff(steps, prepend=0) * rates.values).sum())

    @property
    def state(self) -> str:
        """`finished`, `running`, `stopped`, or `not started` while the log is empty.

        Nothing in the directory says that a process is alive, so an unfinished run counts as running while its log
        grows at its own pace.
        """
        if self.checkpoint.get("finished") or (self.results and not self.checkpoint):
            return "finished"
        times = self.times
        if not times:
            return "not started"
        pause = max((b - a for a, b in pairwise(times)), default=0.0)
        return "running" if self.read_at - times[-1] < max(QUIET_SECONDS, 3 * pause) else "stopped"


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        RunError: it is none, or a file of it cannot be read.
        ConfigError: its recipe is damaged.
    """
    if not (path / RECIPE).is_file():
        raise RunError(_no_run(path))
    recipe = load_recipe(path / RECIPE)
    try:
        return RunFiles(
            path=path,
            recipe=recipe,
            records=read_metrics(path / FILE_NAME),
            results=_results(path / RESULTS),
            checkpoint=_newest_marker(path),
            environment=_read_object(path / ENVIRONMENT, "delete it; only reports need it"),
            read_at=time.time(),
        )
    except OSError as error:
        raise RunError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def by_family(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Family -> the tasks of all runs, families in the order of `Family`, tasks by name."""
    families = {task: family for run in reversed(runs) for task, family in run.families.items()}
    found: dict[str, list[str]] = {family: [] for family in (*(f.value for f in Family), NO_FAMILY)}
    for task in sorted({task for run in runs for task in run.tasks}):
        found.setdefault(families.get(task, NO_FAMILY), []).append(task)
    return {family: tasks for family, tasks in found.items() if tasks}


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such directory; give the directory of a run, `output/name` of its recipe"
    inside = sorted(str(p.parent) for p in path.glob(f"*/{RECIPE}")) if path.is_dir() else []
    if inside:
        return f"{path}: not a run directory, but it holds some; name those you want: {shortened(inside)}"
    return f"{path}: not a run directory (no {RECIPE} in it); `sett train RECIPE` makes one"


def _score(task: str, metric: str, series: Series, row: dict[str, Any]) -> TaskScore:
    steps, values = series
    later = np.flatnonzero(steps > 0)
    best = None
    if len(later):
        best = later[values[later].argmax() if higher_is_better(metric) else values[later].argmin()]
    return TaskScore(
        task=task,
        metric=metric,
        series=series,
        rows=row.get("rows"),
        majority=row.get("majority"),
        before=float(values[0]) if steps[0] == 0 else None,
        after=row["after"] if row else float(values[-1]) if len(later) else None,
        best=None if best is None else float(values[best]),
        best_step=None if best is None else int(steps[best]),
    )


def _results(path: Path) -> list[dict[str, Any]]:
    remedy = "delete it; the report is then made from the log alone"
    document = _read_object(path, remedy)
    rows = document.get("tasks", [])
    needed = {"task", "family", "metric", "after"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise RunError(f"{path}: damaged (no list of tasks with {', '.join(sorted(needed))}); {remedy}")
    return rows


def _newest_marker(path: Path) -> dict[str, Any]:
    """The newest first; a running job may delete old checkpoints meanwhile."""
    for marker in sorted(path.glob(f"checkpoints/step-*/{MARKER}"), reverse=True):
        if found := _read_object(marker, f"delete {marker.parent} to resume from the checkpoint before"):
            return found
    return {}


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: damaged (not a JSON object); {remedy}")
    return value
