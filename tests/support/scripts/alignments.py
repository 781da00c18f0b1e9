"""Alignments read under DeepSpeed beside those of plain PyTorch with dense gradients, over a few trained windows.

deepspeed --num_gpus 2 --no_local_rank alignments.py STEPS RECIPE.json [RECIPE.json ...]
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from support.ranks import rank_main
from torch import Tensor

from trainer.batch import Batch
from trainer.config import recipe_from
from trainer.engine.schedule import lr_factor
from trainer.engine.session import Session, start
from trainer.engine.step import run_window
from trainer.meta import Controller
from trainer.model.layers import layer_parameters
from trainer.model.multitask import MultiTaskModel, build_model
from trainer.run.prepare import Job, prepare_together
from trainer.run.weighing import controller_of
from trainer.window import Window
from trainer.window.hashing import seed32

Gradient = dict[str, Tensor]


def copy_weights(session: Session, model: MultiTaskModel) -> None:
    """The weights that the engine computes with: fp32 masters are rounded to them."""
    theirs = dict(model.named_parameters())
    for name, parameter in session.model.named_parameters():
        full = parameter.detach() if session.stage == 0 else safe_get_full_fp32_param(parameter)
        theirs[name].data.copy_(full.to(next(iter(session.model.parameters())).dtype))


def gradient(model: MultiTaskModel, loss: Tensor, last: int | None) -> Gradient:
    wanted = layer_parameters(model, last)
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def product(a: Gradient, b: Gradient) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def held_out_gradient(model: MultiTaskModel, controller: Controller, job: Job, number: int) -> Gradient:
    """By rows of scores written out, one by one, with nothing of ours but the model's features."""
    held_out = controller.held_out
    assert held_out is not None
    model.eval()
    (batch,) = held_out.held_out.batches(10**6, number, 10**9, 0, 1)
    task = job.tasks[job.names.index(controller.config.end_task)]
    if held_out.head is None:
        weighted = model(batch)["loss"]
    else:
        features = pooled_and_tokens(model, batch)
        rows, hidden = held_out.head.size, features.shape[1]
        weight = torch.zeros(rows, hidden, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(rows, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=500, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )
        fixed = features.detach().double()

        def closure() -> Tensor:
            solver.zero_grad()
            value = mean_loss(fixed, weight, bias, batch, held_out.head.first, task.family.value)
            value = value + controller.config.head.l2 / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(closure)
        seen = (features.float(), weight.detach().float(), bias.detach().float())
        weighted = mean_loss(*seen, batch, held_out.head.first, task.family.value)
    found = gradient(model, weighted, controller.config.layers)
    model.train()
    return found


def pooled_and_tokens(model: MultiTaskModel, batch: Batch) -> Tensor:
    return model._features(model.backbone(batch), batch)


def mean_loss(features: Tensor, weight: Tensor, bias: Tensor, batch: Batch, first: int, family: str) -> Tensor:
    losses = []
    if family == "regression":
        for (feature, row), value in zip(batch.regression_scores.tolist(), batch.regression_target, strict=True):
            score = features[feature] @ weight[row - first] + bias[row - first]
            losses.append(10.0 * (score - value) ** 2)
        return torch.stack(losses).mean()
    for (feature, count, row, rows), target in zip(batch.segments.tolist(), batch.target, strict=True):
        part = slice(row - first, row - first + rows)
        scores = (features[feature : feature + count] @ weight[part].T + bias[part]).view(1, -1)
        losses.append(F.cross_entropy(scores, target.view(1)))
    return torch.stack(losses).mean()


def true_readings(model: MultiTaskModel, job: Job, window: Window, factors: Any, v: Gradient, last: int | None) -> Any:
    """[K] products and [K] lengths of the micro-steps, over all ranks."""
    collator = job.collator(job.train)
    products, lengths = [], []
    for micro_step in window.micro_steps:
        inner = length = 0.0
        for micro in micro_step:
            batch = collator(micro.tasks, micro.rows, micro.epochs, window.unit_weights() * factors)
            torch.manual_seed(seed32(job.recipe.seed, window.step, micro.index))
            g = gradient(model, model(batch)["loss"], last)
            inner, length = inner + product(g, v), length + product(g, g) ** 0.5
        products.append(inner)
        lengths.append(length)
    return products, lengths


def compare(values: dict[str, Any], steps: int) -> dict[str, Any]:
    recipe = recipe_from(values)
    job = prepare_together(recipe, dist.get_rank())
    torch.manual_seed(0)
    plain = recipe.model_copy(update={"kernels": "reference"})
    reference = copy.deepcopy(build_model(plain, job.tasks, job.random_weights))
    session = start(recipe, job.tasks, None, job.random_weights)
    reference.to(next(session.model.parameters()).dtype).train()
    controller = controller_of(job, session)
    assert controller is not None
    planner = job.planner(session.world_size if job.by_step else 1)
    collator = job.collator(job.train)
    found: dict[str, Any] = {"gaps": [], "sizes": [], "weights": [], "norms": []}
    for step in range(steps):
        window = planner.window(step, session.world_size)
        copy_weights(session, reference)
        held_out = controller.before_window(step)
        factors = controller.factors()
        if held_out is not None:
            if controller.due(step):
                v = held_out_gradient(reference, controller, job, step // controller.config.every)
                if controller.config.signal == "adam":
                    v = {name: g / (moment(session, name).sqrt() + 1e-8) for name, g in v.items()}
            products, lengths = true_readings(reference, job, window, factors, v, controller.config.layers)
            norm = product(v, v) ** 0.5
            found["norms"].append(abs(controller.norm / norm - 1))
        totals, _ = run_window(
            session, window, collator, recipe.seed, lr_factor(step, steps, recipe.optimizer), False, factors, held_out
        )
        if held_out is not None:
            mine = torch.stack(held_out.readings())
            dist.all_reduce(mine)
            theirs = torch.tensor([products, lengths], dtype=torch.float64)
            found["gaps"].append((mine - theirs).abs() / torch.stack([theirs[1] * norm, theirs[1]]))
            found["sizes"].append(theirs[0] / (theirs[1] * norm))
        controller.after_window(window, factors, totals.task_loss, held_out)
        found["weights"].append(controller.weighting.weights.tolist())
    session.engine.destroy()
    return found


def moment(session: Session, name: str) -> Tensor:
    parameter = dict(session.model.named_parameters())[name]
    if session.stage == 0:
        return session.engine.optimizer.state[parameter]["exp_avg_sq"]
    return safe_get_full_optimizer_state(parameter, "exp_avg_sq")


def work(steps: str, *recipes: str) -> dict[str, Any]:
    return {path: compare(json.loads(Path(path).read_text()), int(steps)) for path in recipes}


if __name__ == "__main__":
    rank_main(work)
