"""A window is planned before it is run.

Owns: `Planner`, a pure function (seed, step, mixture) -> `Window`: which examples each of the K x R micro-batches of
an optimizer step holds, and the denominators of its loss. It keeps no state: skipping to a step is calling it.

Which examples a window holds depends on `micro_batches` alone, not on how the ranks R and micro-steps K share them, so
another number of GPUs gives the same global batch. (Under `step` it also depends on `group`, fixed at the first start.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import Heterogeneity, WindowConfig
from trainer.errors import ConfigError
from trainer.window.balance import balanced_cuts
from trainer.window.counts import CountTree
from trainer.window.hashing import mix, name_key
from trainer.window.parcels import Parcels
from trainer.window.rows import ROW_PARCELS, Draw, RowWindows

Indices = NDArray[np.int64]

_PHASE = 21  # salt


@dataclass(frozen=True)
class Pool:
    """What the planner needs to know of one task's training rows."""

    name: str
    lengths: NDArray[np.int32]
    """[n] tokens of each row's longest sequence."""
    counts: NDArray[np.int32]
    """[n] sequences of each row."""
    units: NDArray[np.int64]
    """[n] what the row adds to its task's denominator: 1, or the target tokens of a language-modelling row."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank runs in one forward and backward."""

    index: int
    """Place in the window, independent of ranks: seeds dropout, so that it does not depend on the world size."""
    tasks: Indices
    """[B] task of each row."""
    rows: Indices
    """[B] row of each example in its task's training rows."""
    epochs: Indices
    """[B] epoch of its task each row is drawn in (dynamic masking depends on it)."""
    tokens: int
    """Tokens of the micro-batch, padding included."""


@dataclass(frozen=True)
class Window:
    """One optimizer step."""

    step: int
    micro_steps: tuple[tuple[MicroBatch, ...], ...]
    """K micro-steps of R micro-batches: `micro_steps[k][rank]`."""
    rows: Indices
    """[T] examples of each task in the window."""
    units: Indices
    """[T] units (rows or target tokens) of each task in the window."""

    def unit_weights(self) -> NDArray[np.float64]:
        """[T] weight of one unit of each task: each example of the window counts alike, and inside a task the loss
        is a mean over units. 0 for tasks that are absent."""
        share = self.rows / self.rows.sum()
        weights: NDArray[np.float64] = np.divide(share, self.units, out=np.zeros(len(share)), where=self.units > 0)
        return weights


@dataclass(frozen=True)
class Phase:
    """Other shares of the tasks from some window on; plain numbers, for checkpoints."""

    start: int
    """Its first window."""
    drawn: list[int]
    """[T] parcels of each task in all windows before."""
    shares: list[float]
    """[T] expected share of each task among examples."""


