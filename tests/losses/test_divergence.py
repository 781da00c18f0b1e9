"""Symmetric KL where it is hard: buffers that are nearly the same, far apart, and the in-place cross-entropy."""

import oracle
import pytest
import torch
from cases import STORAGES, segments, two_sided
from oracle import in_double, run

from trainer.losses.interface import Losses

DIFFERENCES = [1e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0, 50.0]


def pair(storage: torch.dtype, difference: float) -> dict:
    """Segments of many lengths whose two buffers differ by about `difference`, exactly as the storage holds them."""
    case = segments([2, 3, 16, 151, 5000], 21, storage=storage, spread=1.0) | {"weight": torch.ones(5)}
    if difference < 1e-2:  # scores so small that their differences survive fp32
        case["scores"] = case["scores"] * 2**-5
    return two_sided(case, 21, noise=difference, targets=False)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_fused_divergence_keeps_its_digits(fused: Losses, difference: float) -> None:
    case = pair(torch.float32, difference)
    mine = run(fused.segment_symmetric_kl, case, ("x", "y"))
    exact = run(oracle.segment_symmetric_kl, in_double(case, ("x", "y")), ("x", "y"))
    assert (exact.result.divergence > 0).all()
    torch.testing.assert_close(mine.result.divergence.double(), exact.result.divergence, rtol=1e-5, atol=0)
    assert (mine.result.divergence >= 0).all()
    for leaf in ("x", "y"):
        for a, b in zip(case["offsets"][:-1].tolist(), case["offsets"][1:].tolist(), strict=True):
            true = exact.gradient[leaf][a:b]
            gap = (mine.gradient[leaf][a:b].double() - true).abs().max()
            # log p - log q is of the size of the difference, and has fp32's roundings of it.
            bound = 1e-5 * max(1.0, difference / 10) * float(true.abs().max())
            assert float(gap) <= bound, f"{leaf}, {b - a} scores"


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_divergence_in_float64(losses: Losses, difference: float) -> None:
    case = pair(torch.float64, difference)
    mine = run(losses.segment_symmetric_kl, case, ("x", "y"))
    exact = run(oracle.segment_symmetric_kl, case, ("x", "y"))
    torch.testing.assert_close(mine.result.divergence, exact.result.divergence, rtol=1e-7, atol=0)
    for leaf in ("x", "y"):
        scale = float(exact.gradient[leaf].abs().max())
        torch.testing.assert_close(mine.gradient[leaf], exact.gradient[leaf], rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_fused_divergence_of_half_types_is_rounded_once(fused: Losses, storage: torch.dtype) -> None:
    case = pair(storage, 0.3)
    mine = run(fused.segment_symmetric_kl, case, ("x", "y"))
    exact = run(oracle.segment_symmetric_kl, in_double(case, ("x", "y")), ("x", "y"))
    torch.testing.assert_close(mine.result.divergence.double(), exact.result.divergence, rtol=1e-5, atol=0)
    for leaf in ("x", "y"):
        oracle.rounded_once(mine.gradient[leaf], exact.gradient[leaf], case)


def test_equal_buffers_have_no_divergence(losses: Losses) -> None:
    for storage in STORAGES:
        case = pair(storage, 1.0)
        mine = run(losses.segment_symmetric_kl, case | {"y": case["x"].clone()}, ("x", "y"))
        assert mine.result.divergence.tolist() == [0.0] * 5
        assert all((g == 0).all() for g in mine.gradient.values())


def test_divergence_is_symmetric(losses: Losses) -> None:
    case = pair(torch.float32, 2.0)
    there = run(losses.segment_symmetric_kl, case, ("x", "y"))
    back = run(losses.segment_symmetric_kl, case | {"x": case["y"], "y": case["x"]}, ("x", "y"))
    torch.testing.assert_close(there.result.divergence, back.result.divergence, rtol=1e-5, atol=0)
    torch.testing.assert_close(there.gradient["x"], back.gradient["y"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", ["x", "y"])
def test_one_buffer_alone_may_want_a_gradient(losses: Losses, wanted: str) -> None:
    case = two_sided(segments([3, 40], 22, options=True))
    both = run(losses.segment_cross_entropy_kl, case, ("x", "y"))
    one = run(losses.segment_cross_entropy_kl, case, (wanted,))
    torch.testing.assert_close(one.gradient[wanted], both.gradient[wanted], rtol=0, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_in_place_cross_entropy_is_the_same(fused: Losses, storage: torch.dtype) -> None:
    case = segments([5, 0, 2000, 1, 33], 23, storage=storage, ignored=0.2, options=True)
    smoothing, z_loss = case["smoothing"], case["z_loss"]
    expected = torch.ops.sett.segment_losses(
        case["scores"],
        None,
        case["offsets"],
        case["target"],
        case["weight"],
        None,
        smoothing,
        z_loss,
        None,
        0,
        -1,
        True,
    )
    buffer = case["scores"].clone()
    total, loss = torch.ops.sett.segment_cross_entropy_(
        buffer, case["offsets"], case["target"], case["weight"], smoothing, z_loss, -1
    )
    assert torch.equal(total, expected[0])
    assert torch.equal(loss, expected[1])
    assert torch.equal(buffer, expected[4])
    assert not torch.equal(buffer, case["scores"])
