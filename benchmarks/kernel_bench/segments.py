"""The cases of logits that are given: cross-entropy, and cross-entropy with symmetric KL (R3F)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import rivals
from kernel_bench.measure import Case, Contender
from kernel_bench.setting import Setting, compiled, copy_ceiling

OURS, OURS_IN_PLACE = "ours", "ours, in place"
_SHAPES = {"cpu": (512, 128256), "cuda": (8192, 128256)}


class Logits:
    """Logits of N rows over a vocabulary, their targets, and what our functions want to know of them."""

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.bfloat16) -> None:
        self.setting = setting
        self.rows, self.words = rows, words = _SHAPES[setting.device.type]
        self.x = setting.randn(rows, words, dtype=dtype, scale=2).requires_grad_()
        self.target = setting.randint(words, rows)
        self.weight = torch.full((rows,), 1 / rows, device=setting.device)
        self.offsets = torch.arange(rows + 1, device=setting.device) * words
        self.bytes = self.x.numel() * self.x.element_size()
        self.shape = f"{rows} x {words}, {str(dtype)[6:]}"

    def contender(
        self,
        name: str,
        loss_of: Callable[[], Tensor],
        leaves: list[Tensor],
        against: str = OURS,
        prepare: Callable[[], None] | None = None,
    ) -> Contender:
        def run() -> Tensor:
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        def gradient() -> Tensor:
            found = leaves[0].grad
            assert found is not None
            return found

        return Contender(name, run, leaves, prepare=prepare, gradient=gradient, against=against)

    def in_place(self) -> Contender:
        """The op that a vocabulary head uses; logits are put back before each run, outside of the timed region."""
        buffer = torch.empty_like(self.x).detach()

        def run() -> Tensor:
            total, _ = torch.ops.sett.segment_cross_entropy_(
                buffer.view(-1), self.offsets, self.target, self.weight, None, 0.0, self.words
            )
            return torch.as_tensor(total)

        def prepare() -> None:
            buffer.copy_(self.x.detach())

        return Contender(OURS_IN_PLACE, run, prepare=prepare, gradient=lambda: buffer, against=OURS)


def segment_ce(setting: Setting) -> Iterator[Case]:
    """Cross-entropy of given logits."""
    data = Logits(setting)
    x, target = data.x, data.target

    def ours() -> Tensor:
        return setting.losses.segment_cross_entropy(
            x.view(-1), data.offsets, target, data.weight, longest=data.words
        ).total

    def upcast(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target)

    compiled_loss = compiled(upcast)
    contenders = [
        data.contender(OURS, ours, [x], against=""),
        *([data.in_place()] if setting.fused else []),
        data.contender("eager, logits.float()", lambda: upcast(x), [x]),
        data.contender(f"eager, {str(x.dtype)[6:]} logits", lambda: F.cross_entropy(x, target), [x]),
        data.contender("torch.compile of logits.float()", lambda: torch.as_tensor(compiled_loss(x)), [x]),
    ]
    functions, absent = rivals.of_logits(setting)
    for name, function in functions.items():
        # Some put the gradient where the logits were: everyone gets the same logits, of his own.
        own = x.detach().clone().requires_grad_()

        def prepare(own: Tensor = own) -> None:
            own.detach().copy_(x.detach())

        def loss_of(function: rivals.Given = function, own: Tensor = own) -> Tensor:
            return function(own, target)

        contenders.append(data.contender(name, loss_of, [own], prepare=prepare))
    yield Case(
        "segment-ce", data.shape, contenders,
        unit="B", work=2 * data.bytes, counted="logits read once, their gradient written once",
        ceiling=copy_ceiling(setting), tolerance=1e-2, absent=absent,
    )  # fmt: skip


def ce_kl(setting: Setting) -> Iterator[Case]:
    """Cross-entropy of clean logits and their symmetric KL divergence to noised ones, gradients to both."""
    data = Logits(setting)
    x, target = data.x, data.target
    noise = setting.randn(data.rows, data.words, dtype=x.dtype, scale=0.5, seed=7)
    y = (x.detach() + noise).requires_grad_()
    del noise

    def ours() -> Tensor:
        return setting.losses.segment_cross_entropy_kl(
            x.view(-1), y.view(-1), data.offsets, target, data.weight, data.weight, longest=data.words
        ).total

    def r3f(clean: Tensor, noised: Tensor) -> Tensor:
        # fairseq, criterions/sentence_prediction_r3f.py
        kl = F.kl_div(
            F.log_softmax(noised, dim=-1, dtype=torch.float32),
            F.softmax(clean, dim=-1, dtype=torch.float32),
            reduction="sum",
        ) + F.kl_div(
            F.log_softmax(clean, dim=-1, dtype=torch.float32),
            F.softmax(noised, dim=-1, dtype=torch.float32),
            reduction="sum",
        )
        return F.cross_entropy(clean.float(), target) + kl / clean.shape[0]

    compiled_loss = compiled(r3f)
    yield Case(
        "ce-kl", data.shape,
        [
            data.contender(OURS, ours, [x, y], against=""),
            data.contender("eager, as fairseq's R3F", lambda: r3f(x, y), [x, y]),
            data.contender("torch.compile of that", lambda: torch.as_tensor(compiled_loss(x, y)), [x, y]),
        ],
        unit="B", work=4 * data.bytes, counted="both logits read once, both gradients written once",
        ceiling=copy_ceiling(setting), tolerance=1e-2,
    )  # fmt: skip
