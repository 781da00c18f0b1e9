"""Symmetric KL between two passes through the same heads, by each implementation, against float64."""

from typing import Any

import oracle
import pytest
import torch
from cases import STORAGES, heads, two_passes, vocabulary
from oracle import check, in_double, run

from trainer.losses import linear
from trainer.losses.interface import Losses

LEAVES = ("x", "y", "weight", "bias")
GRADIENTS = ("both", "x", "y")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_ROWS_CPU", dict.fromkeys(linear._ROWS_CPU, 8))


def leaves(gradient: str, bias: bool) -> tuple[str, ...]:
    """Whose gradients are looked at: a constant side has none."""
    return tuple(n for n in LEAVES if n not in {"x": ("y",), "y": ("x",)}.get(gradient, ()) and (bias or n != "bias"))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_small_heads(losses: Losses, storage: torch.dtype, gradient: str) -> None:
    case = two_passes(heads(storage=storage), gradient)
    check(losses.head_divergence, oracle.head_divergence, case, leaves(gradient, True))


def test_small_heads_without_bias(losses: Losses) -> None:
    case = two_passes(heads(bias=False), "both")
    check(losses.head_divergence, oracle.head_divergence, case, leaves("both", False))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("words", [64, 101], ids=["aligned", "padded"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 4.0}], ids=["plain", "bias and softcap"])
def test_a_vocabulary(losses: Losses, storage: torch.dtype, gradient: str, words: int, options: dict[str, Any]) -> None:
    case = two_passes(vocabulary(words=words, storage=storage, **options), gradient)
    check(losses.linear_symmetric_kl, oracle.linear_symmetric_kl, case, leaves(gradient, "bias" in options))


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_any_number_of_rows(losses: Losses, rows: int) -> None:
    case = two_passes(vocabulary(rows=rows, bias=True), "both")
    found = run(losses.linear_symmetric_kl, case, LEAVES)
    exact = run(oracle.linear_symmetric_kl, in_double(case, LEAVES), LEAVES) if rows else None
    assert found.result.divergence.shape == (rows,)
    assert all(g is not None for g in found.gradient.values())
    if exact is not None:
        torch.testing.assert_close(found.result.total.double(), exact.result.total, rtol=1e-5, atol=1e-7)


def test_the_small_noise_of_r3f_keeps_its_digits(fused: Losses) -> None:
    """fairseq's 1e-5: the value of two plain KL divergences in fp32 is rounding there."""
    case = two_passes(heads(), "both", noise=1e-5)
    case |= {"weight": case["weight"] * 2**-4, "bias": torch.zeros_like(case["bias"])}
    mine = run(fused.head_divergence, case, LEAVES)
    exact = run(oracle.head_divergence, in_double(case, LEAVES), LEAVES)
    assert float(exact.result.total) > 0
    # Scores of about 1 have fp32's roundings, 1e-7: a percent of differences of 1e-5, and twice that of their squares.
    assert float(mine.result.total) == pytest.approx(float(exact.result.total), rel=0.05)


def test_equal_passes_are_not_apart(losses: Losses) -> None:
    for case, function in (
        (two_passes(heads(), "both", 0.0), losses.head_divergence),
        (two_passes(vocabulary(bias=True), "both", 0.0), losses.linear_symmetric_kl),
    ):
        found = run(function, case, LEAVES)
        assert float(found.result.total) == 0.0
        assert max(float(g.abs().max()) for g in found.gradient.values()) == 0.0


def test_bad_input(fused: Losses) -> None:
    case = two_passes(vocabulary(), "both")
    with pytest.raises(RuntimeError, match=r"y: must be torch.float32 \[37, 32\], is torch.float32 \[36, 32\]"):
        fused.linear_symmetric_kl(**case | {"y": case["y"][1:]})
    with pytest.raises(RuntimeError, match="weight: has no elements"):
        fused.linear_symmetric_kl(**case | {"weight": case["weight"][:0]})
