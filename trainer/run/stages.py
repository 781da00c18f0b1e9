"""Recipes of several stages: which runs they are, where those lie, and all of them checked before the first starts.

Owns: OUTPUT/NAME of a recipe with stages, which holds the recipe and a run directory a stage. How a stage follows from
the recipe is `trainer.config.stages`; how one takes over the weights of the one before is `init_from.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import Recipe, save_recipe
from trainer.config.stages import stage_recipes
from trainer.engine.checkpoint import newest
from trainer.errors import ConfigError, RunError, SettError
from trainer.run.directory import RECIPE, open_recipe
from trainer.run.init_from import check_origin, source_of
from trainer.run.prepare import Job, Progress, prepare

__all__ = ["final_run_dir", "open_stages", "prepare_stages", "stage_recipes", "stage_run"]


def final_run_dir(recipe: Recipe) -> Path:
    """The run directory of a recipe's last stage; without stages, the recipe's own."""
    return stage_recipes(recipe)[-1].run_dir


def stage_run(run_dir: Path) -> Path:
    """The run that is meant by a run directory: of a recipe with stages, that of the last one.

    Raises:
        RunError: it is not a run directory, or the last stage has not started.
    """
    stages = open_recipe(run_dir).stages
    if not stages:
        return run_dir
    last = run_dir / str(stages[-1]["name"])  # not the recipe's `output`: directories may be moved
    if not (last / RECIPE).is_file():
        raise RunError(
            f"{run_dir}: its last stage '{last.name}' has not started; `sett train` goes on, and a stage that has "
            f"finished is a run directory too ({run_dir / str(stages[0]['name'])})"
        )
    return last


def prepare_stages(
    recipe: Recipe, check: Callable[[Job], object] = lambda _: None, progress: Progress | None = None
) -> list[Job]:
    """Every run of a recipe, prepared and checked, nothing started; one job for a recipe without stages.

    Raises:
        SettError: what `prepare` or `check` raises, naming the stage; or a run does not fit where it is to start from.
    """
    jobs: list[Job] = []
    for run in stage_recipes(recipe):
        with _named(run.name if recipe.stages else None):
            job = prepare(run, progress)
            source = jobs[-1].recipe if jobs else source_of(run)
            if source is not None:
                check_origin(job, source)
            check(job)
            jobs.append(job)
    return jobs


def open_stages(recipe: Recipe) -> None:
    """Write the recipe of a run with stages to its directory; a recipe without stages is left to `open_run`.

    Raises:
        ConfigError: the directory holds a run without stages.
        RunError: it cannot be written.
    """
    if not recipe.stages:
        return
    if newest(recipe.run_dir) is not None:
        raise ConfigError(
            f"{recipe.run_dir}: holds a run without stages. Give this recipe another name (name=...), or delete the "
            "directory to start anew"
        )
    try:
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, recipe.run_dir / RECIPE)
    except OSError as error:
        raise RunError(f"output: cannot write to {recipe.run_dir}: {error.strerror}") from error


@contextmanager
def _named(stage: str | None) -> Iterator[None]:
    """Say which stage an error is about."""
    try:
        yield
    except SettError as error:
        if stage is None:
            raise
        raise type(error)(f"stage '{stage}': {error}") from error
