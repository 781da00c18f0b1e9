"""What one model takes over from another, on every architecture: with it, both compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, LM_OF, TASKS, batch_of, tiny_model, tiny_recipe, write_tokenizer

from trainer.config.schema import HeadsConfig
from trainer.errors import ModelError
from trainer.model.carry import Rows, carried, untied
from trainer.model.multitask import MultiTaskModel, build_model, skeleton
from trainer.model.source import model_kind
from trainer.tasks.spec import Family, TaskSpec


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def take_over(ours: MultiTaskModel, theirs: MultiTaskModel) -> set[str]:
    """Copy what is taken over from `theirs`, after moving all of its weights; the names of ours that are not."""
    with torch.no_grad():
        for number, parameter in enumerate(theirs.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        once = {name: parameter.clone() for name, parameter in theirs.named_parameters()}
        state, what = untied(once, theirs), carried(ours, theirs, heads=False)
        for name, parameter in ours.named_parameters():
            if name in what.whole:
                parameter.copy_(state[what.whole[name]])
    return {name for name, _ in ours.named_parameters()} - what.whole.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_backbone_computes_the_same_whatever_else_is_trained(architecture: str, tokenizer: Path) -> None:
    recipe = tiny_recipe(architecture, tokenizer, dropout=0.0)
    lm = LM_OF[model_kind(recipe.model)]
    for ours, theirs in (([Family.CLASSIFICATION], [lm]), ([lm], [Family.CLASSIFICATION]), ([lm], [lm])):
        a, b = tiny_model(recipe, ours).eval(), tiny_model(recipe, theirs).eval()
        batch = batch_of(a, ours)
        different = a.backbone(batch)
        left = take_over(a, b)
        assert not torch.equal(different, b.backbone(batch))
        assert torch.equal(a.backbone(batch), b.backbone(batch))
        if ours == theirs:
            assert left == set()
            assert torch.equal(a(batch)["loss"], b(batch)["loss"])
        base = {id(p) for p in a.backbone.base.parameters()}
        output = a.backbone.body.get_output_embeddings()
        own = {id(p) for p in output.parameters()} if output is not None else set()
        assert not {n for n, p in a.named_parameters() if n in left and id(p) in base - own}


def test_heads_go_by_task_kind_and_size(tokenizer: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    spans = [TASKS[Family.SPAN], TASKS[Family.SPAN].model_copy(update={"name": "other_span"})]
    topic = TASKS[Family.CLASSIFICATION]
    theirs = skeleton(recipe, [topic, TASKS[Family.PAIR_CLASSIFICATION], TASKS[Family.REGRESSION], spans[0]])
    larger = TaskSpec(name="nli", family=Family.PAIR_CLASSIFICATION, num_labels=3)
    ours = skeleton(recipe, [TaskSpec(name="a", family="regression"), larger, topic, *spans])
    # nli 2, sts 1, topic 3, span 2 rows there; a 1, nli 3, topic 3, span 2 rows here
    assert carried(ours, theirs, heads=True).rows == {"topic": Rows(4, 3, 3), "squad": Rows(7, 6, 2)}
    assert carried(ours, theirs, heads=False).rows == {}
    unshared = recipe.model_copy(update={"heads": HeadsConfig(share_span=False)})
    assert carried(skeleton(unshared, spans), theirs, heads=True).rows == {"squad": Rows(2, 6, 2)}


def test_another_architecture_is_refused(tokenizer: Path) -> None:
    tasks = [TASKS[Family.CLASSIFICATION]]
    bert, distilbert = (skeleton(tiny_recipe(name, tokenizer), tasks) for name in ("bert", "distilbert"))
    deeper = tiny_recipe("bert", tokenizer)
    config = {**(deeper.model.config or {}), "num_hidden_layers": 3}
    deeper = deeper.model_copy(update={"model": deeper.model.model_copy(update={"config": config})})
    with pytest.raises(ModelError, match=r"its model is another one: .*layer\.2"):
        carried(build_model(deeper, tasks), bert, heads=False)
    with pytest.raises(ModelError, match=r"its model is another one: .* has none"):
        carried(bert, distilbert, heads=False)
