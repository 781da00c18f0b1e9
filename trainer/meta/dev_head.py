"""The dev head: a head for the end task that is fitted on frozen features and then thrown away.

Owns: `fit_converged`, the best head there is (a convex problem), and `fit_steps`, the few steps of TARTAN's code.

Why the best: at its optimum the loss does not change with the head, so its gradient by the body is the gradient of the
best loss that the body allows (the envelope theorem). A head short of it leaves directions in which any head could
improve by itself: its scale, the classes' frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.batch import Batch
from trainer.losses import Losses
from trainer.model.heads import Head
from trainer.model.stand_in import StandIn

_MOST_ITERATIONS = 200


@dataclass(frozen=True)
class Frozen:
    """A batch of the end task with the features of its rows, which do not change any more."""

    features: Tensor
    """[P + Q, H] float32."""
    batch: Batch


def fit_converged(parts: Sequence[Frozen], losses: Losses, head: Head, l2: float) -> StandIn:
    """The head with the smallest loss plus l2 / 2 * |weight|^2, over the parts of all ranks together.

    Every rank runs the same L-BFGS on sums over all of them, in fp64, and ends with the same head.

    Args:
        parts: this rank's, one or more; the weights in them sum to 1 over all ranks.
        losses: who computes.
        head: which rows are stood in for.
        l2: see above; the bias is free.
    """
    wide = [Frozen(part.features.double(), part.batch) for part in parts]
    features = wide[0].features
    weight = features.new_zeros(head.size, features.shape[1], requires_grad=True)
    bias = features.new_zeros(head.size, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MOST_ITERATIONS, tolerance_grad=1e-10, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        value = _loss_and_gradient(wide, losses, StandIn(weight, bias, head.first))
        with torch.no_grad():
            assert weight.grad is not None
            weight.grad += l2 * weight
            return value + 0.5 * l2 * weight.square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return StandIn(weight.detach().float(), bias.detach().float(), head.first)


def fit_steps(parts: Sequence[Frozen], losses: Losses, start: StandIn, steps: int, lr: float, decay: float) -> StandIn:
    """The head after `steps` steps of AdamW from `start`, with all parts of all ranks in each (TARTAN's code)."""
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    for _ in range(steps):
        _loss_and_gradient(parts, losses, StandIn(weight, bias, start.first_row))
        optimizer.step()
    return StandIn(weight.detach(), bias.detach(), start.first_row)


def _loss_and_gradient(parts: Sequence[Frozen], losses: Losses, head: StandIn) -> Tensor:
    """The loss over all ranks; its gradient goes to the head's tensors."""
    head.weight.grad = head.bias.grad = None
    loss = torch.stack([head.loss(losses, part.features, part.batch).total for part in parts]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    sums = torch.cat([loss.detach().view(1), *(_gradient(x).flatten() for x in (head.weight, head.bias))])
    dist.all_reduce(sums)
    head.weight.grad = sums[1 : 1 + head.weight.numel()].view_as(head.weight).clone()
    head.bias.grad = sums[1 + head.weight.numel() :].clone()
    return sums[0]


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
