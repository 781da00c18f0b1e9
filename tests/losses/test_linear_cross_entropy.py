"""The loss of a vocabulary head without its logits, by each implementation, against float64."""

import math
from typing import Any

import oracle
import pytest
import torch
from cases import STORAGES, vocabulary
from oracle import check, run

from trainer.losses import linear
from trainer.losses.interface import IGNORE, Losses

LEAVES = ("hidden", "weight", "bias")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "smoothing": {"smoothing": True},
    "z_loss": {"z_loss": 1e-2},
    "all": {"bias": True, "softcap": 4.0, "smoothing": True, "z_loss": 1e-2},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_ROWS_CPU", dict.fromkeys(linear._ROWS_CPU, 8))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("words", [64, 101], ids=["aligned", "padded"])
def test_chunks_of_rows(losses: Losses, storage: torch.dtype, options: dict[str, Any], words: int) -> None:
    """37 rows in chunks of 8: four whole ones and a part."""
    case = vocabulary(words=words, storage=storage, **options)
    check(losses.linear_cross_entropy, oracle.linear_cross_entropy, case, LEAVES)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16])
def test_any_number_of_rows(losses: Losses, rows: int) -> None:
    case = vocabulary(rows=rows, bias=True) | {"target": torch.arange(rows)}
    check(losses.linear_cross_entropy, oracle.linear_cross_entropy, case, LEAVES)


@pytest.mark.parametrize("words", [1, 2, 63, 65, 50265])
def test_any_number_of_words(losses: Losses, words: int) -> None:
    case = vocabulary(rows=11, words=words, hidden=5, bias=True, smoothing=True)
    check(losses.linear_cross_entropy, oracle.linear_cross_entropy, case, LEAVES)


def test_the_padding_of_rows_is_never_read(fused: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer of logits is not set: NaN in what lies between two rows must go nowhere."""
    case = vocabulary(bias=True, smoothing=True, softcap=4.0)
    expected = run(fused.linear_cross_entropy, case, LEAVES)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    mine = run(fused.linear_cross_entropy, case, LEAVES)
    assert torch.equal(mine.result.total, expected.result.total)
    for leaf in LEAVES:
        assert torch.equal(mine.gradient[leaf], expected.gradient[leaf])


def test_many_chunks_lose_no_digits_of_the_weight_gradient(fused: Losses) -> None:
    """150 chunks, each of the same sign: sums in bf16 would stop growing (Liger-Kernel #1323)."""
    case = vocabulary(rows=1200, words=16, hidden=8, storage=torch.bfloat16)
    case["hidden"] = case["hidden"].abs()
    case["target"] = torch.zeros(1200, dtype=torch.int64)
    mine, exact = check(fused.linear_cross_entropy, oracle.linear_cross_entropy, case, LEAVES)
    true = exact.gradient["weight"]
    assert float((mine.gradient["weight"].double() - true).abs().max()) < 4e-3 * float(true.abs().max())


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias")])
def test_leaves_may_want_gradients_in_any_combination(losses: Losses, wanted: tuple[str, ...]) -> None:
    case = vocabulary(bias=True, softcap=4.0)
    every = run(losses.linear_cross_entropy, case, LEAVES)
    some = run(losses.linear_cross_entropy, case, wanted)
    assert torch.equal(some.result.loss, every.result.loss)
    for leaf in wanted:
        torch.testing.assert_close(some.gradient[leaf], every.gradient[leaf], rtol=0, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_without_gradients_the_losses_are_the_same(losses: Losses, storage: torch.dtype) -> None:
    case = vocabulary(bias=True, softcap=4.0, smoothing=True, z_loss=1e-2, storage=storage)
    mine = run(losses.linear_cross_entropy, case, LEAVES).result
    with torch.no_grad():
        other = losses.linear_cross_entropy(**case)
    assert not other.total.requires_grad
    assert torch.equal(mine.total, other.total)
    assert torch.equal(mine.loss, other.loss)


@pytest.mark.parametrize("storage", STORAGES)
def test_ignored_rows_and_no_rows(losses: Losses, storage: torch.dtype) -> None:
    case = vocabulary(bias=True, storage=storage)
    ignored = case | {"target": torch.full_like(case["target"], IGNORE)}
    none = vocabulary(rows=0, bias=True, storage=storage)
    for arguments in (ignored, none):
        mine = run(losses.linear_cross_entropy, arguments, LEAVES)
        assert float(mine.result.total) == 0.0
        assert (mine.result.loss == 0).all()
        for leaf in LEAVES:
            assert mine.gradient[leaf].shape == arguments[leaf].shape
            assert (mine.gradient[leaf] == 0).all()
    mine = run(losses.linear_cross_entropy, case, LEAVES)
    assert (mine.gradient["hidden"][::7] == 0).all()
    assert (mine.gradient["hidden"][1] == 0).all()  # of weight 0
    assert (mine.gradient["hidden"][2] != 0).any()


def test_untrained_words_cost_log_v(losses: Losses) -> None:
    case = vocabulary(words=50265, rows=5, hidden=4)
    case["weight"] = torch.zeros_like(case["weight"])
    case["target"] = torch.tensor([0, 1, 50264, 7, IGNORE])
    assert losses.linear_cross_entropy(**case).loss.tolist() == pytest.approx([math.log(50265)] * 4 + [0.0], rel=1e-6)


def test_softcap_bounds_the_loss(losses: Losses) -> None:
    """Logits of a thousand are capped at 4: a wrong target costs at most 2 x 4 + log(words), and pulls no more."""
    case = vocabulary(softcap=4.0)
    case["hidden"] = case["hidden"] * 300
    mine = run(losses.linear_cross_entropy, case, ("hidden", "weight"))
    assert float(mine.result.loss.max()) <= 8 + math.log(101)
    assert float(mine.gradient["hidden"].abs().max()) < 1.0
