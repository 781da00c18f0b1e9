"""Losses: every one a softmax over a segment, except squared error."""

from trainer.losses.segment import segment_cross_entropy, squared_error, vocabulary_cross_entropy

__all__ = ["segment_cross_entropy", "squared_error", "vocabulary_cross_entropy"]
