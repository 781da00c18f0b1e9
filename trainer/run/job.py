"""Training a recipe: checked whole, then started, stage after stage.

Owns: `train` (what `sett train` does) and `run_on_this_rank` (what each rank does).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config import Recipe, load_recipe
from trainer.engine.deepspeed_json import resolve, stage
from trainer.engine.launch import Launch, run_ranks
from trainer.errors import ConfigError
from trainer.losses import compile_ahead
from trainer.run.directory import RECIPE, check_run, is_finished, open_recipe, open_run
from trainer.run.outcome import RESULTS
from trainer.run.prepare import Job, Progress
from trainer.run.stages import open_stages, prepare_stages
from trainer.run.weighing import readable

__all__ = ["RECIPE", "check_run", "is_finished", "open_recipe", "open_run", "run_on_this_rank", "train"]


def train(recipe: Recipe, launch: Launch | None = None, progress: Progress | None = None) -> Path:
    """Train a recipe, all its stages, or go on where its run directory stands.

    Everything that can be checked is checked, and all rows tokenised, before a process is started.

    Args:
        recipe: what to train.
        launch: where; the default is all GPUs of this machine, or one process without any.
        progress: called while tokenising with (text, done, total).

    Returns:
        The run directory; of a recipe with stages, that of the stage it has come to.

    Raises:
        SettError: see the parts.
    """
    launch = launch or Launch()
    world_size = launch.world_size()
    jobs = prepare_stages(recipe, lambda job: _check(job, world_size), progress)
    open_stages(recipe)
    run_dir = recipe.run_dir
    for number, job in enumerate(jobs, 1):
        run_dir = job.recipe.run_dir
        if recipe.stages:
            done = ", finished already" if _is_done(run_dir) else ""
            print(f"stage {number} of {len(jobs)}: {job.recipe.name}{done}", flush=True)
        compile_ahead(job.recipe.kernels, say=print)
        open_run(job.recipe)
        if not _is_done(run_dir):
            run_ranks(launch, [str(run_dir / RECIPE)])
        if not is_finished(run_dir):
            break  # stopped; the same command goes on here
    return run_dir


def _check(job: Job, world_size: int) -> None:
    check_run(job.recipe)
    config = resolve(job.recipe, world_size, hidden_size=job.hidden_size, device=_device())
    if job.by_step:
        job.planner(job.recipe.window.group or world_size)
    if job.held_out is not None:
        readable(job, world_size, stage(config))


def _is_done(run_dir: Path) -> bool:
    """Whether nothing is left to do: a run may be killed after its last checkpoint and before its results."""
    return is_finished(run_dir) and (run_dir / RESULTS).is_file()


def run_on_this_rank(path: str, overrides: Sequence[str]) -> None:
    """The whole run as one rank sees it; also the entry for `deepspeed --module trainer.worker`."""
    from trainer.engine.session import init_distributed
    from trainer.run.train import train_rank

    recipe = load_recipe(path, overrides)
    if recipe.stages:
        raise ConfigError(f"{path}: has stages, and each needs processes of its own: train it with `sett train`")
    rank, _, _ = init_distributed()
    if rank == 0:
        open_run(recipe)
    train_rank(recipe, recipe.run_dir)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
