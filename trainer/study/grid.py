"""From a study to its runs, all checked before the first one starts.

Owns: the order of the runs, the variables in their overrides, where each run lives, and the checks that need recipes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config import Recipe, load_recipe
from trainer.config.mixture import tasks_of
from trainer.config.stages import stage_recipes
from trainer.errors import ConfigError, SettError, nearest, shortened
from trainer.run.job import check_run
from trainer.study.schema import Study
from trainer.tasks.spec import TaskSpec

_VARIABLE = re.compile(r"\{([A-Za-z_]\w*)\}")
_SET_BY_THE_STUDY = ("seed", "output", "name")
ORIGINS = "origins"
"""Stands where other runs have their task: in labels, and in the study's directory."""


@dataclass(frozen=True)
class Run:
    """One cell of the study: the recipe of an arm, on a task, with a seed."""

    task: str
    arm: str
    seed: int
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe = field(compare=False)
    origin: Run | None = None
    """The run that has to be finished first."""

    @property
    def judged(self) -> bool:
        """Whether it is a cell of the study, and not what some of them start from."""
        return self.task != ORIGINS

    @property
    def label(self) -> str:
        return f"{self.task}/{self.arm}/seed-{self.seed}"

    @property
    def directory(self) -> Path:
        """Where its logs, claim and results are: with stages, that of the last one."""
        return self.stages[-1].run_dir

    @property
    def stages(self) -> list[Recipe]:
        """What is run one after the other: the recipe itself where it has no stages."""
        return stage_recipes(self.recipe)


def plan_runs(study: Study) -> list[Run]:
    """All runs, seed by seed: a study that is interrupted has pairs to compare.

    Raises:
        SettError: a recipe, an override or a judged task is wrong; the message names arm, task and seed.
    """
    known: dict[str, list[TaskSpec]] = {}  # seeds share their tasks' cards
    runs: list[Run] = []
    for seed in study.all_seeds:
        origins = {}
        for name in study.used_origins:
            with _about(f"origin '{name}', seed {seed}"):
                origins[name] = _plan_origin(study, name, seed)
        runs += origins.values()
        for task in study.tasks:
            for arm in study.arms:
                with _about(f"arm '{arm}', task '{task}', seed {seed}"):
                    run = _plan(study, task, arm, seed, origins)
                    last = run.stages[-1]
                    entries = str((last.tasks, last.exclude, last.take, last.take and last.seed))
                    if entries not in known:
                        known[entries] = tasks_of(last)
                    check_judged(task, known[entries], study.metric)
                    for stage in run.stages:
                        check_run(stage)
                    runs.append(run)
    return runs


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Say which run an error is about."""
    try:
        yield
    except SettError as error:
        raise type(error)(f"{what}: {error}") from error


def _plan_origin(study: Study, name: str, seed: int) -> Run:
    config = study.origins[name]
    overrides = _filled(config.overrides, {"seed": str(seed)}, seed, study.directory / ORIGINS / name)
    run = Run(ORIGINS, name, seed, config.recipe, overrides, load_recipe(config.recipe, overrides))
    if run.recipe.stages:
        raise ConfigError("an origin has no stages; give the stages to the arms, or make each an origin's recipe")
    tasks_of(run.recipe)
    check_run(run.recipe)
    return run


def _plan(study: Study, task: str, arm: str, seed: int, origins: Mapping[str, Run]) -> Run:
    config = study.arms[arm]
    variables = {**study.task(task).variables, "task": task, "seed": str(seed)}
    written = [*study.overrides, *config.overrides, *study.task(task).overrides]
    overrides = _filled(written, variables, seed, study.directory / task / arm)
    origin = None if config.origin is None else origins[config.origin]
    if origin is not None:
        overrides += (f"init_from.run={json.dumps(str(origin.directory))}",)
    run = Run(task, arm, seed, config.recipe, overrides, load_recipe(config.recipe, overrides), origin)
    if origin is not None:
        _check_same_model(run.stages[0], origin.recipe)
    return run


def _check_same_model(recipe: Recipe, origin: Recipe) -> None:
    """Before the origin is trained; all else about taking over weights is checked when the arm starts."""
    for key in ("path", "config", "tokenizer"):
        ours, theirs = getattr(recipe.model, key), getattr(origin.model, key)
        if ours != theirs:
            raise ConfigError(f"model.{key}: {ours}, but the origin '{origin.output.name}' has {theirs}; say one")


def _filled(written: Sequence[str], variables: Mapping[str, str], seed: int, folder: Path) -> tuple[str, ...]:
    """The overrides with their variables filled in, and those that are the study's own."""
    overrides = [substitute(override, variables) for override in written]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _SET_BY_THE_STUDY:
            raise ConfigError(f"override '{override}': {key} is set by the study; take it out")
    # Quoted: the value is read as YAML.
    return (*overrides, f"seed={seed}", f"output={json.dumps(str(folder))}", f"name=seed-{seed}")


def substitute(override: str, variables: Mapping[str, str]) -> str:
    """`override` with every `{name}` replaced; other braces, as in `{a: 1}`, stay.

    Raises:
        ConfigError: there is no such variable.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in variables:
            hint = nearest(name, variables) or f"; there are {', '.join(sorted(variables))}"
            raise ConfigError(
                f"override '{override}': no variable '{name}'{hint}. "
                f"Give the task one (tasks: {{TASK: {{{name}: ...}}}})"
            )
        return variables[name]

    return _VARIABLE.sub(value, override)


def check_judged(task: str, specs: Sequence[TaskSpec], metric: str) -> None:
    """Raise `ConfigError` unless the recipe trains the judged task, and it has the split that is reported."""
    names = [spec.name for spec in specs]
    if task not in names:
        raise ConfigError(
            f"the recipe does not train the judged task{nearest(task, names)}: its tasks are {shortened(names)}. "
            "Name it in the recipe or in the arm's overrides"
        )
    if metric == "test" and specs[names.index(task)].test is None:
        raise ConfigError(f"metric: the task '{task}' has no test split; give it one, or report dev")
