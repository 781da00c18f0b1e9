"""The losses in plain PyTorch: the oracle of the fused kernels, and what runs where those cannot be compiled.

Owns: the loss functions' meaning, in the form of `trainer.losses.interface.Losses`. The arithmetic is in fp32 (fp64 for
fp64 input) whatever the storage type. Everything is differentiable by autograd and nothing is fast.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses import divergence
from trainer.losses.interface import IGNORE, Divergence, HeadLoss, SegmentLoss, Side, VocabularyLoss


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _weighted(weight: Tensor, loss: Tensor) -> Tensor:
    """weight x loss, and 0 for a weight of 0 whatever the loss: 0 x inf must not be NaN."""
    return torch.where(weight == 0, 0.0, weight) * torch.where(weight == 0, 0.0, loss)


def _by_task(terms: Tensor, task: Tensor | None, tasks: int) -> Tensor:
    if task is None:
        return terms.new_zeros(0)
    return terms.new_zeros(tasks).index_add(0, task, terms.detach())


class _Segments:
    """Which segment each score is in, and sums over them."""

    def __init__(self, offsets: Tensor, elements: int) -> None:
        lengths = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != elements or bool((lengths < 0).any()):
            raise ValueError(f"offsets: must ascend from 0 to the number of scores, {elements}")
        self.offsets, self.lengths, self.count = offsets, lengths, len(lengths)
        numbers = torch.arange(self.count, device=offsets.device)
        self.of = torch.repeat_interleave(numbers, lengths, output_size=elements)

    def top(self, values: Tensor) -> Tensor:
        """[G] largest score, without gradient; 0 for a segment that is empty or all -inf."""
        low = torch.full((self.count,), -torch.inf, dtype=values.dtype, device=values.device)
        top = low.scatter_reduce(0, self.of, values.detach(), "amax")
        return torch.where(top == -torch.inf, 0.0, top)

    def sum(self, values: Tensor) -> Tensor:
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).index_add(0, self.of, values)

    def log_softmax(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[E] log-probabilities and [G] log of the sum of exponentials."""
        top = self.top(values)
        # Subtracting first keeps the digits under a common offset.
        shifted = values - top[self.of]
        log_sum = torch.log(self.sum(torch.exp(shifted)))
        return shifted - log_sum[self.of], log_sum + top

    def check_target(self, target: Tensor) -> None:
        kept = target != IGNORE
        wrong = kept & ((target < 0) | (target >= self.lengths))
        if bool(wrong.any()):
            where = int(wrong.nonzero()[0])
            raise ValueError(
                f"target: segment {where} has {int(self.lengths[where])} scores, its target is {int(target[where])}"
            )

    def cross_entropy(self, scores: Tensor, target: Tensor, smoothing: Tensor | None, z_loss: float) -> Tensor:
        self.check_target(target)
        log_p, lse = self.log_softmax(_upcast(scores))
        kept = target != IGNORE
        at = torch.where(kept, self.offsets[:-1] + target, 0)
        nll = -log_p[at] if len(log_p) else log_p.new_zeros(self.count) + log_p.sum()  # with a graph to go back
        if smoothing is not None:
            smoothing = smoothing.to(nll.dtype)
            uniform = -self.sum(log_p) / self.lengths.clamp(min=1)
            nll = torch.where(smoothing == 0, nll, (1 - smoothing) * nll + smoothing * uniform)
        loss = nll + z_loss * lse.square() if z_loss else nll
        return torch.where(kept, loss, 0.0)

    def symmetric_kl(self, x: Tensor, y: Tensor) -> Tensor:
        log_p, _ = self.log_softmax(_upcast(x))
        log_q, _ = self.log_softmax(_upcast(y))
        p, q = log_p.exp(), log_q.exp()
        gap = torch.where(log_p == log_q, 0.0, log_p - log_q)  # a score of -inf on both sides has no part
        return self.sum((p - q) * gap)


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
    loss = _Segments(offsets, scores.numel()).cross_entropy(scores, target, smoothing, z_loss)
    terms = _weighted(weight, loss)
    return SegmentLoss(terms.sum(), loss.detach(), loss.new_zeros(0), _by_task(terms, task, tasks))


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
    """See `Losses.segment_symmetric_kl`. In fp32 its value is rounding noise where x and y are nearly the same."""
    found = _Segments(offsets, x.numel()).symmetric_kl(x, y)
    terms = _weighted(weight, found)
    return SegmentLoss(terms.sum(), found.new_zeros(0), found.detach(), _by_task(terms, task, tasks))


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
    segments = _Segments(offsets, x.numel())
    loss = segments.cross_entropy(x, target, smoothing, z_loss)
    found = segments.symmetric_kl(x, y)
    terms = _weighted(weight, loss) + _weighted(kl_weight, found)
    return SegmentLoss(terms.sum(), loss.detach(), found.detach(), _by_task(terms, task, tasks))


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
    flat = _head_scores(features, weight, bias, segment, _Segments(offsets, scores))
    predictions = _pair_scores(features, weight, bias, point[:, 0], point[:, 1])
    segment_loss = _Segments(offsets, scores).cross_entropy(flat, target, smoothing, z_loss)
    point_loss = (predictions - value).square()
    loss = torch.cat([segment_loss, point_loss])
    terms = _weighted(loss_weight, loss)
    scored = torch.cat([flat, predictions]).detach()
    return HeadLoss(terms.sum(), loss.detach(), scored, _by_task(terms, task, tasks))


