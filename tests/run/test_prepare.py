"""What a recipe asks for and cannot have is refused before a rank starts; what it can have is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny

from trainer.errors import ConfigError, DataError, ModelError, SettError
from trainer.run.prepare import prepare


def refused(folder: Path, error: type[SettError], words: str, kind: str = "encoder", **changes: Any) -> None:
    with pytest.raises(error, match=words):
        prepare(tiny.recipe(folder, kind, **changes))


def test_a_family_the_model_cannot_learn_is_named_with_all_its_tasks(tmp_path: Path) -> None:
    rewrite = tiny.task("rewrite", tmp_path / "tasks")
    tasks = [tiny.task("topic", tmp_path / "tasks"), *({**rewrite, "name": f"rewrite{i}"} for i in range(6))]
    words = (
        r"family seq2seq \(rewrite0, rewrite1, rewrite2, rewrite3 and 2 more\) cannot be trained on this encoder: an "
        r"encoder cannot generate. Leave it out \(exclude: \['family:seq2seq'\]\)"
    )
    refused(tmp_path, ConfigError, words, tasks=tasks)
    assert [task.name for task in prepare(tiny.recipe(tmp_path, tasks=tasks, exclude=["family:seq2seq"])).tasks] == [
        "topic"
    ]


SMALL = {**tiny.MODELS["encoder"], "hidden_size": 32, "vocab_size": 20}


@pytest.mark.parametrize(
    ("error", "words", "section", "values"),
    [
        (ConfigError, r"loss.weights.topik: .* \(did you mean 'topic'\?\)", "loss", {"weights": {"topik": 2}}),
        (ConfigError, r"watch: no task named 'men' \(did you mean 'mean'\?\)", "early_stopping", {"watch": "men"}),
        (ConfigError, r"export: no task named 'topik' \(did you mean 'topic'\?\)", "checkpoint", {"export": ["topik"]}),
        (ConfigError, "max_length: 400, but the model has positions for 128", "model", {"max_length": 400}),
        (ModelError, "it has 64 tokens, but the model only 20", "model", {"config": SMALL}),
    ],
)
def test_impossible_combinations(
    tmp_path: Path, error: type[SettError], words: str, section: str, values: dict[str, Any]
) -> None:
    refused(tmp_path, error, words, **{section: values})


def test_an_export_that_transformers_has_no_class_for(tmp_path: Path) -> None:
    words = "export of task 'choose': transformers has no multiple_choice class"
    refused(tmp_path, ModelError, words, kind="decoder", checkpoint={"export": ["choose"]})


def test_a_metric_for_two_classes_on_a_task_of_three(tmp_path: Path) -> None:
    task = {**tiny.task("topic", tmp_path / "tasks"), "metric": "f1"}
    refused(tmp_path, DataError, "task 'topic': metric 'f1' is for two classes", tasks=[task])


def test_rows_are_counted_and_dev_is_cut_where_there_is_none(tmp_path: Path) -> None:
    whole, cut = tiny.task("topic", tmp_path / "a"), {**tiny.task("same", tmp_path / "b"), "dev": None}
    job = prepare(tiny.recipe(tmp_path, tasks=[whole, cut], evaluation={"dev_share": 0.25}))
    assert (len(job.train[0]), len(job.dev[0])) == (60, 12)
    assert len(job.train[1]) + len(job.dev[1]) == 60
    assert 5 <= len(job.dev[1]) <= 25
