"""The documentation says what is: files, names in them, keys, recipes, commands and links are looked up."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from pydantic import BaseModel

from trainer.cli import app
from trainer.config import Recipe, load_recipe, recipe_from
from trainer.config.reference import BEGIN, END, insert
from trainer.engine import deepspeed_json
from trainer.study.grid import substitute
from trainer.study.schema import load_study
from trainer.tasks.cards import BOOKKEEPING
from trainer.tasks.spec import TaskSpec

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
FOLDERS = "trainer|tests|docs|recipes|ds_configs|data|benchmarks|launch|kernels"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(rf"^(?:{FOLDERS})/[\w./*+-]*(?:::[\w.]+)?$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_KEY = re.compile(r"^[a-z_]+(?:\.[a-z_]+)+$")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCE.findall(text_of(page)) if language in languages]


def inline(page: Path) -> list[str]:
    """Code spans of the prose."""
    return _CODE.findall(_FENCE.sub("", text_of(page)))


@cache
def defined(path: Path) -> set[str]:
    """Names a module defines at its top level, and `Class.member`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in _names(node):
            names.add(name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{name}.{inner}" for part in node.body for inner in _names(part)}
    return names


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


@every_page
def test_paths_and_names_exist(page: Path) -> None:
    for span in inline(page):
        if not _PATH.match(span):
            continue
        path, _, name = span.partition("::")
        assert list(ROOT.glob(path.rstrip("/"))), f"{page_id(page)}: {path} does not exist"
        assert not name or name in defined(ROOT / path), f"{page_id(page)}: {path} has no {name}"


@every_page
def test_relative_links_resolve(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", text_of(page))):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page_id(page)}: broken link {target}"


@every_page
def test_no_paths_of_a_machine(page: Path) -> None:
    text = text_of(page)
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(?:home|Users|root|tmp)/", text)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=page_id)
def test_recipes_load(recipe: Path) -> None:
    assert load_recipe(recipe).tasks


def test_the_reference_is_fresh() -> None:
    page = text_of(ROOT / "docs" / "configuration.md")
    assert insert(page) == page, "run: python -m trainer.config.reference docs/configuration.md"
    inside = page.partition(BEGIN)[2].partition(END)[0]
    for name, field in Recipe.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        is_section = any(isinstance(p, type) and issubclass(p, BaseModel) and p is not TaskSpec for p in parts)
        assert (f"### `{name}`" if is_section else f"| `{name}` |") in inside
    for line in inside.splitlines():
        assert not line.endswith("|  |"), f"no docstring under the field: {line}"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one line"):
        insert("# A page\n")


def yaml_recipes() -> list[Any]:
    found = []
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml", "yml")):
            values = yaml.safe_load(block)
            if isinstance(values, dict) and "arms" not in values and values.keys() & Recipe.model_fields.keys():
                found.append(pytest.param(values, id=f"{page_id(page)}-{number}"))
    return found


@pytest.mark.parametrize("values", yaml_recipes())
def test_yaml_blocks_are_recipes(values: dict[str, Any]) -> None:
    recipe_from({"model": {"path": "package:any"}, "tasks": ["any"], **values})


def yaml_studies() -> list[Any]:
    found = [(page, yaml.safe_load(block)) for page in PAGES for block in blocks(page, "yaml", "yml")]
    return [pytest.param(v, id=page_id(page)) for page, v in found if isinstance(v, dict) and "arms" in v]


@pytest.mark.parametrize("values", yaml_studies())
def test_yaml_blocks_are_studies(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    study = load_study(path)
    for name, arm in study.arms.items():
        for task in study.tasks:
            variables = {**study.task(task).variables, "task": task, "seed": "0"}
            filled = [substitute(override, variables) for override in [*study.overrides, *arm.overrides]]
            (tmp_path / "arm.yaml").write_text(yaml.safe_dump({"model": {"path": "package:any"}, "tasks": ["any"]}))
            assert load_recipe(tmp_path / "arm.yaml", filled).tasks, name


@every_page
def test_json_blocks(page: Path) -> None:
    """A task's card is one, a DeepSpeed JSON resolves, anything else is JSON at least."""
    for block in blocks(page, "json"):
        for value in _objects(block):
            if "family" in value:
                TaskSpec.model_validate({k: v for k, v in value.items() if k not in BOOKKEEPING})
            elif "zero_optimization" in value:
                recipe = recipe_from({"model": {"path": "any"}, "tasks": ["any"], "deepspeed": value})
                deepspeed_json.resolve(recipe, world_size=2, hidden_size=64, device="cpu")


def _objects(block: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(block)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in block.splitlines() if line.strip()]


@every_page
def test_recipe_keys_exist(page: Path) -> None:
    for span in inline(page):
        parts = span.split(".")
        if not _KEY.match(span) or not isinstance(_annotation(Recipe, parts[0]), type):
            continue
        if parts[:2] == ["optimizer", "params"] or "." + parts[-1] in {".yaml", ".json", ".py", ".md", ".type"}:
            continue  # a key of the DeepSpeed JSON, a file
        model: Any = Recipe
        for part in parts:
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                break
            assert part in model.model_fields, f"{page_id(page)}: the recipe has no key {span}"
            model = _annotation(model, part)


def _annotation(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].annotation if name in model.model_fields else None


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """`sett ...` and `make ...` lines of shell blocks, whole; and those of the prose, which may be mere names."""
    for block in blocks(page, "bash", "sh", "shell", "console", ""):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith(("sett ", "make ")):
                yield line, True
    yield from ((span, False) for span in inline(page) if span.startswith(("sett ", "make ")))


@every_page
def test_commands_parse(page: Path) -> None:
    for line, whole in commands(page):
        words = [w for w in shlex.split(line, comments=True) if "..." not in w and w != "--help"]
        try:
            if words[0] == "make":
                _check_make(words[1:])
            else:
                _check_sett(words[1:], whole)
        except Exception as error:  # the parser's classes are typer's own or click's, by typer's version
            pytest.fail(f"{page_id(page)}: `{line}`: {error}")


def _check_make(words: list[str]) -> None:
    for target in words:
        if "=" not in target:
            assert re.search(rf"^{target}:", text_of(ROOT / "Makefile"), re.MULTILINE), f"make has no target {target}"


def _check_sett(words: list[str], whole: bool) -> None:
    """Parse as the command line would; a recipe that exists is loaded with the overrides given."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"sett has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    words = ["1" if word in ("N", "K") else word for word in words]
    if not whole and not any(word.startswith("-") for word in words):
        return  # a mention
    if not whole:
        words = [*(["PLACEHOLDER"] if words[0].startswith("-") else []), *words]
    context = command.make_context("sett", list(words))
    recipe = context.params.get("recipe")
    if recipe is not None and (ROOT / recipe).is_file():
        load_recipe(ROOT / recipe, [o for o in context.params["overrides"] or () if "=" in o])
    else:
        assert not str(recipe).startswith("recipes/"), f"{recipe} does not exist"


@every_page
def test_python_blocks_import_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page_id(page)}: {node.module} has no {name.name}"
