"""Text objectives in one line: `masked_lm:PATH` and `causal_lm:PATH` as entries of a recipe's `tasks`.

Owns: what such an entry says, and the declarations it stands for: language modelling on the input texts of a task
folder's task, or on a text file. Which folders and files a path names is `cards.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import ConfigError, nearest
from trainer.tasks.sources import is_hub
from trainer.tasks.spec import Family, TaskSpec, TextOf
from trainer.tasks.textfiles import COMPRESSIONS

OBJECTIVES = {family.value: family for family in (Family.MASKED_LM, Family.CAUSAL_LM)}
"""Prefix of an entry -> what is trained."""

_ENTRY = re.compile(r"([A-Za-z]\w+):(.*)", re.DOTALL)


def split_objective(entry: str) -> tuple[str, str]:
    """Prefix and path of an entry; the prefix is empty where it has none, and need not be one that is known."""
    match = _ENTRY.fullmatch(entry)
    return (match[1], match[2]) if match else ("", entry)


def objective(prefix: str, path: str, where: str) -> Family:
    """What a prefix asks for.

    Raises:
        ConfigError: it asks for nothing, or there is no path after it.
    """
    if prefix not in OBJECTIVES:
        raise ConfigError(
            f"{where}: '{prefix}:' is no text objective{nearest(prefix, OBJECTIVES)}; write masked_lm:PATH or "
            "causal_lm:PATH for the text of a task folder or a text file. Any other task is its folder's path alone, "
            "or a declaration"
        )
    if not path:
        raise ConfigError(f"{where}: '{prefix}:' has no path after it; name a task folder or a text file")
    return OBJECTIVES[prefix]


def on_task(task: TaskSpec, family: Family, where: str) -> TaskSpec:
    """Language modelling on the input texts of `task`: `NAME.masked_lm`, with the same splits."""
    name = f"{task.name}.{family.value}"
    shared = {key: getattr(task, key) for key in ("train", "dev", "test", "licence", "citation")}
    if task.family in OBJECTIVES.values():  # text already: the same task, perhaps with the other objective
        return _checked(where, TaskSpec, name=name, family=family, columns=task.columns, drop=task.drop, **shared)
    return _checked(where, TextOf, name=name, family=family, of=task, **shared)


def on_source(uri: str, family: Family, where: str) -> TaskSpec:
    """Language modelling on the column `text` of a file or hub data set: `STEM.masked_lm`."""
    return _checked(where, TaskSpec, name=f"{_stem(uri)}.{family.value}", family=family, train=uri)


def _stem(uri: str) -> str:
    if is_hub(uri):
        return re.split(r"[:@]", uri.partition(":")[2])[0].rpartition("/")[2]
    path = Path(uri)
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).stem


def _checked(where: str, kind: type[TaskSpec], **values: Any) -> TaskSpec:
    try:
        return kind(**values)
    except ValidationError:
        raise ConfigError(
            f"{where}: '{values['name']}' cannot be the name of a task (letters, digits and _.@+-, at most 100); "
            "rename the file, or declare the task as a mapping with a name of its own"
        ) from None
