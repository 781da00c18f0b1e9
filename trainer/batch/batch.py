"""A micro-batch as tensors: the contract between collating and the model.

Owns: `Batch`. Every loss is a softmax over a segment of scores (design: "every loss is a softmax over a segment"):
the batch says which scores exist, how they fall into segments, which score of each segment is the target, and how
much each segment weighs. The weight holds everything that is known before the forward: `1/log n`, the task's weight
and the window's denominator. Absent kinds are empty tensors, never None, so every rank runs the same modules.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """S sequences of at most L tokens (right-padded), and what is asked of them. All index tensors are int64."""

    input_ids: Tensor
    """[S, L] int64."""
    attention_mask: Tensor
    """[S, L] int64, 1 on tokens."""
    token_type_ids: Tensor
    """[S, L] int64, 1 on the second text."""
    decoder_input_ids: Tensor
    """[S, D] int64 for encoder-decoders (already shifted right); [0, 0] for other models."""
    decoder_attention_mask: Tensor
    """[S, D] int64 or [0, 0]."""

    pooled: Tensor
    """[P] sequence of each pooled feature (the model's own pooling: first token, last token or end token)."""
    tokens: Tensor
    """[Q] flat position s * L + i of each token feature (span heads); for encoder-decoders s * D + i."""

    segments: Tensor
    """[G, 4] (first feature, features, first row, rows): one feature by rows of the packed head (classification), or
    features by one row (choices, spans). Features are counted over cat(pooled, tokens)."""
    offsets: Tensor
    """[G + 1] ascending from 0 to `scores`; segment g has the scores from offsets[g] up to offsets[g + 1]."""
    target: Tensor
    """[G] position of the target inside its segment."""
    weight: Tensor
    """[G] float32 weight of the segment's cross-entropy in the loss of the window."""
    segment_task: Tensor
    """[G] task index, for the per-task loss."""

    regression_scores: Tensor
    """[N, 2] (pooled feature, row of the packed head)."""
    regression_target: Tensor
    """[N] float32, in [0, 1]."""
    regression_weight: Tensor
    """[N] float32 weight of the squared error."""
    regression_task: Tensor
    """[N] task index."""

    lm_positions: Tensor
    """[T] flat position (s * L + i, in the decoder s * D + i) whose hidden state predicts `lm_target`."""
    lm_target: Tensor
    """[T] token id."""
    lm_weight: Tensor
    """[T] float32 weight of the token's cross-entropy."""
    lm_task: Tensor
    """[T] task index."""
    lm_smoothing: Tensor
    """[T] float32 label smoothing of the token."""

    scores: int
    """How many scores the segments have together."""
    tasks: int
    """How many tasks the mixture has."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`, asynchronously where the host side is pinned."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Batch(**moved)

    @property
    def real_tokens(self) -> int:
        """Tokens without padding, encoder and decoder side together."""
        return int(self.attention_mask.sum()) + int(self.decoder_attention_mask.sum())

    @property
    def padded_tokens(self) -> int:
        return self.attention_mask.numel() + self.decoder_attention_mask.numel()
