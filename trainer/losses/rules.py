"""What all fused losses have in common.

Owns: that all tensors are on one device, that only totals carry gradients, and what the backward does with the
gradients that the forward saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def real(x: Tensor) -> torch.dtype:
    """What arithmetic with `x` is in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def one_device(x: Tensor, **others: Tensor | None) -> None:
    """Fake kernels run for tensors of mixed devices too, and would return shapes without values.

    Raises:
        RuntimeError: one of `others` is not where `x` is.
    """
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{name}: is on {other.device}, the first argument on {x.device}")


def only_total(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Outputs but the first carry no gradient, and autograd need not make zeros for them."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A gradient saved for an upstream of 1, for the upstream there is.

    Where the graph is not kept the gradient has no other reader, so it is scaled in place: on a GPU by a kernel that
    returns at once when the factor is 1, without the host knowing.
    """
    traced = torch.compiler.is_compiling() or type(upstream) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    if gradient.is_cuda:
        torch.ops.sett.scale_(gradient, upstream)
        return gradient
    return gradient if float(upstream) == 1.0 else gradient.mul_(upstream)
