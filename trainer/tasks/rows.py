"""What a good row is.

Owns: `check_row`, which turns a raw row into the canonical row of its family or says in one line why it cannot; the
input text and its hash, by which dev rows are cut and duplicates are found; and `BadRows`, which collects what is wrong
and reports it at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import DataError, nearest
from trainer.tasks.columns import LISTS, BadRow, DroppedRow, at, leaves, read
from trainer.tasks.spec import Family, Row, TaskSpec, TextOf

SEPARATOR = "\x1f"
_MISSING = object()
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


def check_row(spec: TaskSpec, raw: Mapping[str, Any]) -> Row:
    """The canonical row of `raw`.

    Raises:
        DroppedRow: the task's `drop` leaves it out.
        BadRow: it does not fit the task.
    """
    if isinstance(spec, TextOf):
        return {"texts": input_fields(spec.of, check_row(spec.of, raw))}
    fields = _Fields(spec, raw)
    if spec.drop:
        _drop(fields)
    return _CHECKS[spec.family](fields)


def input_text(spec: TaskSpec, row: Row) -> str:
    """All a model is shown of a canonical row: its non-empty input fields, joined by the unit separator."""
    return SEPARATOR.join(text for text in input_fields(spec, row) if text)


def input_fields(spec: TaskSpec, row: Row) -> list[str]:
    """The input texts of a canonical row, labels, answers and targets left out."""
    if isinstance(spec, TextOf):
        texts: list[str] = row["texts"]
        return texts
    match spec.family:
        case Family.CLASSIFICATION | Family.MASKED_LM | Family.CAUSAL_LM:
            return [row["text"]]
        case Family.PAIR_CLASSIFICATION | Family.REGRESSION:
            return [row["text_a"], row["text_b"]]
        case Family.MULTIPLE_CHOICE:
            return [row["context"], *row["choices"]]
        case Family.SPAN:
            return [row["context"], row["question"]]
        case Family.SEQ2SEQ:
            return [row["source"]]


def row_key(text: str) -> int:
    """64-bit hash of an input text, the same in every run."""
    return bytes_key(text.encode())


def bytes_key(data: bytes) -> int:
    """64-bit hash of bytes, the same in every run."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass
class BadRows:
    """Bad rows of one split: the first `limit` with their places, and how many there are."""

    limit: int = 50
    rows: list[tuple[str, str]] = field(default_factory=list)
    total: int = 0

    def add(self, place: str, reason: str) -> None:
        self.total += 1
        if len(self.rows) < self.limit:
            self.rows.append((place, reason))

    def raise_if_any(self, task: str, split: str) -> None:
        """One error that lists them all, up to the limit."""
        if not self.total:
            return
        lines = [f"  {place}: {reason}" for place, reason in self.rows]
        if self.total > len(self.rows):
            lines.append(f"  ... and {self.total - len(self.rows)} more")
        count = "1 bad row" if self.total == 1 else f"{self.total} bad rows"
        raise DataError(
            "\n".join([f"task '{task}', {split}: {count}", *lines])
            + "\nCorrect or remove these rows, or the task's columns and labels; `drop` leaves rows out by a value. "
            "`sett tasks check` lists the bad rows of all splits."
        )


def _show(value: Any) -> str:
    """A value for a message: printable, on one line, short."""
    text = repr(value[:80] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def dropped_text(dropped: Mapping[str, int]) -> str:
    """`785 rows left out: label is -1 (785)`, the most frequent reason first."""
    total = sum(dropped.values())
    reasons = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons)
    return f"{total:,} {'row' if total == 1 else 'rows'} left out: {listed}"


@dataclass(frozen=True)
class _Fields:
    """A raw row seen through the task's column names."""

    spec: TaskSpec
    raw: Mapping[str, Any]

    def get(self, column: str, default: Any = _MISSING) -> Any:
        source = self.spec.columns.get(column, column)
        if source == column and column not in self.raw and default is not _MISSING:
            return default
        return read(self.raw, source, column)

    def text(self, column: str, default: Any = _MISSING, empty: bool = False) -> str:
        value = self.get(column, default)
        if value is None and default is not _MISSING:
            value = default
        return _text(value, column, empty)


