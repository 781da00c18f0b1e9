"""Exported folders load with stock classes and give the logits the multi-task model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    ARCHITECTURES,
    HEADED,
    TASKS,
    batch_of,
    families_of,
    minilm,
    tiny_model,
    tiny_recipe,
    write_tokenizer,
)
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from trainer.batch.batch import Batch
from trainer.config.schema import Recipe
from trainer.errors import ModelError, RunError
from trainer.export.huggingface import export_task
from trainer.model.multitask import MultiTaskModel
from trainer.tasks.spec import Family

CLASS = {
    Family.CLASSIFICATION: "AutoModelForSequenceClassification",
    Family.PAIR_CLASSIFICATION: "AutoModelForSequenceClassification",
    Family.REGRESSION: "AutoModelForSequenceClassification",
    Family.MULTIPLE_CHOICE: "AutoModelForMultipleChoice",
    Family.SPAN: "AutoModelForQuestionAnswering",
    Family.MASKED_LM: "AutoModelForMaskedLM",
    Family.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Family.CAUSAL_LM: "AutoModelForCausalLM",
}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2")
NO_CHOICE = ("bart", "mbart", "t5", "mt5", *DECODERS)
NO_SPAN = ("gemma", "gemma2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shaken(model: MultiTaskModel) -> MultiTaskModel:
    """Move every parameter, so that nothing is right by being zero, one, or tied."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def export(model: MultiTaskModel, recipe: Recipe, families: list[Family], family: Family | None, out: Path) -> Any:
    tasks = [TASKS[f] for f in families]
    export_task(model.state_dict(), recipe, tasks, None if family is None else TASKS[family].name, out)
    auto = AutoModel if family is None else getattr(transformers, CLASS[family])
    loaded, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


