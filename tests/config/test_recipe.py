"""Recipes: every mistake is one message with the key's path and the nearest valid name."""

from pathlib import Path

import pytest
import yaml

from trainer.config import load_recipe, recipe_from, save_recipe
from trainer.errors import ConfigError

GOOD = {"model": {"path": "some/model"}, "tasks": ["tasks/a"]}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def with_key(path: str, value: object) -> dict:
    values: dict = yaml.safe_load(yaml.safe_dump(GOOD))
    node = values
    *sections, key = path.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("window.tokenz", 5, "window.tokenz: unknown key (did you mean 'tokens'?)"),
        ("optimiser", {}, "optimiser: unknown key (did you mean 'optimizer'?)"),
        ("window.tokens", "many", "window.tokens: input should be a valid integer"),
        ("window.tokens", 3, "window.tokens: input should be greater than or equal to 16, not 3"),
        ("sampling.rule", "temprature", "sampling.rule: input should be 'proportional', 'temperature'"),
        ("model.config", {"model_type": "bert"}, "model: give exactly one of model.path and model.config"),
        ("sampling.rates", {"a": 1.0}, "sampling.rates: only used by rule 'fixed'"),
        ("sampling", {"rule": "capped"}, "sampling.cap: rule 'capped' needs it"),
        ("window.group", 4, "window.group: only used by window.heterogeneity 'step'"),
        ("early_stopping.patience", 3, "early_stopping.patience: needs evaluation.every > 0"),
        ("tasks", [], "tasks: list should have at least 1 item"),
        ("seed", -1, "seed: input should be greater than or equal to 0"),
        ("name", "../up", "name: string should match pattern"),
    ],
)
def test_mistakes_are_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from(with_key(key, value))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_mistakes_inside_a_task_name_the_task_and_not_the_other_form() -> None:
    task = {"name": "t", "family": "clasification", "labels": ["a", "b"], "trian": "x.jsonl"}
    with pytest.raises(ConfigError) as caught:
        recipe_from({**GOOD, "tasks": ["fine", task]})
    message = str(caught.value)
    assert "tasks.1.trian: unknown key (did you mean 'train'?)" in message
    assert "tasks.1.family" in message
    assert "string" not in message


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        recipe_from({**GOOD, "windw": 1, "seeed": 2})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "recipe.yaml:2:1: not valid YAML: key 'seed' is given twice"),
        ("just text", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text))
    assert expected in str(caught.value)


def test_missing_file_directory_and_binary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(binary)


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(GOOD))
    recipe = load_recipe(path, ["optimizer.lr=1e-4", "window.tokens=512", "sampling={rule: equal}", "tasks.0=tasks/b"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.window.tokens == 512
    assert recipe.sampling.rule == "equal"
    assert recipe.tasks == ["tasks/b"]
    for bad, expected in (
        ("window.tokens", "write it as key.path=value"),
        ("window.tokns=1", "did you mean 'tokens'"),
        ("seed.x=1", "seed: input should be a valid integer"),
        ("tasks.7=a", "not an index"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_recipe(path, [bad])


def test_paths_are_looked_up_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "b").mkdir(parents=True)
    path = write(tmp_path / "recipes", yaml.safe_dump({**GOOD, "tasks": ["../data/a", "../data/*"]}))
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert [Path(str(t)).resolve() for t in recipe.tasks] == [tmp_path / "data/a", tmp_path / "data" / "*"]
    assert recipe.model.path == "some/model"  # not a folder here: a hub name, left alone


def test_saved_recipe_reads_back_equal_and_remembers_what_was_set(tmp_path: Path) -> None:
    recipe = recipe_from(with_key("optimizer.lr", 3e-5))
    save_recipe(recipe, tmp_path / "r.yaml")
    again = load_recipe(tmp_path / "r.yaml")
    assert again == recipe
    assert again.optimizer.model_fields_set == {"lr"}
