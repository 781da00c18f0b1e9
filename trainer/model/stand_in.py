"""A head that stands in for one task's, without being a parameter of the model.

Owns: `StandIn`: what a held-out loss is seen through (`trainer.meta.dev_head` fits it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batch.batch import Batch
from trainer.losses.interface import HeadLoss, Losses


@dataclass(frozen=True)
class StandIn:
    """Rows in place of those of one task in the packed head."""

    weight: Tensor
    """[rows, H]."""
    bias: Tensor
    """[rows]."""
    first_row: int
    """Of the task in the packed head, from which a batch's rows are counted."""

    def loss(self, losses: Losses, features: Tensor, batch: Batch) -> HeadLoss:
        """The loss of a batch of nothing but the task.

        Args:
            losses: who computes.
            features: [P + Q, H] as the packed head sees them.
            batch: what is scored, and against what.
        """
        return losses.head_losses(
            features.to(self.weight.dtype),
            self.weight,
            self.bias,
            batch.segments - batch.segments.new_tensor([0, 0, self.first_row, 0]),
            batch.offsets,
            batch.target,
            torch.cat([batch.weight, batch.regression_weight]),
            batch.regression_scores - batch.regression_scores.new_tensor([0, self.first_row]),
            batch.regression_target,
            scores=batch.scores,
        )
