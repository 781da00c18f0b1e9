"""The whole model: gradients for every parameter, losses, parts that exist only where they are needed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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
from torch import nn

from trainer.batch.batch import Batch
from trainer.config.schema import OptimizerConfig, Recipe
from trainer.model.multitask import MultiTaskModel, build_model, sizes
from trainer.model.source import read_tensors
from trainer.tasks.spec import Family


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def minilm_recipe(**model: object) -> Recipe:
    return Recipe.model_validate({"tasks": ["x"], "seed": 7, "model": {"path": str(minilm()), **model}})


def gradients(model: MultiTaskModel, batch: Batch) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(batch)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(architecture: str, tokenizer: Path) -> None:
    """ZeRO-3 applies a stale gradient to any parameter that gets none."""
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = tiny_model(recipe, families).train()
    batches = {f"only {family}": [family] for family in families}
    batches |= {f"without {family}": [f for f in families if f is not family] for family in families}
    for what, held in batches.items():
        lacking = [name for name, grad in gradients(model, batch_of(model, held)).items() if grad is None]
        assert not lacking, f"{what}: {lacking[:3]}"


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
@pytest.mark.parametrize("families", [[Family.SPAN], [Family.CLASSIFICATION], HEADED, None], ids=str)
def test_every_parameter_is_used_by_some_family_of_the_mixture(
    architecture: str, families: list[Family] | None, tokenizer: Path
) -> None:
    """No part exists that the mixture cannot train: a batch of all its families moves every parameter."""
    recipe = tiny_recipe(architecture, tokenizer)
    held = families or [families_of(recipe)[-1]]
    model = tiny_model(recipe, held)
    unused = {name for name, grad in gradients(model, batch_of(model, held)).items() if grad is None or not grad.any()}
    assert not unused


def test_parts_that_no_task_needs_are_not_built(tokenizer: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    span = tiny_model(recipe, [Family.SPAN])
    assert span.trunk is None
    assert span.vocabulary is None
    assert span.head is not None
    lm = tiny_model(recipe, [Family.MASKED_LM])
    assert lm.head is None
    assert lm.trunk is None
    assert lm.vocabulary is not None
    names = [name for name, _ in tiny_model(recipe, HEADED).backbone.named_parameters()]
    assert not [name for name in names if "pooler" in name or "cls." in name]


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "t5", "qwen3"])
def test_the_loss_is_the_weighted_sum_of_what_it_reports(architecture: str, tokenizer: Path) -> None:
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = tiny_model(recipe, families)
    batch = batch_of(model, families)
    out = model(batch)
    kinds = {"scores", "segment_loss", "regression", "regression_loss", "lm_loss", "features", "r3f"}
    assert set(out) == {"loss", "by_task"} | kinds
    assert [name for name, tensor in out.items() if tensor.requires_grad] == ["loss"]
    total = (out["segment_loss"] * batch.weight).sum() + (out["regression_loss"] * batch.regression_weight).sum()
    total = total + (out["lm_loss"] * batch.lm_weight).sum()
    torch.testing.assert_close(out["loss"].detach(), total)
    parts = torch.zeros(batch.tasks).index_add(0, batch.segment_task, out["segment_loss"] * batch.weight)
    parts.index_add_(0, batch.regression_task, out["regression_loss"] * batch.regression_weight)
    parts.index_add_(0, batch.lm_task, out["lm_loss"] * batch.lm_weight)
    torch.testing.assert_close(out["by_task"], parts)
    segments = [out["scores"][a:b] for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    by_hand = [F.cross_entropy(s[None], t[None]) for s, t in zip(segments, batch.target, strict=True)]
    torch.testing.assert_close(out["segment_loss"], torch.stack(by_hand))
    torch.testing.assert_close(out["regression_loss"], (out["regression"] - 0.25) ** 2)


def test_a_mixed_batch_is_the_sum_of_its_rows(tokenizer: Path) -> None:
    """Neither padding nor the other rows of a micro-batch change a row's loss or gradient."""
    recipe = tiny_recipe("bert", tokenizer)
    families = [Family.CLASSIFICATION, Family.REGRESSION, Family.CLASSIFICATION]
    model = tiny_model(recipe, families[:2])
    mixed = batch_of(model, families, lengths=(9, 5, 12))
    whole = gradients(model, mixed)
    apart = [_row(mixed, 0, 9), _row(mixed, 2, 12), _regression_row(mixed, 1, 5)]
    parts = [gradients(model, batch) for batch in apart]
    for name, grad in whole.items():
        torch.testing.assert_close(grad, sum(part[name] for part in parts), atol=1e-6, rtol=1e-4)


