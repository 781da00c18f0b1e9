"""The run directory: a run's recipe, logs, checkpoints and outcome in one place, started once and gone on with.

Owns: making one, opening one, and the rule about which changes of the recipe a started run accepts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.config import Recipe, load_recipe, save_recipe
from trainer.engine.checkpoint import Checkpoints, newest
from trainer.errors import ConfigError, RunError
from trainer.metrics.log import FILE_NAME

RECIPE, TENSORBOARD = "recipe.yaml", "tensorboard"

_MAY_CHANGE = ("evaluation", "checkpoint", "early_stopping", "kernels", "cache", "workers", "output", "name")
"""Sections a started run may change: nothing in them alters the trajectory of the weights, beyond rounding."""

_BUT_NOT = ("dev_share", "dev_rows")
"""Keys of `evaluation` that decide which rows are trained on."""


def check_run(recipe: Recipe) -> None:
    """Check that the run directory, if there is one, belongs to this recipe. Until the first checkpoint it may change.

    Raises:
        ConfigError: the directory holds a run of a recipe that differs where it matters.
    """
    run_dir = recipe.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"output: {run_dir} is a file, not a directory")
    path = run_dir / RECIPE
    if path.exists() and newest(run_dir) is not None:
        started = load_recipe(path)
        if difference := _difference(_fixed(started), _fixed(recipe)):
            raise ConfigError(
                f"{run_dir}: holds a run with another recipe ({difference}). Give this one another name "
                "(name=...), or delete the directory to start anew"
            )


def open_run(recipe: Recipe) -> None:
    """Create the run directory, or take over one that `check_run` accepts.

    Raises:
        ConfigError: see `check_run`.
        RunError: the directory cannot be written.
    """
    check_run(recipe)
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if newest(run_dir) is None:  # logs of a start that came to nothing would be repeated
            (run_dir / FILE_NAME).unlink(missing_ok=True)
            shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        save_recipe(recipe, run_dir / RECIPE)
    except OSError as error:
        raise RunError(f"output: cannot write to {run_dir}: {error.strerror}") from error


def is_finished(run_dir: Path) -> bool:
    """Whether the run in `run_dir` has come to its end."""
    step = newest(run_dir)
    return step is not None and Checkpoints(run_dir, 1, False).state(step).finished


def open_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run directory.

    Raises:
        RunError: it is not a run directory.
    """
    if not (run_dir / RECIPE).is_file():
        raise RunError(f"{run_dir}: not a run directory (no {RECIPE} in it); `sett train RECIPE` makes one")
    return load_recipe(run_dir / RECIPE)


def _fixed(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    for key in _MAY_CHANGE:
        values.pop(key)
    values["training"].pop("log_every")
    values["evaluation"] = {key: getattr(recipe.evaluation, key) for key in _BUT_NOT}
    start = recipe.init_from.run
    if start is not None and start.parent == recipe.run_dir.parent:  # stages may be moved together
        values["init_from"]["run"] = start.name
    return values


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first place where two recipes differ, as `key.path: old -> new`; empty when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if found := _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if old == new else f"{path}: {old!r:.60} -> {new!r:.60}"
