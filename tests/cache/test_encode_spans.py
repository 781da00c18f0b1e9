"""Span rows: every context token once, answers that can be read back, windows around them in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.cache.encode import encode_rows
from trainer.cache.layout import SPAN_STRIDE_BASE
from trainer.cache.text import EncodeOptions
from trainer.cache.windows import answer_tokens, around, best_window, window_starts
from trainer.errors import ModelError
from trainer.tasks.cards import load_tasks
from trainer.tasks.rows import check_row
from trainer.tasks.sources import open_source
from trainer.tasks.spec import Family, TaskSpec

Options = Callable[..., EncodeOptions]
SPAN = TaskSpec(name="t", family=Family.SPAN)
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KINDS = {"minilm": "encoder", "bart": "encoder-decoder", "t5": "encoder-decoder", "llama": "decoder", "qwen": "decoder"}


def encode(
    row: dict[str, Any], tokenizer: Any, options: EncodeOptions, evaluation: bool, spec: TaskSpec = SPAN
) -> dict[str, Any]:
    (found,) = encode_rows(spec, [(0, row)], tokenizer, options, evaluation).to_pylist()
    return found


def make_row(words: list[str], first: int, last: int, question: str = "Who jumps?") -> dict[str, Any]:
    context = " ".join(words)
    start = len(" ".join([*words[:first], ""]))
    text = " ".join(words[first : last + 1])
    assert context[start : start + len(text)] == text
    return {"context": context, "question": question, "answers": [{"text": text, "start": start}]}


def read(row: dict[str, Any], found: dict[str, Any]) -> str:
    """The answer as a metric reads it: from offsets."""
    offsets = found["offsets"]
    return str(row["context"][offsets[2 * found["start"]] : offsets[2 * found["end"] + 1]])


def tokens_at(found: dict[str, Any]) -> list[int]:
    return [found["sequences"][p // SPAN_STRIDE_BASE][p % SPAN_STRIDE_BASE] for p in found["positions"]]


WORDS = st.lists(
    st.sampled_from(["the", "quick", "brown", "fox", "over", "zebras", "1843", "Ada", "vexingly"]), min_size=1
)


@pytest.mark.parametrize("name", list(KINDS))
@given(words=WORDS, data=st.data(), length=st.integers(16, 64), stride=st.integers(0, 8))
def test_evaluation_sees_each_token_once_and_reads_the_answer_back(
    tokenizers: dict[str, Any], options: Options, name: str, words: list[str], data: Any, length: int, stride: int
) -> None:
    tokenizer = tokenizers[name]
    first = data.draw(st.integers(0, len(words) - 1))
    row = make_row(words, first, data.draw(st.integers(first, len(words) - 1)), question="Who?")
    found = encode(row, tokenizer, options(KINDS[name], length, span_stride=stride), evaluation=True)
    context = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
    assert tokens_at(found)[1:] == context
    assert found["positions"][0] == 0
    assert len(found["offsets"]) == 2 * len(found["positions"])
    assert read(row, found) == row["answers"][0]["text"]
    assert found["count"] == len(found["sequences"])
    assert found["length"] == max(map(len, found["sequences"])) <= length
    assert not found["truncated"]
    assert json.loads(found["reference"]) == {"context": row["context"], "answers": [row["answers"][0]["text"]]}


@pytest.mark.parametrize("name", ["minilm", "bart", "llama"])
@given(words=WORDS, data=st.data(), windows=st.integers(1, 3))
def test_training_keeps_the_windows_around_the_answer(
    tokenizers: dict[str, Any], options: Options, name: str, words: list[str], data: Any, windows: int
) -> None:
    tokenizer = tokenizers[name]
    first = data.draw(st.integers(0, len(words) - 1))
    row = make_row(words * 3, first + len(words), first + len(words), question="Who?")
    setting = options(KINDS[name], 32, span_windows=windows)
    found, whole = (encode(row, tokenizer, setting, evaluation) for evaluation in (False, True))
    assert found["count"] == min(windows, whole["count"])
    assert found["offsets"] == []
    assert found["reference"] == ""
    assert found["truncated"] == (len(found["positions"]) < len(whole["positions"]))
    answer, expected = (tokens_at(f)[f["start"] : f["end"] + 1] for f in (found, whole))
    assert answer == expected
    every = tokens_at(whole)
    assert any(every[i : i + len(found["positions"]) - 1] == tokens_at(found)[1:] for i in range(len(every)))


def test_encoder_windows_are_stock_pairs(tokenizers: dict[str, Any], options: Options) -> None:
    """Same windows, special tokens and token types as transformers' own overflowing pairs, the question first."""
    tokenizer = tokenizers["minilm"]
    row = make_row(["quick", "brown", "zebras", "jump"] * 20, 30, 31)
    found = encode(row, tokenizer, options(max_length=32, span_stride=8), evaluation=True)
    expected = tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=32,
        stride=8,
        return_overflowing_tokens=True,
    )
    assert found["sequences"] == expected["input_ids"]
    assert found["second"] == [types.index(1) for types in expected["token_type_ids"]]


