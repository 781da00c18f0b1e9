"""Evaluating a checkpoint of a run, with any number of ranks.

Owns: `evaluate_run` (what `sett eval` does) and what each of its ranks does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.cache.progress import RowsBar
from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.engine.launch import Launch, run_ranks
from trainer.engine.session import init_distributed, start
from trainer.errors import ConfigError
from trainer.metrics.table import TaskResult, final_table, write_results
from trainer.run.directory import open_recipe
from trainer.run.evaluate import evaluate
from trainer.run.outcome import chosen_step, read_results, task_results
from trainer.run.prepare import load_split, prepare_together
from trainer.run.stages import stage_run

SPLITS = ("dev", "test", "train")


def evaluate_run(
    run_dir: Path,
    split: str = "dev",
    step: str = "best",
    launch: Launch | None = None,
    tasks: Sequence[str] = (),
) -> list[TaskResult]:
    """Evaluate a checkpoint on every task of the run; writes RUN/eval-SPLIT-STEP.json and prints the table.

    Args:
        run_dir: the run; of a recipe with stages, the last one is meant.
        split: `dev` (the run's own, cut from train where a task has none), `test` or `train`.
        step: `best`, `last` or a step number.
        launch: where to run; as for training.
        tasks: names of the tasks to evaluate instead, into a file of their own (`result_path`).

    Raises:
        ConfigError: an unknown split, a task without it, or no such task.
        RunError: no such run or checkpoint.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split: '{split}' is not one of {', '.join(SPLITS)}")
    run_dir = stage_run(run_dir.absolute())
    number = chosen_step(run_dir, step)
    run_ranks(launch or Launch(), ["eval", str(run_dir), split, str(number), *tasks])
    results = read_results(result_path(run_dir, split, number, tasks))
    Console().print(final_table(results))
    return results


def result_path(run_dir: Path, split: str, step: int, tasks: Sequence[str] = ()) -> Path:
    """Where the results of an evaluation are written."""
    return run_dir / f"eval-{split}-{'-'.join([str(step), *tasks])}.json"


def evaluate_on_this_rank(run_dir: Path, split: str, step: int, tasks: Sequence[str] = ()) -> None:
    """One rank's part: the weights are gathered from the checkpoint's shards, so any world size will do."""
    recipe = open_recipe(run_dir)
    rank, _, _ = init_distributed()
    job = prepare_together(recipe, rank)
    judged = job.only(tasks) if tasks else job
    splits = load_split(judged, split)
    weights = load_weights(Checkpoints(run_dir, 1, True).path(step))
    session = start(recipe, job.tasks, None, job.random_weights, weights)
    with RowsBar("evaluating") as bar:
        shown = (lambda done, total: bar("batches", done, total)) if session.is_first else (lambda *_: None)
        evaluation = evaluate(session, judged, splits, shown)
    if session.is_first:
        before: dict[str, float] = {}
        if split == "dev" and (run_dir / "results.json").is_file():
            rows = json.loads((run_dir / "results.json").read_text())["tasks"]
            known = {row["task"]: row["before"] for row in rows if row["before"] is not None}
            before = {evaluation.key(task): known[task] for task in judged.names if task in known}
        results = task_results(judged, splits, before, evaluation.flat())
        write_results(result_path(run_dir, split, step, tasks), results)
