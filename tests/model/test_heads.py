"""The packed head: who has which rows, and what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TASKS
from torch import Tensor

from trainer.config.schema import HeadsConfig
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
NONE = torch.zeros(0, 2, dtype=torch.int64)


def ints(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64)


def test_heads_are_shared_as_in_muppet_and_span_heads_come_last() -> None:
    table = HeadTable.of(MIX, HeadsConfig())
    assert [(h.name, h.first, h.size, h.kind, h.tasks) for h in table.heads] == [
        ("ant", 0, 1, "regression", ("ant",)),
        ("shared:multiple_choice", 1, 1, "multiple_choice", ("copa", "race")),
        ("zebra", 2, 3, "classification", ("zebra",)),
        ("shared:span", 5, 2, "span", ("quoref", "squad")),
    ]
    assert table.rows == 7
    assert table.first_span_row == 5
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
    all_rows = PackedHead(many, 8, 0.02, seed=5).weight
    alone = PackedHead(one, 8, 0.02, seed=5).weight
    assert torch.equal(all_rows[2:5], alone)
    assert not torch.equal(PackedHead(one, 8, 0.02, seed=6).weight, alone)
    assert not torch.equal(all_rows[2:3], all_rows[3:4])


def test_initial_values_have_the_standard_deviation_asked_for() -> None:
    task = TaskSpec(name="wide", family=Family.CLASSIFICATION, num_labels=100)
    weight = PackedHead(HeadTable.of([task], HeadsConfig()), 400, 0.05, seed=0).weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_scores_are_each_feature_against_its_row() -> None:
    table = HeadTable.of(MIX, HeadsConfig())
    head = PackedHead(table, 4, 1.0, seed=0)
    torch.nn.init.normal_(head.bias)  # type: ignore[arg-type]
    pooled, tokens = torch.randn(3, 4), torch.randn(5, 4)
    scores, regression = head(pooled, tokens, ints((0, 2), (0, 4), (2, 1)), ints((4, 5), (1, 6)), ints((1, 0)))
    assert head.bias is not None
    by_hand = [pooled[0] @ head.weight[2] + head.bias[2], pooled[0] @ head.weight[4] + head.bias[4]]
    by_hand += [pooled[2] @ head.weight[1] + head.bias[1]]
    by_hand += [tokens[4] @ head.weight[5] + head.bias[5], tokens[1] @ head.weight[6] + head.bias[6]]
    torch.testing.assert_close(scores, torch.stack(by_hand))
    torch.testing.assert_close(regression, F.linear(pooled[1:2], head.weight[:1], head.bias[:1])[0])


@pytest.mark.parametrize("family", [Family.CLASSIFICATION, Family.SPAN])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_to_score_still_gives_zero_gradients(family: Family, bias: bool) -> None:
    head = PackedHead(HeadTable.of([TASKS[family]], HeadsConfig()), 4, 0.02, seed=0, bias=bias)
    features = torch.zeros(0, 4, requires_grad=True)
    scores, regression = head(features, features, NONE, NONE, NONE)
    assert scores.shape == regression.shape == (0,)
    (scores.sum() + regression.sum()).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert features.grad is not None
    assert len(list(head.parameters())) == 1 + bias
