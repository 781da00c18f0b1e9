"""`masked_lm:PATH` and `causal_lm:PATH`: which tasks they stand for, and what is said of those that stand for none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import load_recipe
from trainer.errors import ConfigError, DataError
from trainer.tasks.cards import load_tasks
from trainer.tasks.check import check_tasks
from trainer.tasks.rows import check_row, input_text
from trainer.tasks.spec import Family, TextOf


def folder(path: Path, **card: object) -> Path:
    path.mkdir(parents=True)
    card = {"name": path.name, "family": "classification", "labels": ["a", "b"], "licence": "CC0", **card}
    (path / "task.json").write_text(json.dumps(card))
    for split in ("train", "dev"):
        (path / f"{split}.jsonl").write_text(json.dumps({"text": f"some {split} text", "label": 1}) + "\n")
    return path


def test_the_text_of_a_task_folder(tmp_path: Path) -> None:
    folder(tmp_path / "topic")
    (spec,) = load_tasks(["masked_lm:topic"], base=tmp_path)
    assert isinstance(spec, TextOf)
    assert (spec.name, spec.family, spec.primary_metric) == ("topic.masked_lm", Family.MASKED_LM, "perplexity")
    assert (spec.train, spec.dev, spec.test) == (*(str(tmp_path / f"topic/{s}.jsonl") for s in ("train", "dev")), None)
    assert (spec.licence, spec.classes, spec.columns) == ("CC0", 0, {})


def test_folders_of_tasks_globs_and_both_objectives(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder(tmp_path / "data" / name)
    entries = ["data", "masked_lm:data", "causal_lm:data/*", "exclude_me"]
    folder(tmp_path / "exclude_me")
    names = [spec.name for spec in load_tasks(entries, ["exclude_me", "a.*"], tmp_path)]
    assert names == ["a", "b", "b.masked_lm", "b.causal_lm"]
    with pytest.raises(ConfigError, match=r"task 'a.masked_lm' is there twice: tasks\[0\] .*data/a\) and tasks\[1\]"):
        load_tasks(["masked_lm:data", "masked_lm:data/a"], base=tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [("cs.txt.gz", "cs"), ("my.corpus.jsonl", "my.corpus"), ("x.txt", "x"), ("x.parquet", "x"), ("x.csv.zst", "x")],
)
def test_a_text_file(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_bytes(b"")
    (spec,) = load_tasks([f"causal_lm:{file}"], base=tmp_path)
    assert (spec.name, spec.family, spec.train) == (f"{name}.causal_lm", Family.CAUSAL_LM, str(tmp_path / file))
    assert (spec.dev, isinstance(spec, TextOf)) == (None, False)


def test_a_glob_of_text_files_and_a_data_set_of_the_hub(tmp_path: Path) -> None:
    for name in ("b.txt.gz", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"")
    specs = load_tasks(["masked_lm:*.txt.gz", "masked_lm:hub:owner/news:en@train"], base=tmp_path)
    assert [spec.name for spec in specs] == ["a.masked_lm", "b.masked_lm", "news.masked_lm"]
    assert specs[2].train == "hub:owner/news:en@train"


def test_text_that_is_a_task_already_keeps_its_columns(tmp_path: Path) -> None:
    folder(tmp_path / "corpus", family="masked_lm", labels=None, columns={"text": "body"})
    (spec,) = load_tasks(["causal_lm:corpus"], base=tmp_path)
    assert (spec.family, spec.columns, isinstance(spec, TextOf)) == (Family.CAUSAL_LM, {"text": "body"}, False)


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        ("maskd_lm:topic", ConfigError, r"tasks\[0\]: 'maskd_lm:' is no text objective \(did you mean 'masked_lm'\?\)"),
        ("hub:owner/name", ConfigError, "'hub:' is no text objective; write masked_lm:PATH or causal_lm:PATH"),
        ("masked_lm:", ConfigError, "'masked_lm:' has no path after it"),
        ("masked_lm:topik", ConfigError, r"no .*topik \(did you mean 'topic'\?\)"),
        ("masked_lm:zz*", ConfigError, "'zz.' matches nothing"),
        ("masked_lm:empty", ConfigError, "is no task folder and holds none"),
        ("masked_lm:notes.md", ConfigError, "not a kind of file that is read"),
        ("masked_lm:two words.txt", ConfigError, "'two words.masked_lm' cannot be the name of a task"),
        ("masked_lm:broken", DataError, "labels"),
    ],
)
def test_entries_that_stand_for_nothing(tmp_path: Path, entry: str, error: type[Exception], words: str) -> None:
    folder(tmp_path / "topic")
    folder(tmp_path / "broken", labels=None)
    (tmp_path / "empty").mkdir()
    for name in ("notes.md", "two words.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(error, match=words):
        load_tasks([entry], base=tmp_path)


def test_paths_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "data" / "topic")
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.write_text("model: {path: x/y}\ntasks: ['masked_lm:../data/topic', 'causal_lm:../data/*']\n")
    monkeypatch.chdir("/")
    loaded = load_recipe(recipe)
    assert [spec.name for spec in load_tasks(loaded.tasks)] == ["topic.masked_lm", "topic.causal_lm"]


ROWS = [
    ("pair_classification", {"text_a": "one", "text_b": "two", "label": 1}, ["one", "two"]),
    ("regression", {"text_a": "one", "score": 0.5}, ["one", ""]),
    ("multiple_choice", {"context": "c", "choices": ["x", "y"], "label": 1}, ["c", "x", "y"]),
    ("span", {"context": "a b", "question": "q", "answers": [{"text": "b", "start": 2}]}, ["a b", "q"]),
    ("seq2seq", {"source": "s", "target": "secret"}, ["s"]),
    ("classification", {"text": "t", "label": "b"}, ["t"]),
]


@pytest.mark.parametrize(("family", "row", "texts"), ROWS, ids=[family for family, *_ in ROWS])
def test_a_row_is_its_input_texts_and_known_by_the_same_key(
    tmp_path: Path, family: str, row: dict[str, object], texts: list[str]
) -> None:
    path = folder(tmp_path / "t", family=family, labels=["a", "b"] if "class" in family else None)
    plain, derived = load_tasks([str(path), f"masked_lm:{path}"])
    found = check_row(derived, row)
    assert found == {"texts": texts}
    assert input_text(derived, found) == input_text(plain, check_row(plain, row))


def test_they_are_checked_like_any_task(tmp_path: Path) -> None:
    path = folder(tmp_path / "topic")
    (path / "train.jsonl").write_text('{"text": "fine", "label": 0}\n{"label": 0}\n')
    report = check_tasks(load_tasks([f"masked_lm:{path}"]))
    assert not report.ok
    assert report.tasks[0].splits["train"].rows == report.tasks[0].bad == 1
