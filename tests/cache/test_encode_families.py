"""What each family's cached rows hold, against the tokenizers' own encodings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.batch.masking import MaskRule, mask_tokens, masked_units
from trainer.cache.encode import encode_rows
from trainer.cache.layout import schema_of
from trainer.cache.text import EncodeOptions, TextEncoder, longest_first
from trainer.errors import ModelError
from trainer.tasks.rows import input_text, row_key
from trainer.tasks.spec import Family, TaskSpec

Options = Callable[..., EncodeOptions]

CLASSES = TaskSpec(name="t", family=Family.CLASSIFICATION, num_labels=3)
PAIRS = TaskSpec(name="t", family=Family.PAIR_CLASSIFICATION, num_labels=3)
RANKING = TaskSpec(name="t", family=Family.PAIR_CLASSIFICATION, num_labels=2, metric="map_mrr")
SCORES = TaskSpec(name="t", family=Family.REGRESSION, score_range=(1.0, 5.0))
CHOICE = TaskSpec(name="t", family=Family.MULTIPLE_CHOICE)
SEQ2SEQ = TaskSpec(name="t", family=Family.SEQ2SEQ)
MASKED = TaskSpec(name="t", family=Family.MASKED_LM)
CAUSAL = TaskSpec(name="t", family=Family.CAUSAL_LM)

SHORT = "The quick fox jumps."
LONG = "Pack my box with five dozen liquor jugs! How quick daft zebras jump over the lazy brown dog, says Ada."


def encode(
    spec: TaskSpec, rows: list[dict[str, Any]], tokenizer: Any, options: EncodeOptions, evaluation: bool = False
) -> list[dict[str, Any]]:
    batch = encode_rows(spec, [(10 + i, row) for i, row in enumerate(rows)], tokenizer, options, evaluation)
    assert isinstance(batch, pa.RecordBatch)
    assert batch.schema == schema_of(spec.family)
    batch.validate(full=True)
    return list(batch.to_pylist())


def second_of(tokenizer: Any, encoding: Any, types: list[int]) -> int:
    if "token_type_ids" not in tokenizer.model_input_names or 1 not in types:
        return len(encoding["input_ids"])
    return types.index(1)


@pytest.mark.parametrize("name", ["minilm", "bart", "t5", "slow"])
@pytest.mark.parametrize("length", [8, 20, 64])
def test_single_texts_are_the_tokenizers_own_encoding(
    tokenizers: dict[str, Any], options: Options, name: str, length: int
) -> None:
    tokenizer = tokenizers[name]
    rows = [{"text": SHORT, "label": 2}, {"text": LONG, "label": 0}, {"text": "\u200b", "label": 1}]
    cached = encode(CLASSES, rows, tokenizer, options(max_length=length))
    for i, (row, found) in enumerate(zip(rows, cached, strict=True)):
        # The last text has no tokens; where none stand around it either, the end token keeps it from being empty.
        expected = tokenizer(row["text"], truncation=True, max_length=length)["input_ids"] or [tokenizer.eos_token_id]
        whole = tokenizer(row["text"])["input_ids"]
        assert found == {
            "row": 10 + i,
            "key": row_key(input_text(CLASSES, row)),
            "sequences": [expected],
            "second": [len(expected)],
            "count": 1,
            "length": len(expected),
            "units": 1,
            "truncated": len(whole) > length,
            "reference": "",
            "label": row["label"],
        }


WORDS = st.lists(
    st.sampled_from(["the", "quick", "brown fox,", "jumps!", "over 1843", "zebras"]), min_size=1, max_size=30
)


@pytest.mark.parametrize("name", ["minilm", "bart", "t5"])
@given(first=WORDS, second=WORDS, length=st.integers(8, 80))
def test_pairs_are_the_tokenizers_own_encoding(
    tokenizers: dict[str, Any], options: Options, name: str, first: list[str], second: list[str], length: int
) -> None:
    tokenizer = tokenizers[name]
    row = {"text_a": " ".join(first), "text_b": " ".join(second), "label": 1}
    (found,) = encode(PAIRS, [row], tokenizer, options(max_length=length))
    expected = tokenizer(
        row["text_a"], row["text_b"], truncation="longest_first", max_length=length, return_token_type_ids=True
    )
    assert found["sequences"] == [expected["input_ids"]]
    assert found["second"] == [second_of(tokenizer, expected, expected["token_type_ids"])]
    assert found["truncated"] == (len(tokenizer(row["text_a"], row["text_b"])["input_ids"]) > length)


def test_slow_tokenizer_pairs(tokenizers: dict[str, Any], options: Options) -> None:
    tokenizer = tokenizers["slow"]
    (found,) = encode(PAIRS, [{"text_a": SHORT, "text_b": LONG, "label": 1}], tokenizer, options(max_length=512))
    assert found["sequences"] == [tokenizer(SHORT, LONG)["input_ids"]]


def test_longest_first_never_cuts_the_shorter_text_below_the_longer() -> None:
    assert longest_first(3, 40, 20) == (3, 17)
    assert longest_first(40, 3, 20) == (17, 3)
    assert longest_first(40, 30, 20) == (10, 10)
    assert longest_first(40, 30, 21) == (11, 10)


@pytest.mark.parametrize(("name", "prefix"), [("llama", ["<s>"]), ("qwen", [])])
def test_decoder_sequences_are_one_text_that_ends_with_the_end_token(
    tokenizers: dict[str, Any], options: Options, name: str, prefix: list[str]
) -> None:
    tokenizer = tokenizers[name]
    start = tokenizer.convert_tokens_to_ids(prefix)
    (single,) = encode(CLASSES, [{"text": SHORT, "label": 0}], tokenizer, options("decoder", 256))
    assert single["sequences"] == [tokenizer(SHORT)["input_ids"] + [tokenizer.eos_token_id]]
    assert single["sequences"][0][: len(start)] == start
    row = {"text_a": SHORT, "text_b": LONG, "label": 1}
    (pair,) = encode(PAIRS, [row], tokenizer, options("decoder", 256))
    assert pair["sequences"] == [tokenizer(SHORT + "\n" + LONG)["input_ids"] + [tokenizer.eos_token_id]]
    assert pair["second"] == [len(pair["sequences"][0])]
    (cut,) = encode(PAIRS, [row], tokenizer, options("decoder", 24))
    room = 24 - len(start) - 1
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (SHORT, "\n" + LONG))
    kept_a, kept_b = longest_first(len(a), len(b), room)
    assert cut["sequences"] == [start + a[:kept_a] + b[:kept_b] + [tokenizer.eos_token_id]]
    assert cut["truncated"]


def test_regression_scales_the_score_and_keeps_the_original(tokenizers: dict[str, Any], options: Options) -> None:
    tokenizer = tokenizers["minilm"]
    rows = [{"text_a": SHORT, "text_b": LONG, "score": 4.0}, {"text_a": SHORT, "text_b": "", "score": 1.0}]
    pair, single = encode(SCORES, rows, tokenizer, options(max_length=64), evaluation=True)
    assert (pair["score"], single["score"]) == (0.75, 0.0)
    assert pair["sequences"] == [tokenizer(SHORT, LONG)["input_ids"]]
    assert single["sequences"] == [tokenizer(SHORT)["input_ids"]]
    assert [json.loads(r["reference"]) for r in (pair, single)] == [{"score": 4.0}, {"score": 1.0}]
    assert encode(SCORES, rows, tokenizer, options(max_length=64))[0]["reference"] == ""


def test_multiple_choice_has_a_sequence_a_choice(tokenizers: dict[str, Any], options: Options) -> None:
    tokenizer = tokenizers["minilm"]
    rows = [
        {"context": SHORT, "choices": ["dog", "lazy fox", "box of jugs"], "label": 2},
        {"context": "", "choices": ["dog", LONG], "label": 0},
    ]
    first, second = encode(CHOICE, rows, tokenizer, options(max_length=64))
    assert first["sequences"] == [tokenizer(SHORT, c)["input_ids"] for c in rows[0]["choices"]]
    start = len(tokenizer(SHORT)["input_ids"])
    assert (first["second"], first["count"], first["label"]) == ([start] * 3, 3, 2)
    assert first["length"] == max(map(len, first["sequences"]))
    assert second["sequences"] == [tokenizer(c)["input_ids"] for c in rows[1]["choices"]]
    assert second["count"] == 2


def test_ranked_pairs_keep_their_group(tokenizers: dict[str, Any], options: Options) -> None:
    rows = [{"text_a": SHORT, "text_b": LONG, "label": 1}]
    (found,) = encode(RANKING, rows, tokenizers["minilm"], options(), evaluation=True)
    assert json.loads(found["reference"]) == {"group": SHORT}
    assert encode(PAIRS, rows, tokenizers["minilm"], options(), evaluation=True)[0]["reference"] == ""


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_targets_are_labels_with_the_end_token(
    tokenizers: dict[str, Any], options: Options, name: str
) -> None:
    tokenizer = tokenizers[name]
    rows = [
        {"source": LONG, "target": "lazy dog", "references": ["lazy dog", "a dög"]},
        {"source": SHORT, "target": LONG, "references": [LONG]},
    ]
    setting = options("encoder-decoder", 64, max_target_length=16)
    short, cut = encode(SEQ2SEQ, rows, tokenizer, setting, evaluation=True)
    assert short["sequences"] == [tokenizer(LONG, truncation=True, max_length=64)["input_ids"]]
    assert short["targets"] == tokenizer(text_target="lazy dog")["input_ids"]
    assert short["targets"][-1] == tokenizer.eos_token_id
    assert short["units"] == len(short["targets"])
    assert json.loads(short["reference"]) == {"references": ["lazy dog", "a dög"], "source": LONG}
    assert cut["targets"] == tokenizer(text_target=LONG, truncation=True, max_length=16)["input_ids"]
    assert (cut["units"], cut["truncated"]) == (16, True)
    assert cut["length"] == max(16, len(cut["sequences"][0]))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_decoder_prompts_lose_their_start_never_the_target(
    tokenizers: dict[str, Any], options: Options, name: str
) -> None:
    tokenizer = tokenizers[name]
    rows = [{"source": LONG, "target": "lazy dog", "references": ["lazy dog"]}]
    prompt = tokenizer(LONG + "\n")["input_ids"]
    target = [*tokenizer("lazy dog", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    (whole,) = encode(SEQ2SEQ, rows, tokenizer, options("decoder", 256))
    assert whole["sequences"] == [prompt + target]
    assert whole["targets"] == target
    assert not whole["truncated"]
    (cut,) = encode(SEQ2SEQ, rows, tokenizer, options("decoder", 24))
    start = [tokenizer.bos_token_id] if name == "llama" else []
    assert cut["sequences"] == [start + prompt[len(prompt) - (24 - len(start) - len(target)) :] + target]
    assert cut["truncated"]
    (long_target,) = encode(
        SEQ2SEQ,
        [{"source": SHORT, "target": LONG, "references": [LONG]}],
        tokenizer,
        options("decoder", 16, max_target_length=64),
    )
    assert long_target["length"] == 16
    assert len(long_target["targets"]) == 15 - len(start)  # a token of the prompt is left, from which to predict


@pytest.mark.parametrize("name", ["minilm", "t5", "slow"])
def test_masked_lm_pieces_lose_nothing(tokenizers: dict[str, Any], options: Options, name: str) -> None:
    tokenizer = tokenizers[name]
    texts = [LONG, SHORT, "\u200b"]
    pieces = encode(MASKED, [{"text": t} for t in texts], tokenizer, options(max_length=12))
    rule = MaskRule(0.15, 1, len(tokenizer), tuple(tokenizer.all_special_ids))
    for i, text in enumerate(texts):
        mine = [p for p in pieces if p["row"] == 10 + i]
        bare = [token for p in mine for token in tokenizer_bare(tokenizer, p["sequences"][0])]
        assert bare == (tokenizer(text, add_special_tokens=False)["input_ids"] or bare)
        assert all(p["length"] == len(p["sequences"][0]) > 0 for p in mine)
        assert len({p["key"] for p in mine}) == 1
        assert not any(p["truncated"] for p in mine)
        for piece in mine:
            chosen = mask_tokens(np.array(piece["sequences"][0], np.int32), rule, 0, 1, 2, 3)[1]
            assert len(chosen) == masked_units(np.array([piece["units"]]), 0.15)[0]
    assert len([p for p in pieces if p["row"] == 10]) > 1


def tokenizer_bare(tokenizer: Any, ids: list[int]) -> list[int]:
    template = TextEncoder(tokenizer, EncodeOptions("encoder", 32, 8, 4, 2)).single
    assert ids[: len(template.prefix)] == list(template.prefix)
    assert ids[len(ids) - len(template.suffix) :] == list(template.suffix)
    return ids[len(template.prefix) : len(ids) - len(template.suffix)]


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("length", [8, 9, 33, 256])
def test_causal_lm_predicts_each_token_once(
    tokenizers: dict[str, Any], options: Options, name: str, length: int
) -> None:
    tokenizer = tokenizers[name]
    texts = [LONG, SHORT]
    pieces = encode(CAUSAL, [{"text": t} for t in texts], tokenizer, options("decoder", length))
    for i, text in enumerate(texts):
        mine = [p["sequences"][0] for p in pieces if p["row"] == 10 + i]
        stream = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        assert mine[0][:1] + [token for piece in mine for token in piece[1:]] == stream
        assert max(map(len, mine)) <= length
    assert all(p["units"] == len(p["sequences"][0]) - 1 > 0 for p in pieces)


def test_decoder_needs_an_end_token(tokenizers: dict[str, Any], options: Options) -> None:
    with pytest.raises(ModelError, match="no end token"):
        encode(CLASSES, [{"text": SHORT, "label": 0}], tokenizers["minilm"], options("decoder"))
