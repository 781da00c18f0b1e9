"""Collating: segments, targets and weights of every family, and masking as a pure function."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer.batch import Batch, Collator, TaskView
from trainer.batch.collate import ModelFacts
from trainer.batch.masking import MaskRule, mask_tokens, masked_units
from trainer.cache.layout import SPAN_STRIDE_BASE
from trainer.config.schema import LossConfig
from trainer.tasks.spec import TaskSpec


class Rows:
    """Rows held in memory, in the form the cache gives them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: np.ndarray) -> list[dict[str, Any]]:
        return [self._rows[int(i)] for i in indices]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def row(sequences: list[np.ndarray], **more: Any) -> dict[str, Any]:
    return {"sequences": sequences, "second": [len(s) for s in sequences], **more}


TASKS = {
    "cls": TaskSpec(name="cls", family="classification", labels=("a", "b", "c")),
    "choice": TaskSpec(name="choice", family="multiple_choice"),
    "span": TaskSpec(name="span", family="span"),
    "score": TaskSpec(name="score", family="regression", score_range=(0, 5)),
    "gen": TaskSpec(name="gen", family="seq2seq"),
    "mlm": TaskSpec(name="mlm", family="masked_lm"),
    "clm": TaskSpec(name="clm", family="causal_lm"),
}
ROWS = {
    "cls": [{**row([ids(1, 5, 2, 6, 2)], label=2), "second": [3]}, row([ids(1, 7, 2)], label=0)],
    "choice": [row([ids(1, 5, 2), ids(1, 6, 6, 2)], label=1)],
    "span": [
        row(
            [ids(1, 9, 2, 10, 11, 2), ids(1, 9, 2, 12, 2)],
            positions=ids(0, 3, 4, SPAN_STRIDE_BASE + 3),
            start=2,
            end=3,
        )
    ],
    "score": [row([ids(1, 5, 2)], score=0.4)],
    "gen": [row([ids(5, 6, 7, 2)], targets=ids(7, 2))],
    "mlm": [row([ids(1, *range(10, 50), 2)])],
    "clm": [row([ids(5, 6, 7)])],
}
FIRST_ROW = {"cls": 4, "choice": 0, "span": 1, "score": 3}
RULE = MaskRule(0.15, 3, 100, (0, 1, 2, 3))


def collate(names: list[str], kind: str = "encoder", weights: float = 1.0, **loss: Any) -> Batch:
    views = [TaskView(TASKS[n], Rows(ROWS[n]), FIRST_ROW.get(n, -1)) for n in names]
    collator = Collator(views, ModelFacts(kind, 0, 100, 9, RULE), LossConfig(**loss), seed=0)
    pairs = [(t, r) for t, n in enumerate(names) for r in range(len(ROWS[n]))]
    tasks, rows = (np.array(x, np.int64) for x in zip(*pairs, strict=True))
    return collator(tasks, rows, np.zeros(len(rows), np.int64), np.full(len(names), weights))


def test_classification_segments_and_token_types() -> None:
    batch = collate(["cls"])
    assert batch.input_ids.tolist() == [[1, 5, 2, 6, 2], [1, 7, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 1, 4, 3], [1, 1, 4, 3]]
    assert (batch.scores, batch.tasks) == (6, 1)
    assert batch.offsets.tolist() == [0, 3, 6]
    assert batch.target.tolist() == [2, 0]
    assert batch.weight.tolist() == pytest.approx([1 / math.log(3)] * 2)
    assert (batch.real_tokens, batch.padded_tokens) == (8, 10)


def test_multiple_choice_is_one_segment_over_its_candidates() -> None:
    batch = collate(["choice"])
    assert batch.pooled.tolist() == [0, 1]
    assert batch.segments.tolist() == [[0, 2, 0, 1]]
    assert batch.offsets.tolist() == [0, 2]
    assert batch.target.tolist() == [1]
    assert batch.weight.tolist() == pytest.approx([1 / math.log(2)])


def test_span_is_two_segments_over_all_windows() -> None:
    batch = collate(["span"])
    width = batch.input_ids.shape[1]
    assert batch.tokens.tolist() == [0, 3, 4, width + 3]
    assert batch.segments.tolist() == [[0, 4, 1, 1], [0, 4, 2, 1]]
    assert batch.offsets.tolist() == [0, 4, 8]
    assert batch.target.tolist() == [2, 3]
    assert batch.weight.tolist() == pytest.approx([0.5 / math.log(4)] * 2)


