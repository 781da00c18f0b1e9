"""Train tiny models under DeepSpeed and, on every rank, in plain PyTorch on all ranks' micro-batches; the result is
the largest difference between their weights after each window.

    deepspeed --num_gpus 2 --no_local_rank against_pytorch.py STEPS RECIPE.json [RECIPE.json ...]
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from support.ranks import rank_main

from trainer.config import recipe_from
from trainer.engine.schedule import lr_factor, shake_at
from trainer.engine.session import Session, start
from trainer.engine.step import run_window
from trainer.model.multitask import MultiTaskModel, build_model
from trainer.model.shake import Shake
from trainer.run.prepare import Job, prepare_together
from trainer.window import Window
from trainer.window.hashing import seed32


def reference_step(
    model: MultiTaskModel, optimizer: Any, job: Job, window: Window, factor: float, shake: Shake | None
) -> float:
    """The same window in plain PyTorch: every micro-batch of every rank, one dense AdamW step."""
    collator = job.collator(job.train)
    optimizer.zero_grad(set_to_none=True)
    for micro_step in window.micro_steps:
        for micro in micro_step:
            batch = collator(micro.tasks, micro.rows, micro.epochs, window.unit_weights())
            seed = seed32(job.recipe.seed, window.step, micro.index)
            torch.manual_seed(seed)
            model(batch, shake=None if shake is None else replace(shake, seed=seed))["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.recipe.optimizer.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    optimizer.step()
    return float(norm)


def full(session: Session, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    value = parameter.detach() if session.stage == 0 else safe_get_full_fp32_param(parameter)
    assert value is not None, name
    return value


def compare(values: dict[str, Any], steps: int) -> dict[str, Any]:
    recipe = recipe_from(values)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    job = prepare_together(recipe, rank)
    torch.manual_seed(0)
    # Whatever computes the losses of the run, these are PyTorch's own.
    plain = recipe.model_copy(update={"kernels": "reference"})
    reference = copy.deepcopy(build_model(plain, job.tasks, job.random_weights))
    reference.train()
    config = recipe.optimizer
    optimizer = torch.optim.AdamW(reference.parameter_groups(config), betas=config.betas, eps=config.eps)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    session = start(recipe, job.tasks, None, job.random_weights)
    planner = job.planner(world_size if job.by_step else 1)
    collator = job.collator(job.train)
    theirs = {name: p.detach() for name, p in reference.named_parameters()}
    differences, absent, norms = [], set(), []
    for step in range(steps):
        window = planner.window(step, world_size)
        absent |= {job.names[t] for t, n in enumerate(window.rows.tolist()) if n == 0}
        factor = lr_factor(step, steps, config)
        shake = shake_at(step, steps, recipe.loss.r3f)
        run_window(session, window, collator, recipe.seed, factor, stop=False, shake=shake)
        norm = reference_step(reference, optimizer, job, window, factor, shake)
        norms.append(abs(session.gradient_norm() / norm - 1))
        differences.append(
            max(float((full(session, n, p) - theirs[n]).abs().max()) for n, p in session.model.named_parameters())
        )
    loss_now = session.engine(collator(*_first(window), window.unit_weights()))["loss"]
    session.engine.destroy()
    return {"differences": differences, "absent": sorted(absent), "norms": norms, "loss": float(loss_now)}


def _first(window: Window) -> tuple[Any, Any, Any]:
    micro = window.micro_steps[0][0]
    return micro.tasks, micro.rows, micro.epochs


def work(steps: str, *recipes: str) -> dict[str, Any]:
    return {path: compare(json.loads(Path(path).read_text()), int(steps)) for path in recipes}


if __name__ == "__main__":
    rank_main(work)
