"""How many micro-batches of a window each task gets.

Owns: `CountTree`. Counts are drawn so that in every window each task is within one of its expectation, they sum to
the window's draws, they are unbiased over seeds, and the number of draws before any window costs O(log) to know:
that is what makes the sampler stateless.

Method: a block of 2**LEVELS windows is drawn by systematic sampling (Madow 1949), then halved again and again: each
task's count goes half to each side, and of the tasks with an odd count a random half leaves its odd one on the left.
A count within d of its expectation has halves within d/2 + 1/2, so "less than one away" holds at every level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.window.hashing import mix

LEVELS = 20
Counts = NDArray[np.int64]


class CountTree:
    """Draws of T tasks over an endless row of windows, each with the same number of draws."""

    def __init__(self, probabilities: NDArray[np.float64], draws: int, seed: int) -> None:
        """`probabilities` [T] sum to 1; `draws` a window; the same arguments always give the same counts."""
        self.probabilities = probabilities
        self.draws = draws
        self.seed = seed
        self._tasks = np.arange(len(probabilities))

    def at(self, window: int) -> Counts:
        """[T] draws of each task in `window`; they sum to `draws`."""
        return self.span(window)[1]

    def before(self, window: int) -> Counts:
        """[T] draws of each task in all windows before `window`."""
        return self.span(window)[0]

    def span(self, window: int) -> tuple[Counts, Counts]:
        """`(before(window), at(window))` in one descent."""
        before, counts, _, _ = self._descend(window, 0)
        return before, counts

    def run(self, start: int, levels: int) -> tuple[Counts, Counts]:
        """`before(start)` [T], and [2**levels, T] `at` of `start` and the windows after it; `start` is a multiple."""
        before, counts, block, node = self._descend(start, levels)
        rows, nodes = [counts], [node]
        for _ in range(levels):
            halves = [(left := self._left_half(c, block, n), c - left) for c, n in zip(rows, nodes, strict=True)]
            rows = [half for pair in halves for half in pair]
            nodes = [2 * n + side for n in nodes for side in (0, 1)]
        return before, np.stack(rows)

    def _descend(self, window: int, levels: int) -> tuple[Counts, Counts, int, int]:
        """Draws before and in the 2**levels windows that `window` is one of; their block and node in its tree."""
        block, inside = divmod(window, 1 << LEVELS)
        before = np.zeros(len(self._tasks), np.int64)
        for earlier in range(block):
            before += self._root(earlier)
        counts = self._root(block)
        node = 1
        for level in reversed(range(levels, LEVELS)):
            left = self._left_half(counts, block, node)
            right_side = (inside >> level) & 1
            if right_side:
                before += left
            counts = counts - left if right_side else left
            node = 2 * node + right_side
        return before, counts, block, node

    def _root(self, block: int) -> Counts:
        """Systematic sampling of a whole block: one uniform offset under the cumulated expectations."""
        total = self.draws << LEVELS
        edges = np.concatenate([[0.0], np.cumsum(self.probabilities)])
        edges *= total / edges[-1]
        edges[-1] = total
        offset = float(mix(self.seed, block, 0)) / 2**64
        return np.diff(np.floor(edges + offset)).astype(np.int64)

    def _left_half(self, counts: Counts, block: int, node: int) -> Counts:
        odd = np.flatnonzero(counts & 1)
        order = np.argsort(mix(self.seed, block, node, self._tasks[odd]))
        left = counts >> 1
        left[odd[order[: len(odd) // 2]]] += 1
        return left
