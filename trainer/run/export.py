"""From a run's checkpoint to Hugging Face folders.

Owns: `export_run`: which checkpoint, which task, where to. The conversion itself is `trainer.export`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.config.mixture import tasks_of
from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.errors import ConfigError, nearest
from trainer.export.huggingface import export_task
from trainer.run.directory import open_recipe
from trainer.run.outcome import RESULTS, chosen_step
from trainer.run.stages import stage_run


def export_run(run_dir: Path, names: Sequence[str], step: str = "best", out: Path | None = None) -> list[Path]:
    """Export a checkpoint of a run.

    Args:
        run_dir: the run; of a recipe with stages, the last one is meant.
        names: `backbone` (for `AutoModel`) or tasks (for the `AutoModelFor...` of the task's family).
        step: `best`, `last` or a step number.
        out: parent of the folders; RUN/export by default.

    Returns:
        The folder of each name.

    Raises:
        ConfigError: a name is no task of the run.
        ModelError: transformers has no class for a task's family on this kind of model.
    """
    run_dir = stage_run(run_dir)
    recipe = open_recipe(run_dir)
    tasks = tasks_of(recipe)
    known = ["backbone", *(task.name for task in tasks)]
    for name in names:
        if name not in known:
            raise ConfigError(f"export: no task named '{name}' in this run{nearest(name, known)}")
    state = load_weights(Checkpoints(run_dir, 1, True).path(chosen_step(run_dir, step)))
    results = run_dir / RESULTS
    measured = json.loads(results.read_text()) if results.is_file() else None
    folders = []
    for name in names:
        folder = (out or run_dir / "export") / name
        export_task(state, recipe, tasks, None if name == "backbone" else name, folder, measured)
        folders.append(folder)
    return folders
