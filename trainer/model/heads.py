"""All small task heads as one parameter.

Owns: `HeadTable`, which says whose rows are where, and `PackedHead`, which scores. A head is a slice of rows, so every
rank touches the same two parameters in every micro-batch whatever tasks it holds, and exporting a head is a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import HeadsConfig
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

    @property
    def first_span_row(self) -> int:
        """Rows from here on are span heads; only they are applied to tokens."""
        return sum(head.size for head in self.heads if head.kind != "span")

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

    def __init__(self, table: HeadTable, hidden: int, std: float, seed: int, bias: bool = True) -> None:
        """Draw each head's rows from its own stream, so that they do not depend on which other tasks there are.

        Args:
            table: whose rows are where.
            hidden: size of a feature.
            std: standard deviation of the initial weights.
            seed: the run's.
            bias: whether there is one; the stock classifiers of decoders have none.
        """
        super().__init__()
        self.first_span_row = table.first_span_row
        rows = [seeded_normal(seed, f"head/{h.name}", (h.size, hidden), std) for h in table.heads]
        self.weight = nn.Parameter(torch.cat(rows))
        self.bias = nn.Parameter(torch.zeros(table.rows)) if bias else None

    def forward(
        self,
        pooled: Tensor,
        tokens: Tensor,
        pooled_scores: Tensor,
        token_scores: Tensor,
        regression_scores: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Score features against rows.

        Args:
            pooled: [P, H] pooled features.
            tokens: [Q, H] token features, scored by span rows only.
            pooled_scores: [E1, 2] (pooled feature, row).
            token_scores: [E2, 2] (token feature, row).
            regression_scores: [N, 2] (pooled feature, row).

        Returns:
            [E1 + E2] scores and [N] predictions. With nothing to score both are empty, and the backward pass still
            gives weight and bias a gradient of zeros.
        """
        split = self.first_span_row
        by_pooled = F.linear(pooled, self.weight[:split], None if self.bias is None else self.bias[:split])
        by_token = F.linear(tokens, self.weight[split:], None if self.bias is None else self.bias[split:])
        scores = torch.cat(
            [
                by_pooled[pooled_scores[:, 0], pooled_scores[:, 1]],
                by_token[token_scores[:, 0], token_scores[:, 1] - split],
            ]
        )
        return scores, by_pooled[regression_scores[:, 0], regression_scores[:, 1]]


def seeded_normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Normal draws that depend on nothing but their arguments: the same on every rank, world size and device."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std
