"""Symmetric KL divergences of two passes through the same heads (R3F, arXiv 2008.03156).

Owns: `head_divergence`, for all small heads, and the op `sett::linear_symmetric_kl`, for a vocabulary head without its
logits. The second works like `trainer.losses.linear`: rows go through in chunks, a chunk's logits of both sides become
their gradients in one kernel, and those its part of the gradients of states and weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.losses.interface import Divergence, Side
from trainer.losses.linear import WeightGradient, rows_of_a_chunk, soften, spread
from trainer.losses.rules import one_device, only_total, real, scaled


def head_divergence(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, segment: Tensor, offsets: Tensor, loss_weight: Tensor,
    point: Tensor, gradient: Side, scores: int, symmetric_kl: Callable[..., Any],
) -> Divergence:  # fmt: skip
    """See `Losses.head_divergence`; `symmetric_kl` is one of `Losses.segment_symmetric_kl`."""
    wide = real(x)
    places = _places(segment, offsets, point, scores)
    with torch.autocast(x.device.type, enabled=False):  # scores in few digits would hide the noise
        of_x, of_y = (
            _scores(side.to(wide), weight.to(wide), None if bias is None else bias.to(wide), places, on)
            for side, on in ((x, gradient != "y"), (y, gradient != "x"))
        )
        of_segments = symmetric_kl(of_x[:scores], of_y[:scores], offsets, loss_weight[: len(segment)])
        squares = (of_x[scores:] - of_y[scores:]).square()
        total = of_segments.total + (loss_weight[len(segment) :] * squares).sum()
    return Divergence(total, torch.cat([of_segments.divergence, squares.detach()]))


def _places(segment: Tensor, offsets: Tensor, point: Tensor, scores: int) -> tuple[Tensor, Tensor]:
    """[E + N] feature and [E + N] row of each score."""
    numbers = torch.arange(len(segment), device=segment.device)
    of = torch.repeat_interleave(numbers, offsets.diff(), output_size=scores)
    place = torch.arange(scores, device=segment.device) - offsets[of]
    first_feature, features, first_row, rows = segment[of].unbind(1)
    feature = torch.cat([first_feature + torch.where(features > 1, place, 0), point[:, 0]])
    return feature, torch.cat([first_row + torch.where(rows > 1, place, 0), point[:, 1]])


def _scores(features: Tensor, weight: Tensor, bias: Tensor | None, places: tuple[Tensor, Tensor], on: bool) -> Tensor:
    """[E + N] scores: those of all rows for all features, and of these the wanted ones. No host waits for a shape."""
    with nullcontext() if on else torch.no_grad():
        table = torch.nn.functional.linear(features, weight, bias)
        return table.view(-1)[places[0] * weight.shape[0] + places[1]]


def register() -> None:
    """Define the op; the ops of the compiled library must be there."""
    torch.library.custom_op("sett::linear_symmetric_kl", _forward, mutates_args=(), schema=_SCHEMA)
    torch.library.register_fake("sett::linear_symmetric_kl", _fake)
    torch.library.register_autograd("sett::linear_symmetric_kl", _backward, setup_context=_save)


_SCHEMA = (
    "(Tensor x, Tensor y, Tensor weight, Tensor? bias, Tensor loss_weight, float softcap, bool of_x, bool of_y, "
    "bool of_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, loss_weight: Tensor, softcap: float, of_x: bool,
    of_y: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, divergences [N], and the gradients of x, y, weight and bias (empty where not asked for).

    The weight's gradient comes from the sides whose own is asked for.
    """
    _check(x, y, weight, bias, loss_weight)
    rows, words, chunk = x.shape[0], weight.shape[0], rows_of_a_chunk(x)
    divergence = x.new_empty(rows, dtype=real(x))
    grads = [side.new_empty(rows if on else 0, side.shape[1]) for side, on in ((x, of_x), (y, of_y))]
    grad_weight = WeightGradient(weight, bias, False) if of_weight and (of_x or of_y) else None
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        sides = [_Side(side[part], weight, bias, softcap) for side in (x, y)]
        offsets, (spaced,) = spread(sides[0].rows, sides[0].pitch, words, (loss_weight[part], 0.0))
        _, _, found, _, *slopes = torch.ops.sett.segment_losses(
            sides[0].flat, sides[1].flat, offsets, None, None, spaced, None, 0.0, None, 0, words, of_x or of_y
        )
        divergence[part] = found[::2] if sides[0].pitch > words else found
        for k, on in enumerate((of_x, of_y)):
            if on:
                gradient = sides[k].through(slopes[k])
                torch.mm(gradient, weight, out=grads[k][part])
                if grad_weight is not None:
                    grad_weight.add(gradient, (x, y)[k][part])
    total = torch.where(loss_weight == 0, 0.0, divergence * loss_weight).sum()
    its_weight, its_bias = grad_weight.result() if grad_weight else (x.new_empty(0, 0), x.new_empty(0))
    return total, divergence, grads[0], grads[1], its_weight, its_bias


class _Side:
    """The logits of a chunk of rows, spread out so that rows are aligned."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> None:
        self.rows, self.words = states.shape[0], weight.shape[0]
        self.pitch = -(-self.words // 64) * 64
        buffer = states.new_zeros(self.rows, self.pitch)
        logits = buffer[:, : self.words]
        if bias is None:
            torch.mm(states, weight.t(), out=logits)
        else:
            torch.addmm(bias, states, weight.t(), out=logits)
        self.slope = soften(logits, softcap) if softcap else None
        self.flat = buffer.view(-1)

    def through(self, gradient: Tensor) -> Tensor:
        """[c, V] gradient of what the matrix product gave, from that of the logits."""
        found = gradient.view(self.rows, self.pitch)[:, : self.words]
        return found if self.slope is None else found * self.slope.to(found.dtype)


def _check(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, loss_weight: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise RuntimeError(f"x and weight: must be [N, H] and [V, H], are {list(x.shape)} and {list(weight.shape)}")
    one_device(x, y=y, weight=weight, bias=bias, loss_weight=loss_weight)
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("y", y, x.dtype, tuple(x.shape)),
        ("weight", weight, x.dtype, tuple(weight.shape)),
        ("bias", bias, x.dtype, (weight.shape[0],)),
        ("loss_weight", loss_weight, torch.float32, (x.shape[0],)),
    ]
    for name, tensor, dtype, shape in expected:
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            raise RuntimeError(f"{name}: must be {dtype} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}")


def _fake(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, loss_weight: Tensor, softcap: float, of_x: bool,
    of_y: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    one_device(x, y=y, weight=weight, bias=bias, loss_weight=loss_weight)
    rows, dtype, asked = x.shape[0], real(x), of_weight and (of_x or of_y)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows if of_x else 0, x.shape[1]),
        y.new_empty(rows if of_y else 0, y.shape[1]),
        x.new_empty(weight.shape if asked else (0, 0)),
        x.new_empty(weight.shape[0] if asked and bias is not None else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_total(ctx, output)
    ctx.asked = inputs[6:9]
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, upstream: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    of_x, of_y, of_weight = ctx.asked
    asked = (of_x, of_y, of_weight and (of_x or of_y), of_weight and (of_x or of_y))
    if upstream is None:
        return (None,) * 9
    wanted = zip(ctx.saved_tensors, asked, ctx.needs_input_grad[:4], strict=True)
    return *(scaled(gradient, upstream) if on and needed else None for gradient, on, needed in wanted), *[None] * 5
