"""The study file and the runs that follow from it: order, variables, and one clear error before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from study.small import write_study

from trainer.config import load_recipe, save_recipe
from trainer.errors import ConfigError
from trainer.study.grid import plan_runs, substitute
from trainer.study.schema import load_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study file")  # a blank: the directory becomes an override
    write_study(folder)
    return folder


def planned(folder: Path, **changes: Any) -> list[Any]:
    return plan_runs(load_study(write_study(folder, **changes)))


def test_runs_come_seed_by_seed_each_in_a_directory_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # paths are relative to the file, not to where one stands
    runs = planned(folder, seeds=[7, 3], tasks={"topic": {"rate": "1e-3"}})
    assert [(run.seed, run.task, run.arm) for run in runs] == [
        (7, "topic", "alone"),
        (7, "topic", "both"),
        (3, "topic", "alone"),
        (3, "topic", "both"),
    ]
    assert [run.directory for run in runs] == [folder / "out" / "small" / run.label for run in runs]
    assert [run.recipe.seed for run in runs] == [7, 7, 3, 3]
    assert [run.recipe.optimizer.lr for run in runs] == [2e-3, 1e-3, 2e-3, 1e-3]
    again = load_recipe(runs[1].recipe_path, runs[1].overrides)  # what the subprocess will do
    assert again == runs[1].recipe


def test_overrides_apply_in_order_study_arm_task(folder: Path) -> None:
    arms = {"alone": {"recipe": "alone.yaml", "overrides": ["training.log_every=3", "optimizer.clip=0.2"]}}
    runs = planned(
        folder,
        arms=arms,
        overrides=["training.log_every=2", "training.steps=9", "optimizer.clip=0.1"],
        tasks={"topic": {"overrides": ["optimizer.clip=0.3"]}},
    )
    training = runs[0].recipe.training
    assert (training.steps, training.log_every, runs[0].recipe.optimizer.clip) == (9, 3, 0.3)


def test_substitution_leaves_other_braces_alone() -> None:
    variables = {"task": "a", "seed": "4", "text": "cs"}
    assert substitute("tasks.1=x:../d/{text}/{task}-{seed}.gz", variables) == "tasks.1=x:../d/cs/a-4.gz"
    assert substitute("sampling.rates={a: 1, b: 2}", variables) == "sampling.rates={a: 1, b: 2}"
    assert substitute("x={}", variables) == "x={}"
    with pytest.raises(ConfigError, match=r"no variable 'txt' \(did you mean 'text'\?\)"):
        substitute("x={txt}", variables)


def test_seeds_may_be_a_number(folder: Path) -> None:
    assert sorted({run.seed for run in planned(folder, seeds=3)}) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "allone"}, r"baseline: there is no arm 'allone' \(did you mean 'alone'\?\)"),
        ({"seeds": [1, 2, 1]}, "a seed is there twice"),
        ({"seeds": 0}, "seeds"),
        ({"metric": "train"}, "metric: .*'dev' or 'test'"),
        ({"armes": {}}, r"armes: unknown key \(did you mean 'arms'\?\)"),
        ({"name": "a/b"}, "name: "),
        ({"arms": {"alone": {"recipe": "alone.yaml", "overides": []}}}, r"arms.alone.overides: unknown key \(did you"),
        ({"arms": {"alone": {}}}, "arms.alone.recipe: missing"),
        ({"arms": {"alone": {"recipe": "none.yaml"}}}, r"arm 'alone', task 'topic', seed 0: .*none.yaml: cannot read"),
        ({"tasks": {"topic": {"rate": [1]}}}, "the variable 'rate' must be text or a number"),
        ({"tasks": {"topic": {"seed": 1}}}, "the variable 'seed' is set by the study"),
        (
            {"tasks": {"topic": None}},
            r"arm 'both', task 'topic', seed 0: override 'optimizer.lr=\{rate\}': no variable",
        ),
        ({"tasks": {"topik": {"rate": 1}}}, r"does not train the judged task \(did you mean 'topic'\?\)"),
        ({"overrides": ["trainin.steps=3"]}, "arm 'alone', task 'topic', seed 0: .*trainin: unknown key"),
        ({"overrides": ["seed=3"]}, "override 'seed=3': seed is set by the study"),
        ({"overrides": ["tasks.0.test=null"]}, "the task 'topic' has no test split"),
    ],
)
def test_mistakes_are_named_with_their_place(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(folder, **changes)


def test_a_directory_with_a_run_of_another_recipe_is_an_error(tmp_path: Path) -> None:
    run = planned(tmp_path)[0]
    marker = run.directory / "checkpoints" / "step-00000004" / "sett.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    save_recipe(run.recipe, run.directory / "recipe.yaml")
    assert planned(tmp_path)[0] == run
    with pytest.raises(ConfigError, match=r"seed 0: .*another recipe \(training.steps: 4 -> 5\)"):
        planned(tmp_path, overrides=["training.steps=5"])


def test_not_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(["arms"]))
    with pytest.raises(ConfigError, match="a study is a mapping of keys to values"):
        load_study(path)


ORIGIN = {"recipe": "both.yaml", "overrides": ["training.steps=3"]}


def test_origins_come_first_and_arms_start_from_them(folder: Path) -> None:
    arms = {"alone": {"recipe": "alone.yaml"}, "from": {"recipe": "alone.yaml", "origin": "pre"}}
    runs = planned(folder, origins={"pre": ORIGIN, "unused": ORIGIN}, arms=arms, overrides=["training.steps=5"])
    assert [run.label for run in runs][:3] == ["origins/pre/seed-0", "topic/alone/seed-0", "topic/from/seed-0"]
    assert [run.label for run in runs if not run.judged] == ["origins/pre/seed-0", "origins/pre/seed-1"]
    assert len(runs) == load_study(folder / "study.yaml").planned
    origin, alone, begun = runs[:3]
    assert origin.recipe.training.steps == 3, "the study's overrides are of its arms"
    assert begun.origin is origin
    assert begun.recipe.init_from.run == origin.directory
    assert alone.origin is alone.recipe.init_from.run is None
    assert load_recipe(begun.recipe_path, begun.overrides) == begun.recipe


@pytest.mark.parametrize(
    ("arm", "origin", "words"),
    [
        ({"origin": "pro"}, ORIGIN, r"arms.alone.origin: there is no origin 'pro' \(did you mean 'pre'\?\)"),
        (
            {"origin": "pre"},
            {**ORIGIN, "overrides": ["seed=3"]},
            "origin 'pre', seed 0: override 'seed=3': seed is set",
        ),
        (
            {"origin": "pre"},
            {**ORIGIN, "overrides": ["model.config.hidden_size=64"]},
            "model.config: .* but the origin",
        ),
        ({"origin": "pre"}, {**ORIGIN, "overrides": ["exclude=[nothing]"]}, "origin 'pre', seed 0: exclude: 'nothing'"),
    ],
)
def test_bad_origins(folder: Path, arm: dict[str, Any], origin: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(folder, origins={"pre": origin}, arms={"alone": {"recipe": "alone.yaml", **arm}})
