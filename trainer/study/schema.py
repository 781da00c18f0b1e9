"""The study file: which arms are compared, on which tasks, with which seeds.

Owns: the models of its keys, and reading it. What runs follow from it is `grid.py`. Relative paths are relative to the
study file, so that a study is the same from whatever directory it is called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from trainer.config.load import read_mapping
from trainer.config.schema import Section
from trainer.errors import ConfigError, nearest
from trainer.tasks.spec import TaskName

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
RESERVED = ("task", "seed")
"""Variables that every run has by itself."""


class OriginConfig(Section):
    """A run that arms start from, once for each seed: it is trained before them, and not judged."""

    recipe: Path
    """The recipe's YAML file, without stages."""
    overrides: list[str] = Field(default_factory=list)
    """`key.path=value`, as on the command line; `{seed}` is filled in. Those of the study are not applied."""


class ArmConfig(Section):
    """One way of training: a recipe and what is changed in it."""

    recipe: Path
    """The recipe's YAML file."""
    overrides: list[str] = Field(default_factory=list)
    """`key.path=value`, as on the command line, after those of the study; `{task}`, `{seed}` and `{VARIABLE}` are
    filled in."""
    origin: str | None = None
    """The origin whose weights it starts from (`init_from`), of the same seed."""
    x: float | None = None
    """Where the arm stands on the horizontal axis of a curve; arms that have it are drawn, in `curves.png`."""
    curve: str = ""
    """Which curve it is on, where there are several; its first arm is what the others are compared with there."""


class TaskConfig(Section):
    """A judged task. All keys but `overrides` are variables for the overrides."""

    model_config = ConfigDict(extra="allow", frozen=True)

    overrides: list[str] = Field(default_factory=list)
    """Overrides of every arm on this task, after the arm's."""

    @property
    def variables(self) -> dict[str, str]:
        return {name: _text(value) for name, value in (self.model_extra or {}).items()}

    @model_validator(mode="after")
    def _plain_variables(self) -> TaskConfig:
        for name, value in (self.model_extra or {}).items():
            if name in RESERVED:
                raise ValueError(f"the variable '{name}' is set by the study; give yours another name")
            if not isinstance(value, str | int | float):
                raise ValueError(f"the variable '{name}' must be text or a number, not {value!r:.60}")
        return self


class Study(Section):
    """A whole study."""

    name: Name
    """Name of the study."""
    output: Path
    """The study's directory is `output/name`."""
    metric: Literal["dev", "test"] = "dev"
    """Split of the judged task that is reported. `test` evaluates the best checkpoint once, after training."""
    seeds: Annotated[list[Seed], Field(min_length=1)] | Annotated[int, Field(ge=1)] = 5
    """The seeds, or a number n for 0 to n - 1."""
    baseline: str
    """The arm that every other is compared with, paired by task and seed."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides of every run."""
    tasks: Annotated[dict[TaskName, TaskConfig | None], Field(min_length=1)]
    """The judged tasks, with their variables."""
    x_label: str = ""
    """What the arms' `x` is."""
    origins: dict[Name, OriginConfig] = Field(default_factory=dict)
    """Runs that arms start from."""
    arms: Annotated[dict[Name, ArmConfig], Field(min_length=1)]
    """The arms."""

    @property
    def directory(self) -> Path:
        return self.output / self.name

    @property
    def all_seeds(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the baseline."""
        return [arm for arm in self.arms if arm != self.baseline]

    @property
    def planned(self) -> int:
        return (len(self.arms) * len(self.tasks) + len(self.used_origins)) * len(self.all_seeds)

    @property
    def used_origins(self) -> list[str]:
        """The origins that an arm starts from."""
        return [name for name in self.origins if any(arm.origin == name for arm in self.arms.values())]

    def task(self, name: str) -> TaskConfig:
        return self.tasks[name] or TaskConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.baseline not in self.arms:
            hint = nearest(self.baseline, self.arms) or f"; the arms are {', '.join(self.arms)}"
            raise ValueError(f"baseline: there is no arm '{self.baseline}'{hint}")
        for name, arm in self.arms.items():
            if arm.origin is not None and arm.origin not in self.origins:
                raise ValueError(
                    f"arms.{name}.origin: there is no origin '{arm.origin}'{nearest(arm.origin, self.origins)}"
                )
        seeds = self.all_seeds
        if len(set(seeds)) < len(seeds):
            raise ValueError("seeds: a seed is there twice; two runs with one seed are one run")
        return self


def load_study(path: Path) -> Study:
    """Read and check a study file; its recipes are checked by `trainer.study.grid.plan_runs`.

    Raises:
        ConfigError: with the key's path and the nearest valid name.
    """
    values = read_mapping(path, "study")
    base = path.resolve().parent
    if isinstance(values.get("output"), str):
        values["output"] = _absolute(values["output"], base)
    for key in ("arms", "origins"):
        if isinstance(runs := values.get(key), dict):
            values[key] = {name: _with_recipe(run, base) for name, run in runs.items()}
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, path)) from error


def _with_recipe(arm: Any, base: Path) -> Any:
    if not isinstance(arm, dict) or not isinstance(arm.get("recipe"), str):
        return arm
    return {**arm, "recipe": _absolute(arm["recipe"], base)}


def _absolute(path: str, base: Path) -> Path:
    return Path(os.path.normpath(base / Path(path).expanduser()))  # no `studies/..` in messages and logs


def _text(value: Any) -> str:
    """A variable's value as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        place = [str(part) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields = ArmConfig.model_fields if place[0] == "arms" else Study.model_fields
            message = "unknown key" + nearest(place[-1], fields)
        elif problem["type"] == "missing":
            message = "missing: this key is required"
        elif problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {problem['input']!r:.80}"
        lines.append(": ".join([*([".".join(place)] if place else []), message]))
    if len(lines) == 1:
        return f"{path}: {lines[0]}"
    return f"{path}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)
