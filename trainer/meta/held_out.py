"""The held-out gradient: where the shared parameters should go for the end task, on rows nobody trains on.

Owns: `HeldOut`: the held-out rows as batches of all ranks, the dev head fitted for them, and the gradient through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Batch, Collator, TaskView
from trainer.batch.collate import ModelFacts
from trainer.cache.views import SplitView
from trainer.config.schema import LossConfig, MetaConfig
from trainer.engine.alignment import HeldOutGradient
from trainer.engine.session import Session
from trainer.meta.dev_head import Frozen, fit_converged, fit_steps
from trainer.model.heads import Head, seeded_normal
from trainer.model.stand_in import StandIn
from trainer.window.dealing import deal, length_batches
from trainer.window.hashing import mix


@dataclass(frozen=True)
class Seen:
    """What a refresh saw on the way."""

    loss: float
    """Mean loss of a held-out row (of a token for language models) through the dev head."""
    accuracy: float | None
    """Share of held-out segments that the dev head gets right; None for regression and language models."""
    norm: float
    """Of the held-out gradient."""


class Shard:
    """Some rows of the end task, to be drawn from and collated with the loss that evaluation reports."""

    def __init__(
        self, rows: SplitView, units: np.ndarray, views: list[TaskView], end: int, facts: ModelFacts, loss: LossConfig,
        seed: int, salt: int,
    ) -> None:  # fmt: skip
        plain = loss.model_copy(update={"scale": "none", "label_smoothing": 0.0})
        mine = [replace(view, rows=rows, loss_weight=1.0) if t == end else view for t, view in enumerate(views)]
        self.collator = Collator(mine, facts, plain, seed)
        self.rows = rows
        self.units = units
        self.end = end
        self.seed, self.salt = seed, salt

    def batches(self, size: int, number: int, budget: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's batches of draw `number` of `size` rows; their weights sum to 1 over all ranks."""
        drawn = np.sort(np.argsort(mix(self.seed, self.salt, number, np.arange(len(self.rows))))[:size])
        lengths, counts = (self.rows.column(name)[drawn].astype(np.int64) for name in ("length", "count"))
        weights = np.zeros(len(self.collator.views))
        found = []
        for part, counted in deal(length_batches(lengths, counts, budget), rank, world_size):
            weights[self.end] = 1.0 / self.units[drawn].sum() if counted else 0.0
            rows = drawn[part]
            tasks, draws = np.full(len(rows), self.end, np.int64), np.full(len(rows), number, np.int64)
            found.append(self.collator(tasks, rows, draws, weights))
        return found


class HeldOut:
    """The gradient of the end task's held-out loss.

    Args:
        session: the engine.
        config: of the method.
        held_out: the rows.
        train: those the task is trained on; a head may be fitted on them.
        head: the task's; None where it uses the model's own output layer.
        budget: tokens of a batch.
        seed: of the run.
    """

    def __init__(
        self, session: Session, config: MetaConfig, held_out: Shard, train: Shard, head: Head | None, budget: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.session = session
        self.config = config
        self.held_out = held_out
        self.train = train
        self.head = head if config.head.fit != "training" else None
        self.budget = budget
        self.seed = seed

    def refresh(self, number: int, gradient: HeldOutGradient) -> Seen:
        """Set `gradient` to that of the held-out loss, without dropout. Every rank calls it.

        Args:
            number: of the refresh: decides which rows are drawn, how text is masked, how a fresh head starts.
            gradient: what is set.
        """
        engine = self.session.engine
        engine.eval()
        batches = self._batches(self.held_out, number)
        head = None if self.head is None else self._stand_in(self.head, batches, number)
        sums = torch.zeros(3, dtype=torch.float64, device=self.session.device)  # loss, right, segments

        def loss_of(batch: Batch) -> Tensor:
            output = gradient.forward(batch, stand_in=head)
            sums[0] += output["loss"].detach()
            sums[1:] += _right(output["scores"], batch)
            return output["loss"]

        gradient.collect((lambda batch=batch: loss_of(batch)) for batch in batches)  # type: ignore[misc]
        engine.train()
        loss, right, segments = self.session.all_sum(sums).tolist()
        return Seen(loss, right / segments if segments else None, gradient.norm())

    def _batches(self, shard: Shard, number: int) -> list[Batch]:
        size = self.config.held_out.batch or len(self.held_out.rows)
        found = shard.batches(size, number, self.budget, self.session.rank, self.session.world_size)
        return [batch.to(self.session.device) for batch in found]

    def _stand_in(self, head: Head, batches: list[Batch], number: int) -> StandIn | Callable[[Tensor], StandIn]:
        """The fitted head, or how to fit it on the way: one forward does for both where a rank's rows are one batch."""
        if self.config.head.rows == "held_out" and len(batches) == 1:
            return lambda features: self._fit_aside(head, Frozen(features.float(), batches[0]), number)
        rows = batches if self.config.head.rows == "held_out" else self._batches(self.train, number)
        return self._fit(head, list(self._frozen(rows)), number)

    def _fit_aside(self, head: Head, part: Frozen, number: int) -> StandIn:
        """Inside the model's forward, whose precision is not the fit's."""
        with torch.autocast(self.session.device.type, enabled=False):
            return self._fit(head, [part], number)

    def _fit(self, head: Head, parts: list[Frozen], number: int) -> StandIn:
        config, losses = self.config.head, self.session.model.losses
        if config.fit == "converged":
            return fit_converged(parts, losses, head, config.l2)
        hidden = parts[0].features.shape[1]
        weight = seeded_normal(self.seed, f"dev-head/{number}", (head.size, hidden), self.session.model.head_std)
        start = StandIn(weight.to(self.session.device), parts[0].features.new_zeros(head.size), head.first)
        return fit_steps(parts, losses, start, config.steps, config.lr, config.weight_decay)

    def _frozen(self, batches: list[Batch]) -> Iterator[Frozen]:
        for batch in batches:
            with torch.no_grad():
                yield Frozen(self.session.engine(batch)["features"].float(), batch)


def _right(scores: Tensor, batch: Batch) -> Tensor:
    """[2] segments whose target has the largest score, and segments, weightless ones left out."""
    counted = batch.weight > 0
    if not len(counted):
        return torch.zeros(2, dtype=torch.float64, device=scores.device)
    lengths = batch.offsets.diff()
    tops = torch.segment_reduce(scores.float(), "max", lengths=lengths)
    right = scores.float()[batch.offsets[:-1] + batch.target] >= tops
    return torch.stack([(right & counted).sum(), counted.sum()]).double()
