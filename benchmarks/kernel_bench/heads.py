"""The cases of small heads: many of them at once, and many of them against few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.measure import Case, Contender
from kernel_bench.setting import Setting, compiled, copy_ceiling
from trainer.losses.interface import IGNORE

ROWS, HIDDEN = 512, 768
OURS, LOOP = "ours", "eager loop over heads"


class Heads:
    """Rows of features, each with one head of a packed table. Weights are `1 / log classes / rows`."""

    def __init__(self, setting: Setting, sizes: Sequence[int], used: int, dtype: torch.dtype) -> None:
        """Draw the data.

        Args:
            setting: where.
            sizes: classes of each head of the table.
            used: how many heads, spread over the table, have rows.
            dtype: of features and table.
        """
        self.setting, self.sizes = setting, list(sizes)
        self.features = setting.randn(ROWS, HIDDEN, dtype=dtype).requires_grad_()
        self.weight = setting.randn(sum(sizes), HIDDEN, dtype=dtype, scale=0.02, seed=1).requires_grad_()
        self.bias = setting.randn(sum(sizes), dtype=dtype, scale=0.02, seed=2).requires_grad_()
        device = setting.device
        heads = [i * len(self.sizes) // used for i in range(used)]
        order = torch.randperm(ROWS, device=device, generator=setting.generator(3)) % used
        self.head = torch.tensor(heads, device=device)[order]
        size = torch.tensor(self.sizes, device=device)
        first = size.cumsum(0) - size
        self.classes = size[self.head]
        row = torch.arange(ROWS, device=device)
        one = torch.ones_like(row)
        self.segment = torch.stack([row, one, first[self.head], self.classes], 1).contiguous()
        self.offsets = torch.cat([row[:1], self.classes.cumsum(0)])
        self.target = (setting.randint(2**31, ROWS) % self.classes).contiguous()
        self.loss_weight = 1 / self.classes.float().log() / ROWS
        self.nothing = torch.zeros(0, 2, dtype=torch.int64, device=device)
        self.no_value = torch.zeros(0, device=device)

    @property
    def bytes(self) -> int:
        """Of the table, read once, and its gradient, written once."""
        return 2 * (self.weight.numel() + self.bias.numel()) * self.weight.element_size()

    def ours(self, name: str, losses: Callable[..., object], against: str = "") -> Contender:
        scores = int(self.offsets[-1])  # known to a trainer beforehand

        def run() -> Tensor:
            total: Tensor = losses(
                self.features, self.weight, self.bias, self.segment, self.offsets, self.target, self.loss_weight,
                self.nothing, self.no_value, scores=scores,
            ).total  # type: ignore[attr-defined]  # fmt: skip
            total.backward()  # type: ignore[no-untyped-call]
            return total

        return self._contender(name, run, [self.weight, self.bias], against)

    def loop(self, name: str, against: str, once: bool = False, compile: bool = False) -> Contender:
        """A module per head, as multi-task models have: rows selected, linear layer, cross-entropy, weight.

        Args:
            name: the contender's.
            against: ours.
            once: features are brought into the order of the heads all at once.
            compile: under torch.compile.
        """
        start = 0
        weights, biases, rows, targets, scales = [], [], [], [], []
        for number, size in enumerate(self.sizes):
            mine = (self.head == number).nonzero().squeeze(1)
            if len(mine):
                weights.append(self.weight.detach()[start : start + size].clone().requires_grad_())
                biases.append(self.bias.detach()[start : start + size].clone().requires_grad_())
                rows.append(mine)
                targets.append(self.target[mine])
                scales.append(1 / math.log(size) / ROWS)
            start += size
        order, counts = torch.cat(rows), [len(mine) for mine in rows]

        def loss_of(features: Tensor) -> Tensor:
            parts = (
                torch.split(features.index_select(0, order), counts)
                if once
                else [features.index_select(0, mine) for mine in rows]
            )
            return torch.stack(
                [
                    F.cross_entropy(F.linear(x, w, b).float(), t, reduction="sum") * scale
                    for x, w, b, t, scale in zip(parts, weights, biases, targets, scales, strict=True)
                ]
            ).sum()

        forward = compiled(loss_of) if compile else loss_of

        def run() -> Tensor:
            loss: Tensor = forward(self.features)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return self._contender(name, run, [*weights, *biases], against)

    def padded(self, name: str, against: str, compile: bool = False) -> Contender:
        """One batched product over heads, rows and classes padded to the most that any head has."""
        heads, classes = len(self.sizes), -(-max(self.sizes) // 8) * 8
        most = int(torch.bincount(self.head).max())
        like = self.weight.detach()
        weight = like.new_zeros(heads, classes, HIDDEN)
        bias = like.new_full((heads, 1, classes), -math.inf)
        place = torch.zeros(heads * most, dtype=torch.int64, device=like.device)
        target = torch.full_like(place, IGNORE)
        scale = torch.zeros(heads * most, device=like.device)
        start = 0
        for number, size in enumerate(self.sizes):
            weight[number, :size] = like[start : start + size]
            bias[number, 0, :size] = self.bias.detach()[start : start + size]
            mine = (self.head == number).nonzero().squeeze(1)
            slots = slice(number * most, number * most + len(mine))
            place[slots], target[slots], scale[slots] = mine, self.target[mine], self.loss_weight[mine]
            start += size
        weight.requires_grad_()
        bias.requires_grad_()

        def loss_of(features: Tensor) -> Tensor:
            x = features.index_select(0, place).view(heads, most, HIDDEN)
            scores = torch.baddbmm(bias, x, weight.transpose(1, 2))
            loss = F.cross_entropy(scores.flatten(0, 1).float(), target, reduction="none")
            return (loss * scale).sum()

        forward = compiled(loss_of) if compile else loss_of

        def run() -> Tensor:
            loss: Tensor = forward(self.features)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return self._contender(name, run, [weight, bias], against)

    def _contender(self, name: str, run: Callable[[], Tensor], leaves: list[Tensor], against: str) -> Contender:
        def gradient() -> Tensor:
            assert self.features.grad is not None
            return self.features.grad

        return Contender(name, run, [self.features, *leaves], gradient=gradient, against=against, work=self.bytes)


def ragged(heads: int = 50, fewest: int = 2, most: int = 151) -> list[int]:
    """Classes of heads, from the fewest to the most in even steps, in mixed order."""
    sizes = [fewest + round(i * (most - fewest) / (heads - 1)) for i in range(heads)]
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(0)).tolist()
    return [sizes[i] for i in order]


def heads(setting: Setting) -> Iterator[Case]:
    """Fifty heads at once."""
    for dtype in [torch.bfloat16, torch.float32] if setting.cuda else [torch.float32]:
        data = Heads(setting, ragged(), 50, dtype)
        contenders = [
            data.ours(OURS, setting.losses.head_losses),
            data.loop(LOOP, OURS),
            data.loop("eager loop, rows sorted at once", OURS, once=True),
            data.loop("torch.compile of that loop", OURS, once=True, compile=True),
            data.padded("padded torch.bmm", OURS),
            data.padded("torch.compile of padded bmm", OURS, compile=True),
        ]
        if setting.fused:
            from trainer.losses import ReferenceLosses

            contenders.append(data.ours("our reference implementation", ReferenceLosses().head_losses, OURS))
        yield Case(
            "heads", f"50 heads of 2 to 151 classes, {ROWS} rows x {HIDDEN}, {str(dtype)[6:]}", contenders,
            unit="B", work=data.bytes, counted="table read once, its gradient written once",
            ceiling=copy_ceiling(setting), tolerance=_tolerance(dtype), clock="wall",
        )  # fmt: skip


def heads_count(setting: Setting) -> Iterator[Case]:
    """Five hundred heads against five, scored by the same number of rows."""
    for dtype in [torch.bfloat16, torch.float32] if setting.cuda else [torch.float32]:
        ours = setting.losses.head_losses
        few_used, all_used = Heads(setting, [4] * 500, 5, dtype), Heads(setting, [4] * 500, 500, dtype)
        few = Heads(setting, [4] * 5, 5, dtype)
        names = "ours: 500 heads, all used", "ours: 500 heads, 5 used", "ours: 5 heads"
        loops = "eager loop: 500 heads", "eager loop: 5 heads"
        yield Case(
            "heads-count", f"heads of 4 classes, {ROWS} rows x {HIDDEN}, {str(dtype)[6:]}",
            [
                all_used.ours(names[0], ours), few_used.ours(names[1], ours), few.ours(names[2], ours),
                all_used.loop(loops[0], names[0]), few.loop(loops[1], names[2]),
            ],
            unit="B", work=all_used.bytes, counted="table read once, its gradient written once",
            ceiling=copy_ceiling(setting), tolerance=_tolerance(dtype), clock="wall",
            pairs=[
                ("ours, a table of 500 heads: all used / 5 used", names[0], names[1]),
                ("ours: 500 heads / 5 heads", names[0], names[2]),
                ("eager loop: 500 heads / 5 heads", *loops),
            ],
        )  # fmt: skip


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 1e-2
