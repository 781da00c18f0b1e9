"""Which draws meet in a `row` window, so that its rows fall into few narrow bands of length.

Owns: `RowWindows`, and how many draws a `row` window has. It holds many tasks at once, so at random it would hold all
lengths at once, and few micro-batches to keep them apart. Windows are therefore planned by the *cycle*, some tens of
micro-batches. How many draws of a task each window gets is what the tree of counts says, give or take
`exchange.SLACK`; which of the task's draws of the cycle these are is chosen to suit the window's other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from trainer.window.balance import balanced_cuts
from trainer.window.counts import CountTree
from trainer.window.exchange import exchange
from trainer.window.hashing import mix
from trainer.window.parcels import Parcels

ROW_PARCELS = 8
"""Under `row`, tasks are drawn in parcels of this fraction of a micro-batch."""
_CYCLE = 64
"""Micro-batches of a cycle, about: as many bands of length are told apart."""
_ROUNDS = 3
"""How often draws are dealt to windows, each time towards the bands that the windows had the last time."""
_TOO_LONG = 2
"""How much worse it is that a draw is too long for a band than too short: it pads all the others."""
_CHECKED = 2
"""Cycles in which every window has to keep the budget before a number of draws is accepted."""
_SPREADS = 3
"""And this many standard deviations of their loads have to be left, where exchanges do not see to it that all fit."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """One parcel of a window."""

    task: int
    epoch: int
    rows: Indices
    """[B] rows of the task."""
    lengths: Indices
    """[B] tokens of each row's longest sequence."""
    counts: Indices
    """[B] sequences of each row."""