def test_no_answer_is_slot_zero(tokenizers: dict[str, Any], options: Options) -> None:
    row = {"context": "The quick fox.", "question": "Who?", "answers": []}
    found = encode(row, tokenizers["minilm"], options(), evaluation=True)
    assert (found["start"], found["end"]) == (0, 0)
    assert read(row, found) == ""
    assert found["sequences"][0][0] == tokenizers["minilm"].cls_token_id
    assert json.loads(found["reference"])["answers"] == []


def test_answer_inside_a_word_takes_the_tokens_that_cover_it(tokenizers: dict[str, Any], options: Options) -> None:
    row = {"context": "The uncrowned king.", "question": "Who?", "answers": [{"text": "crown", "start": 6}]}
    found = encode(row, tokenizers["minilm"], options(), evaluation=True)
    assert "crown" in read(row, found)
    assert read(row, found) in "uncrowned"


def test_long_question_is_cut_to_half(tokenizers: dict[str, Any], options: Options) -> None:
    row = make_row(["fox"] * 5, 2, 2, question="quick " * 100)
    found = encode(row, tokenizers["minilm"], options(max_length=23), evaluation=True)
    assert found["truncated"]
    assert found["length"] <= 23
    assert len(found["positions"]) == 6
    assert read(row, found) == "fox"


def test_slow_tokenizer_is_refused_by_name(tokenizers: dict[str, Any], options: Options) -> None:
    with pytest.raises(ModelError, match=r"BertGenerationTokenizer.*slow.*span tasks"):
        encode(make_row(["fox"], 0, 0), tokenizers["slow"], options(), evaluation=False)


@given(st.integers(0, 300), st.integers(2, 40), st.integers(0, 40))
def test_windows_cover_all_tokens_with_most_context(tokens: int, size: int, overlap: int) -> None:
    starts = window_starts(tokens, size, overlap)
    best = best_window(starts, size, tokens)
    assert starts[0] == 0
    assert all(b > a for a, b in pairwise(starts))
    assert len(starts) == 1 or starts[-2] + size < tokens <= starts[-1] + size  # and none is for nothing
    for token in range(tokens):
        shown = [min(token - s, min(s + size, tokens) - 1 - token) if s <= token < s + size else -1 for s in starts]
        assert best[token] == int(np.argmax(shown))
        assert max(shown) >= 0


def test_windows_around_a_token() -> None:
    starts = window_starts(100, 10, 5)
    assert around(starts, 10, 3, 50) == (8, 11)  # tokens 40 to 60
    assert around(starts, 10, 3, 0) == (0, 3)
    assert around(starts, 10, 3, 99) == (16, 19)
    assert around(starts, 10, 50, 99) == (0, 19)


def test_answer_tokens_between_tokens() -> None:
    offsets = np.array([[0, 3], [4, 4], [4, 9], [9, 10]])
    assert answer_tokens(offsets, 4, 9) == (2, 2)
    assert answer_tokens(offsets, 3, 4) == (1, 1)  # the space itself
    assert answer_tokens(offsets[[0, 2, 3]], 3, 4) == (1, 1)  # no token for it: the next one
    assert answer_tokens(offsets, 5, 20) == (2, 3)
    assert answer_tokens(offsets, 40, 50) == (3, 3)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["squad_sample", "covidqa", "subjqa_grocery"])
def test_real_answers_are_covered(tokenizers: dict[str, Any], options: Options, name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no task collection at {SHARED}")
    (spec,) = load_tasks([str(SHARED / name)])
    chunk = next(open_source(str(spec.train), "train").chunks(100))
    exact = answered = 0
    for raw in chunk.rows():
        assert raw.data is not None
        row = check_row(spec, raw.data)
        found = encode(row, tokenizers["minilm"], options(max_length=128, span_stride=32), True, spec)
        if row["answers"]:
            answered += 1
            text = row["answers"][0]["text"].strip()
            assert text in read(row, found)
            exact += text == read(row, found)
    assert exact >= 0.95 * answered > 0
