"""From start and end scores to an answer.

Owns: the choice of the best span over the whole context, whatever windows it was read in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def best_span(
    start_scores: NDArray[np.floating],
    end_scores: NDArray[np.floating],
    offsets: ArrayLike,
    context: str,
    max_tokens: int = 30,
    no_answer: bool = True,
) -> str:
    """Text of the span of at most `max_tokens` tokens with the largest sum of start and end score.

    Args:
        start_scores: [P] over positions in document order; slot 0 is "no answer", then each context token once.
        end_scores: [P], likewise.
        offsets: 2 P integers (flat or [P, 2]): each position's character range in `context`; slot 0's is not used.
        context: the text that offsets point into.
        max_tokens: longest answer in tokens.
        no_answer: whether "" may be the answer, where slot 0 scores no worse than the best span. Without it, "" comes
            back only for a context without tokens.

    A score that is not a number never wins. The earliest, then shortest, of equal spans is taken.
    """
    # Not-a-number compares false with everything and would win numpy's argmax.
    start = np.nan_to_num(np.asarray(start_scores, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    end = np.nan_to_num(np.asarray(end_scores, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    tokens = len(start) - 1
    if tokens == 0:
        return ""
    width = min(max_tokens, tokens)
    # Row i holds the end scores of the spans that start at token i: ends i .. i + width - 1, -inf past the last token.
    ends = np.lib.stride_tricks.sliding_window_view(np.append(end[1:], np.full(width - 1, -np.inf)), width)
    spans = start[1:, None] + ends
    first, more = divmod(int(spans.argmax()), width)
    if no_answer and start[0] + end[0] >= spans[first, more]:
        return ""
    ranges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[1:]
    return context[ranges[first, 0] : ranges[min(first + more, tokens - 1), 1]].strip()
