"""The losses in plain PyTorch: the oracle of the fused kernels, and what runs where those cannot be compiled.

Owns: the four loss functions' meaning. Everything is a sum of `weight * loss` over segments; there is no implicit mean.
The arithmetic is in fp32 (fp64 for fp64 input) whatever the storage type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def segment_cross_entropy(scores: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each segment of a flat score buffer.

    Args:
        scores: [E] floating; segment g is `scores[offsets[g]:offsets[g + 1]]`.
        offsets: [G + 1] int64, ascending from 0 to E, no empty segment.
        target: [G] int64, position of the target inside its segment.

    Returns:
        [G] fp32 (fp64 for fp64 scores): `logsumexp(segment) - segment[target]`.
    """
    values = _upcast(scores)
    segments = offsets.numel() - 1
    segment_of = torch.repeat_interleave(
        torch.arange(segments, device=scores.device), offsets.diff(), output_size=scores.numel()
    )
    top = torch.full((segments,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, segment_of, values.detach(), "amax")
    # Subtracting first keeps the digits under a common offset; `top` carries no gradient, and needs none.
    shifted = values - top[segment_of]
    total = torch.zeros_like(top).index_add(0, segment_of, torch.exp(shifted))
    return torch.log(total) - shifted[offsets[:-1] + target]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[N] squared error in fp32 (fp64 for fp64 predictions)."""
    return (_upcast(prediction) - target).square()


def vocabulary_cross_entropy(logits: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy of [T, V] logits with a label smoothing per row.

    Smoothing s mixes the target with the uniform distribution over the vocabulary, as fairseq and PyTorch do:
    `(1 - s) * nll + s * mean over the vocabulary of -log p`.
    """
    log_p = F.log_softmax(_upcast(logits), dim=-1)
    nll = -log_p.gather(1, target[:, None]).squeeze(1)
    return nll + smoothing * (-log_p.mean(-1) - nll)
