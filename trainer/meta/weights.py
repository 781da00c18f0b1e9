"""From readings to weights: the simplex on which the tasks' weights live, and the rules that move them.

Owns: `Weighting` and its three rules. All of it is numpy on [T] numbers, the same on every rank, a pure function of
what it was given: no process group, no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import MetaConfig

Vector = NDArray[np.float64]

_LEAST = 1e-4
"""No weight falls below this share of an equal one: a task of weight 0 could never be read again."""

_ERRORS = 2.0
"""Standard errors within which a lead counts as noise. Means are averages over many windows, so that what is noise in
one update still stands in the next: less than two would let it pile up."""

_MOST = 1e6
"""An alignment beyond this is a broken one: a cosine is at most 1."""


@dataclass
class Readings:
    """Alignments of some micro-steps, sorted by task."""

    count: Vector
    """[T] how many."""
    total: Vector
    """[T] their sum."""
    squares: Vector
    """[T] the sum of their squares."""

    @classmethod
    def of(cls, tasks: NDArray[np.int64], values: Vector, size: int) -> Readings:
        """`values` [n] of `tasks` [n]; those that are not finite, or absurd, are left out."""
        good = np.abs(values) < _MOST  # False for NaN
        sums = [np.bincount(tasks[good], weights=w, minlength=size) for w in (None, values[good], values[good] ** 2)]
        return cls(*(np.asarray(s, np.float64) for s in sums))


class Weighting(ABC):
    """The weights of T tasks, which sum to 1."""

    def __init__(self, config: MetaConfig, names: list[str], steps: int) -> None:
        self.config = config
        self.end = names.index(config.end_task)
        self.steps = steps
        initial = np.array([config.initial.get(name, 1.0) for name in names])
        self.log_weights = np.log(np.maximum(initial / initial.sum(), _LEAST / len(names)))

    @property
    def weights(self) -> Vector:
        """[T] positive, summing to 1, the end task's at least `floor`."""
        shifted = np.exp(self.log_weights - self.log_weights.max())
        weights = np.maximum(shifted / shifted.sum(), _LEAST / len(shifted))
        weights /= weights.sum()
        floor = self.config.floor
        if weights[self.end] < floor and len(weights) > 1:
            others = 1.0 - weights[self.end]
            weights *= (1.0 - floor) / others
            weights[self.end] = floor
        return np.asarray(weights)

    @property
    def coefficients(self) -> Vector:
        """[T] what the mean losses of the tasks are multiplied by in the objective."""
        return self.weights

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers, which JSON writes without loss."""
        return {"log_weights": self.log_weights.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        self.log_weights = np.array(state["log_weights"], np.float64)

    def _move(self, change: Vector) -> None:
        """Exponentiated gradient: add to the log-weights; changes that are not finite are left out."""
        moved = self.log_weights + np.where(np.isfinite(change), change, 0.0)
        moved -= moved.max()
        # What the floor and the least weight hold back must not pile up behind them.
        self.log_weights = np.maximum(moved, np.log(_LEAST / len(moved)))

    @abstractmethod
    def update(self, windows: int) -> None:
        """Move the weights after `windows` windows."""


class Constant(Weighting):
    """Weights that stay: equal ones (MT-TARTAN), or those of the recipe."""

    def update(self, windows: int) -> None:
        pass


@dataclass(frozen=True)
class Estimate:
    """What is known of the tasks' alignments by now."""

    mean: Vector
    """[T] NaN where there is no reading."""
    error: Vector
    """[T] standard error of the mean; infinite below two readings."""


