"""A dry run: what a recipe will do, before anything is paid for.

Owns: `make_plan`, `make_plans` and their printed form. Nothing is started; only the token cache is filled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from trainer.config import Recipe
from trainer.engine.deepspeed_json import resolve, stage
from trainer.engine.launch import Launch
from trainer.engine.schedule import warmup_steps
from trainer.model.multitask import ModelSizes, sizes
from trainer.run.memory import MemoryRow, estimate, render
from trainer.run.prepare import Job, Progress
from trainer.run.stages import prepare_stages
from trainer.run.weighing import readable
from trainer.window import Window


@dataclass(frozen=True)
class Plan:
    """What `sett plan` shows."""

    job: Job
    world_size: int
    deepspeed: dict[str, Any]
    sizes: ModelSizes
    memory: list[MemoryRow]
    epochs: NDArray[np.float64]
    """[T] epochs of each task the run goes through."""
    draws: NDArray[np.float64]
    """[T] expected draws of each task in a window."""
    windows: list[Window]
    readable: NDArray[np.float64] | None
    """[T] share of windows in which each task's gradient can be read; None where nothing is read."""


def make_plan(recipe: Recipe, launch: Launch | None = None, windows: int = 2, progress: Progress | None = None) -> Plan:
    """Check a recipe as `train` does and work out what it will do; of a recipe with stages, what the last one will.

    Raises:
        SettError: whatever `train` would raise before it starts a process.
    """
    return make_plans(recipe, launch, windows, progress)[-1]


def make_plans(
    recipe: Recipe, launch: Launch | None = None, windows: int = 2, progress: Progress | None = None
) -> list[Plan]:
    """The plan of every stage of a recipe; see `make_plan`."""
    launch = launch or Launch()
    return [_plan(job, launch, windows) for job in prepare_stages(recipe, progress=progress)]


def _plan(job: Job, launch: Launch, windows: int) -> Plan:
    recipe, world_size = job.recipe, launch.world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = resolve(recipe, world_size, hidden_size=job.hidden_size, device=device)
    planner = job.planner((recipe.window.group or world_size) if job.by_step else 1)
    measured = sizes(recipe, job.tasks)
    gpus = min(world_size, launch.num_gpus or torch.cuda.device_count() or world_size)
    return Plan(
        job,
        world_size,
        config,
        measured,
        estimate(measured.parameters, measured.largest_layer, world_size, gpus),
        planner.epochs_after(recipe.training.steps),
        planner.expected_draws(),
        [planner.window(step, world_size) for step in range(windows)],
        None if job.held_out is None else readable(job, world_size, stage(config)),
    )


def print_plan(recipe: Recipe, launch: Launch, windows: int, progress: Progress | None = None) -> None:
    """Print the plan of each stage: configuration, sizes, memory, tasks, windows."""
    console = Console()
    plans = make_plans(recipe, launch, windows, progress)
    for number, plan in enumerate(plans, 1):
        if recipe.stages:
            console.rule(f"stage {number} of {len(plans)}: {plan.job.recipe.name}", characters="=")
        _print(plan, console)


def _print(plan: Plan, console: Console) -> None:
    console.rule("recipe (defaults included)")
    console.print(yaml.safe_dump(plan.job.recipe.model_dump(mode="json"), sort_keys=False), highlight=False)
    console.rule("DeepSpeed JSON as it will be used")
    console.print(json.dumps(plan.deepspeed, indent=2), highlight=False)
    console.rule("model")
    _print_model(plan, console)
    render(plan.memory, console)
    console.rule("tasks")
    console.print(_tasks_table(plan))
    console.rule("windows")
    _print_steps(plan, console)
    if plan.readable is not None:
        _print_meta(plan, plan.readable, console)
    for window in plan.windows:
        console.print(_window_table(plan, window))


def _print_model(plan: Plan, console: Console) -> None:
    measured = plan.sizes
    console.print(
        f"{plan.job.facts.kind}: {measured.parameters / 1e6:,.1f} M parameters, the largest layer "
        f"{measured.largest_layer / 1e6:,.2f} M, hidden size {measured.hidden_size}; "
        f"the packed head has {plan.job.heads.rows} rows in {len(plan.job.heads.heads)} heads"
    )


def _print_steps(plan: Plan, console: Console) -> None:
    recipe = plan.job.recipe
    micro = recipe.window.micro_batches // plan.world_size
    console.print(
        f"{recipe.training.steps} windows of {recipe.window.micro_batches} micro-batches: {plan.world_size} "
        f"rank{'s' if plan.world_size > 1 else ''} x {micro} micro-step{'s' if micro > 1 else ''}, at most "
        f"{recipe.window.tokens} tokens each; warm-up {warmup_steps(recipe.optimizer, recipe.training.steps)} windows"
    )


def _print_meta(plan: Plan, readable: NDArray[np.float64], console: Console) -> None:
    job, config, held_out = plan.job, plan.job.recipe.meta, plan.job.held_out
    assert config is not None
    assert held_out is not None
    tokens = min(config.held_out.batch or len(held_out), len(held_out)) * float(np.mean(held_out.column("length")))
    window = job.recipe.window.micro_batches * job.recipe.window.tokens
    # A refresh is two forwards and a backward where training is one of each, and a backward costs two forwards.
    more = 4 / 3 * tokens / window / config.every
    seldom = [f"{name} {100 * r:.0f} %" for name, r in zip(job.names, readable, strict=True) if r < 1]
    console.print(
        f"weights by {config.weights} for {config.end_task}: {len(held_out)} held-out rows, a refresh every "
        f"{config.every} windows (about {100 * more:.1f} % of the work); "
        + (f"windows in which a task can be read: {', '.join(seldom)}" if seldom else "every task can be read in all")
    )


def _tasks_table(plan: Plan) -> Table:
    table = Table(
        "task", "family", "train", "dev", "share of examples", "draws a window", "epochs", "truncated", "padded length"
    )
    job = plan.job
    for i, (task, train, dev) in enumerate(zip(job.tasks, job.train, job.dev, strict=True)):
        lengths = train.column("length")
        truncated = float(np.mean(train.column("truncated")))
        table.add_row(
            task.name,
            task.family.value,
            f"{len(train):,}",
            f"{len(dev):,}",
            f"{100 * job.shares[i]:.2f} %",
            f"{plan.draws[i]:.2f}",
            f"{plan.epochs[i]:.2f}",
            f"{100 * truncated:.1f} %" if truncated else "",
            f"{int(np.median(lengths))} median, {int(lengths.max())} most",
        )
    return table


def _window_table(plan: Plan, window: Window) -> Table:
    table = Table("micro-step", "rank", "tokens", "rows", "tasks", title=f"window {window.step}", title_justify="left")
    for k, micro_step in enumerate(window.micro_steps):
        for rank, batch in enumerate(micro_step):
            names, counts = np.unique(batch.tasks, return_counts=True)
            tasks = ", ".join(f"{plan.job.names[t]} {n}" for t, n in zip(names, counts, strict=True))
            table.add_row(str(k), str(rank), str(batch.tokens), str(len(batch.rows)), tasks)
    return table
