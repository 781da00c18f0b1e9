"""The losses as custom ops: forward and gradient in one pass, in CUDA C++ or in C++ for the CPU (`kernels/csrc`).

Owns: `load`, which compiles and registers the ops, and the functions of `trainer.losses.interface.Losses` over them.
Each op computes its gradients in the forward, where the scores are at hand, for an upstream gradient of 1; the backward
only multiplies them by the upstream scalar, which is 1 unless a loss scaler is at work. That is why weights go into the
ops and only totals carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.losses import build, divergence, linear
from trainer.losses.interface import Divergence, HeadLoss, SegmentLoss, Side, VocabularyLoss
from trainer.losses.rules import one_device, only_total, real, scaled

_loaded = False


def load(say: Callable[[str], None] = lambda text: None) -> None:
    """Compile the kernels unless that is done already, and register their ops with torch.

    Args:
        say: gets a line when a build starts and one when it has ended.

    Raises:
        KernelBuildError: they cannot be compiled here.
    """
    global _loaded
    if _loaded:
        return
    torch.ops.load_library(build.library(say=say))  # type: ignore[no-untyped-call]
    for name, fake, save, backward in (
        ("segment_losses", _segment_fake, _segment_save, _segment_backward),
        ("head_losses", _head_fake, _head_save, _head_backward),
    ):
        torch.library.register_fake(f"sett::{name}", fake)
        torch.library.register_autograd(f"sett::{name}", backward, setup_context=save)
    torch.library.register_fake("sett::segment_cross_entropy_", _in_place_fake)
    torch.library.register_fake("sett::scale_", lambda x, scale: None)
    linear.register()
    divergence.register()
    _loaded = True


def isa() -> str:
    """The instruction set of the CPU kernels: `generic`, `avx2` or `avx512`."""
    return str(torch.ops.sett.isa())


def check_faults() -> None:
    """Raise what the ops that have run on GPUs found wrong; on the CPU an op raises by itself.

    Raises:
        RuntimeError: an index was out of range; the message says which.
    """
    torch.ops.sett.check_faults()


def segment_cross_entropy(
    scores: Tensor,
    offsets: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    smoothing: Tensor | None = None,
    z_loss: float = 0.0,
    task: Tensor | None = None,
    tasks: int = 0,
    longest: int = -1,
) -> SegmentLoss:
    """See `Losses.segment_cross_entropy`."""
    (weight,), unit = _normalised(scores.dtype, weight)
    return _segments(scores, None, offsets, target, weight, None, smoothing, z_loss, task, tasks, longest, unit)


def segment_symmetric_kl(
    x: Tensor,
    y: Tensor,
    offsets: Tensor,
    weight: Tensor,
    *,
    task: Tensor | None = None,
    tasks: int = 0,
    longest: int = -1,
) -> SegmentLoss:
    """See `Losses.segment_symmetric_kl`."""
    (weight,), unit = _normalised(x.dtype, weight)
    return _segments(x, y, offsets, None, None, weight, None, 0.0, task, tasks, longest, unit)


def segment_cross_entropy_kl(
    x: Tensor,
    y: Tensor,
    offsets: Tensor,
    target: Tensor,
    weight: Tensor,
    kl_weight: Tensor,
    *,
    smoothing: Tensor | None = None,
    z_loss: float = 0.0,
    task: Tensor | None = None,
    tasks: int = 0,
    longest: int = -1,
) -> SegmentLoss:
    """See `Losses.segment_cross_entropy_kl`."""
    (weight, kl_weight), unit = _normalised(x.dtype, weight, kl_weight)
    return _segments(x, y, offsets, target, weight, kl_weight, smoothing, z_loss, task, tasks, longest, unit)


def head_losses(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segment: Tensor,
    offsets: Tensor,
    target: Tensor,
    loss_weight: Tensor,
    point: Tensor,
    value: Tensor,
    *,
    scores: int,
    smoothing: Tensor | None = None,
    z_loss: float = 0.0,
    task: Tensor | None = None,
    tasks: int = 0,
) -> HeadLoss:
    """See `Losses.head_losses`."""
    features, weight, bias = _autocast(features, weight, bias)
    linear.check_whole(weight)
    (loss_weight,), unit = _normalised(features.dtype, loss_weight)
    gradient = torch.is_grad_enabled() and _any_needed(features, weight, bias)
    total, loss, scored, by_task, *_ = torch.ops.sett.head_losses(
        features, weight, bias, segment, offsets, target, loss_weight, smoothing, point, value, z_loss, task, tasks,
        scores, gradient,
    )  # fmt: skip
    return HeadLoss(_times(total, unit), loss.detach(), scored.detach(), _times(by_task.detach(), unit))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss_weight: Tensor,
    *,
    smoothing: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> VocabularyLoss:
    """See `Losses.linear_cross_entropy`. The logits of a chunk of rows exist at a time, never those of all."""
    hidden, weight, bias = _autocast(hidden, weight, bias)
    linear.check_whole(weight)
    (loss_weight,), unit = _normalised(hidden.dtype, loss_weight)
    grads = torch.is_grad_enabled()
    total, loss, *_ = torch.ops.sett.linear_cross_entropy(
        hidden, weight, bias, target, loss_weight, smoothing, softcap, z_loss,
        grads and hidden.requires_grad, grads and _any_needed(weight, bias),
    )  # fmt: skip
    return VocabularyLoss(_times(total, unit), loss.detach())


def head_divergence(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segment: Tensor,
    offsets: Tensor,
    loss_weight: Tensor,
    point: Tensor,
    *,
    gradient: Side,
    scores: int,
) -> Divergence:
    """See `Losses.head_divergence`."""
    linear.check_whole(weight)
    return divergence.head_divergence(
        x, y, weight, bias, segment, offsets, loss_weight, point, gradient, scores, segment_symmetric_kl
    )


def linear_symmetric_kl(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    *,
    gradient: Side,
    softcap: float = 0.0,
) -> Divergence:
    """See `Losses.linear_symmetric_kl`. The logits of a chunk of rows exist at a time, never those of all."""
    (x, weight, bias), y = _autocast(x, weight, bias), _autocast(y, weight, None)[0]
    linear.check_whole(weight)
    (loss_weight,), unit = _normalised(x.dtype, loss_weight)
    grads = torch.is_grad_enabled() and _any_needed(x, y, weight, bias)
    total, found, *_ = torch.ops.sett.linear_symmetric_kl(
        x, y, weight, bias, loss_weight, softcap, grads and gradient != "y", grads and gradient != "x",
        grads and _any_needed(weight, bias),
    )  # fmt: skip
    return Divergence(_times(total, unit), found.detach())


class FusedLosses:
    """The functions of this module as one object, which models hold: modules can be neither copied nor pickled."""

    name = "fused"
    segment_cross_entropy = staticmethod(segment_cross_entropy)
    segment_symmetric_kl = staticmethod(segment_symmetric_kl)
    segment_cross_entropy_kl = staticmethod(segment_cross_entropy_kl)
    head_losses = staticmethod(head_losses)
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    head_divergence = staticmethod(head_divergence)
    linear_symmetric_kl = staticmethod(linear_symmetric_kl)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a linear layer does to its operands under `torch.autocast`; nothing outside of it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _normalised(dtype: torch.dtype, *weights: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Weights in a range where fp16 gradients neither vanish nor overflow, and the unit they are in; None for 1.

    A window of 10,000 rows has weights of 1e-4; times a probability that is below fp16's smallest number, and a loss
    scaler comes too late: gradients are stored in the forward. In this unit the largest weight is about 2^10, which
    leaves five bits for sums above it.
    """
    if dtype != torch.float16:
        return list(weights), None
    largest = torch.stack([w.abs().amax() if w.numel() else w.new_zeros(()) for w in weights]).amax()
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 10)  # a power of two: dividing by it rounds nothing
    return [w / unit for w in weights], unit


