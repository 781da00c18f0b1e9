"""R4F's heads: each divided by its largest singular value, so that none stretches a feature (arXiv 2008.03156).

Owns: `normalised`. The singular value is found anew from the weights in every forward, by power iteration from a fixed
start: there is no state that a checkpoint, another number of ranks, or an export could have differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 16
"""Of the power method. Where two singular values are so close that this does not part them, either is the answer."""

_LEAST = 1e-12


def normalised(weight: Tensor, start: Tensor, sizes: Tensor) -> Tensor:
    """[R, H] heads of largest singular value 1.

    Args:
        weight: [R, H], the rows of one head after those of another.
        start: [R] where the power method starts in each head: anything that is not by chance orthogonal to the answer.
        sizes: [T] int64, how many rows each head has.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    heads = torch.arange(len(sizes), device=weight.device)
    of = torch.repeat_interleave(heads, sizes, output_size=weight.shape[0])

    def sums(values: Tensor) -> Tensor:
        """Of the rows of each head, in an order that never changes."""
        total: Tensor = torch.segment_reduce(values, "sum", lengths=sizes, axis=0, unsafe=True)
        return total

    with torch.no_grad():
        left = start.to(wide.dtype)
        for _ in range(ITERATIONS):
            right = sums(wide * left[:, None])
            right /= right.norm(dim=1, keepdim=True).clamp_min(_LEAST)
            left = (wide * right[of]).sum(1)
            left /= sums(left.square()).sqrt().clamp_min(_LEAST)[of]
    largest = sums(left * (wide * right[of]).sum(1)).clamp_min(_LEAST)
    return (wide / largest[of, None]).to(weight.dtype)
