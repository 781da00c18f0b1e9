"""Starting from the weights of another run: which, whether they fit, and taking them over.

Owns: the meaning of a recipe's `init_from`. The other run's directory is read once, when this one begins; a run that is
gone on with has weights of its own and needs it no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.cache.keys import tokenizer_hash
from trainer.config.mixture import tasks_of
from trainer.config.schema import ModelConfig, Recipe
from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.engine.start_weights import write_weights
from trainer.errors import ConfigError, ModelError, RunError, SettError
from trainer.model.carry import carried, untied
from trainer.model.multitask import MultiTaskModel, skeleton
from trainer.model.source import resolve_path
from trainer.run.directory import is_finished, open_recipe
from trainer.run.outcome import chosen_step
from trainer.run.prepare import Job

Begin = Callable[[MultiTaskModel, torch.device], None]


def source_of(recipe: Recipe) -> Recipe | None:
    """The recipe of the run that `recipe` starts from; None where it starts from a pretrained model.

    Raises:
        RunError: there is no such run or checkpoint, or `best` and `last` may still change.
    """
    start = recipe.init_from
    if start.run is None:
        return None
    source = open_recipe(start.run)
    if source.stages:
        names = ", ".join(str(stage["name"]) for stage in source.stages)
        raise ConfigError(f"init_from.run: {start.run} has stages; name the directory of one of them ({names})")
    chosen_step(start.run, start.checkpoint)
    if not start.checkpoint.isdigit() and not is_finished(start.run):
        raise RunError(
            f"init_from.run: {start.run} has not finished, so that its {start.checkpoint} checkpoint may change; "
            "finish it, or name a checkpoint by its step (init_from.checkpoint)"
        )
    return source


def check_origin(job: Job, source: Recipe) -> None:
    """Check that a job can take over the weights of a run of `source`, which need not have been trained yet.

    Raises:
        ModelError: the models or tokenizers are not the same.
    """
    where = f"init_from.run: {job.recipe.init_from.run}"
    if tokenizer_hash(_tokenizer(job.recipe.model)) != tokenizer_hash(_tokenizer(source.model)):
        raise ModelError(f"{where}: its model has another tokenizer, so that the same ids are other words")
    theirs = skeleton(source, tasks_of(source))
    try:
        carried(skeleton(job.recipe, job.tasks), theirs, heads=False)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def begin_from(recipe: Recipe) -> Begin | None:
    """What overwrites the initial weights of a run that starts from another; every rank calls it.

    Raises:
        SettError: see `source_of`.
    """
    source, start = source_of(recipe), recipe.init_from
    if source is None or start.run is None:
        return None
    folder = Checkpoints(start.run, 1, True).path(chosen_step(start.run, start.checkpoint))
    theirs = skeleton(source, tasks_of(source))

    def begin(model: MultiTaskModel, device: torch.device) -> None:
        what = carried(model, theirs, start.heads)
        write_weights(model, what, _read_on_first_rank(folder, theirs), device)

    return begin


def _read_on_first_rank(folder: Path, model: MultiTaskModel) -> dict[str, Tensor]:
    """The weights of a checkpoint on the first rank, nothing on the others; an error on all alike."""
    state: dict[str, Tensor] = {}
    problems: list[SettError | None] = [None]
    if dist.get_rank() == 0:
        try:
            state = untied(load_weights(folder), model)
        except SettError as error:
            problems = [error]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        raise problems[0]
    return state


def _tokenizer(model: ModelConfig) -> str:
    return resolve_path(model.tokenizer or str(model.path), weights=False)