class RowWindows:
    """The draws of every window of a run.

    Args:
        parcels: [T] of each task.
        sizes: [T] lengths and counts of each task's rows.
        probabilities: [T] of a draw.
        micro_batches: of a window.
        tokens: budget of a micro-batch; that of the largest row if it is larger.
        seed: of the run.

    Attributes:
        tree: how many draws each window gets of each task.
        windows: of a cycle.
    """

    def __init__(
        self,
        parcels: Sequence[Parcels],
        sizes: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
        probabilities: NDArray[np.float64],
        micro_batches: int,
        tokens: int,
        seed: int,
    ) -> None:
        self.parcels = parcels
        self.sizes = [(lengths.astype(np.int64), counts.astype(np.int64)) for lengths, counts in sizes]
        self.micro_batches = micro_batches
        self.tokens = max(tokens, *(int((lengths * counts).max()) for lengths, counts in self.sizes))
        self._levels = max(0, (_CYCLE // micro_batches).bit_length() - 1)
        self.windows = 1 << self._levels
        self._cycle = lru_cache(maxsize=_CHECKED)(self._plan)  # saves time, and changes nothing
        self._fit(probabilities, seed)

    def at(self, step: int) -> list[Draw]:
        """The draws of window `step`, by task."""
        cycle, inside = divmod(step, self.windows)
        return self._cycle(cycle)[inside]

    def _fit(self, probabilities: NDArray[np.float64], seed: int) -> None:
        """Choose how many draws a window has: as many as keep its micro-batches within the budget."""
        draws = self.micro_batches * ROW_PARCELS
        while True:
            self.tree = CountTree(probabilities, draws, seed)
            self._cycle.cache_clear()
            planned = [window for cycle in range(_CHECKED) for window in self._cycle(cycle)]
            loads = np.array([self._load(window) for window in planned]) / self.tokens
            spread = 0.0 if self.micro_batches <= 2 else _SPREADS * float(loads.std())
            if max(loads.max(), loads.mean() + spread) <= 1 or draws == self.micro_batches:
                return
            draws = max(self.micro_batches, int(draws * min(0.96, 1 / loads.mean())))

    def _load(self, draws: Sequence[Draw]) -> int:
        """Tokens of the largest micro-batch of a window."""
        lengths, counts = np.concatenate([d.lengths for d in draws]), np.concatenate([d.counts for d in draws])
        order = np.lexsort((-counts, -lengths))
        cuts = balanced_cuts(lengths[order], counts[order], self.micro_batches)
        return max(int(lengths[part[0]] * counts[part].sum()) for part in np.split(order, cuts))

    def _plan(self, cycle: int) -> list[list[Draw]]:
        draws, where, parts = self._draws(cycle)
        if self.windows > 1:
            widths = np.array([d.lengths.max() for d in draws])
            sequences = np.array([d.counts.sum() for d in draws])
            slots, bands = where, self._first_bands(widths, cycle)
            for _ in range(_ROUNDS):
                where = _deal(widths, widths * sequences, bands, slots, parts)
                bands = self._bands(widths, sequences, where)
            if self.micro_batches <= 2:
                tasks = np.array([d.task for d in draws])
                key = (self.tree.seed, cycle)
                exchange(widths, sequences, tasks, parts, where, self.micro_batches, self.tokens, key)
        return [[draws[i] for i in np.flatnonzero(where == window)] for window in range(self.windows)]

    def _draws(self, cycle: int) -> tuple[list[Draw], Indices, list[Indices]]:
        """All N draws of a cycle, [N] the windows they fall into by their number, and the parts they fall into.

        A part is what one epoch of one task has in the cycle. Only its own draws change places, so that an epoch is
        over before the next one begins.
        """
        before, counts = self.tree.run(cycle * self.windows, self._levels)
        draws: list[Draw] = []
        slots, starts = [], []
        for task in np.flatnonzero(counts.sum(0)).tolist():
            slots.append(np.repeat(np.arange(self.windows), counts[:, task]))
            lengths, sequences = self.sizes[task]
            for rows, epoch in self.parcels[task].run(int(before[task]), len(slots[-1])):
                if draws and (task, epoch) != (draws[-1].task, draws[-1].epoch):
                    starts.append(len(draws))
                draws.append(Draw(task, epoch, rows, lengths[rows], sequences[rows]))
        return draws, np.concatenate(slots), np.split(np.arange(len(draws)), starts)

    def _first_bands(self, widths: Indices, cycle: int) -> Indices:
        """[windows, micro_batches] the length that each window's micro-batches are for, to begin with.

        All draws of the cycle, sorted, make as many bands as it has micro-batches. A window gets one from every stratum
        of them; where it gets a long one of a stratum it gets a short one of the next, so that none is of long rows
        throughout. The order of windows is random.
        """
        bands = self.windows * self.micro_batches
        middles = np.sort(widths)[(2 * np.arange(bands) + 1) * len(widths) // (2 * bands)]
        strata = middles.reshape(self.micro_batches, self.windows)
        strata[1::2] = strata[1::2, ::-1].copy()
        return np.asarray(strata[:, np.argsort(mix(self.tree.seed, cycle, np.arange(self.windows)))].T)

    def _bands(self, widths: Indices, sequences: Indices, where: Indices) -> Indices:
        """[windows, micro_batches] the upper quartile of lengths in the micro-batches of a deal."""
        bands = np.empty((self.windows, self.micro_batches), np.int64)
        for window in range(self.windows):
            mine = np.flatnonzero(where == window)
            mine = mine[np.argsort(-widths[mine], kind="stable")]
            cuts = balanced_cuts(widths[mine], sequences[mine], self.micro_batches)
            bands[window] = [widths[run[len(run) // 4]] for run in np.split(mine, cuts)]
        return bands


def _deal(widths: Indices, tokens: Indices, bands: Indices, slots: Indices, parts: list[Indices]) -> Indices:
    """[N] the window of each draw: within each part the assignment to its slots with the least padding."""
    where = slots.copy()
    for part in parts:
        own, band = widths[part][:, None, None], bands[None]
        # Whole numbers: a plan must not depend on how a processor rounds.
        misfit = np.where(band >= own, (band - own) * 256 // own, _TOO_LONG * (own - band) * 256 // band).min(axis=2)
        draws, places = linear_sum_assignment((misfit * tokens[part][:, None])[:, slots[part]])
        where[part[draws]] = slots[part[places]]
    return where