def _drop(fields: _Fields) -> None:
    """Raise `DroppedRow` where a column holds a value that `drop` names. A span's answers are looked up later."""
    spec = fields.spec
    known = spec.facts.columns + spec.facts.optional
    for name, values in spec.drop.items():
        value = fields.get(name) if name in known else at(fields.raw, name, " (drop)")
        found = list(leaves(_structured(value, name) if name in LISTS else value))
        some = all if name == "answers" else any  # one empty choice spoils a row, one empty answer of several does not
        if None in values and (not found or some(_is_nothing(leaf) for leaf in found)):
            raise DroppedRow(f"{name} is missing")
        for unwanted in values:
            if unwanted is not None and any(_is_same(leaf, unwanted) for leaf in found):
                raise DroppedRow(f"{name} is {_show(unwanted)}")


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_same(value: Any, unwanted: str | int | float | bool) -> bool:
    """Equal, also where a text format wrote a number as text."""
    return bool(value == unwanted or (isinstance(value, str) and value.strip() == str(unwanted)))


def _text(value: Any, name: str, empty: bool = False) -> str:
    if value is None:
        raise BadRow(f"{name} is null")
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, not {type(value).__name__} {_show(value)}")
    if not empty and not value.strip():
        raise BadRow(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} holds half of a surrogate pair at character {error.start}") from None
    return value


def _structured(value: Any, name: str) -> Any:
    """Lists and objects; CSV writes them as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{name} is not valid JSON: {_show(value)}") from None
    return value


def _index(value: Any, names: tuple[str, ...]) -> int | None:
    """`value` as an index: a name's position, or an integer (also 1.0, and "1" where names are not numbers)."""
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        numbers_are_names = any(_INTEGER.fullmatch(name) for name in names)
        if _INTEGER.fullmatch(value.strip()) and not numbers_are_names:
            return int(value)
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, int) else None


def _label(value: Any, names: tuple[str, ...], count: int, what: str) -> int:
    if value is None:
        raise BadRow("label is null")
    index = _index(value, names)
    if index is None:
        if not isinstance(value, str):
            raise BadRow(f"label must be an index or a name, not {type(value).__name__} {_show(value)}")
        close = nearest(value, names) if names else ""
        raise BadRow(f"label {_show(value)} is unknown{close} ({what})")
    if not 0 <= index < count:
        hidden, remedy = "", ""
        if index == -1:
            hidden = "; -1 often stands for a label that was not published"
            remedy = "; `drop: {label: [-1]}` leaves such rows out"
        raise BadRow(f"label {_show(value)} out of range ({what}{hidden}){remedy}")
    return index


def _task_labels(spec: TaskSpec) -> str:
    names = spec.labels or ()
    listed = ": " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else ""
    return f"task has {spec.classes} labels{listed}"


def _classification(fields: _Fields) -> Row:
    spec = fields.spec
    label = _label(fields.get("label"), spec.labels or (), spec.classes, _task_labels(spec))
    return {"text": fields.text("text"), "label": label}


def _pair_classification(fields: _Fields) -> Row:
    spec = fields.spec
    label = _label(fields.get("label"), spec.labels or (), spec.classes, _task_labels(spec))
    return {"text_a": fields.text("text_a"), "text_b": fields.text("text_b"), "label": label}


def _regression(fields: _Fields) -> Row:
    value = fields.get("score")
    try:
        score = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        score = None
    if score is None or not math.isfinite(score):
        raise BadRow(f"score must be a finite number, not {_show(value)}")
    low, high = fields.spec.score_range or (0.0, 1.0)
    if not low <= score <= high:
        remedy = "" if fields.spec.score_range else "; give the task its score_range: [low, high]"
        raise BadRow(f"score {score:g} is outside [{low:g}, {high:g}]{remedy}")
    return {"text_a": fields.text("text_a"), "text_b": fields.text("text_b", default="", empty=True), "score": score}


