"""What the losses are, whoever computes them: the fused kernels or plain PyTorch.

Owns: `Losses`, the interface that both fill, and what its functions return. Every loss is a softmax over a segment of
scores, but for squared error. There is no implicit mean anywhere: a total is the sum of weight x loss, and the weight
holds all that is known beforehand (task weight, `1 / log n`, the window's denominator).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

IGNORE = -100
"""The target of a segment that has no loss, as in PyTorch."""


class SegmentLoss(NamedTuple):
    """Losses of a flat score buffer. Only `total` carries gradients. fp32, or fp64 for fp64 scores."""

    total: Tensor
    """Scalar: the sum of weight x loss."""
    loss: Tensor
    """[G] cross-entropies without their weights; empty without targets."""
    divergence: Tensor
    """[G] symmetric KL divergences without their weights; empty without a second buffer."""
    by_task: Tensor
    """[tasks] each task's part of the total; empty without tasks."""


class HeadLoss(NamedTuple):
    """Losses of all small heads. Only `total` carries gradients. fp32, or fp64 for fp64 features."""

    total: Tensor
    """Scalar: the sum of weight x loss over segments and points."""
    loss: Tensor
    """[G + N] cross-entropies of segments, then squared errors of points, without their weights."""
    scores: Tensor
    """[E + N] scores of segments, then predictions of points."""
    by_task: Tensor
    """[tasks] each task's part of the total; empty without tasks."""


class VocabularyLoss(NamedTuple):
    """Losses of predicted tokens. Only `total` carries gradients. fp32, or fp64 for fp64 states."""

    total: Tensor
    """Scalar: the sum of weight x loss."""
    loss: Tensor
    """[N] cross-entropies without their weights."""


class Divergence(NamedTuple):
    """How far two passes through the same heads are apart. Only `total` carries gradients. fp32, or fp64 for fp64."""

    total: Tensor
    """Scalar: the sum of weight x divergence."""
    divergence: Tensor
    """Symmetric KL of segments or rows, then squared differences of points, without their weights."""


Side = Literal["both", "x", "y"]
"""Which of two passes gradients go to; the other one is a constant."""


class Losses(Protocol):
    """The loss functions of Sett: `trainer.losses.fused.FusedLosses` and `trainer.losses.reference.ReferenceLosses`.

    Common to all: index tensors are int64, weights and smoothings fp32, all contiguous and on one device. A smoothing s
    mixes a target with the uniform distribution over its segment as fairseq and PyTorch do: `(1 - s) * nll + s * mean
    of -log p`. `z_loss` adds `z_loss * logsumexp^2` to each cross-entropy. A target of `IGNORE` leaves a segment out.
    Wrong input is an error that names it: a `RuntimeError` or `ValueError`, on a GPU at the next call at the latest.
    """

    @property
    def name(self) -> str:
        """`fused` or `reference`."""
        ...

    def segment_cross_entropy(
        self,
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
        """Cross-entropy of each segment: `logsumexp(segment) - segment[target]`.

        Args:
            scores: [E] floating; segment g is `scores[offsets[g]:offsets[g + 1]]`.
            offsets: [G + 1], ascending from 0 to E.
            target: [G] position of the target inside its segment, or `IGNORE`.
            weight: [G].
            smoothing: [G].
            z_loss: see the class.
            task: [G] in [0, tasks).
            tasks: how many tasks `by_task` has.
            longest: a bound of the segments' lengths, if it is known; chooses the kernel on a GPU.
        """
        ...

    def segment_symmetric_kl(
        self,
        x: Tensor,
        y: Tensor,
        offsets: Tensor,
        weight: Tensor,
        *,
        task: Tensor | None = None,
        tasks: int = 0,
        longest: int = -1,
    ) -> SegmentLoss:
        """`KL(p || q) + KL(q || p)` of the softmaxes p of x and q of y (R3F, arXiv 2008.03156), gradients to both."""
        ...

    def segment_cross_entropy_kl(
        self,
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
        """Cross-entropy of x and symmetric KL of x and y at once; the scores are read once."""
        ...

    def head_losses(
        self,
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
        """Linear scores of all small heads, and their losses.

        Args:
            features: [F, H] floating.
            weight: [R, H] of the features' type: all heads' rows.
            bias: [R] or None.
            segment: [G, 4] (first feature, features, first row, rows); one feature by rows, or features by one row.
            offsets: [G + 1], ascending from 0 to E; segment g has `features x rows` scores.
            target: [G] position of the target inside its segment, or `IGNORE`.
            loss_weight: [G + N] of segments, then of points.
            point: [N, 2] (feature, row), scored against `value` by squared error.
            value: [N] fp32.
            scores: E.
            smoothing: [G].
            z_loss: see the class.
            task: [G + N] in [0, tasks).
            tasks: how many tasks `by_task` has.
        """
        ...

    def linear_cross_entropy(
        self,
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
        """Cross-entropy of `softcap * tanh((hidden @ weight.T + bias) / softcap)`, row by row.

        Args:
            hidden: [N, H] floating.
            weight: [V, H] of the same type.
            bias: [V] or None.
            target: [N] in [0, V), or `IGNORE`.
            loss_weight: [N].
            smoothing: [N].
            softcap: 0 is none (Gemma 2's logit soft-capping otherwise).
            z_loss: see the class.
        """
        ...

    def head_divergence(
        self,
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
        """Symmetric KL of each segment, and squared difference of each point, between features x and y [F, H].

        Args: as of `head_losses`. `gradient`: which pass is differentiated, its share in weight and bias included.
        """
        ...

    def linear_symmetric_kl(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_weight: Tensor,
        *,
        gradient: Side,
        softcap: float = 0.0,
    ) -> Divergence:
        """Symmetric KL of the vocabulary between states x and y [N, H], row by row.

        Args: as of `linear_cross_entropy`. `gradient`: as of `head_divergence`.
        """
        ...
