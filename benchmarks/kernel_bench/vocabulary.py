"""The case of a vocabulary head: linear layer and cross-entropy, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import rivals
from kernel_bench.measure import Case, Contender
from kernel_bench.setting import Setting, compiled, product_ceiling

OURS, EAGER, EAGER_FP32 = "ours", "eager", "eager, logits.float()"


@dataclass(frozen=True)
class Shape:
    """N states of size H against V words."""

    rows: int
    hidden: int
    words: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} x {self.words}, {str(self.dtype)[6:]}"


SHAPES = {
    "cpu": [Shape(256, 1024, 50265, torch.bfloat16), Shape(256, 1024, 50265, torch.float32)],
    "cuda": [Shape(8192, 4096, 128256, torch.bfloat16), Shape(16384, 1024, 50265, torch.bfloat16)],
}
SMALL = Shape(8, 64, 1000, torch.bfloat16)


def linear_ce(setting: Setting) -> Iterator[Case]:
    """Linear cross-entropy at the shapes of this device."""
    for shape in SHAPES[setting.device.type]:
        yield case(setting, shape)


def case(setting: Setting, shape: Shape) -> Case:
    """Linear cross-entropy at one shape."""
    hidden = setting.randn(shape.rows, shape.hidden, dtype=shape.dtype).requires_grad_()
    weight = setting.randn(shape.words, shape.hidden, dtype=shape.dtype, scale=0.02, seed=1).requires_grad_()
    target = setting.randint(shape.words, shape.rows)
    loss_weight = torch.full((shape.rows,), 1 / shape.rows, device=setting.device)

    def ours() -> Tensor:
        return setting.losses.linear_cross_entropy(hidden, weight, None, target, loss_weight).total

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    def upcast(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def contender(name: str, loss_of: Callable[[], Tensor], against: str = OURS) -> Contender:
        def run() -> Tensor:
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        def gradient() -> Tensor:
            assert hidden.grad is not None
            return hidden.grad

        return Contender(name, run, [hidden, weight], gradient=gradient, against=against)

    plain = compiled(upcast)
    contenders = [contender(OURS, ours, ""), contender(EAGER, eager)]
    memory = [OURS, EAGER]
    if shape.dtype != torch.float32:
        contenders.append(contender(EAGER_FP32, lambda: upcast(hidden, weight)))
        memory.append(EAGER_FP32)
    contenders.append(contender("torch.compile", lambda: torch.as_tensor(plain(hidden, weight))))
    if setting.cuda:
        chunked = compiled(upcast, **{"auto_chunker.enable": True})
        contenders.append(contender("torch.compile, auto_chunker", lambda: torch.as_tensor(chunked(hidden, weight))))
    functions, absent = rivals.of_states(setting)
    for name, function in functions.items():

        def loss_of(function: rivals.Linear = function) -> Tensor:
            return function(hidden, weight, target)

        contenders.append(contender(name, loss_of))
        if not setting.cuda:
            memory.append(name)
    return Case(
        "linear-ce", str(shape), contenders,
        unit="FLOP", work=6 * shape.rows * shape.hidden * shape.words, counted="6 N H V: three matrix products",
        ceiling=product_ceiling(hidden, weight), tolerance=1e-4 if shape.dtype == torch.float32 else 1e-2,
        absent=absent, memory=memory,
    )  # fmt: skip