class Aligned(Weighting):
    """Tasks whose gradients agree with the held-out gradient gain weight (META-TARTAN; the update is DoGE's, too)."""

    def __init__(self, config: MetaConfig, names: list[str], steps: int) -> None:
        super().__init__(config, names, steps)
        zero = np.zeros(len(names))
        # Discounted sums: of readings, of their number, of squared discounts.
        self.count, self.total, self.squares, self.spread = zero.copy(), zero.copy(), zero.copy(), zero.copy()

    def observe(self, readings: Readings) -> None:
        """Take in readings of the same age."""
        self.count += readings.count
        self.total += readings.total
        self.squares += readings.squares
        self.spread += readings.count

    @property
    def estimate(self) -> Estimate:
        """Means and their standard errors, older readings discounted."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self.total / self.count
            variance = np.maximum(self.squares / self.count - mean**2, 0.0)
            effective = self.count**2 / self.spread
            error = np.sqrt(variance / (effective - 1.0))
        return Estimate(mean, np.where(effective > 1.0, error, np.inf))

    def update(self, windows: int) -> None:
        """Move log-weights by how far each task's alignment lies from the weighted mean of all."""
        now = self.estimate
        known = np.isfinite(now.mean)
        if known.sum() > 1:
            weights = np.where(known, self.weights, 0.0)
            lead = np.where(known, now.mean, 0.0)
            lead = np.where(known, lead - (weights * lead).sum() / weights.sum(), 0.0)
            self._move(
                self._paper(lead, windows) if self.config.rate != "auto" else self._beyond_noise(lead, now, windows)
            )
        keep = self.config.memory
        self.count, self.total, self.squares = keep * self.count, keep * self.total, keep * self.squares
        self.spread = keep**2 * self.spread

    def _paper(self, lead: Vector, windows: int) -> Vector:
        assert isinstance(self.config.rate, float)
        return self.config.rate * windows * lead

    def _beyond_noise(self, lead: Vector, now: Estimate, windows: int) -> Vector:
        """The part of each lead beyond two standard errors (positive-part James-Stein), by the spread of all leads."""
        known = np.isfinite(now.error)
        if not known.any():
            return np.zeros_like(lead)
        noise = np.where(known, _ERRORS * now.error, np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = np.where((lead == 0.0) | ~known, 0.0, lead * np.maximum(0.0, 1.0 - (noise / lead) ** 2))
        spread = np.sqrt((lead[known] ** 2 + noise[known] ** 2).mean())
        return np.asarray(
            self.config.strength * windows / self.steps * kept / spread if spread else np.zeros_like(lead)
        )

    def state(self) -> dict[str, Any]:
        sums = {name: getattr(self, name).tolist() for name in ("count", "total", "squares", "spread")}
        return {**super().state(), **sums}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        for name in ("count", "total", "squares", "spread"):
            setattr(self, name, np.array(state[name], np.float64))


@dataclass
class _Adam:
    """Adam on a handful of numbers."""

    first: Vector
    second: Vector
    step: int = 0
    betas: tuple[float, float] = field(default=(0.9, 0.999))

    def __call__(self, gradient: Vector, lr: float) -> Vector:
        self.step += 1
        a, b = self.betas
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * gradient**2
        return np.asarray(-lr * (self.first / (1 - a**self.step)) / (np.sqrt(self.second / (1 - b**self.step)) + 1e-8))


class Famo(Weighting):
    """FAMO (2306.03792): the log-losses of all tasks should fall alike; needs no gradient, knows no end task.

    The paper looks at the same batch again after the step. Here the change is that between the mean losses of two
    intervals of `every` windows: no extra forward, more noise.
    """

    LR, DECAY = 0.025, 1e-3

    def __init__(self, config: MetaConfig, names: list[str], steps: int) -> None:
        super().__init__(config, names, steps)
        zero = np.zeros(len(names))
        self.loss, self.count, self.before = zero.copy(), zero.copy(), np.full(len(names), np.nan)
        self.adam = _Adam(zero.copy(), zero.copy())

    @property
    def coefficients(self) -> Vector:
        """[T] weight / loss, scaled to sum to 1: the gradient of the weighted sum of log-losses."""
        known = np.isfinite(self.before)
        typical = np.exp(self.before[known].mean()) if known.any() else 1.0
        found = self.weights / np.where(known, np.exp(np.where(known, self.before, 0.0)), typical)
        return np.asarray(found / found.sum())

    def observe(self, loss: Vector, present: NDArray[np.int64]) -> None:
        """Mean losses [T] of a window's tasks, and how many rows of each there were."""
        good = np.isfinite(loss) & (present > 0)
        self.loss += np.where(good, loss, 0.0)
        self.count += good

    def update(self, windows: int) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            now = np.log(np.maximum(self.loss / self.count, 1e-8))
        change = self.before - now
        change = np.where(np.isfinite(change), change, 0.0)
        weights = self.weights
        gradient = weights * (change - (weights * change).sum())  # through the softmax
        self._move(self.adam(gradient + self.DECAY * self.log_weights, self.LR))
        self.before = np.where(np.isfinite(now), now, self.before)
        self.loss, self.count = np.zeros_like(self.loss), np.zeros_like(self.count)

    def state(self) -> dict[str, Any]:
        before = [None if np.isnan(x) else float(x) for x in self.before]
        adam = {"first": self.adam.first.tolist(), "second": self.adam.second.tolist(), "step": self.adam.step}
        return {**super().state(), "loss": self.loss.tolist(), "count": self.count.tolist(), "before": before, **adam}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.loss, self.count = np.array(state["loss"]), np.array(state["count"])
        self.before = np.array([np.nan if x is None else x for x in state["before"]])
        self.adam = _Adam(np.array(state["first"]), np.array(state["second"]), int(state["step"]))


def weighting(config: MetaConfig, names: list[str], steps: int) -> Weighting:
    """The rule that a recipe asks for; `steps` are the windows of the run."""
    kinds: dict[str, type[Weighting]] = {"alignment": Aligned, "famo": Famo}
    return kinds.get(config.weights, Constant)(config, names, steps)
