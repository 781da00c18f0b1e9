import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.tasks.rows import BadRow, BadRows, check_row, input_text, row_key
from trainer.tasks.spec import FAMILIES, Family, TaskSpec

LABELS = ("a", "b", "c", "d", "e", "f")


def spec(family: str, **more: object) -> TaskSpec:
    if FAMILIES[Family(family)].has_classes and "num_labels" not in more:
        more.setdefault("labels", LABELS)
    return TaskSpec.model_validate({"name": "t", "family": family, **more})


PAIR = {"text_a": "x", "text_b": "y"}
CHOICE = {"context": "c", "choices": ["x", "y", "z"], "label": 2}
SPAN = {"context": "Ünder the bridge", "question": "where?", "answers": [{"text": "bridge", "start": 10}]}

GOOD = [
    (spec("classification"), {"text": "x", "label": 5, "id": 7}, {"text": "x", "label": 5}),
    (spec("classification"), {"text": "x", "label": "c"}, {"text": "x", "label": 2}),
    (spec("classification"), {"text": "x", "label": "4"}, {"text": "x", "label": 4}),
    (spec("classification"), {"text": "x", "label": 4.0}, {"text": "x", "label": 4}),
    (spec("classification", labels=["2", "1"]), {"text": "x", "label": "1"}, {"text": "x", "label": 1}),
    (spec("classification", num_labels=2), {"text": "x", "label": True}, {"text": "x", "label": 1}),
    (spec("classification", columns={"text": "s"}), {"s": "x", "label": 0}, {"text": "x", "label": 0}),
    (spec("pair_classification"), {**PAIR, "label": 1}, {**PAIR, "label": 1}),
    (spec("regression", score_range=[1, 5]), {**PAIR, "score": 3}, {**PAIR, "score": 3.0}),
    (spec("regression"), {"text_a": "x", "score": "0.5"}, {"text_a": "x", "text_b": "", "score": 0.5}),
    (spec("regression"), {"text_a": "x", "text_b": None, "score": 0}, {"text_a": "x", "text_b": "", "score": 0.0}),
    (spec("regression", score_range=[1, 5]), {**PAIR, "score": 5}, {**PAIR, "score": 5.0}),
    (spec("multiple_choice"), CHOICE, CHOICE),
    (spec("multiple_choice"), {**CHOICE, "context": ""}, {**CHOICE, "context": ""}),
    (spec("multiple_choice"), {**CHOICE, "choices": '["x", "y", "z"]', "label": "2"}, CHOICE),
    (
        spec("multiple_choice"),
        {"context": "c", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "label": "C"},
        CHOICE,
    ),
    (spec("span"), SPAN, SPAN),
    (spec("span"), {**SPAN, "answers": []}, {**SPAN, "answers": []}),
    (spec("span"), {**SPAN, "answers": {"text": ["bridge"], "answer_start": [10]}}, SPAN),
    (spec("span"), {**SPAN, "answers": {"text": [], "answer_start": []}}, {**SPAN, "answers": []}),
    (spec("span"), {**SPAN, "answers": json.dumps(SPAN["answers"])}, SPAN),
    (spec("span"), {**SPAN, "answers": "bridge"}, SPAN),
    (spec("span"), {**SPAN, "answers": ["tree", "bridge"]}, SPAN),
    (spec("seq2seq"), {"source": "x", "target": "y"}, {"source": "x", "target": "y", "references": ["y"]}),
    (
        spec("seq2seq"),
        {"source": "x", "target": "y", "references": ["y", "z"]},
        {"source": "x", "target": "y", "references": ["y", "z"]},
    ),
    (spec("masked_lm"), {"text": "x"}, {"text": "x"}),
    (spec("causal_lm"), {"text": "x"}, {"text": "x"}),
]


@pytest.mark.parametrize(("task", "raw", "row"), GOOD)
def test_good_rows(task: TaskSpec, raw: dict, row: dict) -> None:
    checked = check_row(task, raw)
    assert checked == row
    assert {k: type(v) for k, v in checked.items()} == {k: type(v) for k, v in row.items()}


