"""Every recipe that ships: it loads, its DeepSpeed JSON resolves for two ranks, and its tasks are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.config import load_recipe
from trainer.config.stages import stage_recipes, stage_tasks
from trainer.engine.deepspeed_json import resolve, stage
from trainer.tasks.cards import load_tasks
from trainer.tasks.spec import Family

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
COLLECTION = ROOT.parent / "shared" / "data"

ENCODER = set(Family) - {Family.SEQ2SEQ, Family.CAUSAL_LM}
MIXTURES = {
    "mixture-encoder": (54, ENCODER),
    "mixture-encoder-decoder": (55, set(Family) - {Family.MASKED_LM, Family.CAUSAL_LM, Family.MULTIPLE_CHOICE}),
    "mixture-decoder": (
        61,
        {Family.CLASSIFICATION, Family.REGRESSION, Family.SPAN, Family.SEQ2SEQ, Family.CAUSAL_LM},
    ),
}
"""Recipe -> how many tasks of the collection it trains, and their families."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_resolves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for run in stage_recipes(recipe):
        assert stage(resolve(run, 2, hidden_size=128, device="cpu")) == 3


STAGES = {
    "fine-tune": {"fine-tune": "citation_intent"},
    "tapt": {"tapt": "citation_intent.masked_lm", "fine-tune": "citation_intent"},
    "dapt": {"dapt": "cs.masked_lm", "fine-tune": "citation_intent"},
    "dapt-tapt": {"dapt": "cs.masked_lm", "tapt": "citation_intent.masked_lm", "fine-tune": "citation_intent"},
}
"""Recipe for an end task -> its stages and the task of each."""


@pytest.mark.shared_data
@pytest.mark.skipif(not COLLECTION.is_dir(), reason=f"the collection of 117 tasks is not at {COLLECTION}")
@pytest.mark.parametrize("name", STAGES)
def test_an_end_task_is_reached_by_these_stages(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    runs = stage_recipes(recipe)
    found = {run.name: [task.name for task in load_tasks(run.tasks, run.exclude)] for run in runs}
    assert found == {stage: [task] for stage, task in STAGES[name].items()}
    assert [task.name for task in stage_tasks(recipe)] == list(STAGES[name].values())


def test_recipes_for_an_end_task_differ_in_their_stages_alone() -> None:
    base, *others = (yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()) for name in STAGES)
    for other in others:
        assert {**other, "name": base["name"]} == {**base, "stages": other["stages"]}
        assert other["stages"][-1] == {"name": "fine-tune"}


@pytest.mark.shared_data
@pytest.mark.skipif(not COLLECTION.is_dir(), reason=f"the collection of 117 tasks is not at {COLLECTION}")
def test_joint_training_differs_in_its_weights_alone() -> None:
    equal, learned = (load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("mt-tartan", "meta-tartan"))
    names = [task.name for task in load_tasks(equal.tasks)]
    assert names == ["citation_intent", "citation_intent.masked_lm", "cs.masked_lm"]
    assert equal.meta is not None
    assert learned.meta is not None
    assert (equal.meta.weights, learned.meta.weights) == ("equal", "alignment")
    same = {"name": "x", "meta": None}
    assert equal.model_copy(update=same) == learned.model_copy(update=same)


def test_the_meta_quickstart_takes_tasks_of_the_quickstart() -> None:
    both = [load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("quickstart", "meta-quickstart")]
    names = [[task.name for task in load_tasks(recipe.tasks, recipe.exclude)] for recipe in both]
    assert set(names[1]) < set(names[0])
    assert both[1].meta is not None
    assert both[1].meta.end_task in names[1]


def test_every_mixture_is_named_here() -> None:
    names = {path.stem for path in RECIPES if path.stem.startswith("mixture-")}
    assert names == set(MIXTURES)
    assert set().union(*(families for _, families in MIXTURES.values())) == set(Family)


def test_the_quickstart_has_eight_tasks_of_five_families_in_this_repository() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    tasks = load_tasks(recipe.tasks, recipe.exclude)
    assert len(tasks) == 8
    assert len({task.family for task in tasks}) == 5
    assert all(Path(task.train or "").is_relative_to(ROOT / "data") for task in tasks)


@pytest.mark.shared_data
@pytest.mark.skipif(not COLLECTION.is_dir(), reason=f"the collection of 117 tasks is not at {COLLECTION}")
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_finds_its_tasks(name: str) -> None:
    count, families = MIXTURES[name]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    tasks = load_tasks(recipe.tasks, recipe.exclude)
    assert (len(tasks), {task.family for task in tasks}) == (count, families)
    assert count >= 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_first_lines_say_what_it_does_and_how_to_start_it(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"sett train recipes/{path.name}" in line for line in comment)
    assert yaml.safe_load(path.read_text())["name"] == path.stem
