"""Finding tasks: from the entries of a recipe to a list of `TaskSpec`.

Owns: task folders (`task.json`, the *card*, beside `train.*`, `dev.*`, `test.*`), globs of them, folders of them,
declarations written out in a recipe, text objectives on any of them (`derived.py`), and what is left out by name.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import ConfigError, DataError, SettError, nearest
from trainer.tasks.derived import objective, on_source, on_task, split_objective
from trainer.tasks.sources import check_source, is_hub, is_source_file
from trainer.tasks.spec import Family, TaskSpec

CARD = "task.json"
SPLITS = ("train", "dev", "test")

BOOKKEEPING = frozenset({"splits", "source", "notes", "rows_dropped_in_conversion", "exact_duplicates", "single_text"})
"""Keys of a card that are for people: where the data came from and what was done to it. (`single_text` says that
`text_b` is always empty, which a regression task may leave out anyway.)"""

_FILE_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}


def load_tasks(
    entries: Sequence[str | TaskSpec], exclude: Sequence[str] = (), base: Path = Path(".")
) -> list[TaskSpec]:
    """The tasks that `entries` name, in their order, without those matching `exclude`.

    An entry is a task folder, a folder of task folders, a glob of either, any of them or a text file after `masked_lm:`
    or `causal_lm:`, or a declaration; an exclusion is a name, a glob of names, or `family:NAME`. Paths are relative to
    `base`; the sources of the tasks that come back are absolute.
    """
    found: dict[str, tuple[TaskSpec, str]] = {}
    for number, entry in enumerate(entries):
        for spec, where in _expand(entry, base, f"tasks[{number}]"):
            if spec.name in found:
                raise ConfigError(
                    f"task '{spec.name}' is there twice: {found[spec.name][1]} and {where}. "
                    "Rename one, or name each task folder once"
                )
            found[spec.name] = (spec, where)
    left_out: set[str] = set()
    families = {name: f"family:{spec.family.value}" for name, (spec, _) in found.items()}
    for pattern in exclude:
        matched = {name for name, family in families.items() if fnmatchcase(name, pattern) or family == pattern}
        if not matched:
            raise ConfigError(f"exclude: '{pattern}' matches no task{nearest(pattern, [*found, *families.values()])}")
        left_out |= matched
    if len(left_out) == len(found):
        raise ConfigError("exclude: leaves no task" if found else "tasks: the list is empty")
    return [spec for name, (spec, _) in found.items() if name not in left_out]


def _expand(entry: str | TaskSpec, base: Path, where: str) -> list[tuple[TaskSpec, str]]:
    if isinstance(entry, TaskSpec):
        spec = _with_sources(entry, {split: entry.source(split) for split in SPLITS}, base)
        _check_sources(spec, ConfigError, f"{where} ('{entry.name}')")
        return [(spec, where)]
    prefix, path = split_objective(entry)
    if prefix and not _absolute(entry, base).exists():
        return _texts(prefix, path, base, where)
    return [(_read_card(folder / CARD), str(folder)) for folder in _folders(entry, base, where)]


def _texts(prefix: str, path: str, base: Path, where: str) -> list[tuple[TaskSpec, str]]:
    """The tasks of an entry `PREFIX:PATH`."""
    family = objective(prefix, path, where)
    if is_hub(path):
        return [(on_source(path, family, where), where)]
    place = _absolute(path, base)
    found = [Path(match) for match in sorted(glob.glob(str(place)))] if glob.has_magic(path) else [place]
    files = [file for file in found if file.is_file() and file.name != CARD]
    if files and len(files) == len(found):
        specs = [on_source(str(file), family, where) for file in files]
        for spec in specs:
            _check_sources(spec, ConfigError, where)
        return [(spec, f"{where} ({spec.train})") for spec in specs]
    if not glob.has_magic(path) and not place.exists():
        beside = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
        raise ConfigError(
            f"{where}: '{prefix}:' needs a task folder or text file; no {place}{nearest(place.name, beside)}"
        )
    folders = _folders(path, base, where)
    return [(on_task(_read_card(folder / CARD), family, where), f"{where} ({folder})") for folder in folders]


def _folders(entry: str, base: Path, where: str) -> list[Path]:
    """The task folders an entry names, sorted."""
    path = _absolute(entry, base)
    if path.name == CARD and path.is_file():
        return [path.parent]
    if path.is_dir():
        folders = _tasks_in(path)
        if not folders:
            raise ConfigError(f"{where}: {path} is no task folder and holds none (a task folder has a {CARD})")
        return folders
    if glob.has_magic(entry):
        matches = [Path(match) for match in sorted(glob.glob(str(path)))]
        folders = [folder for match in matches if match.is_dir() for folder in _tasks_in(match)]
        if not folders:
            what = f"{len(matches)} files or folders but no folder with a {CARD}" if matches else "nothing"
            raise ConfigError(f"{where}: '{entry}' matches {what} (looked for {path})")
        return folders
    beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ConfigError(f"{where}: no folder {path}{nearest(path.name, beside)}")


def _tasks_in(path: Path) -> list[Path]:
    """`path` if it is a task folder, else those of its children that are."""
    if (path / CARD).is_file():
        return [path]
    return sorted(child for child in path.iterdir() if (child / CARD).is_file())


def _read_card(path: Path) -> TaskSpec:
    try:
        card = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: bad JSON: {error.msg} at column {error.colno}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(card, dict):
        raise DataError(f"{path}: a card is one JSON object, not a {type(card).__name__}")
    declared = {key: value for key, value in card.items() if key not in BOOKKEEPING}
    if declared.get("family") == Family.MULTIPLE_CHOICE:
        declared.pop("num_labels", None)  # each row has its own number of choices
    spec = _validate(path, declared)
    folder = path.parent
    named = {split: spec.source(split) for split in SPLITS}
    if not any(named.values()):
        named = {split: _file_beside(folder, split) for split in SPLITS}
    spec = _with_sources(spec, named, folder)
    _check_sources(spec, DataError, str(path))
    return spec


def _validate(path: Path, declared: dict[str, Any]) -> TaskSpec:
    try:
        return TaskSpec.model_validate(declared)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key '{key}'{nearest(key, [*TaskSpec.model_fields, *BOOKKEEPING])}")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{key}: {message}" if key else message)
        raise DataError(f"{path}: " + "; ".join(lines)) from None


def _file_beside(folder: Path, split: str) -> str | None:
    """The file of a split beside its card."""
    names = sorted(
        child.name
        for child in folder.iterdir()
        if child.name.split(".")[0] in _FILE_STEMS[split] and child.is_file() and is_source_file(child)
    )
    if len(names) > 1:
        raise DataError(f"{folder / CARD}: several files for split {split}: {', '.join(names)}; keep or name one")
    return names[0] if names else None


def _with_sources(spec: TaskSpec, named: dict[str, str | None], base: Path) -> TaskSpec:
    absolute = {split: uri if uri is None or is_hub(uri) else str(_absolute(uri, base)) for split, uri in named.items()}
    return spec.model_copy(update=absolute)


def _check_sources(spec: TaskSpec, error: type[SettError], where: str) -> None:
    if spec.train is None:
        raise error(f"{where}: no rows to train on; give `train`, or put a train.jsonl (or .csv, ...) beside the card")
    for split in SPLITS:
        uri = spec.source(split)
        if uri is not None:
            try:
                check_source(uri)
            except DataError as problem:
                raise error(f"{where}: {split}: {problem}") from None


def _absolute(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / Path(path).expanduser()))
