"""What a recipe asks for and cannot have is refused before a rank starts; what it can have is counted."""

from __future__ import annotations

import math
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


def test_some_of_the_tasks_are_drawn_by_the_seed_and_nested(tmp_path: Path) -> None:
    everything = [task.name for task in prepare(tiny.recipe(tmp_path)).tasks]
    taken = {n: [t.name for t in prepare(tiny.recipe(tmp_path, take=n)).tasks] for n in range(1, 7)}
    for n, names in taken.items():
        assert len(names) == n
        assert names == [name for name in everything if name in names], "the recipe's order stays"
        assert n == 1 or set(taken[n - 1]) < set(names)
    others = {tuple(t.name for t in prepare(tiny.recipe(tmp_path, take=3, seed=s)).tasks) for s in range(8)}
    assert len(others) > 2
    without = prepare(tiny.recipe(tmp_path, take=3, exclude=[taken[3][0]])).tasks
    assert set(taken[3][1:]) < {t.name for t in without}, (
        "leaving a task out lets the next one in, and changes no other"
    )
    refused(tmp_path, ConfigError, "take: 7 tasks, but there are only 6", take=7)


def test_some_of_the_rows_are_nested_and_nothing_else_changes(tmp_path: Path) -> None:
    whole = prepare(tiny.recipe(tmp_path))
    index = whole.names.index("topic")
    before: set[int] = set()
    for share in (0.1, 0.25, 0.5, 1.0):
        job = prepare(tiny.recipe(tmp_path, sampling={"rows": {"topic": share}}))
        keys = set(job.train[index].column("key").tolist())
        assert len(job.train[index]) == math.ceil(share * len(whole.train[index]))
        assert before <= keys <= set(whole.train[index].column("key").tolist())
        before = keys
        assert [len(view) for view in job.dev] == [len(view) for view in whole.dev]
        assert [len(v) for n, v in zip(job.names, job.train, strict=True) if n != "topic"] == [
            len(v) for n, v in zip(whole.names, whole.train, strict=True) if n != "topic"
        ]
    words = r"sampling.rows.topik: no task of that name \(did you mean 'topic'\?\)"
    refused(tmp_path, ConfigError, words, sampling={"rows": {"topik": 0.5}})
