import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.spans import best_span

CONTEXT = "red green blue pink"
OFFSETS = [0, 0, 0, 3, 4, 9, 10, 14, 15, 19]  # slot 0, then four words


def span(start, end, **more):
    return best_span(np.array(start, dtype=np.float32), np.array(end, dtype=np.float32), OFFSETS, CONTEXT, **more)


def test_best_pair_in_order():
    assert span([0, 1, 5, 2, 0], [0, 9, 1, 4, 0]) == "red"  # 1 + 9, before 5 + 4
    assert span([0, 1, 5, 2, 0], [0, 3, 1, 4, 0]) == "green blue"


def test_an_end_before_its_start_is_no_span():
    assert span([0, 0, 0, 9, 0], [0, 9, 0, 1, 3]) == "blue pink"


def test_length_is_limited_in_tokens():
    start, end = [0, 9, 0, 0, 0], [0, 0, 0, 1, 9]
    assert span(start, end, max_tokens=4) == CONTEXT
    assert span(start, end, max_tokens=3) == "red green blue"
    assert span(start, end, max_tokens=1) == "red"


def test_no_answer_wins_ties_and_can_be_forbidden():
    start, end = [3, 1, 2, 0, 0], [1, 0, 2, 0, 0]
    assert span(start, end) == ""
    assert span(start, end, no_answer=False) == "green"
    assert span([3, 1, 2, 0, 0], [1, 0, 2.1, 0, 0]) == "green"


def test_scores_that_are_not_numbers_never_win():
    assert span([np.nan, np.nan, 2, 0, 0], [0, 0, 2, np.nan, 0]) == "green"
    assert isinstance(span([np.nan] * 5, [np.nan] * 5, no_answer=False), str)


def test_a_context_without_tokens_has_no_answer():
    assert best_span(np.zeros(1), np.zeros(1), [0, 0], "", no_answer=False) == ""


def test_white_space_at_the_edges_is_cut():
    assert best_span(np.array([0, 1.0]), np.array([0, 1.0]), [[0, 0], [1, 4]], "a bc") == "bc"


@given(st.integers(1, 12), st.integers(1, 15), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_equals_the_double_loop(tokens, width, no_answer, seed):
    generator = np.random.default_rng(seed)
    start, end = generator.integers(0, 6, (2, tokens + 1)).astype(float)
    context = "abcdefghijklmnop"
    offsets = np.array([[0, 0]] + [[i, i + 1] for i in range(tokens)])
    pairs = [(i, j) for i in range(1, tokens + 1) for j in range(i, min(i + width, tokens + 1))]
    first, last = max(pairs, key=lambda p: start[p[0]] + end[p[1]])  # max keeps the first of equals
    expected = context[first - 1 : last]
    if no_answer and start[0] + end[0] >= start[first] + end[last]:
        expected = ""
    assert best_span(start, end, offsets, context, width, no_answer) == expected


def test_flat_offsets_as_the_cache_stores_them():
    flat = np.array(OFFSETS, dtype=np.int32)
    start = np.array([0, 0, 0, 4, 0.0])
    assert best_span(start, start, flat, CONTEXT) == "blue"