class Planner:
    """Plans any window of a run.

    Args:
        pools: the tasks, in the order of task indices.
        shares: [T] expected share of each task among examples (`mixture.example_shares`).
        config: window size, token budget, heterogeneity.
        seed: of the run.
        group: micro-batches that share a task; 1 unless heterogeneity is `step`.
        together: let the ranks of a micro-step hold the same task where that can be had without other rows.
    """

    def __init__(
        self, pools: Sequence[Pool], shares: NDArray[np.float64], config: WindowConfig, seed: int, group: int = 1,
        together: bool = False,
    ) -> None:  # fmt: skip
        self.pools = list(pools)
        self.config = config
        self.together = together
        self.group = group if config.heterogeneity is Heterogeneity.STEP else 1
        if config.micro_batches % self.group:
            raise ConfigError(
                f"window.micro_batches: {config.micro_batches} is not a multiple of window.group ({self.group})"
            )
        by_row = config.heterogeneity is Heterogeneity.ROW
        budget = max(1, config.tokens // ROW_PARCELS) if by_row else config.tokens
        self.parcels = [Parcels(p.lengths, p.counts, budget, int(mix(seed, name_key(p.name))), by_row) for p in pools]
        # A draw is a parcel, and parcels of short rows hold more of them: dividing by the mean makes the expected
        # share of *examples* what the rule says.
        draw = self._draws(shares)
        self.seed = seed
        self._start, self._drawn = 0, np.zeros(len(self.pools), np.int64)
        self._rows = None
        if by_row:
            sizes = [(p.lengths, p.counts) for p in pools]
            self._rows = RowWindows(self.parcels, sizes, draw, config.micro_batches, config.tokens, seed)
        self.tree = self._rows.tree if self._rows else CountTree(draw, config.micro_batches // self.group, seed)

    def _draws(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """[T] expected share of each task among parcels."""
        draw = shares / np.array([p.mean_rows for p in self.parcels])
        return np.asarray(draw / draw.sum())

    def phase(self, start: int, shares: NDArray[np.float64]) -> Phase:
        """The plan's tasks have `shares` from window `start` on, each going on with its next parcel."""
        return Phase(start, self._before(start).tolist(), shares.tolist())

    def entering(self, phase: Phase) -> Planner:
        """The planner of the windows of `phase`. Not for `row` windows, whose rows are planned by the cycle."""
        assert self._rows is None
        planner = copy.copy(self)
        # Another seed: a phase is short, and the first windows of a tree favour the same tasks every time.
        seed = int(mix(self.seed, _PHASE, phase.start))
        planner.tree = CountTree(self._draws(np.array(phase.shares)), self.tree.draws, seed)
        planner._start, planner._drawn = phase.start, np.array(phase.drawn, np.int64)
        return planner

    def _before(self, step: int) -> Indices:
        return np.asarray(self._drawn + self.tree.before(step - self._start) * self.group)

    def expected_draws(self) -> NDArray[np.float64]:
        """[T] expected draws of each task in a window."""
        return np.asarray(self.tree.probabilities * self.tree.draws)

    def epochs_after(self, steps: int) -> NDArray[np.float64]:
        """[T] epochs of each task that `steps` windows go through."""
        drawn = self.tree.before(steps) * self.group
        return np.asarray(drawn / np.array([len(p) for p in self.parcels]), np.float64)

    def window(self, step: int, world_size: int) -> Window:
        """Plan optimizer step `step` (from 0) for `world_size` ranks."""
        drawn = self._draw(step) if self._rows is None else self._mix_rows(self._rows.at(step))
        rows = np.zeros(len(self.pools), np.int64)
        units = np.zeros(len(self.pools), np.int64)
        for batch in drawn:
            np.add.at(rows, batch.tasks, 1)
            for task in np.unique(batch.tasks):
                units[task] += self.pools[task].units[batch.rows[batch.tasks == task]].sum()
        return Window(step, self._arrange(drawn, step, world_size), rows, units)

    def _draw(self, step: int) -> list[MicroBatch]:
        before, counts = (number * self.group for number in self.tree.span(step - self._start))
        before = before + self._drawn
        drawn: list[MicroBatch] = []
        for task in np.flatnonzero(counts).tolist():
            for rows, epoch in self.parcels[task].run(int(before[task]), int(counts[task])):
                same = np.full((2, len(rows)), [[task], [epoch]], np.int64)
                drawn.append(self._batch(len(drawn), same[0], rows, same[1]))
        return drawn

    def _batch(self, index: int, tasks: Indices, rows: Indices, epochs: Indices) -> MicroBatch:
        lengths, counts = self._sizes(tasks, rows)
        return MicroBatch(index, tasks, rows, epochs, int(lengths.max() * counts.sum()))

    def _sizes(self, tasks: Indices, rows: Indices) -> tuple[Indices, Indices]:
        lengths, counts = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for task in np.unique(tasks):
            mine = tasks == task
            lengths[mine] = self.pools[task].lengths[rows[mine]]
            counts[mine] = self.pools[task].counts[rows[mine]]
        return lengths, counts

    def _mix_rows(self, draws: list[Draw]) -> list[MicroBatch]:
        """Deal the window's rows, longest first, onto its micro-batches so that the fullest is as small as possible."""
        sizes = [len(draw.rows) for draw in draws]
        tasks = np.repeat([draw.task for draw in draws], sizes)
        epochs = np.repeat([draw.epoch for draw in draws], sizes)
        rows, lengths, counts = (
            np.concatenate(parts) for parts in zip(*((d.rows, d.lengths, d.counts) for d in draws), strict=True)
        )
        order = np.lexsort((-counts, -lengths))
        cuts = balanced_cuts(lengths[order], counts[order], self.config.micro_batches)
        return [self._batch(i, tasks[part], rows[part], epochs[part]) for i, part in enumerate(np.split(order, cuts))]

    def _arrange(self, drawn: list[MicroBatch], step: int, world_size: int) -> tuple[tuple[MicroBatch, ...], ...]:
        """Group micro-batches of like cost into micro-steps, so that the ranks of one finish together."""
        if len(drawn) % world_size:
            raise ConfigError(
                f"window.micro_batches: {len(drawn)} micro-batches cannot be shared evenly by {world_size} ranks"
            )
        if self.group > 1:  # a group shares its task and stays together: its micro-batches are drawn in a row
            if self.group % world_size:
                raise ConfigError(f"window.group: {self.group} is not a multiple of the {world_size} ranks")
            ordered = drawn
        else:
            ordered = sorted(drawn, key=lambda b: (-b.tokens, b.index))
            if self.together:
                ordered = _by_task(ordered, world_size)
        steps = [tuple(ordered[k : k + world_size]) for k in range(0, len(ordered), world_size)]
        # Without a shuffle the longest texts would always come first; harmless for the sum, bad for reading logs.
        shuffled = np.argsort(mix(self.tree.seed, step, np.arange(len(steps))))
        return tuple(steps[i] for i in shuffled)


def _by_task(batches: list[MicroBatch], size: int) -> list[MicroBatch]:
    """As many groups of `size` micro-batches of one task as there are, in the given order, and then the others."""
    tasks = [int(batch.tasks[0]) for batch in batches]
    whole, rest = [], []
    for task in dict.fromkeys(tasks):
        mine = [batch for batch, its in zip(batches, tasks, strict=True) if its == task]
        cut = len(mine) // size * size
        whole += mine[:cut]
        rest += mine[cut:]
    return whole + sorted(rest, key=lambda b: (-b.tokens, b.index))
