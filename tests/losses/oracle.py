"""The losses once more, by a loop over segments that is plainly right, and how far from it a kernel may be.

The truth is this loop in float64 with autograd's gradients. The same loop on fp32, fp16 or bf16 tensors is "PyTorch in
the same storage type", in fp32 arithmetic: the error it makes itself is the measure of the error a kernel may make.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses.interface import IGNORE, Divergence, HeadLoss, SegmentLoss, VocabularyLoss


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cross_entropy(scores: Tensor, target: int, smoothing: float, z_loss: float) -> Tensor:
    if target == IGNORE:
        return scores.new_zeros(())
    log_p = F.log_softmax(scores, 0)
    loss = -log_p[target]
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean()
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(scores, 0) ** 2
    return loss


def _symmetric_kl(x: Tensor, y: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(x, 0), F.log_softmax(y, 0)
    p, q = log_p.exp(), log_q.exp()
    both_out = (x == -torch.inf) & (y == -torch.inf)
    return ((p - q) * torch.where(both_out, 0.0, log_p - log_q)).sum()


def _numbers(values: Tensor | None, count: int) -> list[float]:
    return [0.0] * count if values is None else values.tolist()


def _summed(
    inputs: tuple[Tensor, ...], losses: list[Tensor], weight: Tensor, task: Tensor | None, tasks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, losses and parts of the tasks. A weight of 0 leaves a loss out."""
    like = inputs[0]
    total = sum(x[:0].sum() for x in inputs)  # 0, but part of the graph even if every weight is 0
    by_task = like.new_zeros(0 if task is None else tasks)
    for i, (loss, w) in enumerate(zip(losses, weight.tolist(), strict=True)):
        if w == 0:
            continue
        total = total + w * loss
        if task is not None:
            by_task[int(task[i])] += (w * loss).detach()
    return total, torch.stack(losses).detach() if losses else like.new_zeros(0), by_task


def segment_cross_entropy(
    scores: Tensor, offsets: Tensor, target: Tensor, weight: Tensor, *, smoothing: Tensor | None = None,
    z_loss: float = 0.0, task: Tensor | None = None, tasks: int = 0, longest: int = -1,
) -> SegmentLoss:  # fmt: skip
    x = _real(scores)
    edges, smooth = offsets.tolist(), _numbers(smoothing, len(target))
    losses = [_cross_entropy(x[edges[g] : edges[g + 1]], int(target[g]), smooth[g], z_loss) for g in range(len(target))]
    total, loss, by_task = _summed((x,), losses, weight, task, tasks)
    return SegmentLoss(total, loss, x.new_zeros(0), by_task)


def segment_symmetric_kl(
    x: Tensor, y: Tensor, offsets: Tensor, weight: Tensor, *, task: Tensor | None = None, tasks: int = 0,
    longest: int = -1,
) -> SegmentLoss:  # fmt: skip
    p, q, edges = _real(x), _real(y), offsets.tolist()
    losses = [_symmetric_kl(p[a:b], q[a:b]) for a, b in pairwise(edges)]
    total, divergence, by_task = _summed((p, q), losses, weight, task, tasks)
    return SegmentLoss(total, p.new_zeros(0), divergence, by_task)


def segment_cross_entropy_kl(
    x: Tensor, y: Tensor, offsets: Tensor, target: Tensor, weight: Tensor, kl_weight: Tensor, **options: Any
) -> SegmentLoss:
    hard = segment_cross_entropy(x, offsets, target, weight, **options)
    tasks = {name: options[name] for name in ("task", "tasks") if name in options}
    soft = segment_symmetric_kl(x, y, offsets, kl_weight, **tasks)
    return SegmentLoss(hard.total + soft.total, hard.loss, soft.divergence, hard.by_task + soft.by_task)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return F.linear(_real(x), _real(weight), None if bias is None else _real(bias[part]))


