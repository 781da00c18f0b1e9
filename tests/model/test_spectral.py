"""Heads of largest singular value 1 (R4F), without state."""

import pytest
import torch

from trainer.config.schema import HeadsConfig
from trainer.losses import ReferenceLosses
from trainer.model.heads import HeadTable, PackedHead, spectral_facts
from trainer.model.spectral import normalised
from trainer.tasks.spec import Family, TaskSpec

CLASSES = (2, 3, 20, 151, 2)
TABLE = HeadTable.of(
    [TaskSpec(name=f"t{i}", family=Family.CLASSIFICATION, num_labels=n) for i, n in enumerate(CLASSES)]
    + [TaskSpec(name="score", family=Family.REGRESSION)],
    HeadsConfig(),
)


def heads(seed: int, trained: bool) -> torch.Tensor:
    """[R, 64] random heads; trained ones have directions that stand out, as far apart as those of a fitted head."""
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for head in TABLE.heads:
        part = torch.randn(head.size, 64, generator=draw, dtype=torch.float64) * 0.02
        if trained:
            u, s, v = torch.linalg.svd(part, full_matrices=False)
            part = u @ torch.diag(s * 2.0 ** -torch.arange(len(s))) @ v
        parts.append(part)
    return torch.cat(parts)


def by_svd(weight: torch.Tensor) -> torch.Tensor:
    parts = [weight[head.first : head.first + head.size] for head in TABLE.heads]
    return torch.cat([part / torch.linalg.matrix_norm(part, ord=2) for part in parts])


@pytest.mark.parametrize("seed", range(5))
def test_heads_that_have_a_direction_equal_their_svd(seed: int) -> None:
    weight = heads(seed, trained=True).requires_grad_()
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = normalised(weight, *spectral_facts(TABLE, seed))
    torch.testing.assert_close(found, by_svd(weight), rtol=1e-5, atol=1e-8)
    mine, exact = (torch.autograd.grad((value * slope).sum(), weight)[0] for value in (found, by_svd(weight)))
    assert float((mine - exact).norm()) < 1e-3 * float(exact.norm())


@pytest.mark.parametrize("seed", range(5))
def test_random_heads_are_near_one(seed: int) -> None:
    """Where singular values are close together the method settles between them, never above the largest."""
    weight = heads(seed, trained=False)
    found = normalised(weight, *spectral_facts(TABLE, seed))
    for head in TABLE.heads:
        norm = float(torch.linalg.matrix_norm(found[head.first : head.first + head.size], ord=2))
        assert 1.0 - 1e-9 <= norm < 1.1, head


def test_opposite_rows_and_zeros() -> None:
    """A fitted head of two classes: the vector of ones is orthogonal to its only direction."""
    weight = torch.zeros(TABLE.rows, 64)
    head = TABLE.head("t0")
    weight[head.first], weight[head.first + 1] = 3.0, -3.0
    found = normalised(weight, *spectral_facts(TABLE, 0))
    torch.testing.assert_close(found, weight / (3 * 128**0.5))
    assert torch.isfinite(found).all()


def test_the_packed_head_scores_with_them() -> None:
    plain = PackedHead(TABLE, 64, 0.02, 0, ReferenceLosses())
    spectral = PackedHead(TABLE, 64, 0.02, 0, ReferenceLosses(), spectral=True)
    assert torch.equal(plain.weight, spectral.weight)
    assert list(plain.state_dict()) == list(spectral.state_dict()), "it has no state of its own"
    assert plain.rows() is plain.weight
    assert torch.equal(spectral.rows(), normalised(plain.weight, *spectral_facts(TABLE, 0)))