def test_regression_has_its_own_scale() -> None:
    batch = collate(["score"], weights=0.5, regression_scale=8.0)
    assert batch.regression_scores.tolist() == [[0, 3]]
    assert batch.regression_target.tolist() == pytest.approx([0.4])
    assert batch.regression_weight.tolist() == [4.0]
    assert batch.offsets.tolist() == [0]


def test_seq2seq_shifts_for_a_decoder_side_and_aligns_in_one_sequence() -> None:
    both = collate(["gen"], "encoder-decoder", label_smoothing=0.1)
    assert both.decoder_input_ids.tolist() == [[9, 7]]
    assert both.lm_positions.tolist() == [0, 1]
    assert both.lm_target.tolist() == [7, 2]
    assert both.lm_smoothing.tolist() == pytest.approx([0.1, 0.1])
    assert both.lm_weight.tolist() == pytest.approx([1 / math.log(100)] * 2)
    one = collate(["gen"], "decoder")
    assert one.decoder_input_ids.shape == (0, 0)
    assert one.lm_positions.tolist() == [1, 2]  # tokens 6 and 7 predict 7 and 2
    assert one.lm_target.tolist() == [7, 2]


def test_pooled_rows_feed_the_decoder_shifted_and_positions_count_its_width() -> None:
    batch = collate(["span", "gen"], "encoder-decoder")
    assert batch.decoder_input_ids[0].tolist() == [9, 1, 9, 2, 10, 11]
    assert batch.tokens.tolist() == [0, 3, 4, 6 + 3]
    assert batch.lm_positions.tolist() == [12, 13]


def test_causal_lm_predicts_the_next_token() -> None:
    batch = collate(["clm"], "decoder")
    assert batch.lm_positions.tolist() == [0, 1]
    assert batch.lm_target.tolist() == [6, 7]


def test_mixed_micro_batch_keeps_pooled_segments_before_token_segments() -> None:
    batch = collate(["cls", "span", "choice", "score", "mlm"])
    assert batch.segment_task.tolist() == [0, 0, 2, 1, 1]
    assert batch.offsets.tolist() == [0, 3, 6, 8, 12, 16]
    pooled = len(batch.pooled)
    assert batch.segments.tolist()[:3] == [[0, 1, 4, 3], [1, 1, 4, 3], [2, 2, 0, 1]]
    assert batch.segments.tolist()[3:] == [[pooled, 4, 1, 1], [pooled, 4, 2, 1]]
    assert batch.scores == 16
    assert set(batch.lm_task.tolist()) == {4}


def test_scaling_can_be_switched_off_and_task_weights_multiply() -> None:
    assert collate(["cls"], scale="none").weight.tolist() == [1.0, 1.0]
    view = TaskView(TASKS["cls"], Rows(ROWS["cls"]), 4, loss_weight=3.0)
    collator = Collator([view], ModelFacts("encoder", 0, 100), LossConfig(), 0)
    batch = collator(np.array([0]), np.array([0]), np.array([0]), np.array([0.25]))
    assert batch.weight.tolist() == pytest.approx([0.75 / math.log(3)])


def test_masking_is_a_pure_function_of_its_key() -> None:
    text = np.arange(10, 90, dtype=np.int32)
    first = mask_tokens(text, RULE, 0, 1, 2, 3)
    again = mask_tokens(text, RULE, 0, 1, 2, 3)
    other_epoch = mask_tokens(text, RULE, 0, 1, 3, 3)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other_epoch[1])


def test_masking_counts_are_known_beforehand_and_specials_are_never_masked() -> None:
    for length in range(60):
        text = np.concatenate([[1], np.arange(10, 10 + length), [2]]).astype(np.int32)
        _, chosen = mask_tokens(text, RULE, 5, length)
        assert len(chosen) == int(masked_units(np.array([length]), 0.15)[0])
        if length:
            assert not {0, length + 1} & set(chosen.tolist())


def test_masking_is_80_10_10() -> None:
    text = np.full(200_000, 50, np.int32)
    masked, chosen = mask_tokens(text, RULE, 1)
    now = masked[chosen]
    kept = float((now == 50).mean())
    assert float((now == 3).mean()) == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / 100, abs=0.01)
    assert np.array_equal(np.delete(masked, chosen), np.delete(text, chosen))


def test_batch_moves_all_its_tensors() -> None:
    batch = collate(["cls"]).to("meta")
    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    assert {name for name, value in values.items() if not isinstance(value, torch.Tensor)} == {"scores", "tasks"}
    assert all(value.device.type == "meta" for value in values.values() if isinstance(value, torch.Tensor))
