"""Which tasks a recipe trains.

Owns: `tasks_of`.
"""

from __future__ import annotations

import hashlib

from trainer.config.schema import Recipe
from trainer.errors import ConfigError
from trainer.tasks.cards import load_tasks
from trainer.tasks.spec import TaskSpec


def tasks_of(recipe: Recipe) -> list[TaskSpec]:
    """The tasks of `tasks` without those of `exclude`, of these the `take` that the seed draws, in the recipe's order.

    Raises:
        ConfigError, DataError: a task cannot be read, or there are fewer than `take`.
    """
    tasks = load_tasks(recipe.tasks, recipe.exclude)
    if recipe.take is None:
        return tasks
    if recipe.take > len(tasks):
        raise ConfigError(f"take: {recipe.take} tasks, but there are only {len(tasks)}")
    # By name alone: which others there are, and where they lie, changes nothing of their order.
    drawn = sorted(tasks, key=lambda task: hashlib.sha256(f"{recipe.seed}/{task.name}".encode()).digest())
    taken = {task.name for task in drawn[: recipe.take]}
    return [task for task in tasks if task.name in taken]
