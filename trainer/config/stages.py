"""A recipe with stages as a list of ordinary recipes.

Owns: `stage_recipes` and `stage_tasks`: what a stage inherits, what it may say, and where it starts from. Stage STAGE
of recipe NAME is a run like any other, in OUTPUT/NAME/STAGE, whose `init_from` is the run of the stage before.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.config.mixture import tasks_of
from trainer.config.schema import Recipe
from trainer.errors import ConfigError
from trainer.tasks.spec import TaskSpec

_OWN = ("output", "stages", "init_from")
"""Keys that a stage cannot change: they say where it stands among the others."""

_SHARED = ("seed", "evaluation.dev_share", "evaluation.dev_rows")
"""Keys that decide which rows are cut as dev. Stages that differed would train on what another is judged by."""


class StageError(ConfigError):
    """What is wrong with a stage: `place` is its key in the recipe."""

    def __init__(self, place: str, problem: str | ValidationError) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """The runs of a recipe, in order; a recipe without stages is its own only one.

    Raises:
        StageError: a stage that cannot be.
    """
    if not recipe.stages:
        return [recipe]
    shared = recipe.model_dump(mode="json", exclude_unset=True, exclude={"stages"})
    recipes: list[Recipe] = []
    for number, stage in enumerate(recipe.stages):
        _check_keys(recipe, number)
        values = _merged(shared, stage)
        heads = values.pop("carry_heads", False)
        values["output"] = str(recipe.run_dir)
        if recipes:
            try:
                heads = TypeAdapter(bool).validate_python(heads)
            except ValidationError:
                raise StageError(f"stages.{number}.carry_heads", f"say true or false, not {heads!r:.80}") from None
            values["init_from"] = {"run": str(recipes[-1].run_dir), "heads": heads}
        try:
            recipes.append(Recipe.model_validate(values))
        except ValidationError as error:
            raise StageError(f"stages.{number}", error) from None
        _check_shared(recipes[0], recipes[-1], number)
    return recipes


def stage_tasks(recipe: Recipe) -> list[TaskSpec]:
    """The tasks of all stages, each once; one that another stage has otherwise under the same name is `NAME@STAGE`."""
    found: dict[str, TaskSpec] = {}
    for run in stage_recipes(recipe):
        for task in tasks_of(run):
            if found.setdefault(task.name, task) != task:
                name = f"{task.name}@{run.name}"
                found[name] = task.model_copy(update={"name": name})
    return list(found.values())


def _check_keys(recipe: Recipe, number: int) -> None:
    stage = recipe.stages[number]
    if not isinstance(stage.get("name"), str):
        raise StageError(f"stages.{number}.name", "missing: this key is required, as text")
    if stage["name"] in [other.get("name") for other in recipe.stages[:number]]:
        raise StageError(f"stages.{number}.name", f"another stage is called '{stage['name']}'")
    for key in _OWN:
        if key in stage:
            raise StageError(f"stages.{number}.{key}", "not a stage's to say: it is the recipe's, or follows from it")


def _check_shared(first: Recipe, stage: Recipe, number: int) -> None:
    for key in _SHARED:
        section, _, name = key.rpartition(".")
        ours, theirs = (getattr(getattr(r, section) if section else r, name) for r in (stage, first))
        if ours != theirs:
            raise StageError(
                f"stages.{number}.{key}",
                f"{ours}, but the first stage has {theirs}. It decides which rows are cut as dev, and one stage would "
                "train on what another is judged by; set it for the whole recipe",
            )


def _merged(shared: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `shared`: mappings key by key, anything else whole."""
    merged = dict(shared)
    for key, value in changes.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
