"""All small task heads as one parameter.

Owns: `HeadTable`, which says whose rows are where, and `PackedHead`, which scores and compares. A head is a slice of
rows, so every rank touches the same two parameters in every micro-batch whatever tasks it holds, and exporting a head
is a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import torch
from torch import Tensor, nn

from trainer.batch.batch import Batch
from trainer.config.schema import HeadsConfig
from trainer.losses.interface import Divergence, HeadLoss, Losses, Side
from trainer.model.spectral import normalised
from trainer.tasks.spec import Family, TaskSpec

HeadKind = Literal["classification", "regression", "multiple_choice", "span"]

_KINDS: dict[Family, HeadKind] = {
    Family.CLASSIFICATION: "classification",
    Family.PAIR_CLASSIFICATION: "classification",
    Family.REGRESSION: "regression",
    Family.MULTIPLE_CHOICE: "multiple_choice",
    Family.SPAN: "span",
}
"""The other families use the model's own output layer."""


@dataclass(frozen=True)
class Head:
    """Rows `first` to `first + size` of the packed head."""

    name: str
    """The task's name, or `shared:KIND`, which no task can be called."""
    first: int
    size: int
    kind: HeadKind
    tasks: tuple[str, ...]
    """Tasks that score with these rows."""


@dataclass(frozen=True)
class HeadTable:
    """Where each task's rows are: by head name, span heads last, whatever the order of the tasks in the recipe."""

    heads: tuple[Head, ...]

    @classmethod
    def of(cls, tasks: Sequence[TaskSpec], heads: HeadsConfig) -> HeadTable:
        """The table of a mixture; with the default sharing all multiple-choice tasks have one head, and all span."""
        shared = {"multiple_choice": heads.share_multiple_choice, "span": heads.share_span}
        users: dict[tuple[bool, str], list[TaskSpec]] = {}
        for task in sorted(tasks, key=lambda t: t.name):
            if kind := _KINDS.get(task.family):
                name = f"shared:{kind}" if shared.get(kind) else task.name
                users.setdefault((kind == "span", name), []).append(task)
        table, first = [], 0
        for (is_span, name), group in sorted(users.items(), key=lambda item: item[0]):
            size = 2 if is_span else max(group[0].classes, 1)
            table.append(Head(name, first, size, _KINDS[group[0].family], tuple(t.name for t in group)))
            first += size
        return cls(tuple(table))

    @property
    def rows(self) -> int:
        return sum(head.size for head in self.heads)

    @cached_property
    def by_task(self) -> dict[str, Head]:
        """The head of each task that has one."""
        return {task: head for head in self.heads for task in head.tasks}

    def head(self, task: str) -> Head:
        return self.by_task[task]

    def first_row(self, task: str) -> int:
        return self.by_task[task].first


class PackedHead(nn.Module):
    """One linear layer whose rows are all heads of a `HeadTable`."""

    start: Tensor
    sizes: Tensor

    def __init__(
        self, table: HeadTable, hidden: int, std: float, seed: int, losses: Losses, bias: bool = True,
        spectral: bool = False,
    ) -> None:  # fmt: skip
        """Draw each head's rows from its own stream, so that they do not depend on which other tasks there are.

        Args:
            table: whose rows are where.
            hidden: size of a feature.
            std: standard deviation of the initial weights.
            seed: the run's.
            losses: who computes.
            bias: whether there is one; the stock classifiers of decoders have none.
            spectral: whether heads are divided by their largest singular values.
        """
        super().__init__()
        self.losses = losses
        rows = [seeded_normal(seed, f"head/{h.name}", (h.size, hidden), std) for h in table.heads]
        self.weight = nn.Parameter(torch.cat(rows))
        self.bias = nn.Parameter(torch.zeros(table.rows)) if bias else None
        self.spectral = spectral
        if spectral:
            start, sizes = spectral_facts(table, seed)
            self.register_buffer("start", start, persistent=False)
            self.register_buffer("sizes", sizes, persistent=False)

    def rows(self) -> Tensor:
        """[R, H] what features are multiplied by."""
        return normalised(self.weight, self.start, self.sizes) if self.spectral else self.weight

    @overload
    def forward(self, features: Tensor, batch: Batch) -> HeadLoss: ...

    @overload
    def forward(self, features: Tensor, batch: Batch, other: Tensor, gradient: Side) -> Divergence: ...

    def forward(
        self, features: Tensor, batch: Batch, other: Tensor | None = None, gradient: Side = "both"
    ) -> HeadLoss | Divergence:
        """The losses of a batch's segments and regression rows, or how far a second pass is from the first.

        Args:
            features: [P + Q, H] pooled features, then token features.
            batch: what is scored, and against what. With nothing to score the backward pass still gives weight and
                bias a gradient, of zeros.
            other: [P + Q, H] the second pass's.
            gradient: which pass is differentiated.
        """
        if other is not None:
            return self.losses.head_divergence(
                features,
                other,
                self.rows(),
                self.bias,
                batch.segments,
                batch.offsets,
                torch.cat([batch.weight, batch.regression_weight]),
                batch.regression_scores,
                gradient=gradient,
                scores=batch.scores,
            )
        return self.losses.head_losses(
            features,
            self.rows(),
            self.bias,
            batch.segments,
            batch.offsets,
            batch.target,
            torch.cat([batch.weight, batch.regression_weight]),
            batch.regression_scores,
            batch.regression_target,
            scores=batch.scores,
            task=torch.cat([batch.segment_task, batch.regression_task]),
            tasks=batch.tasks,
        )


def spectral_facts(table: HeadTable, seed: int) -> tuple[Tensor, Tensor]:
    """What `trainer.model.spectral.normalised` wants beside the weights: starts [R], sizes [T]."""
    starts = [seeded_normal(seed, f"spectral/{head.name}", (head.size,), 1.0) for head in table.heads]
    return torch.cat(starts), torch.tensor([head.size for head in table.heads])


def seeded_normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Normal draws that depend on nothing but their arguments: the same on every rank, world size and device."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std