def _any_needed(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _times(x: Tensor, unit: Tensor | None) -> Tensor:
    """`x * unit`, where a unit of None is 1."""
    return x if unit is None else x * unit


def _segments(
    x: Tensor,
    y: Tensor | None,
    offsets: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    kl_weight: Tensor | None,
    smoothing: Tensor | None,
    z_loss: float,
    task: Tensor | None,
    tasks: int,
    longest: int,
    unit: Tensor | None,
) -> SegmentLoss:
    gradient = torch.is_grad_enabled() and _any_needed(x, y)
    total, loss, apart, by_task, *_ = torch.ops.sett.segment_losses(
        x, y, offsets, target, weight, kl_weight, smoothing, z_loss, task, tasks, longest, gradient
    )
    return SegmentLoss(_times(total, unit), loss.detach(), apart.detach(), _times(by_task.detach(), unit))


# Fake kernels: the shapes and types of what the ops return.


def _segment_fake(
    x: Tensor, y: Any, offsets: Tensor, target: Any, weight: Any, kl_weight: Any, smoothing: Any, z_loss: float,
    task: Any, tasks: int, longest: int, gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    one_device(
        x, y=y, offsets=offsets, target=target, weight=weight, kl_weight=kl_weight, smoothing=smoothing, task=task
    )
    segments, dtype = offsets.shape[0] - 1, real(x)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(0 if target is None else segments, dtype=dtype),
        x.new_empty(0 if y is None else segments, dtype=dtype),
        x.new_empty(0 if task is None else tasks, dtype=dtype),
        x.new_empty(x.shape[0] if gradient else 0),
        x.new_empty(x.shape[0] if gradient and y is not None else 0),
    )


def _in_place_fake(
    x: Tensor, offsets: Tensor, target: Tensor, weight: Tensor, smoothing: Any, z_loss: float, longest: int
) -> tuple[Tensor, ...]:
    one_device(x, offsets=offsets, target=target, weight=weight, smoothing=smoothing)
    return x.new_empty((), dtype=real(x)), x.new_empty(offsets.shape[0] - 1, dtype=real(x))


def _head_fake(
    features: Tensor, weight: Tensor, bias: Any, segment: Tensor, offsets: Tensor, target: Tensor, loss_weight: Tensor,
    smoothing: Any, point: Tensor, value: Tensor, z_loss: float, task: Any, tasks: int, scores: int, gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    one_device(
        features, weight=weight, bias=bias, segment=segment, offsets=offsets, target=target, loss_weight=loss_weight,
        smoothing=smoothing, point=point, value=value, task=task,
    )  # fmt: skip
    dtype = real(features)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(segment.shape[0] + point.shape[0], dtype=dtype),
        features.new_empty(scores + point.shape[0], dtype=dtype),
        features.new_empty(0 if task is None else tasks, dtype=dtype),
        features.new_empty(features.shape[0] if gradient else 0, features.shape[1]),
        features.new_empty(weight.shape[0] if gradient else 0, features.shape[1]),
        features.new_empty(weight.shape[0] if gradient and bias is not None else 0),
    )


# Autograd.


def _segment_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_total(ctx, output)
    ctx.has_y = inputs[1] is not None
    ctx.save_for_backward(output[4], output[5])


def _segment_backward(ctx: Any, upstream: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_y = ctx.saved_tensors
    x = scaled(grad_x, upstream) if upstream is not None and ctx.needs_input_grad[0] else None
    y = scaled(grad_y, upstream) if upstream is not None and ctx.has_y and ctx.needs_input_grad[1] else None
    return x, y, *[None] * 10


def _head_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_total(ctx, output)
    ctx.save_for_backward(*output[4:])


def _head_backward(ctx: Any, upstream: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        grads = [scaled(gradient, upstream) if needed else None for gradient, needed in wanted]
    return *grads, *[None] * 12