def head_losses(
    features: Tensor, weight: Tensor, bias: Tensor | None, segment: Tensor, offsets: Tensor, target: Tensor,
    loss_weight: Tensor, point: Tensor, value: Tensor, *, scores: int, smoothing: Tensor | None = None,
    z_loss: float = 0.0, task: Tensor | None = None, tasks: int = 0,
) -> HeadLoss:  # fmt: skip
    smooth, losses, scored = _numbers(smoothing, len(target)), [], []
    for g, (feature, features_each, row, rows) in enumerate(segment.tolist()):
        part = slice(row, row + rows)
        mine = _linear(features[feature : feature + features_each], weight[part], bias, part).flatten()
        losses.append(_cross_entropy(mine, int(target[g]), smooth[g], z_loss))
        scored.append(mine.detach())
    for (feature, row), wanted in zip(point.tolist(), value.tolist(), strict=True):
        part = slice(row, row + 1)
        mine = _linear(features[feature], weight[part], bias, part)
        losses.append((mine[0] - wanted) ** 2)
        scored.append(mine.detach())
    total, loss, by_task = _summed((_real(features),), losses, loss_weight, task, tasks)
    return HeadLoss(total, loss, torch.cat(scored) if scored else _real(features).new_zeros(0), by_task)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, loss_weight: Tensor, *,
    smoothing: Tensor | None = None, softcap: float = 0.0, z_loss: float = 0.0,
) -> VocabularyLoss:  # fmt: skip
    # Logits, and capped logits, are stored in their type: so does a linear layer, and Gemma's soft-capping after it.
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = _real(logits)
    smooth = _numbers(smoothing, len(target))
    losses = [_cross_entropy(row, int(target[i]), smooth[i], z_loss) for i, row in enumerate(logits)]
    total, loss, _ = _summed((logits,), losses, loss_weight, None, 0)
    return VocabularyLoss(total, loss)


def _constant(side: Tensor, on: bool) -> Tensor:
    return side if on else side.detach()


def head_divergence(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, segment: Tensor, offsets: Tensor, loss_weight: Tensor,
    point: Tensor, *, gradient: str, scores: int,
) -> Divergence:  # fmt: skip
    found = []
    ranges = [*segment.tolist(), *([feature, 1, row, 1] for feature, row in point.tolist())]
    for g, (feature, features, row, rows) in enumerate(ranges):
        part = slice(row, row + rows)
        a, b = (
            _constant(_linear(side[feature : feature + features].to(weight), weight[part], bias, part).flatten(), on)
            for side, on in ((x, gradient != "y"), (y, gradient != "x"))
        )
        found.append(_symmetric_kl(a, b) if g < len(segment) else (a - b).square().sum())
    total, divergence, _ = _summed((_real(x),), found, loss_weight, None, 0)
    return Divergence(total, divergence)


def linear_symmetric_kl(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, loss_weight: Tensor, *, gradient: str,
    softcap: float = 0.0,
) -> Divergence:  # fmt: skip
    sides = []
    for side, on in ((x, gradient != "y"), (y, gradient != "x")):
        logits = F.linear(side.to(weight), weight, bias)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        sides.append(_constant(_real(logits), on))
    found = [_symmetric_kl(a, b) for a, b in zip(*sides, strict=True)]
    total, divergence, _ = _summed((sides[0],), found, loss_weight, None, 0)
    return Divergence(total, divergence)


# Runs.


class Run(NamedTuple):
    """What a loss function returned, and the gradients of its total."""

    result: Any
    gradient: dict[str, Tensor]


def run(function: Callable[..., Any], arguments: dict[str, Any], leaves: tuple[str, ...], upstream: float = 1.0) -> Run:
    """Call a loss function and go back from its total times `upstream` to `leaves`."""
    copies = {n: arguments[n].detach().clone().requires_grad_() for n in leaves if arguments[n] is not None}
    result = function(**{**arguments, **copies})
    (result.total * upstream).backward()
    return Run(result, {n: c.grad for n, c in copies.items()})


def in_double(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {n: a.double() if n in names and a is not None else a for n, a in arguments.items()}


# The rule. A kernel's largest error, against float64, is at most `factor` times the largest error of PyTorch in the
# same storage type, plus a small part of the largest true value.
#
# Losses are fp32 whatever the storage (fp64 for fp64) and no storage rounding may show in them: 2e-6 is 32 roundings
# of fp32, what a sum of exponentials over some thousand scores costs, and 2000 times less than one rounding to bf16.
# PyTorch's own error is often 0 by luck where there are few scores, so the absolute part may not be much smaller.
LOSS_FACTOR, GRADIENT_FACTOR = 3.0, 2.0
LOSS_PART = {torch.float64: 1e-13}
DEFAULT_LOSS_PART = 2e-6
# Gradients are rounded once to their storage: 4e-3 of a value in bf16, 5e-4 in fp16, 6e-8 in fp32. 1e-4 is below all
# roundings of bf16; a kernel that rounds p before it takes the 1 off is wrong by far more (test_tolerance_*).
GRADIENT_PART = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-5, torch.bfloat16: 1e-4}