def _row(batch: Batch, sequence: int, length: int) -> Batch:
    """The classification row of `sequence`, without padding."""
    segment = 0 if sequence == 0 else 1
    chosen = batch.segments[segment : segment + 1].clone()
    chosen[:, 0] = 0
    kept = {
        "pooled": torch.tensor([0]),
        "segments": chosen,
        "scores": 3,
        "offsets": torch.tensor([0, 3]),
        "target": batch.target[segment : segment + 1],
        "weight": batch.weight[segment : segment + 1],
        "segment_task": batch.segment_task[segment : segment + 1],
    }
    return replace(_empty(batch, sequence, length), **kept)


def _regression_row(batch: Batch, sequence: int, length: int) -> Batch:
    scores = batch.regression_scores.clone()
    scores[:, 0] = 0
    kept = {"pooled": torch.tensor([0]), "regression_scores": scores}
    kept |= {name: getattr(batch, name) for name in ("regression_target", "regression_weight", "regression_task")}
    return replace(_empty(batch, sequence, length), **kept)


def _empty(batch: Batch, sequence: int, length: int) -> Batch:
    """One sequence that nothing is asked of."""
    kept = ("input_ids", "attention_mask", "token_type_ids")
    values = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    empty = {name: value[:0] for name, value in values.items() if name not in kept and isinstance(value, torch.Tensor)}
    empty |= {name: values[name][sequence : sequence + 1, :length] for name in kept}
    return Batch(**{**empty, "offsets": torch.tensor([0]), "scores": 0, "tasks": batch.tasks})


@pytest.mark.parametrize("architecture", ["roberta", "bart", "llama"])
def test_gradient_checkpointing_changes_no_gradient(architecture: str, tokenizer: Path) -> None:
    plain = tiny_recipe(architecture, tokenizer, dropout=0.0)
    families = families_of(plain)
    model = tiny_model(plain, families).train()
    expected = gradients(model, batch_of(model, families))
    again = tiny_model(tiny_recipe(architecture, tokenizer, dropout=0.0, gradient_checkpointing=True), families).train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in again.modules())
    for name, grad in gradients(again, batch_of(again, families)).items():
        torch.testing.assert_close(grad, expected[name])


