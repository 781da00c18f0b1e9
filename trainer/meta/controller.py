"""When the held-out gradient is made anew, what is read against it, and when the weights move.

Owns: `Controller`: one run's way of weighing its tasks, with all its state. Every rank calls it at the same places and
comes to the same weights.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.schema import MetaConfig
from trainer.engine.alignment import HeldOutGradient, held_out_gradient
from trainer.engine.session import Session
from trainer.meta.held_out import HeldOut
from trainer.meta.weights import Aligned, Famo, Readings, Vector, Weighting
from trainer.model.layers import layer_parameters
from trainer.window import MicroBatch, Planner, Pool, Window
from trainer.window.planner import Phase

_EPS = 1e-8
"""Added to the root of Adam's second moment."""

_LEAST_NORM = 1e-9
"""Below this a held-out gradient is rounding."""


class Controller:
    """The weights of the tasks while a run goes on.

    Args:
        session: the engine.
        config: of the method.
        names: of the tasks.
        pools: of the tasks, for the units of micro-batches.
        shares: [T] expected share of each task among a window's examples.
        weighting: the rule.
        held_out: the end task's held-out rows, which only rule `alignment` needs.
    """

    def __init__(
        self, session: Session, config: MetaConfig, names: list[str], pools: list[Pool], shares: Vector,
        weighting: Weighting, held_out: HeldOut | None,
    ) -> None:  # fmt: skip
        self.session = session
        self.config = config
        self.names = names
        self.pools = pools
        self.shares = shares
        self.phase: Phase | None = None
        self.weighting = weighting
        self.held_out = held_out
        self.gradient: HeldOutGradient | None = None
        if held_out is not None:
            self.gradient = held_out_gradient(session, layer_parameters(session.model, config.layers))
        self.norm = 0.0
        self._moved = True  # sampling starts with the rule's own weights
        self._log: dict[str, float] = {}

    def factors(self) -> Vector:
        """[T] what each task's loss is multiplied by. But for `importance`, the expected loss of a window is then the
        sum of coefficient x mean loss of the task, however often each is drawn."""
        if self.config.action == "loss":
            return np.asarray(self.weighting.coefficients / self.shares)
        drawn = self.shares if self.phase is None else np.array(self.phase.shares)
        return np.asarray(self.shares / drawn) if self.config.importance else np.ones_like(drawn)

    def planner(self, planner: Planner, step: int) -> Planner:
        """The planner of window `step` and those after it, once the windows before it are done."""
        if self.config.action == "loss":
            return planner
        if self._moved:
            self.phase, self._moved = planner.phase(step, self.weighting.coefficients), False
            return planner.entering(self.phase)
        return planner

    def resumed(self, planner: Planner) -> Planner:
        """The planner that a checkpoint was written with."""
        return planner if self.phase is None else planner.entering(self.phase)

    def before_window(self, step: int) -> HeldOutGradient | None:
        """Make the held-out gradient anew where that is due.

        Returns:
            What the window's gradients are to be read against; None if nothing is to be read.
        """
        gradient = self.gradient
        if self.held_out is None or gradient is None:
            return None
        due = self.due(step)
        if due:
            self._refresh(self.held_out, gradient, step)
        return gradient if gradient.ready and (due or self.config.read == "every") else None

    def due(self, step: int) -> bool:
        """Whether the held-out gradient is made anew before window `step`."""
        first = 1 if self.config.signal == "adam" else 0  # AdamW has no second moment before its first step
        return step == first or (step > first and step % self.config.every == 0)

    def _refresh(self, held_out: HeldOut, gradient: HeldOutGradient, step: int) -> None:
        seen = held_out.refresh(step // self.config.every, gradient)
        scaled = self.config.signal != "adam" or gradient.precondition(_EPS)
        norm = gradient.norm()
        # Next to zero: no row can be told better. Not finite: a broken forward, which training will report.
        gradient.ready = scaled and bool(np.isfinite(norm)) and norm > _LEAST_NORM
        self.norm = norm if gradient.ready else 0.0
        skipped = self._log.get("meta/skipped", 0.0) + float(not gradient.ready)
        found = {"held_out_loss": seen.loss, "held_out_norm": seen.norm, "dev_head_accuracy": seen.accuracy}
        self._log = {f"meta/{key}": v for key, v in found.items() if v is not None and np.isfinite(v)}
        self._log["meta/skipped"] = skipped

    def after_window(self, window: Window, factors: Vector, task_loss: Tensor, read: HeldOutGradient | None) -> None:
        """Take in what a window showed, and move the weights where that is due.

        Args:
            window: the window.
            factors: [T] that its losses were multiplied by.
            task_loss: [T] this rank's parts of its loss, by task.
            read: what `before_window` gave.
        """
        rule = self.weighting
        if isinstance(rule, Aligned) and read is not None:
            rule.observe(self._readings(window, factors, read))
        elif isinstance(rule, Famo):
            rule.observe(*self._losses(window, factors, task_loss))
        else:
            return
        if (window.step + (self.config.read == "every")) % self.config.every == 0:
            rule.update(self.config.every)
            self._moved = True

    def values(self) -> dict[str, float]:
        """Flat numbers for the log."""
        found = {f"weight/{n}": float(w) for n, w in zip(self.names, self.weighting.weights, strict=True)}
        if isinstance(self.weighting, Aligned):
            now = self.weighting.estimate
            for name, mean, error in zip(self.names, now.mean, now.error, strict=True):
                found |= {f"alignment/{name}": float(mean), f"alignment_error/{name}": float(error)}
        return {key: value for key, value in {**found, **self._log}.items() if np.isfinite(value)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `shards`; the same on every rank."""
        ready = self.gradient is not None and self.gradient.ready
        phase = None if self.phase is None else asdict(self.phase)
        own = {"norm": self.norm, "ready": ready, "log": self._log, "phase": phase, "moved": self._moved}
        return {**own, "weighting": self.weighting.state()}

    def load(self, state: dict[str, Any], shards: list[Tensor]) -> None:
        """Go on from a checkpoint."""
        self.norm, self._log, self._moved = state["norm"], dict(state["log"]), state["moved"]
        self.phase = None if state["phase"] is None else Phase(**state["phase"])
        self.weighting.load(state["weighting"])
        if self.gradient is not None:
            self.gradient.load(shards, state["ready"])

    def shards(self) -> list[Tensor]:
        """This rank's part of the held-out gradient; nothing where the next window makes it anew."""
        return [] if self.gradient is None else self.gradient.pieces()

    def _readings(self, window: Window, factors: Vector, read: HeldOutGradient) -> Readings:
        """Alignments of the window's micro-steps, or micro-batches, that hold one task."""
        mine = torch.cat(read.readings())
        gathered = [torch.empty_like(mine) for _ in range(self.session.world_size)]
        dist.all_gather(gathered, mine)
        products, lengths = np.split(torch.stack(gathered).cpu().numpy(), 2, axis=1)  # [R, K] each
        unit_weights = window.unit_weights() * factors
        tasks, found = [], []
        for k, micro_step in enumerate(window.micro_steps):
            for ranks in alone(micro_step, read.by_rank):
                task = int(micro_step[ranks[0]].tasks[0])
                units = sum(self._units(micro_step[rank]) for rank in ranks)
                tasks.append(task)
                found.append((products[ranks, k].sum(), lengths[ranks, k].sum(), unit_weights[task] * units))
        product, length, share = np.array(found, np.float64).reshape(-1, 3).T
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.config.signal != "cosine" and len(share):
                # Of mean losses, by one length for all tasks: the numbers have no unit, and steep tasks count more.
                length = share * np.mean(length / share)
            alignment = product / (self.norm * length)
        return Readings.of(np.array(tasks, np.int64), alignment, len(self.names))

    def _units(self, micro: MicroBatch) -> int:
        return int(self.pools[int(micro.tasks[0])].units[micro.rows].sum())

    def _losses(self, window: Window, factors: Vector, task_loss: Tensor) -> tuple[Vector, NDArray[np.int64]]:
        """[T] mean losses of the window's tasks over all ranks, and which tasks were there."""
        total = self.session.all_sum(task_loss.clone()).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            return total / (window.unit_weights() * window.units * factors), window.rows


def alone(micro_step: tuple[MicroBatch, ...], by_rank: bool) -> list[list[int]]:
    """Groups of ranks whose gradients, together, are one task's."""
    held = [set(micro.tasks.tolist()) for micro in micro_step]
    if len(set().union(*held)) == 1:
        return [list(range(len(held)))]
    return [[rank] for rank, tasks in enumerate(held) if len(tasks) == 1] if by_rank else []
