"""What a finished run leaves to look at, and how the user is told.

Owns: the table, `results.json`, the picture, and the last lines of `sett train`. It reads files of the run directory
only, so that a restart prints the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from trainer.cache.views import SplitView
from trainer.engine.checkpoint import Checkpoints, newest
from trainer.errors import RunError
from trainer.metrics.log import FILE_NAME, read_metrics
from trainer.metrics.picture import draw_curves
from trainer.metrics.scores import PRIMARY, majority
from trainer.metrics.table import TaskResult, final_table, to_markdown, write_results
from trainer.metrics.weights_picture import draw_weights
from trainer.run.evaluate import primary_metric, references_of
from trainer.run.prepare import Job

RESULTS, TABLE, PICTURE, WEIGHTS = "results.json", "results.md", "curves.png", "weights.png"


def write_outcome(job: Job, run_dir: Path) -> None:
    """Write the final table (JSON and Markdown) and the picture of a run; the JSON last: with it, all is there."""
    records = read_metrics(run_dir / FILE_NAME)
    after = _scores_at(records, chosen_step(run_dir))
    results = task_results(job, job.dev, _scores_at(records, 0), after)
    (run_dir / TABLE).write_text(to_markdown(results))
    baselines = {r.task: r.majority for r in results if r.majority is not None}
    draw_curves(run_dir / FILE_NAME, run_dir / PICTURE, baselines)
    draw_weights(run_dir / FILE_NAME, run_dir / WEIGHTS)
    write_results(run_dir / RESULTS, results)


def chosen_step(run_dir: Path, which: str = "best") -> int:
    """The checkpoint meant by `best`, `last` or a step number.

    `best` is the checkpoint of the best evaluation where it was kept, else the last.

    Raises:
        RunError: there is no such checkpoint.
    """
    last = newest(run_dir)
    if last is None:
        raise RunError(f"{run_dir}: has no checkpoint yet")
    checkpoints = Checkpoints(run_dir, 1, True)
    if which == "last":
        return last
    if which == "best":
        best = checkpoints.state(last).best_step
        return best if best in checkpoints.steps() else last
    if not which.isdigit() or int(which) not in checkpoints.steps():
        kept = ", ".join(map(str, checkpoints.steps()))
        raise RunError(f"{run_dir}: no checkpoint '{which}' (kept: {kept}; or say best, last)")
    return int(which)


def task_results(
    job: Job, splits: Sequence[SplitView], before: dict[str, float], after: dict[str, float]
) -> list[TaskResult]:
    """A line a task; `before` and `after` are flat `eval/<task>/<metric>` numbers."""
    results = []
    for task, train, split in zip(job.tasks, job.train, splits, strict=True):
        metric = primary_metric(task, job.recipe.evaluation.generate)
        key = f"eval/{task.name}/{PRIMARY[metric]}"
        labels: Sequence[int] = []
        if "label" in task.facts.columns:
            labels = np.asarray(train.column("label")).tolist()
        baseline = majority(metric, task, labels, references_of(task, split))
        results.append(
            TaskResult(
                task=task.name,
                family=task.family.value,
                metric=metric,
                train_rows=len(train),
                rows=len(split),
                majority=baseline,
                before=before.get(key),
                after=after.get(key),
            )
        )
    return results


def read_results(path: Path) -> list[TaskResult]:
    """The rows of a `results.json`."""
    fields = TaskResult.__dataclass_fields__
    return [TaskResult(**{k: row[k] for k in fields}) for row in json.loads(path.read_text())["tasks"]]


def print_outcome(run_dir: Path) -> None:
    """The end of `sett train`: the table, where everything is, and what to try next."""
    console = Console()
    if not (run_dir / RESULTS).is_file():
        console.print(f"The run in {run_dir} is not finished; run the same command to go on.")
        return
    shown = _short(run_dir)
    console.print(final_table(read_results(run_dir / RESULTS)))
    where = [
        ("curves", run_dir / PICTURE),
        *([("weights", run_dir / WEIGHTS)] if (run_dir / WEIGHTS).is_file() else []),
        ("metrics", run_dir / FILE_NAME),
        ("table", run_dir / TABLE),
        ("TensorBoard", run_dir / "tensorboard"),
        ("checkpoint", Checkpoints(run_dir, 1, True).path(chosen_step(run_dir))),
        *(("model", path) for path in sorted((run_dir / "export").glob("*"))),
    ]
    for name, path in where:
        console.print(f"  {name:<12} {_short(path)}", highlight=False, soft_wrap=True)
    console.print("\nNext:", style="bold")
    for command, what in (
        (f"tensorboard --logdir {shown}", "watch the curves in a browser"),
        (f"sett eval {shown} --split dev", "evaluate the checkpoint again"),
        (f"sett export {shown} --task TASK", "a model with one task's head, for transformers"),
        ("sett plan RECIPE", "see what your own recipe would do (docs/tasks.md: add a task in five lines)"),
    ):
        console.print(f"  {command:<44} {what}", highlight=False, soft_wrap=True)


def _short(path: Path) -> str:
    """Relative to the current directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _scores_at(records: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The evaluation logged at `step`; empty when there was none."""
    found: dict[str, float] = {}
    for record in records:
        if record["step"] == step:
            found |= {k: v for k, v in record.items() if k.startswith("eval/") and v is not None}
    return found
