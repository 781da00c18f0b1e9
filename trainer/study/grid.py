"""From a study to its runs, all checked before the first one starts.

Owns: the order of the runs, the variables in their overrides, where each run lives, and the checks that need recipes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Run:
    """One cell of the study: the recipe of an arm, on a task, with a seed."""

    task: str
    arm: str
    seed: int
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe = field(compare=False)

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
    runs = []
    for seed in study.all_seeds:
        for task in study.tasks:
            for arm in study.arms:
                try:
                    run = _plan(study, task, arm, seed)
                    last = run.stages[-1]
                    entries = str((last.tasks, last.exclude, last.take, last.take and last.seed))
                    if entries not in known:
                        known[entries] = tasks_of(last)
                    check_judged(task, known[entries], study.metric)
                    for stage in run.stages:
                        check_run(stage)
                except SettError as error:
                    raise type(error)(f"arm '{arm}', task '{task}', seed {seed}: {error}") from error
                runs.append(run)
    return runs


def _plan(study: Study, task: str, arm: str, seed: int) -> Run:
    config = study.arms[arm]
    variables = {**study.task(task).variables, "task": task, "seed": str(seed)}
    written = [*study.overrides, *config.overrides, *study.task(task).overrides]
    overrides = [substitute(override, variables) for override in written]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _SET_BY_THE_STUDY:
            raise ConfigError(f"override '{override}': {key} is set by the study; take it out")
    overrides += [
        f"seed={seed}",
        f"output={json.dumps(str(study.directory / task / arm))}",  # quoted: the value is read as YAML
        f"name=seed-{seed}",
    ]
    return Run(task, arm, seed, config.recipe, tuple(overrides), load_recipe(config.recipe, overrides))


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