BAD = [
    (
        spec("classification"),
        {"text": "x", "label": 7},
        "label 7 out of range (task has 6 labels: a, b, c, d, e, f)",
    ),
    (
        spec("classification", num_labels=3),
        {"text": "x", "label": -1},
        "label -1 out of range (task has 3 labels; -1 often stands for a label that was not published)",
    ),
    (
        spec("classification", labels=["spam", "ham"]),
        {"text": "x", "label": "spa"},
        "label 'spa' is unknown (did you mean 'spam'?) (task has 2 labels: spam, ham)",
    ),
    (
        spec("classification", labels=["2", "1"]),
        {"text": "x", "label": "0"},
        "label '0' is unknown (task has 2 labels: 2, 1)",
    ),
    (spec("classification"), {"text": "x", "label": None}, "label is null"),
    (spec("classification"), {"text": "x", "label": 1.5}, "label must be an index or a name, not float 1.5"),
    (spec("classification"), {"text": "x", "label": [1]}, "label must be an index or a name, not list [1]"),
    (spec("classification"), {"text": " \n", "label": 0}, "text is empty"),
    (spec("classification"), {"text": 5, "label": 0}, "text must be text, not int 5"),
    (spec("classification"), {"text": "\ud83d", "label": 0}, "text holds half of a surrogate pair at character 0"),
    (
        spec("classification"),
        {"texts": "x", "label": 0},
        "missing column 'text' (did you mean 'texts'?); the row has texts, label",
    ),
    (
        spec("classification", columns={"text": "s"}),
        {"text": "x", "label": 0},
        "missing column 's' (columns.text); the row has text, label",
    ),
    (spec("pair_classification"), {"text_a": "x", "text_b": "", "label": 0}, "text_b is empty"),
    (spec("pair_classification"), {**PAIR, "label": "zz"}, "label 'zz' is unknown"),
    (spec("regression"), {**PAIR, "score": math.nan}, "score must be a finite number, not nan"),
    (spec("regression"), {**PAIR, "score": "high"}, "score must be a finite number, not 'high'"),
    (spec("regression"), {**PAIR, "score": 10**400}, "score must be a finite number"),
    (spec("regression"), {**PAIR, "score": True}, "score must be a finite number, not True"),
    (spec("regression", score_range=[0, 5]), {**PAIR, "score": 5.5}, "score 5.5 is outside [0, 5]"),
    (spec("regression"), {**PAIR, "score": 3}, "score 3 is outside [0, 1]; give the task its score_range"),
    (spec("regression", columns={"text_b": "s2"}), {**PAIR, "score": 1}, "missing column 's2' (columns.text_b)"),
    (spec("multiple_choice"), {**CHOICE, "choices": ["x"]}, "choices has 1 entries, needs at least 2"),
    (spec("multiple_choice"), {**CHOICE, "choices": ["x", ""]}, "choices[1] is empty"),
    (spec("multiple_choice"), {**CHOICE, "choices": "x"}, "choices must be a list of texts, not str 'x'"),
    (spec("multiple_choice"), {**CHOICE, "label": 3}, "label 3 out of range (the row has 3 choices)"),
    (spec("multiple_choice"), {**CHOICE, "label": "B"}, "label 'B' is unknown (the row has 3 choices)"),
    (
        spec("span"),
        {**SPAN, "answers": [{"text": "bridge", "start": 11}]},
        "answers[0]: 'bridge' is not at character 11 of the context; it stands at 10",
    ),
    (
        spec("span"),
        {**SPAN, "answers": [SPAN["answers"][0], {"text": "tree", "start": 3}]},
        "answers[1]: 'tree' is not at character 3 of the context; it does not occur in the context",
    ),
    (spec("span"), {**SPAN, "answers": [{"text": "Ü", "start": -16}]}, "answers[0]: 'Ü' is not at character -16"),
    (spec("span"), {**SPAN, "answers": [{"text": "Ü", "start": "0"}]}, "answers[0].start must be an integer"),
    (spec("span"), {**SPAN, "answers": [5]}, "answers[0] must have `text` and `start`, not 5"),
    (spec("span"), {**SPAN, "answers": ["ridge"]}, "answers: 'ridge' not in the context; `drop: {answers: [null]}`"),
    (spec("span"), {**SPAN, "answers": ["a", "b"]}, "answers: 'a' and 1 more not in the context"),
    (spec("span"), {**SPAN, "answers": {"text": ["bridge"]}}, "answers must have lists `text` and `answer_start`"),
    (spec("span"), {**SPAN, "answers": None}, "answers must be a list (empty: no answer), not NoneType None"),
    (spec("span"), {**SPAN, "question": ""}, "question is empty"),
    (spec("seq2seq"), {"source": "x", "target": ""}, "target is empty"),
    (spec("seq2seq"), {"source": "x", "target": "y", "references": []}, "references must be a list of at least one"),
    (spec("seq2seq"), {"source": "x", "target": "y", "references": ["y", 3]}, "references[1] must be text, not int 3"),
    (spec("masked_lm"), {"text": ""}, "text is empty"),
    (spec("causal_lm"), {"text": None}, "text is null"),
]