def _head_scores(features: Tensor, weight: Tensor, bias: Tensor | None, segment: Tensor, of: _Segments) -> Tensor:
    """[E] scores: a matrix product for classification heads, pair by pair for features by one row."""
    if bool((segment[:, 1] * segment[:, 3] != of.lengths).any()):
        raise ValueError("segment: features x rows must be what the offsets say")
    if bool(((segment[:, 1] > 1) & (segment[:, 3] > 1)).any()):
        raise ValueError("segment: must be one feature by some rows, or some features by one row")
    place = torch.arange(len(of.of), device=segment.device) - of.offsets[of.of]
    first_feature, features_each, first_row, rows_each = segment[of.of].unbind(1)
    feature = first_feature + torch.where(features_each > 1, place, 0)
    row = first_row + torch.where(rows_each > 1, place, 0)
    wide = rows_each > 1
    numbers, used = torch.unique(feature[wide], return_inverse=True)
    dense = F.linear(features[numbers], weight, bias)
    flat = _upcast(features).new_zeros(len(feature))
    flat = flat.masked_scatter(wide, _upcast(dense[used, row[wide]]))
    return flat.masked_scatter(~wide, _pair_scores(features, weight, bias, feature[~wide], row[~wide]))


def _pair_scores(features: Tensor, weight: Tensor, bias: Tensor | None, feature: Tensor, row: Tensor) -> Tensor:
    scores = (_upcast(features[feature]) * _upcast(weight[row])).sum(-1)
    return scores if bias is None else scores + _upcast(bias[row])


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
    """See `Losses.linear_cross_entropy`. Holds all logits several times over."""
    kept = target != IGNORE
    if bool((kept & ((target < 0) | (target >= len(weight)))).any()):
        raise ValueError(f"target: must be in [0, {len(weight)}) or {IGNORE}")
    logits = _upcast(F.linear(hidden, weight, bias))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = F.log_softmax(logits, dim=-1)
    loss = -log_p.gather(1, torch.where(kept, target, 0)[:, None]).squeeze(1)
    if smoothing is not None:
        smoothing = smoothing.to(loss.dtype)
        loss = torch.where(smoothing == 0, loss, (1 - smoothing) * loss - smoothing * log_p.mean(-1))
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1).square()
    loss = torch.where(kept, loss, 0.0)
    return VocabularyLoss(_weighted(loss_weight, loss).sum(), loss.detach())


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
    """See `Losses.linear_symmetric_kl`. Holds all logits several times over."""
    log_p, log_q = (
        _log_softmax(side, weight, bias, softcap, on) for side, on in ((x, gradient != "y"), (y, gradient != "x"))
    )
    found = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return Divergence(_weighted(loss_weight, found).sum(), found.detach())


def _log_softmax(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, on: bool) -> Tensor:
    with nullcontext() if on else torch.no_grad():
        logits = _upcast(F.linear(states, weight, bias))
        return F.log_softmax(torch.tanh(logits / softcap) * softcap if softcap else logits, dim=-1)


class ReferenceLosses:
    """The functions of this module as one object, which models hold: modules can be neither copied nor pickled."""

    name = "reference"
    segment_cross_entropy = staticmethod(segment_cross_entropy)
    segment_symmetric_kl = staticmethod(segment_symmetric_kl)
    segment_cross_entropy_kl = staticmethod(segment_cross_entropy_kl)
    head_losses = staticmethod(head_losses)
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    head_divergence = staticmethod(head_divergence)
    linear_symmetric_kl = staticmethod(linear_symmetric_kl)
