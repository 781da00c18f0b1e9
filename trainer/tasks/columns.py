"""From a file's own columns to a task's: what an entry of `columns` may say.

Owns: the forms (a column, a field inside one, a template, a list of these, matches of a pattern), what is wrong with a
form, and reading one off a raw row; `BadRow` and `DroppedRow`, the two ways in which a row is not used. What the values
have to be is `rows.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from trainer.errors import nearest

LISTS = frozenset({"choices", "answers", "references"})
"""Canonical columns that hold several texts; the others hold one value."""


class BadRow(Exception):  # noqa: N818 - it is what the row is, and never reaches a user as an exception
    """A row that does not fit its task; the message says why in one line."""


class DroppedRow(Exception):  # noqa: N818 - likewise
    """A row that the task's `drop` leaves out; the message says by which value, the same for all such rows."""


class Matches(BaseModel):
    """Every match of a pattern in a text column is one entry: the pattern's group, or all of it if it has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str
    pattern: str


def _one_form(value: Any) -> Any:
    """Anything but the three forms is one error, instead of one for each form that it is not."""
    listed = isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    matches = isinstance(value, Mapping) and set(value) == {"column", "pattern"}
    if isinstance(value, str | Matches) or listed or matches:
        return value
    raise ValueError(
        "must be a column, a template such as '{premise} {question}', a list of these, or {column: ..., pattern: ...}, "
        f"not {value!r:.80}"
    )


ColumnSource = Annotated[str | tuple[str, ...] | Matches, BeforeValidator(_one_form)]
"""Where a canonical column comes from."""


def problem_with(column: str, source: str | tuple[str, ...] | Matches) -> str | None:
    """What is wrong with `source` as the source of a canonical column, and what to write instead."""
    if isinstance(source, str):
        return _template_problem(source)
    if column not in LISTS:
        if isinstance(source, Matches):
            return "a pattern gives a list of texts, and this column holds one value; name a column or a template"
        joined = " ".join(f"{{{part}}}" for part in source)
        return f"holds one value, not a list; to join columns write a template: '{joined}'"
    if isinstance(source, Matches):
        return _pattern_problem(source.pattern)
    if not source:
        return "is an empty list"
    return next((problem for part in source if (problem := _template_problem(part))), None)


def _template_problem(source: str) -> str | None:
    if not source:
        return "is empty; name a column"
    if not _is_template(source):
        return None
    try:
        parts = _template(source)
    except ValueError as error:
        return f"'{source}' is no template ({error}); columns stand in braces, a brace itself is written twice"
    return None if any(path for _, path in parts) else f"'{source}' names no column; columns stand in braces: {{name}}"


def _pattern_problem(pattern: str) -> str | None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"the pattern is no regular expression: {error}"
    return None if groups <= 1 else f"the pattern has {groups} groups, at most one is allowed; write (?:...) for others"


def read(raw: Mapping[str, Any], source: str | tuple[str, ...] | Matches, column: str) -> Any:
    """The value of canonical `column` of a raw row, not checked yet.

    Raises:
        BadRow: a column is missing, or holds what cannot be put into a template or searched.
    """
    where = f" (columns.{column})" if source != column else ""
    if isinstance(source, str):
        return _text_or_value(raw, source, where)
    if isinstance(source, Matches):
        text = at(raw, source.column, where)
        if not isinstance(text, str):
            raise BadRow(f"{source.column} must be text to look for matches in, not {type(text).__name__}{where}")
        return [found.strip() for found in re.findall(source.pattern, text)]
    return [_text_or_value(raw, part, where) for part in source]


def at(raw: Mapping[str, Any], path: str, where: str = "") -> Any:
    """The column `path` of a raw row, or the field that it names: `answers.text` is `text` of `answers`, of a list that
    of each entry. A column whose name has dots in it comes first."""
    if path in raw:
        return raw[path]
    value: Any = raw
    for step in path.split("."):
        value = _field(value, step)
        if value is _MISSING:
            raise BadRow(_missing(raw, path, where))
    return value


_MISSING = object()


def _field(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value.get(name, _MISSING)
    if isinstance(value, list | tuple):
        found = [_field(entry, name) for entry in value]
        return _MISSING if any(entry is _MISSING for entry in found) else found
    return _MISSING


def _missing(raw: Mapping[str, Any], path: str, where: str) -> str:
    columns = [str(key) for key in raw]
    fields = [f"{key}.{name}" for key, value in raw.items() for name in _names_in(value)]
    inside = [field for field in fields if field.partition(".")[0] == path.partition(".")[0]]
    shown = ", ".join(_safe(name) for name in (inside if "." in path and inside else columns)[:12]) or "no columns"
    return f"missing column '{path}'{where}{_safe(nearest(path, [*columns, *fields]))}; the row has {shown}"


def _names_in(value: Any) -> list[str]:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return [str(name) for name in value] if isinstance(value, Mapping) else []


def _safe(name: str) -> str:
    """A name of somebody's file, printable and on one line."""
    return repr(name[:60])[1:-1] if not name.isprintable() or not name.isascii() else name[:60]


def _text_or_value(raw: Mapping[str, Any], source: str, where: str) -> Any:
    if not _is_template(source) or source in raw:
        return at(raw, source, where)
    filled = (literal + _joined(at(raw, path, where), path) if path else literal for literal, path in _template(source))
    return "".join(filled).strip()


def _is_template(source: str) -> bool:
    return "{" in source or "}" in source


@lru_cache(maxsize=1024)
def _template(source: str) -> tuple[tuple[str, str], ...]:
    """Literal text and the column after it, in turn; the last column may be empty."""
    parts = []
    for literal, path, format_spec, conversion in string.Formatter().parse(source):
        if path == "" or format_spec or conversion:
            raise ValueError("between braces stands the name of a column and nothing else")
        parts.append((literal, path or ""))
    return tuple(parts)


def _joined(value: Any, path: str) -> str:
    """A value as part of a text: several are joined by spaces, null is nothing."""
    texts = []
    for leaf in leaves(value):
        if isinstance(leaf, bool) or not isinstance(leaf, str | int | float | None):
            raise BadRow(f"{path} must be text to stand in a template, not {type(leaf).__name__}")
        texts.append("" if leaf is None else str(leaf).strip())
    return " ".join(text for text in texts if text)


def leaves(value: Any) -> Iterator[Any]:
    """The single values of a value, whatever lists and objects they stand in."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value
