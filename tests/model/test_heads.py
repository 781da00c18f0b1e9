"""The packed head: who has which rows, and what it computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from trainer.config.schema import HeadsConfig
from trainer.losses import Kernels, ReferenceLosses, choose
from trainer.model.heads import HeadTable, PackedHead
from trainer.tasks.spec import Family, TaskSpec

MIX = [
    TaskSpec(name="zebra", family=Family.CLASSIFICATION, num_labels=3),
    TaskSpec(name="race", family=Family.MULTIPLE_CHOICE),
    TaskSpec(name="squad", family=Family.SPAN),
    TaskSpec(name="ant", family=Family.REGRESSION),
    TaskSpec(name="copa", family=Family.MULTIPLE_CHOICE),
    TaskSpec(name="quoref", family=Family.SPAN),
    TaskSpec(name="mlm", family=Family.MASKED_LM),
]


def test_heads_are_shared_as_in_muppet_and_span_heads_come_last() -> None:
    table = HeadTable.of(MIX, HeadsConfig())
    assert [(h.name, h.first, h.size, h.kind, h.tasks) for h in table.heads] == [
        ("ant", 0, 1, "regression", ("ant",)),
        ("shared:multiple_choice", 1, 1, "multiple_choice", ("copa", "race")),
        ("zebra", 2, 3, "classification", ("zebra",)),
        ("shared:span", 5, 2, "span", ("quoref", "squad")),
    ]
    assert table.rows == 7
    assert (table.first_row("race"), table.first_row("copa"), table.first_row("squad")) == (1, 1, 5)


def test_sharing_can_be_switched_off() -> None:
    table = HeadTable.of(MIX, HeadsConfig(share_multiple_choice=False, share_span=False))
    assert [(h.name, h.first, h.size) for h in table.heads] == [
        ("ant", 0, 1),
        ("copa", 1, 1),
        ("race", 2, 1),
        ("zebra", 3, 3),
        ("quoref", 6, 2),
        ("squad", 8, 2),
    ]


def test_the_order_of_the_recipe_does_not_matter() -> None:
    assert HeadTable.of(MIX[::-1], HeadsConfig()) == HeadTable.of(MIX, HeadsConfig())


def test_initial_rows_do_not_depend_on_the_other_tasks() -> None:
    many = HeadTable.of(MIX, HeadsConfig())
    one = HeadTable.of(MIX[:1], HeadsConfig())
    all_rows = PackedHead(many, 8, 0.02, 5, ReferenceLosses()).weight
    alone = PackedHead(one, 8, 0.02, 5, ReferenceLosses()).weight
    assert torch.equal(all_rows[2:5], alone)
    assert not torch.equal(PackedHead(one, 8, 0.02, 6, ReferenceLosses()).weight, alone)
    assert not torch.equal(all_rows[2:3], all_rows[3:4])


def test_initial_values_have_the_standard_deviation_asked_for() -> None:
    task = TaskSpec(name="wide", family=Family.CLASSIFICATION, num_labels=100)
    weight = PackedHead(HeadTable.of([task], HeadsConfig()), 400, 0.05, 0, ReferenceLosses()).weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def batch(segments: list[list[int]] = (), points: list[list[int]] = ()) -> SimpleNamespace:  # type: ignore[assignment]
    """What the head reads of a batch; every target is the first score, every value 0, every weight 1."""
    table = torch.tensor(segments, dtype=torch.int64).reshape(-1, 4)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (table[:, 1] * table[:, 3]).cumsum(0)])
    return SimpleNamespace(
        segments=table,
        offsets=offsets,
        target=torch.zeros(len(table), dtype=torch.int64),
        weight=torch.ones(len(table)),
        segment_task=torch.zeros(len(table), dtype=torch.int64),
        regression_scores=torch.tensor(points, dtype=torch.int64).reshape(-1, 2),
        regression_target=torch.zeros(len(points)),
        regression_weight=torch.ones(len(points)),
        regression_task=torch.ones(len(points), dtype=torch.int64),
        scores=int(offsets[-1]),
        tasks=2,
    )


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_scores_are_each_feature_against_its_row(kernels: Kernels) -> None:
    table = HeadTable.of(MIX, HeadsConfig())
    head = PackedHead(table, 4, 1.0, 0, choose(kernels))
    torch.nn.init.normal_(head.bias)  # type: ignore[arg-type]
    x = torch.randn(8, 4)
    out = head(x, batch([[0, 1, 2, 3], [2, 3, 1, 1]], [[1, 0]]))
    all_scores = F.linear(x, head.weight, head.bias)
    scores = torch.cat([all_scores[0, 2:5], all_scores[2:5, 1], all_scores[1, :1]])
    torch.testing.assert_close(out.scores, scores.detach())
    losses = [F.cross_entropy(s, torch.tensor(0)) for s in (scores[:3], scores[3:6])] + [scores[6] ** 2]
    torch.testing.assert_close(out.loss, torch.stack(losses).detach())
    torch.testing.assert_close(out.by_task, torch.stack([losses[0] + losses[1], losses[2]]).detach())


@pytest.mark.parametrize("kernels", ["fused", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_to_score_still_gives_zero_gradients(bias: bool, kernels: Kernels) -> None:
    head = PackedHead(HeadTable.of(MIX, HeadsConfig()), 4, 0.02, 0, choose(kernels), bias)
    features = torch.zeros(0, 4, requires_grad=True)
    out = head(features, batch())
    assert out.scores.shape == out.loss.shape == (0,)
    out.total.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert features.grad is not None
    assert len(list(head.parameters())) == 1 + bias