def stock_inputs(model: MultiTaskModel, batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs | ({"token_type_ids": batch.token_type_ids} if model.backbone.takes_types else {})


@torch.no_grad()
def compare(model: MultiTaskModel, stock: Any, family: Family) -> float:
    """Largest difference between our scores and the stock logits for one example of `family`."""
    batch = batch_of(model, [family])
    inputs = stock_inputs(model, batch)
    ours = model(batch)
    if family is Family.MULTIPLE_CHOICE:
        logits = stock(**{k: v[None] for k, v in inputs.items()}).logits
        return float((logits[0] - ours["scores"]).abs().max())
    if family is Family.SPAN:
        out = stock(**inputs)
        logits = torch.cat([out.start_logits[0, :5], out.end_logits[0, :5]])
        return float((logits - ours["scores"]).abs().max())
    if family in HEADED:
        expected = ours["regression"] if family is Family.REGRESSION else ours["scores"]
        return float((stock(**inputs).logits[0] - expected).abs().max())
    if family is Family.SEQ2SEQ:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
    assert model.vocabulary is not None
    logits = model.vocabulary.logits(model.backbone(batch))
    return float((stock(**inputs).logits.flatten(0, 1) - logits).abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_gives_the_stock_logits(architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = shaken(tiny_model(recipe, families))
    for family in families:
        impossible = (family is Family.MULTIPLE_CHOICE and architecture in NO_CHOICE) or (
            family is Family.SPAN and architecture in NO_SPAN
        )
        if impossible:
            with pytest.raises(ModelError, match=f"no {family.value} class"):
                export(model, recipe, families, family, tmp_path / family.value)
            continue
        stock = export(model, recipe, families, family, tmp_path / family.value)
        assert compare(model, stock, family) < 1e-5, family


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_without_a_task_the_body_exports(architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = shaken(tiny_model(recipe, families))
    stock = export(model, recipe, families, None, tmp_path / "body")
    batch = batch_of(model, [Family.CLASSIFICATION, Family.MULTIPLE_CHOICE])
    inputs = stock_inputs(model, batch)
    if model.backbone.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": batch.decoder_input_ids, "decoder_attention_mask": batch.decoder_attention_mask}
    out = stock(**inputs)
    torch.testing.assert_close(out.last_hidden_state.flatten(0, 1), model.backbone(batch), atol=1e-5, rtol=0)
    if getattr(out, "pooler_output", None) is not None:
        assert model.trunk is not None
        torch.testing.assert_close(out.pooler_output, model.trunk(out.last_hidden_state[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "bart", "t5", "llama"])
def test_batches_of_several_lengths_agree_with_stock(architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    """Padding inside a batch changes neither side's answer, so pooling finds the same token."""
    recipe = tiny_recipe(architecture, tokenizer)
    model = shaken(tiny_model(recipe, [Family.CLASSIFICATION]))
    stock = export(model, recipe, [Family.CLASSIFICATION], Family.CLASSIFICATION, tmp_path / "out")
    batch = batch_of(model, [Family.CLASSIFICATION] * 4, lengths=(9, 5, 12, 7))
    with torch.no_grad():
        logits = stock(**stock_inputs(model, batch)).logits
        assert (logits.flatten() - model(batch)["scores"]).abs().max() < 1e-5


def test_heads_are_exported_as_they_were_used(tokenizer: Path, tmp_path: Path) -> None:
    """R4F's are divided by their largest singular values."""
    recipe = tiny_recipe("bert", tokenizer)
    recipe = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"spectral": True})})
    model = shaken(tiny_model(recipe, HEADED))
    for family in HEADED:
        stock = export(model, recipe, HEADED, family, tmp_path / family.value)
        assert compare(model, stock, family) < 1e-5, family


def test_tied_parameters_may_be_stated_once(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("t5", tokenizer)
    model = shaken(tiny_model(recipe, [Family.SEQ2SEQ, Family.CLASSIFICATION]))
    state = dict(model.named_parameters())
    tasks = [TASKS[Family.SEQ2SEQ], TASKS[Family.CLASSIFICATION]]
    assert len(state) < len(model.state_dict())
    for task in ("sum", "topic", None):
        export_task(state, recipe, tasks, task, tmp_path / str(task))
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sum").eval()
    assert compare(model, stock, Family.SEQ2SEQ) < 1e-5


def test_the_config_says_what_the_outputs_mean(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    families = [Family.CLASSIFICATION, Family.REGRESSION]
    model = tiny_model(recipe, families)
    config = export(model, recipe, families, Family.CLASSIFICATION, tmp_path / "a").config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.problem_type == "single_label_classification"
    config = export(model, recipe, families, Family.REGRESSION, tmp_path / "b").config
    assert (config.num_labels, config.problem_type, config.sett_score_range) == (1, "regression", [0.0, 5.0])
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("w1 w2")["input_ids"] == [8, 9]


def test_training_settings_do_not_leak_into_the_exported_config(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer, dropout=0.0, attention="eager")
    model = tiny_model(recipe, [Family.CLASSIFICATION])
    config = export(model, recipe, [Family.CLASSIFICATION], Family.CLASSIFICATION, tmp_path / "a").config
    assert config.hidden_dropout_prob == 0.1
    assert config.use_cache


def test_an_existing_folder_is_replaced_whole(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    model = tiny_model(recipe, [Family.CLASSIFICATION])
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.bin").write_text("old")
    export(model, recipe, [Family.CLASSIFICATION], Family.CLASSIFICATION, out)
    assert not (out / "stale.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    model = tiny_model(recipe, [Family.CLASSIFICATION])
    state = model.state_dict()
    del state["backbone.body.encoder.layer.1.output.dense.weight"]
    with pytest.raises(RunError, match=r"layer\.1\.output\.dense\.weight"):
        export_task(state, recipe, [TASKS[Family.CLASSIFICATION]], "topic", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_tasks_are_named_with_the_nearest(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    with pytest.raises(ModelError, match=r"no task 'topics' .did you mean 'topic'"):
        export_task({}, recipe, [TASKS[Family.CLASSIFICATION]], "topics", tmp_path / "out")


def test_a_sett_export_is_a_starting_point_with_its_trunk(tokenizer: Path, tmp_path: Path) -> None:
    """Train, export, train on: the trunk of the exported classifier is taken up again, as pretrained."""
    recipe = tiny_recipe("roberta", tokenizer)
    model = shaken(tiny_model(recipe, [Family.CLASSIFICATION]))
    export(model, recipe, [Family.CLASSIFICATION], Family.CLASSIFICATION, tmp_path / "first")
    again = Recipe.model_validate(
        {"tasks": ["x"], "model": {"path": str(tmp_path / "first"), "max_length": 32, "span_stride": 4}}
    )
    second = tiny_model(again, [Family.CLASSIFICATION])
    assert model.trunk is not None
    assert second.trunk is not None
    assert torch.equal(second.trunk.dense.weight, model.trunk.dense.weight)
    assert second.fresh == {"head.weight", "head.bias"}


def test_minilm_exports_exactly(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"tasks": ["x"], "model": {"path": str(minilm())}})
    families = [Family.CLASSIFICATION, Family.MULTIPLE_CHOICE, Family.SPAN, Family.REGRESSION, Family.MASKED_LM]
    model = tiny_model(recipe, families)
    for family in families:
        stock = export(model, recipe, families, family, tmp_path / family.value)
        assert compare(model, stock, family) < 1e-5, family
