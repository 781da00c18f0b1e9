"""Windows over a context that is longer than a sequence.

Owns: where windows start, which window a token is read in, which windows training keeps, and which tokens an answer
covers. Only numbers: tokens are counted from the start of the context.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def window_starts(tokens: int, size: int, overlap: int) -> list[int]:
    """First tokens of the windows of `size` tokens that cover a context, each sharing `overlap` with the next."""
    step = size - min(overlap, size // 2)
    return [i * step for i in range(1 + max(0, -(-(tokens - size) // step)))]


def around(starts: list[int], size: int, most: int, token: int) -> tuple[int, int]:
    """The `most` consecutive windows (first, one past the last) with `token` nearest to their middle."""
    if len(starts) <= most:
        return 0, len(starts)
    firsts = np.arange(len(starts) - most + 1)
    begin = np.array(starts)[firsts]
    end = np.array(starts)[firsts + most - 1] + size
    first = int(np.argmax(np.minimum(token - begin, end - 1 - token)))
    return first, first + most


def best_window(starts: list[int], size: int, tokens: int) -> Ints:
    """For each token of the context the window that shows most of it on the token's poorer side; -1 outside all.

    As in BERT's question answering; of equal windows the first.
    """
    best = np.full(tokens, -1, np.int64)
    shown = np.full(tokens, -1, np.int64)
    for window, start in enumerate(starts):
        end = min(start + size, tokens)
        inside = np.arange(end - start)
        context = np.minimum(inside, inside[::-1])
        better = context > shown[start:end]
        best[start:end][better] = window
        shown[start:end][better] = context[better]
    return best


def answer_tokens(offsets: Ints, start: int, end: int) -> tuple[int, int]:
    """First and last token that cover characters `start` to `end`; the nearest ones where none do."""
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    first = min(first, len(offsets) - 1)
    return first, max(first, last)
