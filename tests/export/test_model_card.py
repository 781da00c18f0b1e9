"""The model card: front matter that parses, a row a task, and nothing that was not given."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.config.schema import Recipe
from trainer.export.card import model_card
from trainer.tasks.spec import Family, TaskSpec

TASKS = [
    TaskSpec(
        name="rte",
        family=Family.PAIR_CLASSIFICATION,
        labels=("yes", "no"),
        train="hub:nyu-mll/glue:rte@train",
        licence="CC-BY-4.0 | attribution",
        citation="Dagan et al.\n2006",
    ),
    TaskSpec(name="ann", family=Family.REGRESSION, score_range=(1.0, 5.0), train="ann.jsonl"),
]


def card(task: TaskSpec | None, **recipe: object) -> str:
    whole = Recipe.model_validate({"name": "trial", "tasks": ["x"], "model": {"path": "org/base"}, **recipe})
    measured = {"task": "rte", "metric": "f1", "before": 0.5, "after": 0.75, "majority": None}
    results = {"tasks": [{**measured, "train_rows": 2490, "rows": 277}], "mean": {}}
    return model_card(whole, TASKS, task, "AutoModelForSequenceClassification", results)


def front_matter(text: str) -> dict[str, object]:
    start, header, _ = text.split("---\n", 2)
    assert start == ""
    parsed: dict[str, object] = yaml.safe_load(header)
    return parsed


def test_the_front_matter_names_what_the_hub_knows() -> None:
    facts = front_matter(card(TASKS[0]))
    assert facts["datasets"] == ["nyu-mll/glue"]
    assert facts["base_model"] == "org/base"
    assert facts["pipeline_tag"] == "text-classification"
    assert facts["license"] == "other"
    assert "multi-task" in facts["tags"]  # type: ignore[operator]
    assert front_matter(card(None))["pipeline_tag"] == "feature-extraction"


def test_the_table_has_a_row_a_task_and_dashes_for_the_unknown() -> None:
    lines = card(TASKS[0]).splitlines()
    rte = next(line for line in lines if line.startswith("| rte "))
    assert rte == ("| rte | pair_classification | f1 | 0.5000 | 0.7500 | - | 2490 | 277 | CC-BY-4.0 \\| attribution |")
    assert "| ann | regression | pearson_spearman | - | - | - | - | - | unstated |" in lines
    assert lines.index(rte) == next(i for i, line in enumerate(lines) if line.startswith("| ann ")) + 1
    assert "- **rte**: Dagan et al. 2006" in lines


def test_a_regression_card_says_how_to_read_the_score() -> None:
    assert "`score = 1 + logit * 4`" in card(TASKS[1])
    assert "logit" not in card(TASKS[0])


@pytest.mark.parametrize("path", ["package:some_model", "folder"])
def test_a_local_model_is_no_base_model_of_the_hub(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    where = str(tmp_path / path) if path == "folder" else path
    text = card(None, model={"path": where})
    assert "base_model" not in front_matter(text)
    assert str(tmp_path) not in text
    assert f"Trained from `{path}` on 2 tasks at once." in text
