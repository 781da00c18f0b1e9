"""Losses of all small heads at once, by each implementation, against float64."""

from typing import Any

import oracle
import pytest
import torch
from cases import STORAGES, heads
from oracle import check, in_double, run

from trainer.losses.interface import IGNORE, Losses

LEAVES = ("features", "weight", "bias")
WHOLE = (torch.float32, torch.float64)


def check_heads(losses: Losses, case: dict[str, Any]) -> None:
    """The rule, with fp32 scores; the reference stores scores in half types, and is only looked at roughly there."""
    if losses.name == "fused" or case["features"].dtype in WHOLE:
        check(losses.head_losses, oracle.head_losses, case, LEAVES)
        return
    mine = run(losses.head_losses, case, LEAVES)
    exact = run(oracle.head_losses, in_double(case, LEAVES), LEAVES)
    for a, b in zip([*mine.result, *mine.gradient.values()], [*exact.result, *exact.gradient.values()], strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).abs().max()) <= 0.05 * float(b.abs().max())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("hidden", [1, 7, 384, 768])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_every_head_in_one_call(losses: Losses, storage: torch.dtype, hidden: int, bias: bool) -> None:
    """Classification, choice, spans whose start and end share features, and regression."""
    for seed in range(2):
        case = heads(hidden=hidden, storage=storage, seed=seed, bias=bias)
        check_heads(losses, case)


@pytest.mark.parametrize("storage", STORAGES)
def test_many_rows_of_few_heads(losses: Losses, storage: torch.dtype) -> None:
    """More segments than threads have pieces: rows collect the gradients of many features."""
    case = heads(hidden=64, storage=storage, classification=100)
    check_heads(losses, case)


def test_what_no_one_uses_gets_exact_zeros(losses: Losses) -> None:
    for storage in STORAGES:
        case = heads(storage=storage)
        mine = run(losses.head_losses, case, LEAVES)
        assert (mine.gradient["features"][-3:] == 0).all()
        assert (mine.gradient["weight"][30:] == 0).all()
        assert (mine.gradient["bias"][30:] == 0).all()
        assert (mine.gradient["features"][1] == 0).all()  # its only segment is ignored
        assert (mine.gradient["weight"][:30] != 0).any(dim=1).all()


def test_points_may_share_a_feature_with_segments(losses: Losses) -> None:
    """Feature 0 has a class and a point; the gradient is the sum of both."""
    case = heads(storage=torch.float64)
    case["loss_weight"][-1] = 2.0
    whole = run(losses.head_losses, case, LEAVES).gradient["features"][0]
    parts = []
    for left_out in (0, len(case["loss_weight"]) - 1):
        weight = case["loss_weight"].clone()
        weight[left_out] = 0.0
        parts.append(run(losses.head_losses, case | {"loss_weight": weight}, LEAVES).gradient["features"][0])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-14)
    assert all((part != 0).all() for part in parts)


