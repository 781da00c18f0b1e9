"""Micro-batches as tensors: rows of the cache, padded, with their scores, segments, targets and weights."""

from trainer.batch.batch import Batch
from trainer.batch.collate import Collator, TaskView

__all__ = ["Batch", "Collator", "TaskView"]
