"""How even the micro-batches of a window can be made.

Owns: `balanced_cuts`, which cuts the rows of a `row` window into its micro-batches, and `window_loads`, which says
how large these will be, for very many windows at once.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError

Indices = NDArray[np.int64]

_BITS = 24
_SEQUENCES = (1 << _BITS) - 1


def balanced_cuts(lengths: Indices, counts: Indices, parts: int) -> list[int]:
    """Cut rows sorted by falling length into `parts` non-empty runs with the smallest largest padded size.

    Args:
        lengths: [n] tokens of each row's longest sequence, falling.
        counts: [n] sequences of each row.
        parts: how many.

    Raises:
        ConfigError: there are fewer rows than parts.
    """
    rows = len(lengths)
    if rows < parts:
        raise ConfigError(
            f"window.micro_batches: the window holds only {rows} rows for {parts} micro-batches; "
            "raise window.tokens or lower window.micro_batches"
        )
    tops, ends = lengths.tolist(), [0, *np.cumsum(counts).tolist()]

    def cut(limit: int) -> list[int]:
        """Where runs end that are as long as `limit` tokens allow; the last one takes what is left."""
        cuts: list[int] = []
        start = 0
        while len(cuts) < parts - 1:
            stop = bisect_right(ends, ends[start] + limit // tops[start]) - 1
            start = min(max(stop, start + 1), rows - (parts - 1 - len(cuts)))
            cuts.append(start)
        return cuts

    low, high = int((lengths * counts).max()), tops[0] * ends[-1]
    while low < high:
        middle = (low + high) // 2
        last = [0, *cut(middle)][-1]
        low, high = (low, middle) if tops[last] * (ends[-1] - ends[last]) <= middle else (middle + 1, high)
    return cut(low)


def packed(widths: Indices, sequences: Indices) -> Indices:
    """Both in one number, which sorts by width."""
    return np.asarray(widths << _BITS | sequences)


def window_loads(sizes: Indices, parts: int) -> Indices:
    """[...] tokens of the larger micro-batch of windows of `packed` draws [..., draws]; `parts` is one or two."""
    ordered = -np.sort(-sizes, axis=-1)
    width, sequences = ordered >> _BITS, ordered & _SEQUENCES
    total = sequences.sum(-1, keepdims=True)
    if parts == 1:
        return np.asarray((width[..., :1] * total)[..., 0])
    done = np.cumsum(sequences, axis=-1)[..., :-1]
    return np.asarray(np.maximum(width[..., :1] * done, width[..., 1:] * (total - done)).min(-1))
