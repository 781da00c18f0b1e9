"""Train tiny models in the precision of their recipes; the result is each run's losses, types and fp32 weights.

deepspeed --num_gpus 2 --no_local_rank low_precision.py STEPS RECIPE.json [RECIPE.json ...]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from support.ranks import rank_main
from torch import Tensor

from trainer.config import recipe_from
from trainer.engine.schedule import lr_factor
from trainer.engine.session import Session, start
from trainer.engine.step import run_window
from trainer.run.prepare import prepare_together


def master(session: Session) -> dict[str, Tensor]:
    """The weights that the optimizer updates, whole."""
    return {name: safe_get_full_fp32_param(p).clone() for name, p in session.model.named_parameters()}


def types(session: Session) -> dict[str, list[str]]:
    """The types of the weights that compute, of those that are updated, and of the moments on this rank."""
    states = session.engine.optimizer.optimizer.state.values()
    found: dict[str, list[Tensor]] = {
        "weights": list(session.model.parameters()),
        "master": [safe_get_full_fp32_param(p) for p in session.model.parameters()],
        "moments": [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")],
    }
    return {what: sorted({str(tensor.dtype) for tensor in tensors}) for what, tensors in found.items()}


def train(values: dict[str, Any], steps: int) -> dict[str, Any]:
    recipe = recipe_from(values)
    job = prepare_together(recipe, dist.get_rank())
    session = start(recipe, job.tasks, None, job.random_weights)
    planner, collator = job.planner(1), job.collator(job.train)
    before, losses = master(session), []
    for step in range(steps):
        window = planner.window(step, session.world_size)
        factor = lr_factor(step, steps, recipe.optimizer)
        totals, _ = run_window(session, window, collator, recipe.seed, factor, stop=False)
        losses.append(float(session.all_sum(totals.task_loss).sum()))
    result = {"losses": losses, "types": types(session), "before": before, "after": master(session)}
    session.engine.destroy()
    return result


def work(steps: str, *recipes: str) -> dict[str, dict[str, Any]]:
    return {Path(path).stem: train(json.loads(Path(path).read_text()), int(steps)) for path in recipes}


if __name__ == "__main__":
    rank_main(work)
