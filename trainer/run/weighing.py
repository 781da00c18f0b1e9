"""The controller of a run's task weights, made of its job and its engine.

Owns: `controller_of`, and `readable`, which says beforehand what the controller will be able to see.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.engine.session import Session
from trainer.errors import ConfigError, shortened
from trainer.meta import Controller
from trainer.meta.controller import alone
from trainer.meta.held_out import HeldOut, Shard
from trainer.meta.weights import weighting
from trainer.run.prepare import LM_FAMILIES, Job

_HELD_OUT, _TRAIN = 11, 12  # salts of the draws of rows


def controller_of(job: Job, session: Session) -> Controller | None:
    """Who weighs the tasks; None where the recipe has no `meta`."""
    recipe, config = job.recipe, job.recipe.meta
    if config is None:
        return None
    held_out = None
    if job.held_out is not None:
        end = job.names.index(config.end_task)
        task, views = job.tasks[end], job.views(job.train)
        shards = [
            Shard(rows, job.units(task, rows), views, end, job.facts, recipe.loss, recipe.seed, salt)
            for rows, salt in ((job.held_out, _HELD_OUT), (job.train[end], _TRAIN))
        ]
        head = None if task.family in LM_FAMILIES else job.heads.head(task.name)
        held_out = HeldOut(session, config, shards[0], shards[1], head, recipe.window.tokens, recipe.seed)
    rule = weighting(config, job.names, recipe.training.steps)
    return Controller(session, config, job.names, job.pools(job.train), job.shares, rule, held_out)


_LOOKED_AT = 64
"""Windows that are planned to see how often each task can be read."""


def readable(job: Job, world_size: int, stage: int) -> NDArray[np.float64]:
    """[T] share of the run's first windows in which each task can be read.

    Raises:
        ConfigError: a task that is drawn cannot be read in any of them.
    """
    planner = job.planner((job.recipe.window.group or world_size) if job.by_step else 1)
    seen, drawn = np.zeros(len(job.tasks)), np.zeros(len(job.tasks))
    windows = min(_LOOKED_AT, job.recipe.training.steps)
    for step in range(windows):
        window = planner.window(step, world_size)
        groups = [(step_, ranks) for step_ in window.micro_steps for ranks in alone(step_, stage < 3)]
        seen[np.unique([int(step_[ranks[0]].tasks[0]) for step_, ranks in groups]).astype(int)] += 1
        drawn += window.rows
    if never := [name for name, s, d in zip(job.names, seen, drawn, strict=True) if d and not s]:
        raise ConfigError(
            f"meta: no gradient of {shortened(never)} can be read: in none of the first {windows} windows do all "
            f"{world_size} ranks of a micro-step hold it, which ZeRO-3 needs. Set window.heterogeneity=step, "
            f"raise window.micro_batches ({len(job.tasks) * world_size}: every task in every window), or draw it more"
        )
    return np.asarray(seen / windows)
