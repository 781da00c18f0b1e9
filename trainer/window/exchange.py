"""Draws of a cycle change places between windows as long as that makes micro-batches smaller.

Owns: `exchange` and `SLACK`. For windows of one or two micro-batches, whose cost is cheap to know for thousands of
exchanges at once, and which have the most to gain.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from trainer.window.balance import packed, window_loads
from trainer.window.hashing import mix

SLACK = 2
"""Draws of a task that a window may get more or fewer of by exchanges between tasks."""
_SWEEPS = 3
"""How often exchanges within a part are tried."""
_TRIALS = 96
"""How often exchanges among draws of any part are tried."""
_LOOKED_AT = 1 << 14
"""Draws looked at in one trial of all pairs of some draws: sets how many these are."""
_FULL, _OVER = 15 / 16, 8
"""Tokens above this share of the budget count this many times more."""

Indices = NDArray[np.int64]


def exchange(
    widths: Indices,
    sequences: Indices,
    tasks: Indices,
    parts: list[Indices],
    where: Indices,
    micro_batches: int,
    tokens: int,
    seed: tuple[int, ...],
) -> None:
    """Move draws between windows that hold equally many of them, always one for one.

    Args:
        widths: [N] longest sequence of each draw of a cycle.
        sequences: [N] sequences of each draw.
        tasks: [N] task of each draw.
        parts: which draws are of the same epoch of the same task; a part stays between its first and last window.
        where: [N] window of each draw; changed in place.
        micro_batches: of a window.
        tokens: budget of a micro-batch.
        seed: which draws are tried together.
    """
    state = _Exchange(packed(widths, sequences), tasks, parts, where, micro_batches, tokens)
    most = max(2, isqrt(_LOOKED_AT // state.held.shape[1]))
    for sweep in range(_SWEEPS):
        for part in parts:
            state.trial(part[np.argsort(mix(*seed, sweep, part))[:most]])
    for number in range(_TRIALS):
        state.trial(np.argsort(mix(*seed, _SWEEPS + number, np.arange(len(where))))[:most])


class _Exchange:
    def __init__(
        self, sizes: Indices, tasks: Indices, parts: list[Indices], where: Indices, micro_batches: int, tokens: int
    ) -> None:
        self.sizes, self.tasks, self.where = sizes, tasks, where
        self.micro_batches, self.tokens = micro_batches, tokens
        windows = int(where.max()) + 1
        self.held = np.stack([np.flatnonzero(where == window) for window in range(windows)])  # [windows, draws]
        self.prices = self._prices(sizes[self.held])
        self.more = np.zeros((int(tasks.max()) + 1, windows), np.int64)
        """[T, windows] draws that a window has more of a task than it was given."""
        self.first, self.last = np.empty_like(where), np.empty_like(where)
        for part in parts:
            self.first[part], self.last[part] = where[part].min(), where[part].max()

    def trial(self, some: Indices) -> None:
        """Exchange the best pairs among `some` draws, each window once."""
        mine = self.where[some]
        place = (self.held[mine] == some[:, None]).argmax(1)
        changed = np.repeat(self.sizes[self.held[mine]][:, None], len(some), axis=1)
        changed[np.arange(len(some)), :, place] = self.sizes[some]
        after = self._prices(changed)  # [i, j]: of the window of draw i, had it draw j instead
        gain = np.triu(self.prices[mine][:, None] + self.prices[mine] - after - after.T)
        gain[mine[:, None] == mine] = 0
        pairs = np.flatnonzero(gain > 0)
        done: set[int] = set()
        for pair in pairs[np.argsort(-gain.ravel()[pairs], kind="stable")].tolist():
            i, j = divmod(pair, len(some))
            a, b = int(mine[i]), int(mine[j])
            if a in done or b in done or not self._allowed(int(some[i]), int(some[j]), a, b):
                continue
            done |= {a, b}
            self.held[a, place[i]], self.held[b, place[j]] = some[j], some[i]
            self.where[some[i]], self.where[some[j]] = b, a
            self.prices[a], self.prices[b] = after[i, j], after[j, i]
            for draw, source, target in ((some[i], a, b), (some[j], b, a)):
                self.more[self.tasks[draw], source] -= 1
                self.more[self.tasks[draw], target] += 1

    def _allowed(self, i: int, j: int, a: int, b: int) -> bool:
        """Whether draw i of window a and draw j of window b may change places."""
        if not (self.first[i] <= b <= self.last[i] and self.first[j] <= a <= self.last[j]):
            return False
        mine, other = self.more[self.tasks[i]], self.more[self.tasks[j]]
        return bool(
            self.tasks[i] == self.tasks[j] or (min(mine[a], other[b]) > -SLACK and max(mine[b], other[a]) < SLACK)
        )

    def _prices(self, sizes: Indices) -> Indices:
        """[...] tokens of the largest micro-batch in windows of packed draws [..., draws], over the budget dearly."""
        loads = window_loads(sizes, self.micro_batches)
        return np.asarray(loads + _OVER * np.maximum(0, loads - int(self.tokens * _FULL)))
