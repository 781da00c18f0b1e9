"""The fused linear cross-entropy: the losses of a vocabulary head without its logits.

Owns: the op `sett::linear_cross_entropy`. Rows go through in chunks: logits of the chunk, then their losses and, in
place, their gradient (a kernel), then the chunk's part of the gradients of states and weight. That is three matrix
products, like a plain head, because the rows' weights are known in the forward; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.losses.interface import IGNORE
from trainer.losses.rules import one_device, only_total, real, scaled

# A chunk's part of the weight's gradient is added to an fp32 accumulator: 8 V H bytes moved for 2 c V H operations. To
# stay with the matrix products that wants c >= 4 x (operations a byte) of the machine: 263 on an H100, about 25 on a
# CPU in fp32. In bf16 a CPU's product comes rounded and apart, 16 V H bytes, and is several times as fast. More rows
# only cost memory, c x V scores.
_ROWS_CUDA = 2048
_ROWS_CPU = {torch.float32: 128, torch.float64: 128, torch.bfloat16: 512, torch.float16: 512}
_PITCH = 64
"""Rows of logits start on multiples of this many scores: matrix products want aligned rows, and 50265 is odd."""


def check_whole(weight: Tensor) -> None:
    """Say so where ZeRO-3 has not gathered a weight.

    Raises:
        RuntimeError: the weight has no elements.
    """
    if weight.numel() == 0:
        raise RuntimeError(
            "weight: has no elements. Under ZeRO-3 a parameter is whole only inside the forward of the module that "
            "holds it directly: call the loss there"
        )


def register() -> None:
    """Define the op; the ops of the compiled library must be there."""
    torch.library.custom_op("sett::linear_cross_entropy", _forward, mutates_args=(), schema=_SCHEMA)
    torch.library.register_fake("sett::linear_cross_entropy", _fake)
    torch.library.register_autograd("sett::linear_cross_entropy", _backward, setup_context=_save)


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor loss_weight, Tensor? smoothing, float softcap, "
    "float z_loss, bool hidden_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def rows_of_a_chunk(hidden: Tensor) -> int:
    """How many rows' logits exist at a time."""
    return _ROWS_CUDA if hidden.is_cuda else _ROWS_CPU[hidden.dtype]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss_weight: Tensor,
    smoothing: Tensor | None,
    softcap: float,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total, losses [N], and the gradients of hidden, weight and bias (empty where not asked for)."""
    _check(hidden, weight, bias, target, loss_weight, smoothing)
    rows, words = hidden.shape[0], weight.shape[0]
    chunk = rows_of_a_chunk(hidden)
    buffer = hidden.new_empty(min(rows, chunk), -(-words // _PITCH) * _PITCH)
    loss = hidden.new_empty(rows, dtype=real(hidden))
    grad_hidden = hidden.new_empty(rows if hidden_gradient else 0, hidden.shape[1])
    grad_weight = WeightGradient(weight, bias, rows <= chunk) if weight_gradient else None
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        x, scores = hidden[part], buffer[: min(chunk, rows - start)]
        logits = scores[:, :words]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        slope = soften(logits, softcap) if softcap else None
        smooth = None if smoothing is None else smoothing[part]
        gradient = hidden_gradient or weight_gradient
        loss[part] = _losses(scores, words, target[part], loss_weight[part], smooth, z_loss, gradient)
        if gradient and slope is not None:
            logits.mul_(slope)
        if hidden_gradient:
            torch.mm(logits, weight, out=grad_hidden[part])
        if grad_weight is not None:
            grad_weight.add(logits, x)
    total = torch.where(loss_weight == 0, 0.0, loss * loss_weight).sum()
    of_weight, of_bias = grad_weight.result() if grad_weight else (hidden.new_empty(0, 0), hidden.new_empty(0))
    return total, loss, grad_hidden, of_weight, of_bias


def spread(rows: int, pitch: int, words: int, *values: tuple[Tensor, float]) -> tuple[Tensor, list[Tensor]]:
    """Offsets of `words` scores on every multiple of `pitch`, and a value a segment.

    What lies between two rows is a segment of its own, and `values` says what its value is.
    """
    device = values[0][0].device
    offsets = torch.arange(rows + 1, device=device) * pitch
    if pitch == words:
        return offsets, [tensor for tensor, _ in values]
    offsets = torch.cat([torch.stack([offsets[:-1], offsets[:-1] + words], 1).flatten(), offsets[-1:]])
    return offsets, [torch.stack([tensor, torch.full_like(tensor, gap)], 1).flatten() for tensor, gap in values]


def soften(logits: Tensor, softcap: float) -> Tensor:
    """Put `softcap * tanh(z / softcap)` in the place of z; returns its derivative, in fp32 where it has few digits."""
    bounded = torch.tanh(logits.to(real(logits)) / softcap)
    logits.copy_(bounded * softcap)
    return 1 - bounded.square()


def _losses(
    scores: Tensor,
    words: int,
    target: Tensor,
    weight: Tensor,
    smoothing: Tensor | None,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """[c] losses of the first `words` columns of [c, pitch] scores, which become their gradient if that is wanted."""
    rows, pitch = scores.shape
    smooth = [] if smoothing is None else [(smoothing, 0.0)]
    offsets, (target, weight, *spaced) = spread(rows, pitch, words, (target, IGNORE), (weight, 0.0), *smooth)
    smoothing = spaced[0] if spaced else None
    flat = scores.view(-1)
    loss: Tensor
    if gradient:
        _, loss = torch.ops.sett.segment_cross_entropy_(flat, offsets, target, weight, smoothing, z_loss, words)
    else:
        _, loss, *_ = torch.ops.sett.segment_losses(
            flat, None, offsets, target, weight, None, smoothing, z_loss, None, 0, words, False
        )
    return loss[::2] if pitch > words else loss


class WeightGradient:
    """The gradient of weight and bias: of one chunk as the product gives it, of several summed in fp32 (fp64 for fp64).

    On a CPU the product of two half-precision chunks is itself rounded to that type before it is added.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, alone: bool) -> None:
        self._like, self._has_bias = weight, bias is not None
        self._of_weight: Tensor | None = None
        self._of_bias = weight.new_zeros(weight.shape[0] if self._has_bias else 0, dtype=real(weight))
        self._alone = alone

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add `gradient.T @ x` for [c, V] gradients of logits and [c, H] states."""
        if self._has_bias:
            self._of_bias += gradient.sum(0, dtype=self._of_bias.dtype)
        wide = real(x)
        if self._of_weight is None:
            mixed = x.is_cuda and x.dtype != wide and not self._alone
            product = torch.mm(gradient.t(), x, out_dtype=wide) if mixed else torch.mm(gradient.t(), x)
            self._of_weight = product if self._alone else product.to(wide)
        elif x.dtype == wide:
            self._of_weight.addmm_(gradient.t(), x)
        elif x.is_cuda:
            torch.addmm(self._of_weight, gradient.t(), x, out_dtype=wide, out=self._of_weight)
        else:
            self._of_weight += torch.mm(gradient.t(), x)

    def result(self) -> tuple[Tensor, Tensor]:
        of_weight = torch.zeros_like(self._like) if self._of_weight is None else self._of_weight.to(self._like.dtype)
        return of_weight, self._of_bias.to(self._like.dtype)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, loss_weight: Tensor, smoothing: Tensor | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"hidden and weight: must be [N, H] and [V, H], are {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype not in _ROWS_CPU:
        raise RuntimeError(f"hidden: must be float32, float16, bfloat16 or float64, is {hidden.dtype}")
    one_device(hidden, weight=weight, bias=bias, target=target, loss_weight=loss_weight, smoothing=smoothing)
    rows, words = hidden.shape[0], weight.shape[0]
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("weight", weight, hidden.dtype, (words, hidden.shape[1])),
        ("bias", bias, hidden.dtype, (words,)),
        ("target", target, torch.int64, (rows,)),
        ("loss_weight", loss_weight, torch.float32, (rows,)),
        ("smoothing", smoothing, torch.float32, (rows,)),
    ]
    for name, tensor, dtype, shape in expected:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name}: must be {dtype}, is {tensor.dtype}")
        if tensor.shape != shape:
            raise RuntimeError(f"{name}: must have shape {list(shape)}, has {list(tensor.shape)}")
    if not hidden.is_cuda:  # there the kernel finds it, without anyone waiting
        wrong = ((target != IGNORE) & ((target < 0) | (target >= words))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise RuntimeError(f"target: of row {row} is {int(target[row])}, must be in [0, {words}) or {IGNORE}")


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss_weight: Tensor,
    smoothing: Tensor | None,
    softcap: float,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    one_device(hidden, weight=weight, bias=bias, target=target, loss_weight=loss_weight, smoothing=smoothing)
    rows, dtype = hidden.shape[0], real(hidden)
    biased = weight_gradient and bias is not None
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if hidden_gradient else 0, hidden.shape[1]),
        hidden.new_empty(weight.shape if weight_gradient else (0, 0)),
        hidden.new_empty(weight.shape[0] if biased else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_total(ctx, output)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, upstream: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 10
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *(scaled(gradient, upstream) if needed else None for gradient, needed in wanted), *[None] * 7