def within(kernel: Tensor, same_type: Tensor, truth: Tensor, factor: float, part: float, name: str = "value") -> None:
    """Fail unless `kernel` keeps the rule above. Where the truth is infinite, `kernel` must be too."""
    assert kernel.shape == truth.shape, f"{name}: {tuple(kernel.shape)} is not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    finite = torch.isfinite(truth)
    assert torch.equal(kernel.double()[~finite], truth[~finite]), f"{name}: not infinite where it should be"
    gap = (kernel.double() - truth)[finite].abs()
    theirs = (same_type.double() - truth)[finite].abs()
    if gap.numel() == 0:
        return
    # No storage holds less than half of its smallest number.
    least = torch.finfo(kernel.dtype).smallest_normal * torch.finfo(kernel.dtype).eps
    bound = factor * float(theirs.max()) + part * float(truth[finite].abs().max()) + least
    assert float(gap.max()) <= bound, f"{name}: off by {float(gap.max()):.3e}, may be by {bound:.3e}"


def loss_within(kernel: Tensor, same_type: Tensor, truth: Tensor, name: str = "loss", slack: float = 1.0) -> None:
    part = slack * LOSS_PART.get(kernel.dtype, DEFAULT_LOSS_PART)
    within(kernel, same_type, truth, LOSS_FACTOR, part, name)


def gradient_within(
    kernel: Tensor, same_type: Tensor, truth: Tensor, name: str = "gradient", slack: float = 1.0
) -> None:
    within(kernel, same_type, truth, GRADIENT_FACTOR, slack * GRADIENT_PART[kernel.dtype], name)


def slack_of(function: Callable[..., Any]) -> float:
    """The reference sums scores one after another in fp32, which costs digits that the kernels keep."""
    return 32.0 if function.__module__ == "trainer.losses.reference" else 1.0


def rounded_once(gradient: Tensor, truth: Tensor, case: dict[str, Any], slack: float = 1.0) -> None:
    """Each score's gradient is its true value, rounded once; small ones keep their digits."""
    storage, edges = gradient.dtype, case["offsets"].tolist()
    least = torch.finfo(storage).smallest_normal * torch.finfo(storage).eps
    noise = slack * (1e-13 if storage == torch.float64 else 2e-6)
    # Smoothing is a part of each gradient that p may take away again. The reference, and the truth, take 1 off p.
    one = float(slack > 1 or storage == torch.float64)
    parts = (torch.tensor(_numbers(case.get("smoothing"), len(edges) - 1)) + one) * case["weight"].abs()
    for a, b, part in zip(edges[:-1], edges[1:], parts.tolist(), strict=True):
        if a == b:
            continue
        true, gap = truth[a:b], (gradient[a:b].double() - truth[a:b]).abs()
        size = float(true.abs().max()) + part
        over = gap - 1.01 * torch.finfo(storage).eps / 2 * true.abs() - noise * size - least
        assert float(over.max()) <= 0, f"scores {a} to {b}: off by {float(gap[over.argmax()]):.3e}"


def check(
    function: Callable[..., Any], truth: Callable[..., Any], arguments: dict[str, Any], leaves: tuple[str, ...],
) -> tuple[Run, Run]:  # fmt: skip
    """Everything `function` returns keeps the rule; by_task adds up to the total. Returns its run and the true one."""
    mine = run(function, arguments, leaves)
    theirs = run(truth, arguments, leaves)
    exact = run(truth, in_double(arguments, leaves), leaves)
    slack = slack_of(function)
    for name in exact.result._fields:
        a, b, c = (getattr(r.result, name) for r in (mine, theirs, exact))
        assert a.requires_grad == (name == "total"), f"only the total carries gradients, not {name}"
        loss_within(a.detach(), b.detach(), c.detach(), name, slack)
    for name, gradient in mine.gradient.items():
        assert gradient.dtype == arguments[name].dtype
        gradient_within(gradient, theirs.gradient[name], exact.gradient[name], f"gradient of {name}", slack)
    by_task = getattr(mine.result, "by_task", ())
    if len(by_task):
        gap = abs(float(by_task.double().sum()) - float(mine.result.total.detach()))
        assert gap <= LOSS_PART.get(by_task.dtype, DEFAULT_LOSS_PART) * float(by_task.double().abs().sum())
    return mine, exact