@pytest.mark.parametrize(("task", "raw", "reason"), BAD)
def test_bad_rows_say_why(task: TaskSpec, raw: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        check_row(task, raw)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_every_family_has_good_and_bad_rows_here() -> None:
    assert {task.family for task, *_ in GOOD} == set(Family)
    assert {task.family for task, *_ in BAD} == set(Family)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["text", "start", "answer_start", "label", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = sorted({c for facts in FAMILIES.values() for c in facts.columns + facts.optional})


@pytest.mark.parametrize("family", list(Family))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_fuzz_gives_a_canonical_row_or_badrow(family: Family, data: st.DataObject) -> None:
    task = spec(family.value)
    base = next(row for t, _, row in GOOD if t.family is family)
    raw = dict(base)
    for column in data.draw(st.lists(st.sampled_from([*base, *COLUMNS]), max_size=3)):
        raw[column] = data.draw(VALUES)
    for column in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=1)):
        raw.pop(column, None)
    try:
        row = check_row(task, raw)
    except BadRow as bad:
        str(bad).encode()
        return
    assert check_row(task, row) == row
    assert 0 <= row_key(input_text(task, row)) < 2**64
    json.dumps(row, ensure_ascii=False).encode()
    if family is Family.SPAN:
        assert all(row["context"][a["start"] :].startswith(a["text"]) for a in row["answers"])


def test_input_text_leaves_out_what_is_to_be_learned() -> None:
    texts = {}
    for task, raw, _ in GOOD:
        texts.setdefault(task.family.value, input_text(task, check_row(task, raw)))
    assert texts == {
        "classification": "x",
        "pair_classification": "x\x1fy",
        "regression": "x\x1fy",
        "multiple_choice": "c\x1fx\x1fy\x1fz",
        "span": "Ünder the bridge\x1fwhere?",
        "seq2seq": "x",
        "masked_lm": "x",
        "causal_lm": "x",
    }
    single = spec("regression")
    assert input_text(single, check_row(single, {"text_a": "x", "score": 1})) == "x"


def test_row_key_is_the_same_in_another_process() -> None:
    assert row_key("Ünder") == 0x8A01F664FCA172AA  # a cache written yesterday must cut the same dev rows tomorrow
    code = "from trainer.tasks.rows import row_key; print(row_key('\\xdcnder'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == row_key("Ünder")


def test_bad_rows_are_reported_together_up_to_the_limit() -> None:
    bad = BadRows(limit=2)
    bad.raise_if_any("t", "train")
    for line in (3, 8, 9):
        bad.add(f"train.jsonl:{line}", "text is empty")
    with pytest.raises(DataError) as caught:
        bad.raise_if_any("t", "train")
    assert str(caught.value).splitlines()[:4] == [
        "task 't', train: 3 bad rows",
        "  train.jsonl:3: text is empty",
        "  train.jsonl:8: text is empty",
        "  ... and 1 more",
    ]
    assert "sett tasks check" in str(caught.value)
