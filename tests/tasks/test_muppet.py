"""recipes/muppet.yaml, without a network: every data set is written here with the hub's features, as Parquet, and read
by `datasets` through the recipe's own declaration. What is checked is what comes out, row by row.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.muppet_sets import CASES, Case, write

from trainer.config import load_recipe
from trainer.tasks.cards import SPLITS, load_tasks
from trainer.tasks.check import check_tasks
from trainer.tasks.columns import DroppedRow
from trainer.tasks.rows import check_row
from trainer.tasks.sources import open_source
from trainer.tasks.spec import TaskSpec

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "muppet.yaml"
COLLECTION = ROOT.parent / "shared" / "data"

COPIES = {
    "trec": "CogComp/trec",
    "hans": "jhu-cogsci/hans",
    "eraser_multirc": "CogComp/eraser_multi_rc",
    "math_qa": "allenai/math_qa",
    "multi_news": "alexfabbri/multi_news",
}
"""Tasks whose data sets come with code, and those."""


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskSpec]:
    recipe = load_recipe(RECIPE)
    return {task.name: task for task in load_tasks(recipe.tasks, recipe.exclude)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """What `datasets.load_dataset` finds: data set -> rows, whatever the split."""
    real, found = datasets.load_dataset, dict[str, Case]()

    def load(path: str, name: str | None = None, *, split: str, keep_in_memory: bool, **copy: Any) -> Any:
        assert keep_in_memory is False
        case = found[path]
        if path in COPIES.values() and not copy:
            raise RuntimeError("Dataset scripts are no longer supported, but found code.py")
        assert copy in ({}, {"data_dir": None, "revision": "refs/convert/parquet"})
        file = tmp_path / f"{path.replace('/', '-')}-{name}-{split}.parquet"
        features = write(case, file)
        loaded = real("parquet", data_files={split: str(file)}, split=split, cache_dir=str(tmp_path / "cache"))
        assert loaded.features == features
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    return found


def test_all_tasks_and_families_are_here(tasks: dict[str, TaskSpec]) -> None:
    assert set(tasks) == set(CASES)
    assert Counter(task.family.value for task in tasks.values()) == {
        "classification": 7,
        "pair_classification": 16,
        "multiple_choice": 11,
        "span": 6,
        "seq2seq": 5,
    }
    recipe = load_recipe(RECIPE)
    assert len(load_tasks(recipe.tasks, ["family:seq2seq"])) == 40


@pytest.mark.parametrize("name", CASES)
def test_rows_come_out_as_they_should(name: str, tasks: dict[str, TaskSpec], hub: dict[str, Case]) -> None:
    task, case = tasks[name], CASES[name]
    assert (task.train or "").startswith("hub:")
    hub[re.split("[:@]", task.train or "")[1]] = case
    for split in SPLITS:
        uri = task.source(split)
        if uri is None:
            continue
        rows, dropped = [], Counter[str]()
        for raw in (row for chunk in open_source(uri, split).chunks() for row in chunk.rows()):
            assert raw.problem is None
            try:
                rows.append(check_row(task, raw.data or {}))
            except DroppedRow as reason:
                dropped[str(reason)] += 1
        assert rows == case.expected
        assert dropped == case.dropped
    names = next((short for short in case.features.values() if isinstance(short, tuple)), ())
    if task.facts.has_classes and name not in {"boolq", "yelp_polarity", "scitail"}:
        assert task.labels == names  # the recipe's names of the classes are the hub's


def test_sett_tasks_check_reads_them_and_says_what_is_left_out(
    tasks: dict[str, TaskSpec], hub: dict[str, Case]
) -> None:
    hub["stanfordnlp/snli"] = CASES["snli"]
    report = check_tasks([tasks["snli"]])
    assert report.ok
    assert [dict(facts.dropped) for facts in report.tasks[0].splits.values()] == [{"label is -1": 2}] * 3


def test_every_task_says_where_its_data_set_lies() -> None:
    marks = re.findall(r"^  - name: (\w+) +# (parquet|copy|\?)(?=[;\n])", RECIPE.read_text(), re.MULTILINE)
    assert [name for name, _ in marks] == list(CASES)
    assert {name for name, mark in marks if mark == "copy"} == set(COPIES)


@pytest.mark.shared_data
def test_the_local_recipe_has_the_same_families_and_one_more() -> None:
    if not COLLECTION.is_dir():
        pytest.skip(f"NOT CHECKED: the collection of 117 tasks is not at {COLLECTION}")
    recipe = load_recipe(ROOT / "recipes" / "muppet-local.yaml")
    assert len(load_tasks(recipe.tasks)) == 117
    assert Counter(task.family.value for task in load_tasks(recipe.tasks, recipe.exclude)) == {
        "classification": 43,
        "pair_classification": 23,
        "multiple_choice": 14,
        "span": 8,
        "seq2seq": 21,
        "regression": 5,
    }
    assert recipe.training.steps == 500
