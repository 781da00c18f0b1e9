"""The controller of a run's task weights, made of its job and its engine.

Owns: `controller_of`.
"""

from __future__ import annotations

from trainer.engine.session import Session
from trainer.meta import Controller
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