def test_dropout_and_layerdrop(tokenizer: Path) -> None:
    recipe = tiny_recipe("bart", tokenizer, dropout=0.0)
    config = {**(recipe.model.config or {}), "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    model = tiny_model(recipe, [Family.SEQ2SEQ, Family.CLASSIFICATION]).train()
    batch = batch_of(model, [Family.SEQ2SEQ, Family.CLASSIFICATION])
    assert len({model(batch)["loss"].item() for _ in range(4)}) == 1
    dropped = tiny_model(tiny_recipe("bert", tokenizer, dropout=0.3), HEADED)
    assert {m.p for m in dropped.backbone.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert dropped.dropout.p == 0.3
    assert dropped.span_dropout.p == 0.0
    heads = Recipe.model_validate({**tiny_recipe("bert", tokenizer).model_dump(), "heads": {"dropout": 0.25}})
    own = tiny_model(heads, HEADED)
    assert (own.dropout.p, own.span_dropout.p) == (0.25, 0.25)


def test_minilm_uses_its_pretrained_pooler_and_seeds_what_it_lacks() -> None:
    families = [Family.CLASSIFICATION, Family.MASKED_LM]
    torch.manual_seed(1)
    model = tiny_model(minilm_recipe(), families)
    torch.manual_seed(2)
    again = tiny_model(minilm_recipe(), families)
    assert model.trunk is not None
    pooler = read_tensors(minilm(), ["pooler.dense.weight"])["pooler.dense.weight"]
    assert torch.equal(model.trunk.dense.weight, pooler)
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    transform = "backbone.body.cls.predictions.transform"
    assert {f"{transform}.dense.weight", f"{transform}.LayerNorm.weight", "head.weight"} <= model.fresh
    assert not [name for name in model.fresh if "trunk" in name or "embeddings" in name or "encoder" in name]
    dense = model.backbone.body.cls.predictions.transform.dense.weight
    assert dense.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.vocabulary is not None
    assert model.vocabulary.weight is model.backbone.base.embeddings.word_embeddings.weight


def test_parameter_groups(tokenizer: Path) -> None:
    model = tiny_model(minilm_recipe(), [Family.CLASSIFICATION, Family.MASKED_LM])
    optimizer = OptimizerConfig(lr=1e-5, head_lr=1e-3, weight_decay=0.1, head_weight_decay=0.01)
    groups = model.parameter_groups(optimizer)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("body", 1e-5, 0.1),
        ("body_no_decay", 1e-5, 0.0),
        ("heads", 1e-3, 0.01),
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert set.union(*members) == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {"trunk.dense.weight", "backbone.body.bert.embeddings.word_embeddings.weight"} <= members[0]
    assert {"trunk.dense.bias", "backbone.body.bert.embeddings.LayerNorm.weight"} <= members[1]
    assert members[2] == model.fresh
    fresh_trunk = tiny_model(tiny_recipe("roberta", tokenizer), [Family.CLASSIFICATION])
    assert fresh_trunk.fresh == {"head.weight", "head.bias", "trunk.dense.weight", "trunk.dense.bias"}
    lm = tiny_model(tiny_recipe("llama", tokenizer), [Family.CAUSAL_LM])
    assert [g["name"] for g in lm.parameter_groups(OptimizerConfig())] == ["body", "body_no_decay"]


@pytest.mark.parametrize("architecture", ["t5", "bart", "llama"])
def test_generation_is_the_argmax_of_each_step(architecture: str, tokenizer: Path) -> None:
    """Left-padded prompts of two lengths continue as each would alone, step by step, without a cache."""
    recipe = tiny_recipe(architecture, tokenizer)
    model = tiny_model(recipe, [families_of(recipe)[-1]])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    prompts = [torch.tensor([2, 20, 30, 40, 50]), torch.tensor([2, 60, 70])]
    pads = [(5 - len(p), 0) if architecture == "llama" else (0, 5 - len(p)) for p in prompts]
    ids = torch.stack([F.pad(p, pad) for p, pad in zip(prompts, pads, strict=True)])
    made = model.generate(ids, (ids != 0).long(), 4)
    assert made.shape[0] == 2
    assert made.shape[1] <= 4
    for prompt, row in zip(prompts, made, strict=True):
        assert row.tolist() == _by_argmax(model, prompt, made.shape[1])


@torch.no_grad()
def _by_argmax(model: MultiTaskModel, prompt: torch.Tensor, steps: int) -> list[int]:
    body = model.backbone.body
    made: list[int] = []
    start = body.config.decoder_start_token_id if model.backbone.kind == "encoder-decoder" else None
    for _ in range(steps):
        if 6 in made:  # after the end token there is padding
            made.append(0)
        elif start is not None:
            logits = body(input_ids=prompt[None], decoder_input_ids=torch.tensor([[start, *made]])).logits
            made.append(int(logits[0, -1].argmax()))
        else:
            logits = body(input_ids=torch.cat([prompt, torch.tensor(made, dtype=torch.int64)])[None]).logits
            made.append(int(logits[0, -1].argmax()))
    return made


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5", "bart", "llama", "deberta-v2"])
def test_sizes_are_those_of_the_model_that_is_built(architecture: str, tokenizer: Path) -> None:
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = tiny_model(recipe, families)
    found = sizes(recipe, [TASKS[family] for family in families])
    assert model.head is not None
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parts["heads"] == sum(p.numel() for p in model.head.parameters())
    assert found.hidden_size == 32
    assert found.largest_layer == max(sum(p.numel() for p in m.parameters(False)) for m in model.modules())


def test_sizes_of_a_large_model_take_no_memory(tokenizer: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    recipe = Recipe.model_validate({"tasks": ["x"], "model": {"config": config, "tokenizer": str(tokenizer)}})
    found = sizes(recipe, [TASKS[Family.CAUSAL_LM]])
    assert found.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert found.largest_layer == 128256 * 8192


def test_building_does_not_disturb_the_random_state(tokenizer: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_model(tiny_recipe("bert", tokenizer), [TASKS[Family.CLASSIFICATION], TASKS[Family.MASKED_LM]])
    assert torch.equal(before, torch.get_rng_state())