def _multiple_choice(fields: _Fields) -> Row:
    value = _structured(fields.get("choices"), "choices")
    names = fields.spec.labels or ()
    if isinstance(value, Mapping) and "text" in value:  # the hub's {"text": [...], "label": ["A", "B", ...]}
        letters = value.get("label")
        names = tuple(letters) if isinstance(letters, list) and all(isinstance(x, str) for x in letters) else names
        value = value["text"]
    if not isinstance(value, list | tuple):
        raise BadRow(f"choices must be a list of texts, not {type(value).__name__} {_show(value)}")
    if len(value) < 2:
        raise BadRow(f"choices has {len(value)} entries, needs at least 2")
    choices = [_text(choice, f"choices[{i}]") for i, choice in enumerate(value)]
    context = fields.text("context", empty=True)
    listed, correct = fields.spec.columns.get("choices"), fields.spec.columns.get("label")
    if isinstance(listed, tuple) and correct in listed:
        order = _order(context, choices)
        return {"context": context, "choices": [choices[i] for i in order], "label": order.index(listed.index(correct))}
    label = _label(fields.get("label"), names, len(choices), f"the row has {len(choices)} choices")
    return {"context": context, "choices": choices, "label": label}


def _order(context: str, choices: list[str]) -> list[int]:
    """An order of the choices that depends on the row's texts alone: in the file the correct one is always the same."""
    return sorted(range(len(choices)), key=lambda i: (row_key(SEPARATOR.join((context, choices[i]))), i))


def _span(fields: _Fields) -> Row:
    context, question = fields.text("context"), fields.text("question")
    value = _structured(fields.get("answers"), "answers")
    if isinstance(value, Mapping):  # SQuAD on the hub
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadRow("answers must have lists `text` and `answer_start` of the same length")
        value = [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow(f"answers must be a list (empty: no answer), not {type(value).__name__} {_show(value)}")
    if value and all(isinstance(answer, str) for answer in value):
        answers = _located(list(value), context)
        if not answers and None in fields.spec.drop.get("answers", ()):
            raise DroppedRow("no answer in the context")
        if not answers:
            raise BadRow(
                f"answers: {_show(value[0])} {'' if len(value) == 1 else f'and {len(value) - 1} more '}not in the "
                "context; `drop: {answers: [null]}` leaves such rows out"
            )
    else:
        answers = [_answer(answer, f"answers[{i}]", context) for i, answer in enumerate(value)]
    return {"context": context, "question": question, "answers": answers}


def _located(texts: list[str], context: str) -> list[dict[str, Any]]:
    """Answers that are text alone, each where it first stands in the context as whole words; others are left off."""
    found = []
    for text in dict.fromkeys(text.strip() for text in texts):
        if text and text in context:
            before = r"(?<!\w)" if text[0].isalnum() else ""
            after = r"(?!\w)" if text[-1].isalnum() else ""
            if match := re.search(before + re.escape(text) + after, context):
                found.append({"text": text, "start": match.start()})
    return found


def _answer(value: Any, name: str, context: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or "text" not in value or not ("start" in value or "answer_start" in value):
        raise BadRow(f"{name} must have `text` and `start`, not {_show(value)}")
    text = _text(value["text"], f"{name}.text")
    start = value["start"] if "start" in value else value["answer_start"]
    if not isinstance(start, int) or isinstance(start, bool):
        raise BadRow(f"{name}.start must be an integer, not {_show(start)}")
    if start < 0 or context[start : start + len(text)] != text:
        at = context.find(text)
        where = f"it stands at {at}" if at >= 0 else "it does not occur in the context"
        raise BadRow(f"{name}: {_show(text)} is not at character {start} of the context; {where}")
    return {"text": text, "start": start}


def _seq2seq(fields: _Fields) -> Row:
    source, target = fields.text("source"), fields.text("target")
    value = _structured(fields.get("references", default=None), "references")
    if value is None:
        value = [target]
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"references must be a list of at least one text, not {_show(value)}")
    references = [_text(reference, f"references[{i}]") for i, reference in enumerate(value)]
    return {"source": source, "target": target, "references": references}


def _plain_text(fields: _Fields) -> Row:
    return {"text": fields.text("text")}


_CHECKS: dict[Family, Callable[[_Fields], Row]] = {
    Family.CLASSIFICATION: _classification,
    Family.PAIR_CLASSIFICATION: _pair_classification,
    Family.REGRESSION: _regression,
    Family.MULTIPLE_CHOICE: _multiple_choice,
    Family.SPAN: _span,
    Family.SEQ2SEQ: _seq2seq,
    Family.MASKED_LM: _plain_text,
    Family.CAUSAL_LM: _plain_text,
}