@pytest.mark.parametrize("storage", WHOLE)
def test_the_order_of_heads_does_not_matter(losses: Losses, storage: torch.dtype) -> None:
    case = heads(storage=storage)
    count = len(case["target"])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    lengths = case["offsets"].diff()
    points = torch.randperm(len(case["point"]), generator=torch.Generator().manual_seed(4))
    everything = torch.cat([order, count + points])
    moved = case | {n: case[n][order] for n in ("segment", "target", "smoothing")}
    moved |= {n: case[n][everything] for n in ("loss_weight", "task")}
    moved |= {"offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths[order].cumsum(0)])}
    moved |= {"point": case["point"][points], "value": case["value"][points]}
    here, there = run(losses.head_losses, case, LEAVES), run(losses.head_losses, moved, LEAVES)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if storage == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(there.result.loss, here.result.loss[everything], **tolerance)
    torch.testing.assert_close(there.result.total, here.result.total, **tolerance)
    torch.testing.assert_close(there.result.by_task, here.result.by_task, **tolerance)
    for leaf in LEAVES:
        torch.testing.assert_close(there.gradient[leaf], here.gradient[leaf], **tolerance)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_ignored(losses: Losses, storage: torch.dtype) -> None:
    case = heads(storage=storage)
    case["target"] = torch.full_like(case["target"], IGNORE)
    case["loss_weight"][len(case["target"]) :] = 0.0
    mine = run(losses.head_losses, case, LEAVES)
    assert float(mine.result.total) == 0.0
    assert (mine.result.loss[: len(case["target"])] == 0).all()
    assert all((g == 0).all() for g in mine.gradient.values())
    assert (mine.result.scores != 0).all()  # predictions are there all the same


def without_segments(case: dict[str, Any]) -> dict[str, Any]:
    count = len(case["target"])
    return case | {
        "segment": case["segment"][:0],
        "offsets": case["offsets"][:1],
        "target": case["target"][:0],
        "smoothing": case["smoothing"][:0],
        "loss_weight": case["loss_weight"][count:],
        "task": case["task"][count:],
        "scores": 0,
    }


def without_points(case: dict[str, Any]) -> dict[str, Any]:
    count = len(case["loss_weight"]) - len(case["point"])
    return case | {
        "point": case["point"][:0],
        "value": case["value"][:0],
        "loss_weight": case["loss_weight"][:count],
        "task": case["task"][:count],
    }


@pytest.mark.parametrize("storage", STORAGES)
def test_no_segments_or_no_points_or_nothing(losses: Losses, storage: torch.dtype) -> None:
    case = heads(storage=storage)
    for part in (without_segments(case), without_points(case)):
        check_heads(losses, part)
    nothing = without_points(without_segments(case))
    for arguments in (nothing, nothing | {"features": case["features"][:0]}):
        mine = run(losses.head_losses, arguments, LEAVES)
        assert float(mine.result.total) == 0.0
        assert mine.result.loss.shape == mine.result.scores.shape == (0,)
        assert mine.result.by_task.tolist() == [0.0] * 4
        assert all((g == 0).all() for g in mine.gradient.values())
        assert mine.gradient["weight"].shape == case["weight"].shape


@pytest.mark.parametrize("wanted", LEAVES)
def test_one_leaf_alone_may_want_a_gradient(losses: Losses, wanted: str) -> None:
    """A frozen model with trained heads, frozen heads, or trained biases alone (BitFit)."""
    case = heads()
    every = run(losses.head_losses, case, LEAVES)
    one = run(losses.head_losses, case, (wanted,))
    torch.testing.assert_close(one.gradient[wanted], every.gradient[wanted], rtol=0, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_without_gradients_the_results_are_the_same(losses: Losses, storage: torch.dtype) -> None:
    case = heads(storage=storage)
    mine = run(losses.head_losses, case, LEAVES).result
    with torch.no_grad():
        other = losses.head_losses(**case)
    assert not other.total.requires_grad
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b)


def test_a_sure_head_keeps_the_digits_of_its_gradient(fused: Losses) -> None:
    """p(target) of 0.9998 in bf16: the gradient of the bias is p - 1, rounded once."""
    case = {
        "features": torch.tensor([[1.0]], dtype=torch.bfloat16),
        "weight": torch.tensor([[9.0], [0.0], [0.0]], dtype=torch.bfloat16),
        "bias": torch.zeros(3, dtype=torch.bfloat16),
        "segment": torch.tensor([[0, 1, 0, 3]]),
        "offsets": torch.tensor([0, 3]),
        "target": torch.tensor([0]),
        "loss_weight": torch.ones(1),
        "point": torch.zeros(0, 2, dtype=torch.int64),
        "value": torch.zeros(0),
        "scores": 3,
    }
    mine, exact = check(fused.head_losses, oracle.head_losses, case, LEAVES)
    torch.testing.assert_close(mine.gradient["bias"].double(), exact.gradient["bias"], rtol=4e-3, atol=0)
    torch.testing.assert_close(mine.result.loss.double(), exact.result.loss, rtol=2e-6, atol=0)
