"""From the rows of a micro-batch to its tensors.

Owns: padding, the decoder's inputs, where each family's scores, segments and targets lie, and the weight of each:
`loss weight x unit weight of the window / log n` (MUPPET section 3; n is the segment's length).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch.batch import Batch
from trainer.batch.masking import MaskRule, mask_tokens
from trainer.cache.layout import SPAN_STRIDE_BASE
from trainer.config.schema import LossConfig
from trainer.tasks.spec import Family, TaskSpec
from trainer.window.hashing import name_key


class RowSource(Protocol):
    """What collating reads: `SplitView` and `CachedSplit` of the cache."""

    def __len__(self) -> int: ...

    def rows(self, indices: NDArray[np.int64]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class TaskView:
    """One task as collating sees it."""

    spec: TaskSpec
    rows: RowSource
    first_row: int
    """The task's first row in the packed head; -1 for families that use the model's own output layer."""
    loss_weight: float = 1.0


@dataclass(frozen=True)
class ModelFacts:
    """What collating must know of the model and its tokenizer."""

    kind: str
    """encoder, encoder-decoder or decoder."""
    pad_id: int
    vocabulary: int
    decoder_start_id: int = 0
    mask: MaskRule | None = None


class _Segment(NamedTuple):
    feature: int
    features: int
    row: int
    rows: int
    target: int
    weight: float
    task: int


@dataclass
class _Parts:
    """Growing lists of one micro-batch, turned into tensors at the end."""

    sequences: list[NDArray[np.int32]] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    decoder: list[NDArray[np.int32]] = field(default_factory=list)
    pooled: list[int] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    pooled_segments: list[_Segment] = field(default_factory=list)
    token_segments: list[_Segment] = field(default_factory=list)  # features counted from the first token
    regression_scores: list[tuple[int, int]] = field(default_factory=list)
    regression: list[tuple[float, float, int]] = field(default_factory=list)  # target, weight, task
    lm: list[tuple[int, int, int, float, int, float]] = field(default_factory=list)
    # sequence, position, target, weight, task, smoothing


class Collator:
    """Makes `Batch`es of rows of any mix of tasks."""

    def __init__(self, views: Sequence[TaskView], facts: ModelFacts, loss: LossConfig, seed: int) -> None:
        self.views = list(views)
        self.facts = facts
        self.loss = loss
        self.seed = seed
        self._keys = [name_key(view.spec.name) for view in views]

    def __call__(
        self,
        tasks: NDArray[np.int64],
        rows: NDArray[np.int64],
        epochs: NDArray[np.int64],
        unit_weights: NDArray[np.float64],
    ) -> Batch:
        """The batch of `rows` [B] of `tasks` [B], drawn in `epochs` [B]; `unit_weights` [T] is the window's."""
        parts = _Parts()
        for task in np.unique(tasks):
            mine = tasks == task
            view = self.views[task]
            add = _FAMILIES[view.spec.family]
            weight = float(unit_weights[task]) * view.loss_weight
            for index, epoch, row in zip(rows[mine], epochs[mine], view.rows.rows(rows[mine]), strict=True):
                add(self, parts, int(task), view, row, weight, (self.seed, self._keys[task], int(epoch), int(index)))
        return self._finish(parts)

    def _scale(self, outputs: int) -> float:
        """1 / log n, MUPPET's loss scaling; 1 when off, and for n = 1, whose loss is 0 anyway."""
        return 1.0 / math.log(outputs) if self.loss.scale == "log_n" and outputs > 1 else 1.0

    def _add_sequences(self, parts: _Parts, row: dict[str, Any]) -> int:
        first = len(parts.sequences)
        parts.sequences += row["sequences"]
        parts.second += [int(s) for s in row["second"]]
        if self.facts.kind == "encoder-decoder":  # the stock heads feed the decoder the input shifted right
            parts.decoder += [self._shift_right(s) for s in row["sequences"]]
        return first

    def _shift_right(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.concatenate([np.array([self.facts.decoder_start_id], np.int32), ids[:-1]])

    def _classification(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        first = self._add_sequences(parts, row)
        classes = view.spec.classes
        scaled = weight * self._scale(classes)
        parts.pooled_segments.append(
            _Segment(len(parts.pooled), 1, view.first_row, classes, int(row["label"]), scaled, task)
        )
        parts.pooled.append(first)

    def _regression(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        first = self._add_sequences(parts, row)
        parts.regression_scores.append((len(parts.pooled), view.first_row))
        parts.pooled.append(first)
        parts.regression.append((float(row["score"]), weight * self.loss.regression_scale, task))

    def _multiple_choice(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        first = self._add_sequences(parts, row)
        choices = len(row["sequences"])
        scaled = weight * self._scale(choices)
        parts.pooled_segments.append(
            _Segment(len(parts.pooled), choices, view.first_row, 1, int(row["label"]), scaled, task)
        )
        parts.pooled += range(first, first + choices)

    def _span(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        first = self._add_sequences(parts, row)
        positions = [(first + int(p) // SPAN_STRIDE_BASE, int(p) % SPAN_STRIDE_BASE) for p in row["positions"]]
        base = len(parts.tokens)
        parts.tokens += positions
        # Start and end are averaged, as in BERT's and RoBERTa's question answering.
        scaled = 0.5 * weight * self._scale(len(positions))
        for side, target in enumerate((row["start"], row["end"])):
            parts.token_segments.append(
                _Segment(base, len(positions), view.first_row + side, 1, int(target), scaled, task)
            )

    def _seq2seq(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        targets = row["targets"]
        sequence = len(parts.sequences)
        parts.sequences += row["sequences"]
        parts.second += [int(s) for s in row["second"]]
        if self.facts.kind == "encoder-decoder":
            parts.decoder.append(self._shift_right(targets))
            first = 0
        else:  # prompt + target in one sequence: position i predicts token i + 1
            first = len(row["sequences"][0]) - len(targets) - 1
        scaled = weight * self._scale(self.facts.vocabulary)
        smoothing = self.loss.label_smoothing
        parts.lm += [(sequence, first + i, int(t), scaled, task, smoothing) for i, t in enumerate(targets)]

    def _masked_lm(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        assert self.facts.mask is not None, "a masked LM task on a tokenizer without mask token"
        ids = row["sequences"][0]
        masked, chosen = mask_tokens(ids, self.facts.mask, *key)
        sequence = self._add_sequences(parts, {**row, "sequences": [masked]})
        scaled = weight * self._scale(self.facts.vocabulary)
        parts.lm += [(sequence, int(i), int(ids[i]), scaled, task, 0.0) for i in chosen]

    def _causal_lm(
        self, parts: _Parts, task: int, view: TaskView, row: dict[str, Any], weight: float, key: tuple[int, ...]
    ) -> None:
        sequence = self._add_sequences(parts, row)
        ids = row["sequences"][0]
        scaled = weight * self._scale(self.facts.vocabulary)
        parts.lm += [(sequence, i, int(ids[i + 1]), scaled, task, 0.0) for i in range(len(ids) - 1)]

    def _finish(self, parts: _Parts) -> Batch:
        ids, mask = _pad(parts.sequences, self.facts.pad_id)
        types = np.zeros_like(ids)
        for i, start in enumerate(parts.second):
            types[i, start : len(parts.sequences[i])] = 1
        decoder, decoder_mask = _pad(parts.decoder, self.facts.pad_id)
        width = decoder.shape[1] if self.facts.kind == "encoder-decoder" else ids.shape[1]
        token_segments = [s._replace(feature=s.feature + len(parts.pooled)) for s in parts.token_segments]
        segments = parts.pooled_segments + token_segments
        offsets = np.cumsum([0, *(s.features * s.rows for s in segments)])
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            token_type_ids=torch.from_numpy(types),
            decoder_input_ids=torch.from_numpy(decoder),
            decoder_attention_mask=torch.from_numpy(decoder_mask),
            pooled=_ints(parts.pooled),
            tokens=_ints([s * width + i for s, i in parts.tokens]),
            segments=_table([s[:4] for s in segments], 4),
            offsets=torch.from_numpy(offsets),
            target=_ints([s.target for s in segments]),
            weight=_floats([s.weight for s in segments]),
            segment_task=_ints([s.task for s in segments]),
            regression_scores=_table(parts.regression_scores, 2),
            regression_target=_floats([r[0] for r in parts.regression]),
            regression_weight=_floats([r[1] for r in parts.regression]),
            regression_task=_ints([r[2] for r in parts.regression]),
            lm_positions=_ints([s * width + i for s, i, *_ in parts.lm]),
            lm_target=_ints([t[2] for t in parts.lm]),
            lm_weight=_floats([t[3] for t in parts.lm]),
            lm_task=_ints([t[4] for t in parts.lm]),
            lm_smoothing=_floats([t[5] for t in parts.lm]),
            scores=int(offsets[-1]),
            tasks=len(self.views),
        )


_FAMILIES = {
    Family.CLASSIFICATION: Collator._classification,
    Family.PAIR_CLASSIFICATION: Collator._classification,
    Family.REGRESSION: Collator._regression,
    Family.MULTIPLE_CHOICE: Collator._multiple_choice,
    Family.SPAN: Collator._span,
    Family.SEQ2SEQ: Collator._seq2seq,
    Family.MASKED_LM: Collator._masked_lm,
    Family.CAUSAL_LM: Collator._causal_lm,
}


def _pad(sequences: list[NDArray[np.int32]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    width = max((len(s) for s in sequences), default=0)
    ids = np.full((len(sequences), width), pad_id, np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return ids, mask


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _table(values: Sequence[tuple[int, ...]], columns: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).reshape(-1, columns)
