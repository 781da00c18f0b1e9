"""The loss functions against PyTorch's own, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import segment_cross_entropy, squared_error, vocabulary_cross_entropy


def layout(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_ragged_segments_equal_a_loop(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([int(torch.randint(n, (1,), generator=generator)) for n in sizes])
    weight = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    loss = segment_cross_entropy(scores, layout(sizes), target)
    (gradient,) = torch.autograd.grad((weight * loss).sum(), scores)
    expected = torch.stack([F.cross_entropy(s, t) for s, t in zip(scores.split(sizes), target, strict=True)])
    (expected_gradient,) = torch.autograd.grad((weight * expected).sum(), scores)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_uniform_scores_cost_log_n() -> None:
    loss = segment_cross_entropy(torch.zeros(2 + 3 + 151), layout([2, 3, 151]), torch.tensor([0, 2, 77]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(3), math.log(151)], rel=1e-6)


def test_common_offset_infinities_and_single_scores() -> None:
    scores = torch.tensor([1e4, 1e4 + 1, -math.inf, 0.0, 5.0], requires_grad=True)
    loss = segment_cross_entropy(scores, layout([2, 2, 1]), torch.tensor([1, 1, 0]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), 0.0, 0.0], abs=1e-6)
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[4] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss = segment_cross_entropy(scores, layout([1000]), torch.tensor([3]))
    exact = F.cross_entropy(scores.double(), torch.tensor(3))
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-5


def test_nothing_is_fine() -> None:
    scores = torch.zeros(0, requires_grad=True)
    loss = segment_cross_entropy(scores, torch.tensor([0]), torch.zeros(0, dtype=torch.int64))
    loss.sum().backward()
    assert loss.shape == (0,)
    assert scores.grad.shape == (0,)


def test_vocabulary_smoothing_per_row_equals_pytorch() -> None:
    logits = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.arange(6)
    smoothing = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.1, 0.5], dtype=torch.float64)
    expected = torch.stack(
        [F.cross_entropy(row, t, label_smoothing=float(s)) for row, t, s in zip(logits, target, smoothing, strict=True)]
    )
    torch.testing.assert_close(vocabulary_cross_entropy(logits, target, smoothing), expected, rtol=1e-12, atol=1e-12)


def test_squared_error() -> None:
    assert squared_error(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.25]
