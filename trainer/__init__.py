"""Sett: train one large model on many tasks at once, on DeepSpeed ZeRO-3.

    from trainer import load_recipe, train, evaluate_run, export_run

    run = train(load_recipe("recipes/quickstart.yaml"))
    export_run(run, ["backbone"])

Data flows one way through the folders: tasks -> cache -> window -> batch -> model -> losses -> engine -> metrics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trainer.config import Recipe, load_recipe, recipe_from
    from trainer.engine.launch import Launch
    from trainer.errors import SettError
    from trainer.run.evaluate_run import evaluate_run
    from trainer.run.export import export_run
    from trainer.run.job import train
    from trainer.run.plan import make_plan
    from trainer.tasks.cards import load_tasks
    from trainer.tasks.check import check_tasks
    from trainer.tasks.spec import Family, TaskSpec

_WHERE = {
    "Family": "trainer.tasks.spec",
    "Launch": "trainer.engine.launch",
    "Recipe": "trainer.config",
    "SettError": "trainer.errors",
    "TaskSpec": "trainer.tasks.spec",
    "check_tasks": "trainer.tasks.check",
    "evaluate_run": "trainer.run.evaluate_run",
    "export_run": "trainer.run.export",
    "load_recipe": "trainer.config",
    "load_tasks": "trainer.tasks.cards",
    "make_plan": "trainer.run.plan",
    "recipe_from": "trainer.config",
    "train": "trainer.run.job",
}

__all__ = [
    "Family",
    "Launch",
    "Recipe",
    "SettError",
    "TaskSpec",
    "check_tasks",
    "evaluate_run",
    "export_run",
    "load_recipe",
    "load_tasks",
    "make_plan",
    "recipe_from",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, and `sett --help` needs neither."""
    if name not in _WHERE:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
