"""The main job on one rank: train on many tasks at once, with evaluation, checkpoints and logs.

Owns: the loop. `launch.py` starts it on every rank; `step.py` holds the one optimizer step it repeats.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import Collator
from trainer.config.schema import Heterogeneity, Recipe
from trainer.engine.checkpoint import Checkpoints, RunState, newest
from trainer.engine.schedule import lr_factor, shake_at
from trainer.engine.session import Session, init_distributed, start
from trainer.engine.step import Totals, run_window
from trainer.engine.stop import StopFlag
from trainer.errors import ConfigError
from trainer.meta import Controller
from trainer.metrics.log import MetricsLog
from trainer.metrics.progress import Progress
from trainer.run.environment import write_environment
from trainer.run.evaluate import Evaluation, evaluate
from trainer.run.export import export_run
from trainer.run.init_from import begin_from
from trainer.run.outcome import write_outcome
from trainer.run.prepare import Job, prepare_together
from trainer.run.weighing import controller_of
from trainer.window import Window


@dataclasses.dataclass
class Loop:
    """A run between two windows: everything the loop reads and changes."""

    job: Job
    session: Session
    checkpoints: Checkpoints
    log: MetricsLog | None
    progress: Progress
    state: RunState
    controller: Controller | None


def train_rank(recipe: Recipe, run_dir: Path) -> None:
    """Train to the end, or go on from the newest checkpoint of `run_dir`; every rank calls it.

    Raises:
        SettError: see the parts; raised on every rank alike.
    """
    rank, world_size, _ = init_distributed()
    job = prepare_together(recipe, rank)
    if recipe.window.micro_batches % world_size:
        raise ConfigError(
            f"window.micro_batches: {recipe.window.micro_batches} cannot be shared evenly by {world_size} ranks"
        )
    begin = begin_from(recipe) if newest(run_dir) is None else None
    session = start(recipe, job.tasks, run_dir, job.random_weights, begin=begin)
    write_environment(run_dir, session)
    checkpoints = Checkpoints(run_dir, recipe.checkpoint.keep_last, recipe.checkpoint.keep_best)
    controller = controller_of(job, session)
    state, resumed = _restore(recipe, session, checkpoints, run_dir, controller)
    log = MetricsLog(run_dir, session.engine.monitor) if session.is_first else None
    progress = Progress(recipe.training.steps, state.step, recipe.training.log_every, enabled=session.is_first)
    loop = Loop(job, session, checkpoints, log, progress, state, controller)
    with progress, StopFlag() as stop:
        if resumed:
            progress.message(f"resuming at window {state.step} from {checkpoints.path(state.step)}")
            if log is not None:
                log.truncate_after(state.step)
        elif recipe.evaluation.before:
            _evaluate(loop, "before training")
        _run(loop, stop)
    if log is not None:
        log.close()
    if session.is_first and loop.state.finished:
        write_outcome(job, run_dir)
        export_run(run_dir, recipe.checkpoint.export)


def _restore(
    recipe: Recipe, session: Session, checkpoints: Checkpoints, run_dir: Path, controller: Controller | None
) -> tuple[RunState, bool]:
    step = newest(run_dir)
    if step is not None:
        state = checkpoints.load(session, step)
        if controller is not None and state.meta is not None:
            controller.load(state.meta, checkpoints.held_out(step, session.rank))
        return state, True
    by_step = recipe.window.heterogeneity is Heterogeneity.STEP
    group = (recipe.window.group or session.world_size) if by_step else 1
    return RunState(0, session.world_size, session.stage, group), False


def _run(loop: Loop, stop: StopFlag) -> None:
    """Window after window, until the last one, early stopping or a signal."""
    recipe, session = loop.job.recipe, loop.session
    steps = recipe.training.steps
    controller = loop.controller
    planner = loop.job.planner(loop.state.group)
    planner = planner if controller is None else controller.resumed(planner)
    collator = loop.job.collator(loop.job.train)
    meter = Meter(loop.job, session)
    while loop.state.step < steps and not loop.state.finished:
        planner = planner if controller is None else controller.planner(planner, loop.state.step)
        window = planner.window(loop.state.step, session.world_size)
        factor = lr_factor(window.step, steps, recipe.optimizer)
        began = time.monotonic()
        totals, stopping, factors = _weighed_window(loop, window, collator, factor, stop.raised)
        loop.state = dataclasses.replace(loop.state, step=window.step + 1)
        meter.add(window, totals, factors, time.monotonic() - began)
        _report(loop, meter)
        evaluated = _due(loop.state.step, recipe.evaluation.every, steps) and _evaluate(loop)
        loop.state = dataclasses.replace(loop.state, finished=loop.state.finished or loop.state.step == steps)
        best = evaluated and recipe.checkpoint.keep_best and loop.state.best_step == loop.state.step
        if best or stopping or loop.state.finished or _due(loop.state.step, recipe.checkpoint.every, 0):
            _save(loop)
        if stopping and not loop.state.finished:
            loop.progress.message(f"stopped after window {loop.state.step}; run the same command to go on")
            return


def _weighed_window(
    loop: Loop, window: Window, collator: Collator, lr: float, stop: bool
) -> tuple[Totals, bool, NDArray[np.float64]]:
    """A window with the weights its tasks have by now, and what it shows about them."""
    controller, recipe, seed = loop.controller, loop.job.recipe, loop.job.recipe.seed
    shake = shake_at(window.step, recipe.training.steps, recipe.loss.r3f)
    if controller is None:
        totals, stopping = run_window(loop.session, window, collator, seed, lr, stop, shake=shake)
        return totals, stopping, np.ones(len(loop.job.tasks))
    held_out = controller.before_window(window.step)
    factors = controller.factors()
    totals, stopping = run_window(loop.session, window, collator, seed, lr, stop, factors, held_out, shake)
    controller.after_window(window, factors, totals.task_loss, held_out)
    return totals, stopping, factors


def _save(loop: Loop) -> None:
    controller = loop.controller
    if controller is not None:
        loop.state = dataclasses.replace(loop.state, meta=controller.state())
    loop.checkpoints.save(loop.session, loop.state, () if controller is None else controller.shards())


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _evaluate(loop: Loop, when: str = "") -> bool:
    """Evaluate, log, and note in the state whether this is the best so far."""
    evaluation = evaluate(loop.session, loop.job, loop.job.dev, loop.progress.evaluating)
    step = loop.state.step
    if loop.log is not None:
        loop.log.write(step, evaluation.flat())
    mean = evaluation.mean()
    shown = "" if mean is None else f"mean dev metric {100 * mean:.2f} %"
    loop.progress.message(f"evaluation {when or f'at window {step}'}: {shown}")
    loop.state = _judge(loop.job.recipe, loop.state, evaluation)
    return True


def _judge(recipe: Recipe, state: RunState, evaluation: Evaluation) -> RunState:
    """Best so far, and early stopping."""
    config = recipe.early_stopping
    value = evaluation.watched(config.watch)
    if state.step == 0:  # the untrained model is a baseline, not a candidate
        return state
    if state.best_step < 0 or value > state.best_value + config.min_delta:
        return dataclasses.replace(state, best_step=state.step, best_value=value, waited=0)
    waited = state.waited + 1
    return dataclasses.replace(state, waited=waited, finished=0 < config.patience <= waited)


def _report(loop: Loop, meter: Meter) -> None:
    """Progress and log lines. The sums over ranks are collective: every rank comes here at the same windows."""
    step, config = loop.state.step, loop.job.recipe.training
    if step % config.log_every and step != config.steps:
        return
    values = meter.read()
    if loop.controller is not None:
        values |= loop.controller.values()
    loop.progress.update(step, values["train/loss"], values["train/tokens_per_second"], values["train/padding"])
    if loop.log is not None:
        loop.log.write(step, values)


class Meter:
    """Sums over the windows since the last reading, and what they come to over all ranks."""

    def __init__(self, job: Job, session: Session) -> None:
        self.job = job
        self.session = session
        self.weights = torch.tensor([job.recipe.loss.weights.get(n, 1.0) for n in job.names], dtype=torch.float64)
        self._reset()

    def _reset(self) -> None:
        tasks = len(self.job.tasks)
        self.totals = Totals.zero(tasks, self.session.device)
        self.share = torch.zeros(tasks, dtype=torch.float64)
        self.rows = torch.zeros(tasks, dtype=torch.float64)
        self.windows = 0
        self.seconds = 0.0

    def add(self, window: Window, totals: Totals, factors: NDArray[np.float64], seconds: float) -> None:
        """Add a window: its plan, what this rank ran of it, the factors [T] on its losses, and the seconds it took
        (evaluation not counted)."""
        self.seconds += seconds
        self.totals.task_loss += totals.task_loss
        self.totals.r3f += totals.r3f
        self.totals.real_tokens += totals.real_tokens
        self.totals.padded_tokens += totals.padded_tokens
        rows = torch.from_numpy(window.rows).double()
        self.share += rows / rows.sum() * torch.from_numpy(factors)
        self.rows += rows
        self.windows += 1

    def read(self) -> dict[str, float]:
        """Flat numbers for the log, over all ranks; starts the next reading."""
        seconds = self.seconds
        counts = [float(self.totals.real_tokens), float(self.totals.padded_tokens)]
        parts = [self.totals.task_loss, self.totals.r3f.view(1), self.totals.task_loss.new_tensor(counts)]
        sums = self.session.all_sum(torch.cat(parts)).cpu()
        task_loss, (r3f, real, padded) = sums[:-3], sums[-3:].tolist()
        values = {
            "train/loss": float(task_loss.sum()) / self.windows,
            "train/grad_norm": self.session.gradient_norm(),
            "train/tokens_per_second": real / seconds,
            "train/padding": 1.0 - real / padded,
            "train/seconds_per_window": seconds / self.windows,
            **_learning_rates(self.session),
            **_memory(self.session.device),
        }
        if self.job.recipe.loss.r3f is not None:
            values["train/r3f"] = r3f / self.windows
        for i, name in enumerate(self.job.names):
            if self.rows[i] and self.weights[i]:
                values[f"train/loss/{name}"] = float(task_loss[i] / (self.share[i] * self.weights[i]))
            values[f"share/{name}"] = float(self.rows[i] / self.rows.sum())
        self._reset()
        return values


def _learning_rates(session: Session) -> dict[str, float]:
    rates = session.learning_rates()
    values = {"train/lr": rates["body"]} if "body" in rates else {}
    return {**values, "train/lr_heads": rates["heads"]} if "heads" in rates else values


def _memory(device: torch.device) -> dict[str, float]:
    """GiB in use by this process: peak on the GPU, resident on the host."""
    import psutil

    values = {"memory/host_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        values["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return values
