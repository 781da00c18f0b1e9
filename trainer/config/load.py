"""From YAML and `key.path=value` overrides to a checked `Recipe`.

Owns: reading, overriding, resolving paths, and turning every mistake into one message with the key's path and the
nearest valid name. Order of precedence: defaults < file < overrides.
"""

from __future__ import annotations

import glob
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config.schema import Recipe
from trainer.config.stages import StageError, stage_recipes
from trainer.errors import ConfigError, nearest
from trainer.tasks.derived import OBJECTIVES, split_objective

_UNION_TAGS = {"str", "dict[str,any]"}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: PyYAML silently keeps the last one."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in seen and key != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _fix_floats(value: Any) -> Any:
    """Read 1e-4 as a number: YAML 1.1 wants 1.0e-4 and takes the short form as text."""
    if isinstance(value, dict):
        return {key: _fix_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fix_floats(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return _fix_floats(yaml.load(text, Loader=_UniqueKeyLoader))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML: {problem}") from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file; relative paths inside it are looked up beside it first, then in the current directory.
        overrides: `key.path=value` strings, values in YAML (`window.tokens=4096`, `sampling.rates={a: 1, b: 2}`).

    Raises:
        ConfigError: with the key's path and the nearest valid name.
    """
    path = Path(path)
    values = read_mapping(path, "recipe")
    for override in overrides:
        _apply(values, override)
    return recipe_from(values, base=path.resolve().parent, where=str(path))


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The top-level mapping of a YAML file; `what` is said of it in messages.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is not a mapping.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; give the {what}'s YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the {what}: {reason}") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys to values")
    return values


def recipe_from(values: dict[str, Any], base: Path | None = None, where: str = "recipe") -> Recipe:
    """Check a recipe given as plain Python values, all its stages included; see `load_recipe`."""
    try:
        recipe = Recipe.model_validate(_locate_all(values, base or Path.cwd()))
        stage_recipes(recipe)
    except ValidationError as error:
        raise ConfigError(_describe(error, where)) from error
    except StageError as error:
        if isinstance(error.problem, ValidationError):
            raise ConfigError(_describe(error.problem, where, f"{error.place}.")) from error
        raise ConfigError(f"{where}: {error}") from error
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write what the recipe sets (not the defaults), so that reading it back gives an equal recipe."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{override}': write it as key.path=value, for example window.tokens=4096")
    node: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = _item(node, part, override)
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override '{override}': '{'.'.join(parts[: depth + 1])}' is not a section")
    value = _parse(text, f"override '{override}'")
    if isinstance(node, list):
        _item(node, parts[-1], override)
        node[int(parts[-1])] = value
    else:
        node[parts[-1]] = value


def _item(node: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override '{override}': '{part}' is not an index of a list of {len(node)}")
    return node[int(part)]


def _locate_all(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """Make paths absolute, so that ranks and later commands find them whatever directory they start in."""
    out = _locate_keys(values, base)
    if isinstance(stages := out.get("stages"), list):
        out["stages"] = [_locate_keys(stage, base) if isinstance(stage, dict) else stage for stage in stages]
    out.setdefault("output", str(Path("runs").absolute()))
    return out


def _locate_keys(values: dict[str, Any], base: Path) -> dict[str, Any]:
    out = dict(values)
    if isinstance(model := out.get("model"), dict):
        out["model"] = {k: _locate(v, base) if k in ("path", "tokenizer") else v for k, v in model.items()}
    if isinstance(out.get("deepspeed"), str):
        out["deepspeed"] = _locate(out["deepspeed"], base)
    if isinstance(tasks := out.get("tasks"), list):
        out["tasks"] = [_locate_task(task, base) for task in tasks]
    if isinstance(start := out.get("init_from"), dict) and isinstance(run := start.get("run"), str):
        out["init_from"] = {**start, "run": str(Path(_locate(run, base)).expanduser().absolute())}
    for key in ("output", "cache"):
        if isinstance(out.get(key), str):
            out[key] = str(Path(out[key]).expanduser().absolute())
    return out


def _locate_task(task: Any, base: Path) -> Any:
    if isinstance(task, dict):
        return {k: _locate(v, base) if k in ("train", "dev", "test") else v for k, v in task.items()}
    prefix, path = split_objective(task) if isinstance(task, str) else ("", "")
    return f"{prefix}:{_locate(path, base)}" if prefix in OBJECTIVES else _locate(task, base)


def _locate(value: Any, base: Path) -> Any:
    """`value` as an absolute path when it names something beside the recipe or in the current directory."""
    if not isinstance(value, str) or value.startswith(("hub:", "package:")) or "\0" in value:
        return value
    for folder in (base, Path.cwd()):
        candidate = str(folder / Path(value).expanduser())
        if Path(candidate).exists() or (glob.has_magic(candidate) and glob.glob(candidate)):
            return str(Path(candidate).absolute())
    return value


def _describe(error: ValidationError, where: str, inside: str = "") -> str:
    lines = []
    for item in error.errors(include_url=False):
        if _is_other_branch(item["loc"], item["type"], error):
            continue
        parts = [p for p in item["loc"] if not _is_tag(p)]
        path = ".".join(str(p) for p in parts)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key" + nearest(str(parts[-1]), _fields_at(parts[:-1]))
        elif item["type"] == "missing":
            message = "missing: this key is required"
        elif item["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {item['input']!r:.80}"
        lines.append(inside + (f"{path}: {message}" if path else message))
    if len(lines) == 1:
        return f"{where}: {lines[0]}"
    return f"{where}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)


def _is_tag(part: int | str) -> bool:
    """Pydantic names the branch of a union in an error's location; users did not write that."""
    return isinstance(part, str) and (part in _UNION_TAGS or "TaskSpec" in part)


def _is_other_branch(loc: tuple[int | str, ...], kind: str, error: ValidationError) -> bool:
    """A task entry is text or a mapping: report only the branch the user meant."""
    if len(loc) < 3 or loc[0] != "tasks" or not _is_tag(loc[2]):
        return False
    branches = {str(e["loc"][2]): e for e in error.errors() if e["loc"][:2] == loc[:2] and len(e["loc"]) == 3}
    whole = next((e for tag, e in branches.items() if "TaskSpec" in tag and e["type"] != "value_error"), None)
    if whole is not None and not isinstance(whole["input"], str):
        return "TaskSpec" not in str(loc[2])  # neither text nor a mapping: one message is enough
    return ("TaskSpec" in str(loc[2])) if whole is not None else (loc[2] == "str")


def _fields_at(parts: Sequence[int | str]) -> list[str]:
    """Names of the keys valid at a place in the recipe."""
    model: type[BaseModel] = Recipe
    for part in parts:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, tuple, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            if (found := _model_in(argument)) is not None:
                return found
    return None
